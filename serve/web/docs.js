// The OpenAPI document of this service, shown by Swagger UI from local files.
SwaggerUIBundle({ url: "/openapi.json", dom_id: "#swagger", deepLinking: true, validatorUrl: null });

"""A Kubernetes API server with one RayService, and the operator behind it, for tests of what changes that."""

import http.server
import json
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import parse_qs, urlsplit

import yaml

PATH = "/apis/ray.io/v1/namespaces/aldm/rayservices/aldm-translator"


class FakeKubernetes:
    """Serves GET and PATCH of the RayService `aldm-translator`; use it in a `with` block.

    Attributes:
        service: the object.
        patches: bodies of the changes that were taken.
        managers: names of those who wanted to change something.
        before_patch: called before each change with how many were taken, as somebody else who works on the service.
        outcome: model -> the state that its application gets, and a message.
        looks_until_seen: GETs after a change until the operator has seen it.
    """

    def __init__(self, config: str, outcome: Callable[[str | None], tuple[str, str]], looks_until_seen: int = 2):
        self.service: dict[str, Any] = {
            "metadata": {"name": "aldm-translator", "generation": 1, "resourceVersion": "10"},
            "spec": {"serveConfigV2": config, "upgradeStrategy": {"type": "NewCluster"}},
            "status": {},
        }
        self.patches: list[dict[str, Any]] = []
        self.managers: set[str] = set()
        self.before_patch: Callable[[int], None] = lambda taken: None
        self.outcome, self.looks_until_seen, self._looks = outcome, looks_until_seen, 0
        self._operate()

    @property
    def model(self) -> str | None:
        """The model that the service is given."""
        (application,) = yaml.safe_load(self.service["spec"]["serveConfigV2"])["applications"]
        return application["args"]["model"]

    @property
    def note(self) -> str | None:
        """The annotation that names the model before."""
        found: str | None = self.service["metadata"].get("annotations", {}).get("aldm/previous-model")
        return found

    def edit(self, change: Callable[[dict[str, Any]], Any]) -> None:
        """Change the arguments of the service's application, as somebody else does."""
        config = yaml.safe_load(self.service["spec"]["serveConfigV2"])
        change(config["applications"][0]["args"])
        self.service["spec"]["serveConfigV2"] = yaml.safe_dump(config)
        meta = self.service["metadata"]
        meta["generation"], meta["resourceVersion"] = meta["generation"] + 1, str(int(meta["resourceVersion"]) + 1)

    def kubeconfig(self, path: Path) -> Path:
        """Write the kubeconfig of a client."""
        address = f"http://127.0.0.1:{self._server.server_port}"
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "fake", "cluster": {"server": address}}],
            "users": [{"name": "someone", "user": {"token": "secret"}}],
            "contexts": [{"name": "fake", "context": {"cluster": "fake", "user": "someone"}}],
            "current-context": "fake",
        }
        path.write_text(yaml.safe_dump(config))
        return path

    def get(self) -> tuple[int, dict[str, Any]]:
        """Answer a GET; the operator works meanwhile."""
        self._looks += 1
        if self._looks > self.looks_until_seen:
            self._operate()
        return 200, self.service

    def patch(self, kind: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """Answer a PATCH as the API does for a custom resource."""
        if kind != "application/merge-patch+json":
            return 415, {"message": f"cannot take {kind}"}
        self.before_patch(len(self.patches))
        meta = self.service["metadata"]
        if body["metadata"].get("resourceVersion", meta["resourceVersion"]) != meta["resourceVersion"]:
            return 409, {"message": "the object has been modified"}
        if self.service["spec"] != {**self.service["spec"], **body["spec"]}:
            meta["generation"] += 1
        self.service["spec"].update(body["spec"])
        annotations = {**meta.get("annotations", {}), **body["metadata"].get("annotations", {})}
        meta["annotations"] = {name: value for name, value in annotations.items() if value is not None}
        meta["resourceVersion"] = str(int(meta["resourceVersion"]) + 1)
        self.patches.append(body)
        self._looks = 0
        return 200, self.service

    def _operate(self) -> None:
        """Let the state follow the specification."""
        status, message = self.outcome(self.model)
        self.service["status"] = {
            "observedGeneration": self.service["metadata"]["generation"],
            "activeServiceStatus": {"applicationStatuses": {"aldm": {"status": status, "message": message}}},
            "conditions": [{"type": "Ready", "status": "True"}, {"type": "UpgradeInProgress", "status": "False"}],
        }

    def __enter__(self) -> "FakeKubernetes":
        fake = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def _answer(self, made: tuple[int, dict[str, Any]]) -> None:
                content = json.dumps(made[1]).encode()
                self.send_response(made[0])
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def _refused(self) -> tuple[int, dict[str, Any]] | None:
                if self.headers["Authorization"] != "Bearer secret":
                    return 401, {}
                return None if self.path.partition("?")[0] == PATH else (404, {})

            def do_GET(self) -> None:
                self._answer(self._refused() or fake.get())

            def do_PATCH(self) -> None:
                fake.managers |= set(parse_qs(urlsplit(self.path).query)["fieldManager"])
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                self._answer(self._refused() or fake.patch(self.headers["Content-Type"], body))

            def log_message(self, *_: object) -> None: ...

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        self._server.shutdown()
        self._server.server_close()

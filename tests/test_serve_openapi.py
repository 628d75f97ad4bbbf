"""Whatever fits the OpenAPI document of the service, and much that does not, gets an answer that the document names."""

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from service import RunningService

CONFORMANCE = [status_code_conformance, content_type_conformance, response_schema_conformance]
OPERATIONS = {
    "POST /v1/translations",
    "POST /v1/translate",
    "GET /v1/translations/{job_id}",
    "GET /v1/translations/{job_id}/events",
    "DELETE /v1/translations/{job_id}",
    "GET /v1/translations/{job_id}/result",
    "GET /v1/translations/{job_id}/uncertainty",
    "GET /v1/translations/{job_id}/preview.png",
    "GET /v1/translations/{job_id}/provenance",
    "GET /v1/translations/{job_id}/source",
    "GET /v1/models",
    "GET /v1/example",
    "GET /v1/health/live",
    "GET /v1/health/ready",
    "GET /metrics",
}


@pytest.fixture(scope="module")
def operations(service: RunningService) -> dict[str, schemathesis.APIOperation]:
    """What the service's OpenAPI document describes."""
    document = schemathesis.openapi.from_url(f"{service.url}/openapi.json")
    return {each.ok().label: each.ok() for each in document.get_all_operations()}


def test_every_operation_is_described(operations: dict[str, schemathesis.APIOperation]) -> None:
    assert set(operations) == OPERATIONS


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE], ids=lambda mode: mode.value)
@pytest.mark.parametrize("label", sorted(OPERATIONS))
def test_the_answer_is_one_that_the_document_names(
    operations: dict[str, schemathesis.APIOperation], label: str, mode: GenerationMode
) -> None:
    if mode == GenerationMode.NEGATIVE and not (operations[label].body or operations[label].query):
        return  # nothing to get wrong but the id, which is any string

    @settings(
        max_examples=20, deadline=None, suppress_health_check=list(HealthCheck), phases=[Phase.explicit, Phase.generate]
    )
    @given(case=operations[label].as_strategy(generation_mode=mode))
    def answers(case: schemathesis.Case) -> None:
        answer = case.call(timeout=60)
        case.validate_response(answer, checks=CONFORMANCE + ([] if answer.status_code == 503 else [not_a_server_error]))

    answers()

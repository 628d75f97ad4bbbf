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
    "GET /v1/translations/{job_id}/spread",
    "GET /v1/translations/{job_id}/preview.png",
    "GET /v1/translations/{job_id}/provenance",
    "GET /v1/translations/{job_id}/source",
    "GET /v1/models",
    "GET /v1/example",
    "GET /v1/health/live",
    "GET /v1/health/ready",
    "GET /metrics",
}


NOTHING_TO_GET_WRONG = {
    "GET /v1/translations/{job_id}",
    "GET /v1/translations/{job_id}/events",
    "DELETE /v1/translations/{job_id}",
    "GET /v1/models",
    "GET /v1/example",
    "GET /v1/health/live",
    "GET /v1/health/ready",
    "GET /metrics",
}
"""Neither a body nor a query: an id is any string."""
CASES = [(label, GenerationMode.POSITIVE) for label in sorted(OPERATIONS)]
CASES += [(label, GenerationMode.NEGATIVE) for label in sorted(OPERATIONS - NOTHING_TO_GET_WRONG)]


@pytest.fixture(scope="module")
def operations(service: RunningService) -> dict[str, schemathesis.APIOperation]:
    """What the service's OpenAPI document describes."""
    document = schemathesis.openapi.from_url(f"{service.url}/openapi.json")
    return {each.ok().label: each.ok() for each in document.get_all_operations()}


def test_every_operation_is_described(operations: dict[str, schemathesis.APIOperation]) -> None:
    assert set(operations) == OPERATIONS
    without = {label for label, operation in operations.items() if not (operation.body or operation.query)}
    assert without == NOTHING_TO_GET_WRONG


@pytest.mark.parametrize(("label", "mode"), CASES, ids=lambda value: getattr(value, "value", value))
def test_the_answer_is_one_that_the_document_names(
    operations: dict[str, schemathesis.APIOperation], label: str, mode: GenerationMode
) -> None:
    @settings(
        max_examples=20, deadline=None, suppress_health_check=list(HealthCheck), phases=[Phase.explicit, Phase.generate]
    )
    @given(case=operations[label].as_strategy(generation_mode=mode))
    def answers(case: schemathesis.Case) -> None:
        answer = case.call(timeout=60)
        case.validate_response(answer, checks=CONFORMANCE + ([] if answer.status_code == 503 else [not_a_server_error]))

    answers()

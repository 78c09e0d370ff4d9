"""Requests drawn from the OpenAPI document, right and wrong: none is a fault of the service."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.browser import TEST_ALL

from .made import listening, make, photograph

try:
    import schemathesis
except ImportError:
    (pytest.fail if TEST_ALL else pytest.skip)("no schemathesis here", allow_module_level=True)  # pyright: ignore[reportCallIssue]

from hypothesis import HealthCheck, given, settings

pytestmark = pytest.mark.full


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The document of a running service with a job database."""
    folder = tmp_path_factory.mktemp("service")
    made = make(folder, database=True, mode="ab_test")
    made.world.row("job-1", filename="x.jpg", status="queued")
    (made.world.source / "ridge.jpg").write_bytes(photograph())
    with listening(made) as url:
        yield schemathesis.openapi.from_url(f"{url}/openapi.json")
    # What the service itself took for its own fault would be told here.
    assert [line for line in made.lines if "error" in line] == []


def test_no_request_is_a_fault_of_the_service(api: Any) -> None:
    """Drawn without schemathesis's own plugin, which does not know this pytest."""
    seen = []
    for found in api.get_all_operations():
        operation = found.ok()
        seen.append(operation.label)

        @settings(
            max_examples=60,
            deadline=None,
            database=None,
            derandomize=True,
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
        )
        @given(case=operation.as_strategy())
        def no_fault(case: Any) -> None:
            answer = case.call()
            assert answer.status_code < 500, (answer.status_code, answer.text)
            if answer.status_code >= 400:
                assert answer.json()["error"]

        no_fault()
    assert {"POST /analyze", "POST /analyze_stream", "POST /v1/chat/completions"} <= set(seen)

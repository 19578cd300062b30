"""Requests made from the schema: none ends in an error of the server, and a good part of them is answered."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mm_interleaved.serving.config import LimitConfig, ServeConfig
from mm_interleaved.serving.stub import StubEngine

from .conftest import running
from .test_protocol import PIXEL

CASES = 2000
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def api() -> Iterator[schemathesis.BaseSchema]:
    config = ServeConfig(limits=LimitConfig(request_seconds=5.0), rows=32, waiting=200)
    with running(StubEngine(rows=32, queue=200), config) as address:
        yield schemathesis.openapi.from_url(f"{address}/openapi.json")


def mended(value: Any, known: str) -> Any:
    """A body whose references lead somewhere: ids are those of a stored response, images are images."""
    if isinstance(value, list):
        return [mended(item, known) for item in value]
    if not isinstance(value, dict):
        return value
    found = {name: mended(item, known) for name, item in value.items()}
    if found.get("type") == "image_generation_call":
        found = {"type": "image_generation_call", "result": PIXEL.partition(",")[2]}
    elif found.get("type") == "item_reference" or set(found) <= {"id", "type"}:
        found = {"role": "user", "content": "an item"} if "id" in found else found
    for name in found:
        if name in ("image_url", "url") and isinstance(found[name], str):
            found[name] = PIXEL
    if "previous_response_id" in found:
        found["previous_response_id"] = known
    return found


def sensible(body: dict[str, Any]) -> dict[str, Any]:
    """Without the fields that exclude each other."""
    gone = {"store", "background", "tool_choice", "max_tool_calls", "num_beams", "max_completion_tokens", "suffix",
            "logprobs", "echo", "output_compression", "stop"}  # fmt: skip
    kept = {name: value for name, value in body.items() if name not in gone}
    kept.update({name: None for name in ("tools", "temperature") if name in kept})
    return {**kept, "max_tokens": 5} if "prompt" in kept and "max_tokens" in kept else kept


def statuses(operation: Any, address: str) -> Counter[int]:
    """How often the server answered with which status to requests made from the schema."""
    found: Counter[int] = Counter()

    def known() -> str:
        answer = httpx2.post(f"{address}/v1/responses", json={"input": "x", "num_inference_steps": 1, "inspect": True},
                             trust_env=False)  # fmt: skip
        return answer.json()["id"]

    @given(case=operation.as_strategy(), mends=st.sampled_from([False, True, True]))
    @settings(max_examples=260, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None)
    def ask(case: schemathesis.Case, mends: bool) -> None:
        if mends and isinstance(case.body, dict):
            case.body = mended(sensible(case.body), known() if "previous_response_id" in case.body else "")
        if mends and case.path_parameters and "response_id" in case.path_parameters:
            case.path_parameters["response_id"] = known()
            case.query = {name: value for name, value in (case.query or {}).items() if name in ("limit", "order")}
        if mends and case.path_parameters and "model" in case.path_parameters:
            case.path_parameters["model"] = "stub"
        response = case.call(timeout=20)
        found[response.status_code] += 1
        assert response.status_code < 500, response.text
        if response.status_code >= 400:
            assert set(response.json()["error"]) == {"message", "type", "param", "code"}

    ask()
    return found


def test_no_request_breaks_the_server(api: schemathesis.BaseSchema) -> None:
    address = api.location.removesuffix("/openapi.json")
    seen = {operation.ok().label: statuses(operation.ok(), address) for operation in api.get_all_operations()}
    total = sum(sum(found.values()) for found in seen.values())
    good = sum(count for found in seen.values() for status, count in found.items() if 200 <= status < 300)
    print(total, good, {name: dict(found) for name, found in seen.items()})
    assert total >= CASES
    assert good >= 0.3 * total

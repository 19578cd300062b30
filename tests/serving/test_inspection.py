"""`inspect` over HTTP, and in the engine beside other requests."""

from __future__ import annotations

import asyncio
import base64
import io
import json
from dataclasses import replace
from typing import Any

import httpx2
import numpy as np
import pytest

from mm_interleaved import InputError, MMInterleaved, MMInterleavedProcessor
from mm_interleaved.inspection import InspectionSettings
from mm_interleaved.model.language_model import synchronizers
from mm_interleaved.serving import engine as events
from mm_interleaved.serving.config import ServeConfig, StoreConfig
from mm_interleaved.serving.stub import StubEngine

from ..conftest import make_image
from ..generation.test_interleaved import same
from .conftest import running
from .test_model import collect, request, with_engine


def url() -> str:
    stream = io.BytesIO()
    make_image(1).save(stream, "PNG")
    return f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}"


def asked(**more: Any) -> dict[str, Any]:
    parts = [{"type": "input_image", "image_url": url()}, {"type": "input_text", "text": "<b>Where</b>?"}]
    return {"input": [{"role": "user", "content": parts}], "tool_choice": "none", "seed": 1, "inspect": True, **more}


def test_the_page_and_its_data_until_the_response_is_deleted(stub: str) -> None:
    with httpx2.Client(base_url=f"{stub}/v1", trust_env=False) as client:
        made = client.post("/responses", json=asked()).json()
        place = f"/responses/{made['id']}/inspection"
        page, data = client.get(place), client.get(place, params={"format": "json"})
        assert page.headers["content-type"].startswith("text/html")
        assert "sandbox allow-scripts" in page.headers["content-security-policy"]
        assert "http" not in page.text.replace("http-equiv", "")  # no other file
        assert "<b>Where" not in page.text
        record = data.json()["records"][0]
        assert "".join(record["pieces"]) == made["output"][0]["content"][0]["text"]
        assert "inspect" not in client.get(f"/responses/{made['id']}").json()
        for wrong, status in ({"format": "pdf"}, 400), ({"size": "1"}, 400):
            assert client.get(place, params=wrong).status_code == status
        client.delete(f"/responses/{made['id']}")
        gone = client.get(place)
        assert gone.status_code == 404
        assert gone.json()["error"]["message"] == f"Response with id '{made['id']}' not found."


def test_what_is_refused_and_what_is_not_there(stub: str) -> None:
    with httpx2.Client(base_url=f"{stub}/v1", trust_env=False) as client:
        refused = client.post("/responses", json=asked(store=False))
        assert refused.status_code == 400
        assert refused.json()["error"]["param"] == "store"
        assert "'inspect' needs 'store'" in refused.json()["error"]["message"]
        made = client.post("/responses", json=asked(inspect=False)).json()
        lacking = client.get(f"/responses/{made['id']}/inspection")
        assert lacking.status_code == 404
        assert lacking.json()["error"]["code"] == "inspection_not_found"
        assert client.post("/responses", json=asked(inspect="yes")).json()["error"]["param"] == "inspect"


def test_a_page_that_is_too_large_says_what_there_is_instead(stub: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mm_interleaved.inspection.page.LARGEST_MIB", 0)
    with httpx2.Client(base_url=f"{stub}/v1", trust_env=False) as client:
        place = f"/responses/{client.post('/responses', json=asked()).json()['id']}/inspection"
        refused = client.get(place)
        assert refused.status_code == 400
        assert refused.json()["error"]["param"] == "format"
        assert "Ask for format=json" in refused.json()["error"]["message"]
        assert client.get(place, params={"format": "json"}).status_code == 200


def test_an_engine_that_does_not_inspect_says_so() -> None:
    engine = StubEngine(delay=0.05)
    engine.inspects = False
    with running(engine) as address:
        answer = httpx2.post(f"{address}/v1/responses", json=asked(), trust_env=False)
        assert answer.json()["error"]["message"] == "this server does not inspect responses"
        engine.inspects = True
        made = httpx2.post(f"{address}/v1/responses", json=asked(background=True), trust_env=False).json()
        early = httpx2.get(f"{address}/v1/responses/{made['id']}/inspection", trust_env=False)
        assert early.status_code == 409
        assert early.json()["error"]["code"] == "response_not_finished"


def test_inspections_count_in_the_memory_of_stored_responses() -> None:
    with running(StubEngine(), ServeConfig(store=StoreConfig(mib=1))) as address:
        names = []
        for number in range(30):
            made = httpx2.post(f"{address}/v1/responses", json=asked(seed=number), trust_env=False).json()
            names.append(made["id"])
        known = [httpx2.get(f"{address}/v1/responses/{name}/inspection", trust_env=False).status_code for name in names]
        assert known[-1] == 200
        assert known[0] == 404


def test_answers_beside_an_inspected_request_and_its_own_are_the_same(
    model: MMInterleaved, processor: MMInterleavedProcessor
) -> None:
    inspected = replace(request(1), inspect=InspectionSettings(cells=4))

    async def work(engine) -> Any:
        alone = [await collect(engine, request(number)) for number in range(3)]
        given = [request(0), inspected, request(2), replace(inspected, inspect=InspectionSettings(heads=[0]))]
        return alone, await asyncio.gather(*(collect(engine, one) for one in given))

    alone, together = with_engine(model, processor, work)
    for (_, expected), (found, made) in zip([*alone, alone[1]], together, strict=True):
        assert all(same(a, b) if not isinstance(a, str) else a == b for a, b in zip(expected, made, strict=True))
        assert isinstance(found[-1], events.Done)
    first, second = (json.loads(found[-1].inspection) for found, _ in (together[1], together[3]))
    assert together[0][0][-1].inspection is None
    assert [len(r["heads"]) for r in second["records"]] == [1, 1, 1]
    block = first["records"][0]["blocks"][0]
    weights = np.frombuffer(base64.b64decode(block["weights"]), "<u2").reshape(
        -1, block["heads"], block["images"] * block["levels"] * block["points"]
    )
    ignored = np.frombuffer(base64.b64decode(block["ignored"]), "<u2").reshape(-1, block["heads"])
    np.testing.assert_allclose((weights.sum(-1, dtype=int) + ignored) / 65535, 1, atol=1e-3)
    assert all(s.mmfs.recorder is None for s in synchronizers(model.language_model))


def test_a_request_that_collects_too_much_ends_alone(model: MMInterleaved, processor: MMInterleavedProcessor) -> None:
    huge = replace(request(1).settings, image=replace(request(1).settings.image, num_inference_steps=40))
    much = replace(request(1), settings=huge, inspect=InspectionSettings(most_mib=1, steps=list(range(1, 41))))

    async def work(engine) -> Any:
        found = await asyncio.gather(collect(engine, request(0)), collect(engine, much), return_exceptions=True)
        return found, await collect(engine, request(0))

    (beside, failed), later = with_engine(model, processor, work, rows=2)
    assert isinstance(failed, InputError)
    assert "most_mib is 1" in str(failed)
    assert isinstance(beside[0][-1], events.Done)
    assert isinstance(later[0][-1], events.Done)


@pytest.mark.parametrize("path", ["/v1/responses/{response_id}/inspection"])
def test_the_description_of_the_api_has_it(stub: str, path: str) -> None:
    found = httpx2.get(f"{stub}/openapi.json", trust_env=False).json()
    assert set(found["paths"][path]["get"]["responses"]["200"]["content"]) == {"text/html", "application/json"}
    assert "inspect" in found["components"]["schemas"]["ResponseRequest"]["properties"]

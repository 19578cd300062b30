"""`/v1/responses` through the official client, on the stub engine."""

from __future__ import annotations

import base64
from io import BytesIO
from typing import Any

import openai
import PIL.Image
import pytest
from fastapi.testclient import TestClient

from mm_interleaved.serving.app import create_app
from mm_interleaved.serving.config import StoreConfig
from mm_interleaved.serving.errors import ApiError
from mm_interleaved.serving.store import ResponseStore, StoredResponse
from mm_interleaved.serving.stub import StubEngine

OWN = {"seed": 1, "num_inference_steps": 6}
IMAGE_TOOL = {"type": "image_generation", "partial_images": 2}


@pytest.fixture(scope="module")
def client(stub: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{stub}/v1", api_key="none", max_retries=0)


def decoded(data: str) -> PIL.Image.Image:
    return PIL.Image.open(BytesIO(base64.b64decode(data)))


def test_text_and_images_come_in_their_order(client: openai.OpenAI) -> None:
    response = client.responses.create(model="stub", input="hello", extra_body=OWN)
    assert response.status == "completed"
    assert [item.type for item in response.output] == ["message", "image_generation_call"] * 2
    assert decoded(response.output[1].result).size == (32, 32)
    assert response.usage.output_tokens > 0
    again = client.responses.create(model="stub", input="hello", extra_body=OWN)
    assert again.output_text == response.output_text


def test_a_stream_gives_what_the_answer_gives(client: openai.OpenAI) -> None:
    whole = client.responses.create(model="stub", input="hello", tools=[IMAGE_TOOL], extra_body=OWN)
    with client.responses.stream(model="stub", input="hello", tools=[IMAGE_TOOL], extra_body=OWN) as stream:
        events = list(stream)
        final = stream.get_final_response()
    assert final.output_text == whole.output_text
    assert [item.result for item in final.output if item.type == "image_generation_call"] == [
        item.result for item in whole.output if item.type == "image_generation_call"
    ]
    check_order(events)


def check_order(events: list[Any]) -> None:
    """One item is open at a time, numbers have no gap, one event ends it."""
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert [event.type for event in events[:2]] == ["response.created", "response.in_progress"]
    ends = ("response.completed", "response.incomplete", "response.failed")
    assert [event.type for event in events if event.type in ends] == [events[-1].type]
    open_item, done = None, []
    for event in events[2:-1]:
        if event.type == "response.output_item.added":
            assert open_item is None
            open_item = event.item.id
            assert event.output_index == len(done)
            assert event.item.type != "image_generation_call" or event.item.result is None
        elif event.type == "response.output_item.done":
            assert event.item.id == open_item
            done.append(open_item)
            open_item = None
        else:
            assert event.item_id == open_item
    assert open_item is None
    assert len(set(done)) == len(done)


def test_what_a_limit_ends_is_incomplete(client: openai.OpenAI) -> None:
    response = client.responses.create(model="stub", input="hello", max_output_tokens=3, extra_body=OWN)
    assert response.status == "incomplete"
    assert response.incomplete_details.reason == "max_output_tokens"


def test_a_failure_ends_the_stream(client: openai.OpenAI) -> None:
    events = list(client.responses.create(model="stub", input="please fail", stream=True))
    assert events[-1].type == "response.failed"
    assert events[-1].response.error.code == "server_error"


@pytest.mark.parametrize(
    ("choice", "kinds"),
    [("none", ["message"]), ("required", ["image_generation_call"]),
     ({"type": "image_generation"}, ["image_generation_call"])],
)  # fmt: skip
def test_the_tool_choice_decides(client: openai.OpenAI, choice: Any, kinds: list[str]) -> None:
    response = client.responses.create(model="stub", input="x", tools=[IMAGE_TOOL], tool_choice=choice, extra_body=OWN)
    assert [item.type for item in response.output] == kinds


def test_a_conversation_goes_on(client: openai.OpenAI) -> None:
    first = client.responses.create(model="stub", input="hello", extra_body=OWN)
    by_id = client.responses.create(model="stub", input="more", previous_response_id=first.id, extra_body=OWN)
    replayed = [{"role": "user", "content": "hello"}, *(i.model_dump(exclude_none=True) for i in first.output),
                {"role": "user", "content": "more"}]  # fmt: skip
    by_output = client.responses.create(model="stub", input=replayed, extra_body=OWN)
    by_item = client.responses.create(
        model="stub",
        input=[replayed[0], *({"type": "item_reference", "id": i.id} for i in first.output), replayed[-1]],
        extra_body=OWN,
    )
    assert by_id.output_text == by_output.output_text == by_item.output_text != first.output_text


def test_stored_responses(client: openai.OpenAI) -> None:
    response = client.responses.create(model="stub", input="hello", extra_body=OWN)
    assert client.responses.retrieve(response.id).output_text == response.output_text
    assert client.responses.input_items.list(response.id).data[0].content[0].text == "hello"
    client.responses.delete(response.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(response.id)
    unkept = client.responses.create(model="stub", input="hello", store=False, extra_body=OWN)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(unkept.id)


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"foo": 1}, "foo", "unknown_parameter"),
        ({"seed": "x"}, "seed", "invalid_value"),
        ({"num_inference_steps": 10**6}, "num_inference_steps", "above_limit"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type", "invalid_value"),
        ({"previous_response_id": "resp_none"}, "previous_response_id", "previous_response_not_found"),
        ({"tools": [{"type": "image_generation", "size": "1024x1024"}]}, "tools[0].size", "invalid_value"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "file:///etc/passwd"}]}]},
         "input[0].content[0].image_url", "invalid_image_url"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_named(client: openai.OpenAI, fields: dict[str, Any], param: str, code: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(model="stub", input="x", extra_body=fields)
    assert (caught.value.param, caught.value.code) == (param, code)


def test_the_store_is_bounded_and_forgets_what_was_deleted() -> None:
    def stored(name: str, characters: int, status: str = "completed") -> StoredResponse:
        output = [{"type": "image_generation_call", "result": "", "candidates": ["x" * characters]}]
        return StoredResponse({"id": name, "status": status, "output": output})

    store = ResponseStore(StoreConfig(responses=3, mib=1))
    working = stored("working", 0, "in_progress")
    store.keep(working)
    for number in range(4):
        store.keep(stored(f"r{number}", 400_000))
    for name in ("working", "r2", "r3"):
        store.get(name)
    for name in ("r0", "r1"):
        with pytest.raises(ApiError, match="not found"):
            store.get(name)
    store.delete("r3")
    store.delete("working")
    store.keep(stored("r4", 400_000))
    store.update(working)  # it ends after it was deleted
    with pytest.raises(ApiError, match="not found"):
        store.get("working")
    store.get("r2")  # the memory of what was deleted is free again


def test_a_refused_response_is_not_stored() -> None:
    engine = StubEngine()
    app = create_app(engine)
    with TestClient(app) as client:
        body = {"input": "hello", "background": True, "stream": True}
        assert client.post("/v1/responses", json=body).status_code == 400
        assert not app.state.services.store.in_progress()
        assert (engine.load.running, engine.load.waiting) == (0, 0)


def test_prompts_beyond_the_queue_stop_those_before_them() -> None:
    engine = StubEngine(delay=0.05, rows=1, queue=1)
    with TestClient(create_app(engine)) as client:
        answer = client.post("/v1/completions", json={"prompt": ["a", "b", "c"]})
        assert answer.status_code == 429
        assert 1 <= int(answer.headers["retry-after"]) <= 120
        assert client.post("/v1/completions", json={"prompt": "a", "max_tokens": 2}).status_code == 200
        assert engine.load.cancelled == 2

"""The protocol against the official package's own types, for every event and every answer of the stub."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import httpx2
import openai
import pytest
from openai.types import CompletionUsage, ImagesResponse, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.completion import Completion
from openai.types.responses import Response, ResponseItemList, ResponseStreamEvent
from pydantic import BaseModel, TypeAdapter

from mm_interleaved.serving.config import ServeConfig
from mm_interleaved.serving.stub import StubEngine

from .conftest import running

OWN_FIELDS = {"seed", "candidates", "images", "parts"}  # docs/guides/serving.md
STREAM_EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
PIXEL = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAIAAAACCAIAAAD91JpzAAAAEElEQVR4nGP4z8AARAwQCgAf7gP9i18U1AAAAABJRU5E"
    "rkJggg=="
)


def extras(value: Any, where: str = "") -> Iterator[str]:
    """The fields that the official models do not have."""
    if isinstance(value, BaseModel):
        yield from (f"{where}.{name}" for name in (value.model_extra or {}) if name not in OWN_FIELDS)
        for name in type(value).model_fields:
            yield from extras(getattr(value, name), f"{where}.{name}")
    elif isinstance(value, list):
        for number, item in enumerate(value):
            yield from extras(item, f"{where}[{number}]")


def check(kind: Any, data: Any) -> Any:
    """Validate JSON as an official type, with no field that it does not know."""
    adapter = kind if isinstance(kind, TypeAdapter) else TypeAdapter(kind)
    found = adapter.validate_json(json.dumps(data), strict=True)
    assert not list(extras(found))
    return found


def events_of(text: str) -> list[dict[str, Any]]:
    """The events of a stream; its lines have a bounded length and name the type of the event."""
    found = []
    for block in text.split("\n\n"):
        lines = [line for line in block.split("\n") if line and not line.startswith(":")]
        if lines:
            assert [line.partition(":")[0] for line in lines] == ["event", "data"]
            data = json.loads(lines[1].removeprefix("data: "))
            assert lines[0] == f"event: {data['type']}"
            found.append(data)
    return found


def post(server: str, path: str, **body: Any) -> Any:
    response = httpx2.post(server + path, json=body, trust_env=False, timeout=60)
    assert response.status_code == 200, response.text
    return response


REQUESTS: list[dict[str, Any]] = [
    {"input": "hello"},
    {"input": "hello", "tools": [{"type": "image_generation", "partial_images": 3, "output_format": "webp"}]},
    {"input": "hello", "tools": [{"type": "image_generation", "output_format": "jpeg", "output_compression": 50}],
     "tool_choice": {"type": "image_generation"}, "num_candidates": 2},
    {"input": "hello", "tool_choice": "none", "instructions": "be kind", "metadata": {"a": "b"}, "user": "me"},
    {"input": "hello", "max_output_tokens": 2},
    {"input": "please fail"},
    {"input": [{"role": "user", "content": [{"type": "input_text", "text": "see"},
                                            {"type": "input_image", "image_url": PIXEL}]}], "max_tool_calls": 1,
     "temperature": 0.5, "top_p": 0.9},
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(REQUESTS)))
def test_responses(stub: str, number: int) -> None:
    body = {"seed": 3, "num_inference_steps": 9, **REQUESTS[number]}
    events = events_of(post(stub, "/v1/responses", stream=True, **body).text)
    for event in events:
        check(STREAM_EVENT, event)
    whole = check(Response, post(stub, "/v1/responses", **body).json())
    last = check(Response, events[-1]["response"])
    assert last.status == whole.status
    assert [item.type for item in last.output] == [item.type for item in whole.output]
    assert last.output_text == whole.output_text
    assert last.usage == whole.usage
    check(Response, httpx2.get(f"{stub}/v1/responses/{whole.id}", trust_env=False).json())
    items = httpx2.get(f"{stub}/v1/responses/{whole.id}/input_items", trust_env=False).json()
    check(ResponseItemList, items)


def test_chat(stub: str) -> None:
    messages = [{"role": "user", "content": [{"type": "text", "text": "see"},
                                             {"type": "image_url", "image_url": {"url": PIXEL}}]}]  # fmt: skip
    whole = post(stub, "/v1/chat/completions", messages=messages, seed=1, num_inference_steps=2).json()
    check(ChatCompletion, whole)
    message = whole["choices"][0]["message"]
    streamed = post(stub, "/v1/chat/completions", messages=messages, seed=1, num_inference_steps=2, stream=True,
                    stream_options={"include_usage": True}).text  # fmt: skip
    lines = [line.removeprefix("data: ") for line in streamed.split("\n\n") if line]
    assert lines.pop() == "[DONE]"
    chunks = [json.loads(line) for line in lines]
    for chunk in chunks:
        for choice in check(ChatCompletionChunk, chunk).choices:
            assert choice.delta.content is None or isinstance(choice.delta.content, str)
    deltas = [choice["delta"] for chunk in chunks for choice in chunk["choices"]]
    assert "".join(delta.get("content") or "" for delta in deltas) == message["content"]
    images = [image for delta in deltas for image in delta.get("images", [])]
    assert images == message["images"]
    assert [image["index"] for image in images] == list(range(len(images)))
    check(CompletionUsage, chunks[-1]["usage"])
    back = [*messages, {"role": "assistant", "content": message["content"], "images": message["images"]}]
    post(stub, "/v1/chat/completions", messages=[*back, {"role": "user", "content": "and?"}], num_inference_steps=1)


def test_images_completions_models(stub: str) -> None:
    images = post(stub, "/v1/images/generations", prompt="a dog", n=3, seed=1, num_inference_steps=2).json()
    assert len(check(ImagesResponse, images).data) == 3
    check(Completion, post(stub, "/v1/completions", prompt=["a", "b"], max_tokens=4).json())
    scored = check(Completion, post(stub, "/v1/completions", prompt="a b", max_tokens=0, echo=True, logprobs=1).json())
    assert len(scored.choices[0].logprobs.token_logprobs) == 2
    models = httpx2.get(f"{stub}/v1/models", trust_env=False).json()["data"]
    assert [check(Model, model).id for model in models] == ["stub", "style"]
    for model in ("stub", "style"):
        assert httpx2.get(f"{stub}/v1/models/{model}", trust_env=False).json()["id"] == model
    schema = httpx2.get(f"{stub}/openapi.json", trust_env=False).json()
    contents = schema["paths"]["/v1/responses"]["post"]["responses"]["200"]["content"]
    assert set(contents) == {"application/json", "text/event-stream"}


def test_our_own_fields_reach_the_sampler(stub: str) -> None:
    """The stub's answers follow from all settings, so every field must change them, and only a field that is sent."""

    def colour(**fields: Any) -> str:
        body = {"input": "x", "tool_choice": {"type": "image_generation"}, "seed": 1, "num_inference_steps": 2}
        return post(stub, "/v1/responses", **{**body, **fields}).json()["output"][0]["result"]

    usual = colour()
    assert colour() == usual
    for fields in ({"seed": 2}, {"num_inference_steps": 3}, {"guidance_scale": 2.5}, {"num_candidates": 2},
                   {"scheduler": "DDIMScheduler"}, {"num_beams": 2, "temperature": 0}, {"top_k": 7},
                   {"repetition_penalty": 1.5}, {"min_output_tokens": 3}, {"temperature": 0.5}, {"top_p": 0.5},
                   {"max_output_tokens": 9}, {"model": "style"}):  # fmt: skip
        assert colour(**fields) != usual, fields


def test_the_default_buffer_of_aiohttp_reads_every_line(stub: str) -> None:
    """With its limit for lines; previews are at most 64 KiB, and the images of the stub are small."""

    async def read() -> int:
        body = {"input": "hello", "stream": True, "num_inference_steps": 8,
                "tools": [{"type": "image_generation", "partial_images": 3}]}  # fmt: skip
        async with aiohttp.ClientSession() as session, session.post(f"{stub}/v1/responses", json=body) as response:
            return len([line async for line in response.content])

    import asyncio

    assert asyncio.run(read()) > 10


def test_a_stream_without_events_stays_alive() -> None:
    config = ServeConfig(keep_alive_seconds=0.05)
    with running(StubEngine(delay=0.2, words=2), config) as server:
        text = post(server, "/v1/responses", input="hello", tool_choice="none", stream=True).text
        assert text.count(": keep-alive\n\n") >= 3
        assert events_of(text)[-1]["type"] == "response.completed"


def test_who_leaves_frees_the_engine() -> None:
    """In mid-stream, and while waiting for an answer without a stream; the next request succeeds."""
    engine = StubEngine(delay=0.05, rows=1)
    with running(engine) as server:
        client = openai.OpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0)
        for leave in range(4):
            if leave % 2:
                stream = client.responses.create(model="stub", input="hello", stream=True)
                next(iter(stream))
                stream.close()
            else:
                with pytest.raises(openai.APITimeoutError):
                    client.with_options(timeout=0.3).responses.create(model="stub", input="hello")
        answer = client.responses.create(model="stub", input="hello", extra_body={"num_inference_steps": 1})
        assert answer.status == "completed"
        assert engine.load.cancelled == 4
        assert (engine.load.running, engine.load.waiting) == (0, 0)


def test_too_many_requests_are_told_when_to_come_again() -> None:
    engine = StubEngine(delay=0.1, rows=1, queue=1)
    with running(engine) as server:
        client = openai.OpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0)
        streams = [client.responses.create(model="stub", input="hello", stream=True) for _ in range(2)]
        with pytest.raises(openai.RateLimitError) as caught:
            client.responses.create(model="stub", input="hello")
        assert 1 <= int(caught.value.response.headers["retry-after"]) <= 120
        assert caught.value.code == "rate_limit_exceeded"
        for stream in streams:
            stream.close()


def test_a_response_in_the_background() -> None:
    with running(StubEngine(delay=0.05)) as server:
        client = openai.OpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0)
        first = client.responses.create(model="stub", input="hello", background=True, extra_body={"seed": 1})
        assert first.status in ("queued", "in_progress")
        assert client.responses.cancel(first.id).status == "cancelled"
        second = client.responses.create(
            model="stub", input="hi", background=True, extra_body={"num_inference_steps": 1}
        )
        for _ in range(200):
            found = client.responses.retrieve(second.id)
            if found.status == "completed":
                break
        assert found.status == "completed"
        assert found.output_text


def test_deadlines_end_requests() -> None:
    from mm_interleaved.serving.config import LimitConfig

    with running(StubEngine(delay=0.2), ServeConfig(limits=LimitConfig(request_seconds=0.5))) as server:
        answer = httpx2.post(f"{server}/v1/responses", json={"input": "hello"}, trust_env=False, timeout=30)
        assert answer.json()["status"] == "failed"
        chat = httpx2.post(f"{server}/v1/chat/completions", json={"messages": [{"role": "user", "content": "x"}]},
                           trust_env=False, timeout=30)  # fmt: skip
        assert (chat.status_code, chat.json()["error"]["code"]) == (504, "timeout")


OLDER = """
import sys, openai
client = openai.OpenAI(base_url=sys.argv[1] + "/v1", api_key="none")
assert openai.__version__.startswith("2."), openai.__version__
own = {"seed": 1, "num_inference_steps": 4}
whole = client.responses.create(model="stub", input="hello", extra_body=own)
events = list(client.responses.create(model="stub", input="hello", stream=True, extra_body=own))
with client.responses.stream(model="stub", input="hello", extra_body=own) as stream:
    for event in stream:
        pass
    final = stream.get_final_response()
assert whole.output_text == final.output_text == events[-1].response.output_text
assert [i.type for i in whole.output] == [i.type for i in final.output]
print("good")
"""


@pytest.mark.slow
def test_the_last_package_of_the_former_series(stub: str, tmp_path: Path) -> None:
    packages = ["openai==2.54.0", "httpx", "jiter", "distro"]
    got = subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--target", tmp_path / "old", *packages],
                         capture_output=True, text=True)  # fmt: skip
    if got.returncode:
        pytest.skip(f"cannot be installed here: {got.stderr.strip().splitlines()[-1]}")
    run = subprocess.run([sys.executable, "-c", OLDER, stub], capture_output=True, text=True, cwd=tmp_path,
                         env={"PYTHONPATH": str(tmp_path / "old")})  # fmt: skip
    assert run.stdout.strip() == "good", run.stderr

"""`/v1/chat/completions`: texts as string deltas, images beside them with an index and their position in the text."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.responses import Response

from . import engine as events
from . import schema
from .app_state import Services, services
from .documents import (
    Asked,
    Inputs,
    Wanted,
    build_document,
    chat_segments,
    find_model,
    generation_request,
    generation_settings,
)
from .engine import Done, Stream, Usage
from .errors import ApiError
from .images import encode
from .middleware import JsonRoute
from .streaming import SSE, answer_stream, left_behind

router = APIRouter(prefix="/v1/chat/completions", route_class=JsonRoute, tags=["chat"])


@dataclass
class ChatAnswer:
    """An answer in the form of chat completions.

    Attributes:
        text: all text; images stand at their positions (in characters) in it.
        images: the images as in `message.images`.
        finish_reason: why it ended; None: it has not.
    """

    id: str
    model: str
    created: int
    seed: int
    text: str = ""
    images: list[dict[str, Any]] = field(default_factory=list)
    finish_reason: str | None = None
    usage: dict[str, Any] | None = None
    _shown: str = ""

    def take(self, event: events.Event) -> list[dict[str, Any]]:
        """The deltas that follow from an event of the engine."""
        if isinstance(event, events.TextDelta):
            self._shown += event.text
            return self._more_text(event.text)
        if isinstance(event, events.TextDone):
            rest = event.text[len(self._shown) :] if event.text.startswith(self._shown) else ""
            self._shown = ""
            return self._more_text(rest) if rest else []
        if isinstance(event, events.ImageDone):
            url = f"data:image/png;base64,{encode(event.images[0])}"
            image = {"type": "image_url", "index": len(self.images), "position": len(self.text),
                     "image_url": {"url": url}}  # fmt: skip
            self.images.append(image)
            return [{"images": [image]}]
        if isinstance(event, Done):
            self.finish_reason = "length" if event.reason == "length" else "stop"
            self.usage = chat_usage(event.usage)
        return []

    def _more_text(self, text: str) -> list[dict[str, Any]]:
        self.text += text
        return [{"content": text}]

    def chunk(self, delta: dict[str, Any], finish_reason: str | None = None) -> dict[str, Any]:
        """A chunk of a stream."""
        choice = {"index": 0, "delta": delta, "finish_reason": finish_reason, "logprobs": None}
        return {"id": self.id, "object": "chat.completion.chunk", "created": self.created, "model": self.model,
                "choices": [choice]}  # fmt: skip

    def whole(self) -> dict[str, Any]:
        """The answer without a stream; `parts` has text and images in their order."""
        message = {"role": "assistant", "content": self.text, "refusal": None, "images": self.images,
                   "parts": self._parts()}  # fmt: skip
        choice = {"index": 0, "message": message, "finish_reason": self.finish_reason, "logprobs": None}
        return {"id": self.id, "object": "chat.completion", "created": self.created, "model": self.model,
                "choices": [choice], "usage": self.usage, "seed": self.seed}  # fmt: skip

    def _parts(self) -> list[dict[str, Any]]:
        found, at = [], 0
        for image in self.images:
            if image["position"] > at:
                found.append({"type": "text", "text": self.text[at : image["position"]]})
            found.append({"type": "image_url", "image_url": image["image_url"]})
            at = image["position"]
        return found + ([{"type": "text", "text": self.text[at:]}] if at < len(self.text) else [])


def chat_usage(found: Usage) -> dict[str, Any]:
    """The tokens of a request by the names of chat completions."""
    return {"prompt_tokens": found.input_tokens, "completion_tokens": found.output_tokens,
            "total_tokens": found.input_tokens + found.output_tokens,
            "prompt_tokens_details": {"cached_tokens": found.cached_tokens}}  # fmt: skip


async def _prepare(body: schema.ChatRequest, request: Request, found: Services) -> tuple[ChatAnswer, Stream]:
    engine, config = found.engine, found.config
    adapter = find_model(body.model, engine)
    if body.max_tokens is not None and body.max_completion_tokens is not None:
        raise ApiError("give 'max_completion_tokens' or 'max_tokens', not both", param="max_tokens",
                       code="invalid_value")  # fmt: skip
    tokens = body.max_completion_tokens or body.max_tokens
    asked = Asked(body, body.temperature, body.top_p, tokens, body.max_images)
    settings = generation_settings(asked, config, engine)
    inputs = Inputs(found.remote, found.pixel_budget(request))
    segments = await chat_segments(body.messages, inputs)
    wanted: Wanted = "both"
    if body.modalities == ["image"]:
        wanted = "image"
    elif body.max_images == 0 or (body.modalities is not None and "image" not in body.modalities):
        wanted = "text"
    document = build_document(segments, wanted, config)
    stream = await engine.submit(generation_request(document, settings, adapter, config))
    name = f"chatcmpl-{secrets.token_hex(14)}"
    return ChatAnswer(name, body.model or engine.model, int(time.time()), settings.seed), stream


@router.post("", responses=SSE, response_model=None)
async def create(body: schema.ChatRequest, request: Request) -> Response:
    """Create a chat completion, as JSON or as a stream of chunks."""
    found = services(request)
    answer, stream = await _prepare(body, request, found)
    seconds = found.config.keep_alive_seconds
    options = body.stream_options or schema.StreamOptions()

    async def chunks() -> AsyncIterator[dict[str, Any] | None]:
        yield answer.chunk({"role": "assistant", "content": ""})
        while not stream.ended:
            event = await stream.next(seconds)
            if event is None:
                yield None
                continue
            for delta in await asyncio.to_thread(answer.take, event):
                yield answer.chunk(delta)
        yield answer.chunk({}, answer.finish_reason)
        if options.include_usage:
            yield {**answer.chunk({}), "choices": [], "usage": answer.usage}

    if body.stream:
        sent = answer_stream(request, stream, chunks())
        return StreamingResponse(sent, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
    async with left_behind(request, stream):
        async for event in stream:
            await asyncio.to_thread(answer.take, event)
    return JSONResponse(answer.whole())

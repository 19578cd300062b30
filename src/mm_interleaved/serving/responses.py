"""`/v1/responses`: an answer is an ordered list of items, a message for each text and a call for each image.

`ResponseWriter` turns the events of an engine into those of the protocol: one item is open at a time, indices follow
each other, every event has a number, and exactly one event ends the stream.
"""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, cast

from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.responses import Response

from ..document import Image, Segment, Text
from ..io import InputError
from . import engine as events
from . import schema
from .app_state import Services, services
from .budget import Share
from .config import ServeConfig
from .documents import (
    Asked,
    Inputs,
    Wanted,
    build_document,
    check_size,
    find_model,
    generation_request,
    generation_settings,
    message_segments,
)
from .engine import Done, Engine, EngineError, Stream, Usage
from .errors import ApiError, as_api_error
from .images import Format, decode_base64, encode, encode_preview, read_image
from .middleware import JsonRoute
from .store import StoredResponse
from .streaming import SSE, left_behind, sse

router = APIRouter(prefix="/v1/responses", route_class=JsonRoute, tags=["responses"])
Event = dict[str, Any]
log = logging.getLogger(__name__)
FAILURES = {"rate_limit_exceeded", "server_error", "invalid_prompt"}  # codes that the protocol knows


def new_id(kind: str) -> str:
    """A new id, such as `resp_...`."""
    return f"{kind}_{secrets.token_hex(24)}"


@dataclass
class ImageForm:
    """The form of images in an answer."""

    kind: Format = "png"
    compression: int | None = None
    previews: int = 0


@dataclass
class _Open:
    """The item that is open."""

    item: dict[str, Any]
    index: int
    text: str = ""
    previews: int = 0


@dataclass
class ResponseWriter:
    """Makes the events of a response.

    Attributes:
        stored: the response, which is updated with every event.
        form: the form of images.
        size: side of images in pixels.
        preview_bytes: most bytes of a preview.
    """

    stored: StoredResponse
    form: ImageForm
    size: int
    preview_bytes: int
    number: int = 0
    open: _Open | None = None
    ended: bool = False

    @property
    def response(self) -> dict[str, Any]:
        """The response as it is now."""
        return self.stored.response

    def _event(self, kind: str, **fields: Any) -> Event:
        self.number += 1
        return {"type": kind, "sequence_number": self.number - 1, **fields}

    def _whole(self, kind: str) -> Event:
        return self._event(kind, response=json.loads(json.dumps(self.response)))

    def begin(self) -> list[Event]:
        """The first events."""
        self.response["status"] = "in_progress"
        return [self._whole("response.created"), self._whole("response.in_progress")]

    def take(self, event: events.Event) -> list[Event]:
        """The events that follow from one of the engine."""
        if isinstance(event, events.TextDelta):
            return self._delta(event.text)
        if isinstance(event, events.TextDone):
            return self._end_text(event)
        if isinstance(event, events.ImageProgress):
            return self._progress(event)
        if isinstance(event, events.ImageDone):
            return self._end_image(event)
        return self._end(event) if isinstance(event, Done) else []

    # ---- texts

    def _delta(self, text: str) -> list[Event]:
        found = []
        if self.open is None:
            item = {"id": new_id("msg"), "type": "message", "status": "in_progress", "role": "assistant", "content": []}
            self.open = _Open(item, len(self.response["output"]))
            part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
            found = [self._event("response.output_item.added", output_index=self.open.index, item=dict(item)),
                     self._event("response.content_part.added", **self._place(), part=part)]  # fmt: skip
        self.open.text += text
        return [*found, self._event("response.output_text.delta", **self._place(), delta=text, logprobs=[])]

    def _place(self) -> dict[str, Any]:
        assert self.open is not None
        return {"item_id": self.open.item["id"], "output_index": self.open.index, "content_index": 0}

    def _end_text(self, event: events.TextDone) -> list[Event]:
        said = self.open.text if self.open is not None else ""
        if self.open is None and not event.text:
            return []  # the model had nothing to say before an image
        rest = event.text[len(said) :] if event.text.startswith(said) else ""
        found = self._delta(rest) if rest or self.open is None else []
        self.stored.segments.append(Text(self.open.text if self.open else "", role="assistant"))
        return found + self._close_text("incomplete" if event.truncated else "completed")

    def _close_text(self, status: str) -> list[Event]:
        assert self.open is not None
        place, opened = self._place(), self.open
        part = {"type": "output_text", "text": opened.text, "annotations": [], "logprobs": []}
        item = {**opened.item, "status": status, "content": [part]}
        self._close(item, Text(opened.text, role="assistant"))
        return [
            self._event("response.output_text.done", **place, text=opened.text, logprobs=[]),
            self._event("response.content_part.done", **place, part=part),
            self._event("response.output_item.done", output_index=opened.index, item=item),
        ]

    def _close(self, item: dict[str, Any], segment: Segment | None) -> None:
        self.response["output"].append(item)
        if segment is not None:
            self.stored.items[item["id"]] = segment
        self.open = None

    # ---- images

    def _progress(self, event: events.ImageProgress) -> list[Event]:
        found = self._open_image()
        assert self.open is not None
        if event.preview is None or event.candidate or self.open.previews >= self.form.previews:
            return found
        preview = self._event("response.image_generation_call.partial_image", item_id=self.open.item["id"],
                              output_index=self.open.index, partial_image_index=self.open.previews,
                              partial_image_b64=encode_preview(event.preview, self.preview_bytes),
                              output_format="jpeg", size=f"{event.preview.width}x{event.preview.height}",
                              background="opaque", quality="high")  # fmt: skip
        self.open.previews += 1
        return [*found, preview]

    def _open_image(self) -> list[Event]:
        if self.open is not None:
            return []
        item = {"id": new_id("ig"), "type": "image_generation_call", "status": "in_progress", "result": None}
        self.open = _Open(item, len(self.response["output"]))
        place = {"item_id": item["id"], "output_index": self.open.index}
        return [
            self._event("response.output_item.added", output_index=self.open.index, item=dict(item)),
            self._event("response.image_generation_call.in_progress", **place),
            self._event("response.image_generation_call.generating", **place),
        ]

    def _end_image(self, event: events.ImageDone) -> list[Event]:
        found = self._open_image()
        assert self.open is not None
        opened, kind = self.open, self.form.kind
        results = [encode(image, kind, self.form.compression) for image in event.images]
        item = {**opened.item, "status": "completed", "result": results[0], "output_format": kind, "action": "generate",
                "background": "opaque", "quality": "high", "size": f"{self.size}x{self.size}"}  # fmt: skip
        if len(results) > 1:
            item["candidates"] = results
        segment = Image(event.images[0], role="assistant")
        self.stored.segments.append(segment)
        self._close(item, segment)
        completed = self._event("response.image_generation_call.completed", item_id=item["id"],
                                output_index=opened.index)  # fmt: skip
        done = self._event("response.output_item.done", output_index=opened.index, item=item)
        return [*found, completed, done]

    # ---- the end

    def _end(self, event: Done) -> list[Event]:
        complete = event.reason != "length"
        self.response["usage"] = usage(event.usage)
        self.stored.inspection = event.inspection
        return self._finish("completed" if complete else "incomplete", None if complete else "max_output_tokens")

    def _finish(self, status: str, why_incomplete: str | None = None) -> list[Event]:
        self.ended = True
        self.response["status"] = status
        self.response["completed_at"] = int(time.time()) if status == "completed" else None
        self.response["incomplete_details"] = {"reason": why_incomplete} if why_incomplete else None
        kind = {"cancelled": "failed"}.get(status, status)
        return [self._whole(f"response.{kind}")]

    def fail(self, error: Exception, cancelled: bool = False) -> list[Event]:
        """The events of a failure; the open item is left out of the answer."""
        if self.ended:
            return []
        self.open = None
        found = as_api_error(error)
        code = found.code if found.code in FAILURES else ("server_error" if found.status >= 500 else "invalid_prompt")
        self.response["error"] = None if cancelled else {"code": code, "message": found.message}
        return self._finish("cancelled" if cancelled else "failed")


def usage(found: Usage) -> dict[str, Any]:
    """The tokens of a request; an image counts as its image tokens."""
    return {
        "input_tokens": found.input_tokens,
        "input_tokens_details": {"cached_tokens": found.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": found.output_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": found.input_tokens + found.output_tokens,
    }


# ---- requests


def wanted(request: schema.ResponseRequest) -> Wanted:
    """Whether a text, an image, or both in any order are asked for.

    Raises:
        ApiError: an image is forced and forbidden at once.
    """
    choice, tools = request.tool_choice, request.tools
    forced = isinstance(choice, schema.ImageChoice) or choice == "required"
    forbidden = tools == [] or request.max_tool_calls == 0
    if forced and forbidden:
        raise ApiError("'tool_choice' forces an image, but images are excluded", param="tool_choice",
                       code="invalid_value")  # fmt: skip
    if forced:
        return "image"
    return "text" if forbidden or choice == "none" else "both"


def image_form(request: schema.ResponseRequest, engine: Engine) -> ImageForm:
    """The form of images that the tool of a request asks for."""
    tools = request.tools or []
    if len(tools) > 1:
        raise ApiError("there is one tool, image_generation; name it once", param="tools", code="invalid_value")
    if not tools:
        return ImageForm()
    tool = tools[0]
    check_size(tool.size, engine, "tools[0].size")
    kind = cast(Format, tool.output_format or "png")
    if kind == "png" and tool.output_compression is not None:
        raise ApiError("PNG is lossless; 'output_compression' goes with jpeg and webp",
                       param="tools[0].output_compression", code="invalid_value")  # fmt: skip
    return ImageForm(kind, tool.output_compression, tool.partial_images or 0)


async def input_segments(
    request: schema.ResponseRequest, inputs: Inputs, owner: int | None, found: Services
) -> list[Segment]:
    """What a request gives, after its instructions: the previous response and its input."""
    segments: list[Segment] = []
    if request.previous_response_id is not None:
        previous = found.store.get(request.previous_response_id, owner, "previous_response_id")
        if previous.response["status"] in ("queued", "in_progress"):
            raise ApiError("the previous response is not finished", param="previous_response_id", code="invalid_value")
        segments += previous.segments
    if isinstance(request.input, str):
        segments += inputs.text(request.input, "user", "input")
        return segments
    for number, item in enumerate(request.input or []):
        where = f"input[{number}]"
        if isinstance(item, schema.Message):
            segments += await message_segments(item, where, inputs)
        elif isinstance(item, schema.ImageCall) and item.result is not None:
            inputs.count(where)
            data = await asyncio.to_thread(decode_base64, item.result, f"{where}.result")
            image = await asyncio.to_thread(read_image, data, f"{where}.result", inputs.budget)
            segments.append(Image(image, role="assistant"))
        else:
            inputs.count(where)
            segments.append(found.store.item(str(item.id), owner, f"{where}.id"))
    return segments


def input_items(request: schema.ResponseRequest) -> list[dict[str, Any]]:
    """The items of a request, each with an id."""
    if isinstance(request.input, str):
        given: Sequence[schema.Item] = [schema.Message(role="user", content=request.input)]
    else:
        given = request.input or []
    found = []
    for item in given:
        data = item.model_dump(exclude_none=True, exclude_defaults=True)
        if isinstance(item, schema.Message):
            kind = "output_text" if item.role == "assistant" else "input_text"
            content = data["content"]
            parts = [{"type": kind, "text": content}] if isinstance(content, str) else content
            parts = [{"annotations": [], "logprobs": [], **p} if p["type"] == "output_text" else p for p in parts]
            parts = [{"detail": "auto", **p} if p["type"] == "input_image" else p for p in parts]
            data = {"status": "completed", **data, "type": "message", "content": parts}
        elif isinstance(item, schema.ImageCall):
            data = {"status": "completed", "result": None, **data}
        found.append({"id": new_id("msg"), **data})
    return found


def new_response(request: schema.ResponseRequest, engine: Engine, form: ImageForm, sampled: Any) -> dict[str, Any]:
    """A response before its first event; it states the settings that were used."""
    tools = [tool.model_dump(exclude_none=True) for tool in request.tools or []]
    choice = request.tool_choice
    return {
        "id": new_id("resp"), "object": "response", "created_at": int(time.time()), "completed_at": None,
        "status": "queued", "background": bool(request.background), "error": None, "incomplete_details": None,
        "instructions": request.instructions, "max_output_tokens": request.max_output_tokens,
        "max_tool_calls": request.max_tool_calls, "metadata": request.metadata or {},
        "model": request.model or engine.model, "output": [], "parallel_tool_calls": False,
        "previous_response_id": request.previous_response_id,
        "temperature": request.temperature if request.temperature is not None else 1.0,
        "text": {"format": {"type": "text"}}, "tool_choice": "auto" if choice is None else
        choice if isinstance(choice, str) else choice.model_dump(), "tools": tools,
        "top_p": request.top_p if request.top_p is not None else 1.0, "truncation": "disabled", "usage": None,
        "user": request.user, "service_tier": "default", "seed": sampled.seed,
    }  # fmt: skip


@dataclass
class _Prepared:
    """A request that was checked and is waiting for the engine."""

    writer: ResponseWriter
    stream: Stream


async def prepare(request: schema.ResponseRequest, asked_by: Request, found: Services) -> _Prepared:
    """Check a request and hand it to the engine."""
    engine, config = found.engine, found.config
    adapter, form = find_model(request.model, engine), image_form(request, engine)
    asked = Asked(request, request.temperature, request.top_p, request.max_output_tokens, request.max_tool_calls,
                  form.previews)  # fmt: skip
    settings = generation_settings(asked, config, engine)
    if request.input is None and request.previous_response_id is None:
        raise ApiError("Missing required parameter: 'input'.", param="input", code="missing_required_parameter")
    if request.background and request.store is False:
        raise ApiError("'background' needs 'store'", param="store", code="invalid_value")
    if request.inspect and request.store is False:
        raise ApiError("'inspect' needs 'store', since the inspection is retrieved by the response's id", param="store",
                       code="invalid_value")  # fmt: skip
    if request.inspect and not engine.inspects:
        raise ApiError("this server does not inspect responses", param="inspect", code="invalid_value")
    if request.background and request.stream:
        raise ApiError("a response in the background is not streamed here; retrieve it by its id", param="stream",
                       code="invalid_value")  # fmt: skip
    inputs = Inputs(found.remote, found.pixel_budget(asked_by))
    segments = await input_segments(request, inputs, asked_by.state.owner, found)
    first = [Text(request.instructions, role="system")] if request.instructions else []
    document = build_document([*first, *segments], wanted(request), config)
    stream = await engine.submit(generation_request(document, settings, adapter, config, bool(request.inspect)))
    stored = StoredResponse(
        new_response(request, engine, form, settings), input_items(request), segments, owner=asked_by.state.owner
    )
    writer = ResponseWriter(stored, form, engine.limits.image_size, config.preview_kib * 1024)
    return _Prepared(writer, stream)


async def written(prepared: _Prepared, config: ServeConfig) -> AsyncIterator[Event | None]:
    """The events of a response; None: there was none for a while."""
    writer, stream = prepared.writer, prepared.stream
    for event in writer.begin():
        yield event
    try:
        while not writer.ended:
            event = await stream.next(config.keep_alive_seconds)
            made = [] if event is None else await asyncio.to_thread(writer.take, event)
            for one in made:
                yield one
            if event is None:
                yield None
    except (EngineError, InputError, ApiError) as error:
        for one in writer.fail(error):
            yield one
    except Exception as error:  # the answer has begun, so any failure is an event of it
        log.exception("a response failed")
        for one in writer.fail(error):
            yield one
    finally:
        stream.cancel()
        if not writer.ended:
            writer.fail(EngineError("the client left"), cancelled=True)


@router.post("", responses=SSE, response_model=None)
async def create(body: schema.ResponseRequest, request: Request) -> Response:
    """Create a response, as JSON or as a stream of events."""
    found = services(request)
    prepared = await prepare(body, request, found)
    writer = prepared.writer
    if body.store is not False:
        found.store.keep(writer.stored)
    if body.background:
        return _in_background(prepared, request.state.share, found)

    async def stream() -> AsyncIterator[bytes]:
        try:
            async with left_behind(request, prepared.stream):
                async for event in written(prepared, found.config):
                    yield sse(event, named=True)
        finally:
            found.store.update(writer.stored)

    if body.stream:
        return StreamingResponse(stream(), media_type="text/event-stream", headers={"Cache-Control": "no-store"})
    async with left_behind(request, prepared.stream):
        async for _ in written(prepared, found.config):
            pass
    found.store.update(writer.stored)
    return JSONResponse(writer.response)


def _in_background(prepared: _Prepared, share: Share, found: Services) -> Response:
    """Generate a response for which nobody waits."""
    share.kept = True

    async def run() -> None:
        async for _ in written(prepared, found.config):
            pass

    def ended(task: asyncio.Task[None]) -> None:  # also of a task that was cancelled before it began
        prepared.stream.cancel()
        prepared.writer.fail(EngineError("cancelled"), cancelled=True)
        found.store.update(prepared.writer.stored)
        share.give_back()

    task = prepared.writer.stored.task = asyncio.create_task(run())
    task.add_done_callback(ended)
    return JSONResponse(prepared.writer.response)


@router.get("/{response_id}", response_model=None)
async def retrieve(
    response_id: schema.Id, request: Request, stream: bool = False, include: Annotated[list[str] | None, Query()] = None
) -> Response:
    """A stored response."""
    if stream:
        raise ApiError("stored responses are not streamed again", param="stream", code="invalid_value")
    if include:
        raise ApiError("nothing more can be included", param="include", code="invalid_value")
    return JSONResponse(services(request).store.get(response_id, request.state.owner).response)


@router.delete("/{response_id}", response_model=None)
async def delete(response_id: schema.Id, request: Request) -> Response:
    """Forget a response; one that is in progress ends."""
    stored = services(request).store.delete(response_id, request.state.owner)
    if stored.task is not None:
        stored.task.cancel()
    return JSONResponse({"id": response_id, "object": "response", "deleted": True})


@router.post("/{response_id}/cancel", response_model=None)
async def cancel(response_id: schema.Id, request: Request) -> Response:
    """End a response that is generated in the background."""
    stored = services(request).store.get(response_id, request.state.owner)
    if not stored.response["background"]:
        raise ApiError("only responses in the background can be cancelled; close the connection of others",
                       code="invalid_value")  # fmt: skip
    if stored.task is not None and not stored.task.done():
        stored.task.cancel()
        await asyncio.wait([stored.task])
    return JSONResponse(stored.response)


@router.get("/{response_id}/input_items", response_model=None)
async def list_input_items(
    response_id: schema.Id,
    request: Request,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    order: Annotated[str, Query(pattern="^(asc|desc)$")] = "desc",
    after: str | None = None,
) -> Response:
    """The items of a response's request."""
    items = list(services(request).store.get(response_id, request.state.owner).input_items)
    items = items[::-1] if order == "desc" else items
    names = [item["id"] for item in items]
    if after is not None:
        if after not in names:
            raise ApiError(f"there is no item '{after[:100]}'", param="after", code="invalid_value")
        items = items[names.index(after) + 1 :]
    page = items[:limit]
    return JSONResponse({"object": "list", "data": page, "first_id": page[0]["id"] if page else "",
                         "last_id": page[-1]["id"] if page else "", "has_more": len(items) > limit})  # fmt: skip

"""`/v1/images/generations`, `/v1/completions`, `/v1/models`, `/health` and `/metrics`."""

from __future__ import annotations

import asyncio
import itertools
import math
import secrets
import time
from collections.abc import AsyncIterator
from typing import Any, cast

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.responses import Response

from .. import __version__
from ..document import Document, Text
from . import engine as events
from . import schema
from .app_state import services
from .chat import chat_usage
from .documents import Asked, build_document, check_size, find_model, generation_request, generation_settings
from .engine import Done, Stream, Usage
from .errors import ApiError
from .images import Format, encode
from .middleware import JsonRoute
from .streaming import SSE, answer_stream, left_behind, unless_left

router = APIRouter(route_class=JsonRoute)


@router.post("/v1/images/generations", tags=["images"], response_model=None)
async def generate_images(body: schema.ImagesRequest, request: Request) -> Response:
    """Draw a text; `n` images have the seeds `seed`, `seed + 1`, ..."""
    found = services(request)
    engine, config = found.engine, found.config
    adapter = find_model(body.model, engine)
    check_size(body.size, engine, "size")
    kind = cast(Format, body.output_format or "png")
    if kind == "png" and body.output_compression is not None:
        raise ApiError("PNG is lossless; 'output_compression' goes with jpeg and webp", param="output_compression",
                       code="invalid_value")  # fmt: skip
    if (body.n or 1) > config.limits.candidates:
        raise ApiError(f"'n' is {body.n}; this server allows {config.limits.candidates}", param="n", code="above_limit")
    own = schema.Sampling(seed=body.seed, num_inference_steps=body.num_inference_steps, scheduler=body.scheduler,
                          guidance_scale=body.guidance_scale, num_candidates=body.n)  # fmt: skip
    settings = generation_settings(Asked(own), config, engine)
    document = build_document([Text(body.prompt, role="user")], "image", config)
    stream = await engine.submit(generation_request(document, settings, adapter, config))
    images, used = [], Usage()
    async with left_behind(request, stream):
        async for event in stream:
            if isinstance(event, events.ImageDone):
                images = [await asyncio.to_thread(encode, image, kind, body.output_compression)
                          for image in event.images]  # fmt: skip
            if isinstance(event, Done):
                used = event.usage
    if not images:
        raise ApiError("the prompt leaves no room for an image in the model's context", param="prompt",
                       code="context_length_exceeded")  # fmt: skip
    details = {"image_tokens": 0, "text_tokens": used.input_tokens}
    side = engine.limits.image_size
    return JSONResponse({
        "created": int(time.time()), "data": [{"b64_json": image} for image in images], "output_format": kind,
        "background": "opaque", "quality": "high", "size": f"{side}x{side}", "seed": settings.seed,
        "usage": {"input_tokens": used.input_tokens, "input_tokens_details": details,
                  "output_tokens": used.output_tokens, "total_tokens": used.input_tokens + used.output_tokens},
    })  # fmt: skip


# ---- texts


@router.post("/v1/completions", tags=["completions"], responses=SSE, response_model=None)
async def complete(body: schema.CompletionRequest, request: Request) -> Response:
    """Continue a text, or with `echo`, `max_tokens: 0` and `logprobs` score it."""
    found = services(request)
    adapter = find_model(body.model, found.engine)
    prompts = [body.prompt] if isinstance(body.prompt, str) else body.prompt
    if len(prompts) > found.config.limits.parts:
        raise ApiError(f"more than {found.config.limits.parts} prompts", param="prompt", code="too_many_parts")
    about = {"id": f"cmpl-{secrets.token_hex(14)}", "object": "text_completion", "created": int(time.time()),
             "model": body.model or found.engine.model}  # fmt: skip
    if body.max_tokens == 0:
        return JSONResponse(await _score(body, prompts, adapter, request, about))
    if body.logprobs is not None or body.echo:
        raise ApiError("'logprobs' and 'echo' need 'max_tokens': 0", param="logprobs" if body.logprobs is not None
                       else "echo", code="invalid_value")  # fmt: skip
    if body.stream and len(prompts) > 1:
        raise ApiError("a stream has one prompt", param="prompt", code="invalid_value")
    asked = Asked(body, body.temperature, body.top_p, body.max_tokens)
    settings = generation_settings(asked, found.config, found.engine)
    documents = [build_document([Text(p, role="user")] if p else [], "text", found.config) for p in prompts]
    requests = [generation_request(document, settings, adapter, found.config) for document in documents]
    if body.stream:
        stream = await found.engine.submit(requests[0])
        sent = answer_stream(request, stream, _chunks(stream, about, found.config.keep_alive_seconds))
        return StreamingResponse(sent, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
    streams: list[Stream] = []
    try:
        for one in requests:
            streams.append(await found.engine.submit(one))  # the last ones may be refused
        ends = [await _whole(stream, request) for stream in streams]
    finally:
        for stream in streams:
            stream.cancel()
    choices = [_choice(number, text, reason) for number, (text, reason, _) in enumerate(ends)]
    total = Usage(sum(u.input_tokens for *_, u in ends), sum(u.cached_tokens for *_, u in ends),
                  sum(u.output_tokens for *_, u in ends))  # fmt: skip
    return JSONResponse({**about, "choices": choices, "usage": chat_usage(total)})


def _choice(index: int, text: str, reason: str | None, logprobs: Any = None) -> dict[str, Any]:
    return {"index": index, "text": text, "finish_reason": reason, "logprobs": logprobs}


async def _whole(stream: Stream, request: Request) -> tuple[str, str, Usage]:
    """The text of a stream, why it ended, and what it took."""
    text, reason, used = "", "stop", Usage()
    async with left_behind(request, stream):
        async for event in stream:
            if isinstance(event, events.TextDone):
                text += event.text
            elif isinstance(event, Done):
                reason, used = "length" if event.reason == "length" else "stop", event.usage
    return text, reason, used


async def _chunks(stream: Stream, about: dict[str, Any], seconds: float) -> AsyncIterator[dict[str, Any] | None]:
    """The chunks of a text; None: there was none for a while."""
    shown = ""
    while not stream.ended:
        event = await stream.next(seconds)
        if event is None:
            yield None
        elif isinstance(event, events.TextDelta):
            shown += event.text
            yield {**about, "choices": [_choice(0, event.text, None)]}
        elif isinstance(event, events.TextDone) and len(event.text) > len(shown):
            yield {**about, "choices": [_choice(0, event.text[len(shown) :], None)]}
        elif isinstance(event, Done):
            reason = "length" if event.reason == "length" else "stop"
            yield {**about, "choices": [_choice(0, "", reason)], "usage": chat_usage(event.usage)}


async def _score(
    body: schema.CompletionRequest, prompts: list[str], adapter: str | None, request: Request, about: dict[str, Any]
) -> dict[str, Any]:
    """The log-probabilities of all tokens of each prompt, as if it had been generated."""
    if not body.echo or body.logprobs is None:
        raise ApiError("'max_tokens': 0 generates nothing; with 'echo' and 'logprobs' the prompt is scored",
                       param="max_tokens", code="invalid_value")  # fmt: skip
    found = services(request)
    if body.logprobs > 1:
        raise ApiError("only the log-probability of each token itself is given; set 'logprobs' to 0 or 1",
                       param="logprobs", code="invalid_value")  # fmt: skip
    if not all(prompts):
        raise ApiError("the prompt is empty", param="prompt", code="invalid_value")
    scoring = found.engine.score(Document([]), prompts, adapter, found.config.limits.request_seconds)
    scores, choices = await unless_left(request, scoring), []
    for number, scored in enumerate(scores):
        offsets = [0, *itertools.accumulate(map(len, scored.tokens))][:-1]
        values = [value if math.isfinite(value) else -9999.0 for value in scored.log_probabilities]
        about_tokens = {"tokens": scored.tokens, "token_logprobs": values, "top_logprobs": None, "text_offset": offsets}
        choices.append(_choice(number, "".join(scored.tokens), "length", about_tokens))
    used = Usage(sum(len(scored.tokens) for scored in scores))
    return {**about, "choices": choices, "usage": chat_usage(used)}


# ---- the server


def _about_model(name: str, created: int) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": created, "owned_by": "mm-interleaved"}


@router.get("/v1/models", tags=["server"], response_model=None)
async def list_models(request: Request) -> Response:
    """The model and its adapters."""
    found = services(request)
    names = [found.engine.model, *found.engine.adapters]
    return JSONResponse({"object": "list", "data": [_about_model(name, found.started) for name in names]})


@router.get("/v1/models/{model:path}", tags=["server"], response_model=None)
async def retrieve_model(model: str, request: Request) -> Response:
    """One of them."""
    found = services(request)
    find_model(model, found.engine)
    return JSONResponse(_about_model(model, found.started))


@router.head("/health", include_in_schema=False, response_model=None)
@router.get("/health", tags=["server"], response_model=None)
async def health(request: Request) -> Response:
    """Whether the server can answer requests; needs no key."""
    alive = services(request).engine.alive
    return JSONResponse({"status": "ok" if alive else "unavailable", "version": __version__}, 200 if alive else 503)


@router.get("/metrics", tags=["server"], response_model=None)
async def metrics(request: Request) -> Response:
    """Measurements in Prometheus' form."""
    return Response(services(request).metrics.text(), media_type="text/plain; version=0.0.4")

"""Server-sent events."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from fastapi import Request

from ..io import InputError
from .engine import EngineError, Stream
from .errors import as_api_error

T = TypeVar("T")
log = logging.getLogger(__name__)

SSE: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The answer as JSON, or with `stream: true` as server-sent events",
        "content": {"application/json": {"schema": {"type": "object"}},
                    "text/event-stream": {"schema": {"type": "string"}}},
    }
}  # fmt: skip
KEEP_ALIVE = b": keep-alive\n\n"
DONE = b"data: [DONE]\n\n"


def sse(event: dict[str, Any] | None, named: bool = False) -> bytes:
    """An event as it is sent; None: a comment, which keeps the connection alive."""
    if event is None:
        return KEEP_ALIVE
    head = f"event: {event['type']}\n" if named else ""
    return f"{head}data: {json.dumps(event, separators=(',', ':'))}\n\n".encode()


async def answer_stream(
    request: Request, stream: Stream, chunks: AsyncIterator[dict[str, Any] | None]
) -> AsyncIterator[bytes]:
    """The chunks of an answer as they are sent, `[DONE]` after them; a failure is the last chunk.

    Args:
        request: the request; when its client leaves, the stream is cancelled.
        stream: what the chunks are made of; cancelled at the end.
        chunks: the chunks; None: there was none for a while.
    """
    async with left_behind(request, stream):
        try:
            async for chunk in chunks:
                yield sse(chunk)
        except (EngineError, InputError) as error:
            yield sse({"error": as_api_error(error).envelope})
        except Exception as error:  # the answer has begun, so any failure is a chunk of it
            log.exception("a stream failed")
            yield sse({"error": as_api_error(error).envelope})
        finally:
            stream.cancel()
    yield DONE


@asynccontextmanager
async def left_behind(request: Request, stream: Stream) -> AsyncIterator[None]:
    """Cancel the stream when the client leaves."""

    async def watch() -> None:
        await disconnected(request)
        stream.cancel()

    task = asyncio.create_task(watch())
    try:
        yield
    finally:
        task.cancel()


async def unless_left(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled when the client leaves.

    Raises:
        EngineError: the client has left.
    """
    task, watch = asyncio.create_task(work), asyncio.create_task(disconnected(request))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise EngineError("the client left")
        return task.result()
    finally:
        task.cancel()
        watch.cancel()


async def disconnected(request: Request) -> None:
    """Wait until the client leaves; the body was read before."""
    while (await request.receive())["type"] != "http.disconnect":
        await asyncio.sleep(0)

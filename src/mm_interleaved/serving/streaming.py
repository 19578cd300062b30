"""Server-sent events."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Coroutine
from typing import Any, TypeVar

from fastapi import Request

from .engine import EngineError

T = TypeVar("T")

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

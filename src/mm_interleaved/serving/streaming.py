"""Server-sent events."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from fastapi import Request

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


async def disconnected(request: Request) -> None:
    """Wait until the client leaves; the body was read before."""
    while (await request.receive())["type"] != "http.disconnect":
        await asyncio.sleep(0)

"""uvicorn with the deadlines that it lacks: for the receipt of headers, and for clients that do not read answers."""

from __future__ import annotations

import asyncio
import math
import time
from typing import Any

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from .app_state import Services
from .config import ServeConfig
from .errors import ApiError

LEAST_READ = 64 * 1024  # bytes that a client must read in `limits.write_seconds` while its answer waits


class DeadlineProtocol(H11Protocol):
    """uvicorn's HTTP/1.1 protocol, which closes a connection when its client is too slow.

    The headers of a request must arrive within `limits.receipt_seconds`, for the first request of a connection and for
    each that follows on it; bodies have their own deadline in `middleware.Guard`. While an answer waits for its client,
    the client must read `LEAST_READ` bytes or all of it within `limits.write_seconds`.
    """

    def __init__(self, config: uvicorn.Config, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        assert isinstance(config.app, FastAPI)
        services: Services = config.app.state.services
        self._limits, self._closed = services.config.limits, services.metrics.closed
        self._deadline: asyncio.TimerHandle | None = None
        self._write_deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._wait_for_headers()

    def data_received(self, data: bytes) -> None:
        if self._deadline is None and (self.cycle is None or self.cycle.response_complete):
            self._wait_for_headers()
        before = self.cycle
        super().data_received(data)
        if self.cycle is not before:
            self._stop_waiting()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        self._stop_watching()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """Called when much of an answer waits for the client."""
        super().pause_writing()
        self._watch_reading()

    def resume_writing(self) -> None:
        """Called when the client has read most of it."""
        super().resume_writing()
        self._stop_watching()

    def on_response_complete(self) -> None:
        """Called when all of an answer is written; the client may not have read it."""
        super().on_response_complete()
        if self.transport.get_write_buffer_size():
            self._watch_reading()

    def send_400_response(self, msg: str) -> None:
        """Answer what is not HTTP in the form of all errors."""
        error = ApiError(msg, code="invalid_request").response()
        headers = [*error.raw_headers, (b"connection", b"close")]
        for event in (h11.Response(status_code=400, headers=headers, reason=b"Bad Request"),
                      h11.Data(data=bytes(error.body)), h11.EndOfMessage()):  # fmt: skip
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _wait_for_headers(self) -> None:
        self._deadline = self.loop.call_later(self._limits.receipt_seconds, self._give_up)

    def _stop_waiting(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _give_up(self) -> None:
        self._deadline = None
        if self.transport is not None and not self.transport.is_closing():
            self._closed.labels("receipt").inc()
            self.transport.close()

    def _watch_reading(self) -> None:
        self._stop_watching()
        waiting = self.transport.get_write_buffer_size()
        self._write_deadline = self.loop.call_later(self._limits.write_seconds, self._check_reading, waiting)

    def _stop_watching(self) -> None:
        if self._write_deadline is not None:
            self._write_deadline.cancel()
            self._write_deadline = None

    def _check_reading(self, before: int) -> None:
        """Close the connection unless the client has read enough of the bytes that waited for it."""
        self._write_deadline = None
        waiting = self.transport.get_write_buffer_size()
        if waiting and waiting > before - LEAST_READ:
            self._closed.labels("write").inc()
            self.transport.abort()  # `close` would wait for the client
        elif waiting:
            self._watch_reading()


class Server(uvicorn.Server):
    """uvicorn whose grace at the end is that of the engine, too: the time is counted once."""

    def __init__(self, config: uvicorn.Config, services: Services) -> None:
        super().__init__(config)
        self._services = services

    async def shutdown(self, sockets: Any = None) -> None:
        """Let running requests finish, and end."""
        self._services.ends_at = time.monotonic() + self._services.config.grace_seconds
        await super().shutdown(sockets)


def make_server(app: FastAPI, config: ServeConfig) -> Server:
    """A uvicorn server of one process."""
    services = app.state.services
    return Server(uvicorn.Config(
        app, config.host, config.port, http=DeadlineProtocol, ws="none",
        server_header=False, access_log=False, timeout_graceful_shutdown=math.ceil(config.grace_seconds),
        h11_max_incomplete_event_size=64 * 1024, log_level="warning", lifespan="on",
    ), services)  # fmt: skip

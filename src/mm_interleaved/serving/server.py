"""uvicorn with a deadline for the receipt of headers, which it does not have itself."""

from __future__ import annotations

import asyncio
from typing import Any

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from .config import ServeConfig
from .errors import ApiError


def protocol_with_deadline(seconds: float) -> type[asyncio.Protocol]:
    """uvicorn's HTTP/1.1 protocol, which closes a connection whose headers do not arrive within `seconds`.

    It holds for the first request of a connection and for each that follows on it. Bodies have their own deadline in
    `middleware.Guard`.
    """

    class Protocol(H11Protocol):
        _deadline: asyncio.TimerHandle | None = None

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
            super().connection_lost(exc)

        def send_400_response(self, msg: str) -> None:
            """Answer what is not HTTP in the form of all errors."""
            error = ApiError(msg, code="invalid_request").response()
            headers = [*error.raw_headers, (b"connection", b"close")]
            for event in (h11.Response(status_code=400, headers=headers, reason=b"Bad Request"),
                          h11.Data(data=bytes(error.body)), h11.EndOfMessage()):  # fmt: skip
                self.transport.write(self.conn.send(event) or b"")
            self.transport.close()

        def _wait_for_headers(self) -> None:
            self._deadline = self.loop.call_later(seconds, self._give_up)

        def _stop_waiting(self) -> None:
            if self._deadline is not None:
                self._deadline.cancel()
                self._deadline = None

        def _give_up(self) -> None:
            self._deadline = None
            if self.transport is not None and not self.transport.is_closing():
                self.transport.close()

    return Protocol


def make_server(app: FastAPI, config: ServeConfig) -> uvicorn.Server:
    """A uvicorn server of one process."""
    limits = config.limits
    return uvicorn.Server(uvicorn.Config(
        app, config.host, config.port, http=protocol_with_deadline(limits.receipt_seconds), ws="none",
        server_header=False, access_log=False, timeout_graceful_shutdown=int(config.grace_seconds) + 5,
        h11_max_incomplete_event_size=64 * 1024, log_level="warning", lifespan="on",
    ))  # fmt: skip

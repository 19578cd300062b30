"""Servers that run in a thread, on the stub engine or on the small model."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("openai")

from mm_interleaved.serving.app import create_app
from mm_interleaved.serving.config import ServeConfig
from mm_interleaved.serving.engine import Engine
from mm_interleaved.serving.server import make_server
from mm_interleaved.serving.stub import StubEngine

Serve = Callable[..., str]


@contextmanager
def running(engine: Engine, config: ServeConfig | None = None, send_buffer: int | None = None) -> Iterator[str]:
    """A server with this engine; yields its address. `send_buffer`: bytes that the kernel keeps for slow clients."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=512)
    if send_buffer is not None:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
    config = replace(config or ServeConfig(), port=listener.getsockname()[1], grace_seconds=1.0)
    server = make_server(create_app(engine, config), config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    until = time.monotonic() + 30
    while not server.started:
        assert thread.is_alive()
        assert time.monotonic() < until
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{config.port}"
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def stub() -> Iterator[str]:
    """The address of a server on a stub engine."""
    with running(StubEngine(adapters=["style"])) as address:
        yield address

"""`create_app`: the HTTP API over an engine."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from .. import __version__
from . import chat, inspection, plain, responses
from .app_state import Services
from .budget import Budget
from .config import MIB, ServeConfig
from .engine import Engine
from .errors import add_handlers
from .metrics import Measured, Metrics
from .middleware import Guard
from .openapi import describe_api
from .page import page_router
from .remote import RemoteImages
from .store import ResponseStore


def create_app(engine: Engine, config: ServeConfig | None = None) -> FastAPI:
    """The server as an ASGI application.

    Args:
        engine: what generates; it is started and stopped with the application.
        config: the settings; None: the defaults.
    """
    config = config or ServeConfig()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await engine.start()
        yield
        await engine.stop(found.rest_of_grace)
        for stored in found.store.in_progress():
            assert stored.task is not None
            stored.task.cancel()

    app = FastAPI(
        title="MM-Interleaved", version=__version__, lifespan=lifespan, redirect_slashes=False,
        description="Ordered text and images over OpenAI's protocols", docs_url=None, redoc_url=None,
    )  # fmt: skip
    metrics = Metrics(engine)
    remote = RemoteImages(config.allow_hosts, config.limits.body_mib * MIB)
    budget = Budget(config.limits)
    found = Services(config, engine, ResponseStore(config.store), remote, metrics, budget)
    app.state.services, app.state.config = found, config
    for router in (responses.router, chat.router, plain.router, inspection.router):
        app.include_router(router)
    if config.page:
        app.include_router(page_router())
    describe_api(app, config, engine)
    add_handlers(app)
    app.add_middleware(Measured, metrics=metrics)
    app.add_middleware(Guard, config=config, budget=budget)
    if config.allow_origins:
        app.add_middleware(CORSMiddleware, allow_origins=config.allow_origins, allow_methods=["*"], allow_headers=["*"],
                           expose_headers=["x-request-id"])  # fmt: skip
    return app

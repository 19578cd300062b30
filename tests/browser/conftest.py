"""Chromium with the web page of a server that runs in a thread, on the stub engine or on the small model."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import pytest

from mm_interleaved.serving.config import ServeConfig
from mm_interleaved.serving.engine import Engine
from mm_interleaved.serving.stub import StubEngine

from ..serving.conftest import running
from .writer import Writer

if TYPE_CHECKING:
    from playwright.sync_api import Browser

Open = Callable[..., Writer]
EXPECTED = ("Failed to load resource", "net::ERR_")  # of requests that a test lets fail; the page says it in words


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """One browser for all tests; each has a context, so storage of its own."""
    from playwright.sync_api import sync_playwright

    path = shutil.which("chromium")
    assert path, "Chromium is needed: scripts/setup-browser"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def stub() -> Iterator[str]:
    """The address of a server on a quick stub engine."""
    with running(StubEngine("small", adapters=["style"], image_size=64)) as address:
        yield address


@pytest.fixture
def serve() -> Iterator[Callable[..., str]]:
    """Starts servers that end with the test."""
    with ExitStack() as stack:

        def start(engine: Engine | None = None, config: ServeConfig | None = None) -> str:
            return stack.enter_context(running(engine or StubEngine("small", image_size=64), config))

        yield start


@pytest.fixture
def open_page(browser: Browser) -> Iterator[Open]:
    """Opens the page at an address; no test may leave an error in the console or break the policy."""
    contexts, problems = [], []

    def open_at(address: str, *, width: int = 1100, height: int = 800, **options: Any) -> Writer:
        context = browser.new_context(viewport={"width": width, "height": height}, **options)
        contexts.append(context)
        context.set_default_timeout(15_000)
        page = context.new_page()
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda said: problems.append(said.text) if said.type in ("error", "warning") else None)
        page.goto(f"{address}/")
        page.locator("body[data-ready]").wait_for()
        return Writer(page, address)

    yield open_at
    for context in contexts:
        context.close()
    assert not [problem for problem in problems if not any(known in problem for known in EXPECTED)]

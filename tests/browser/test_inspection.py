"""The page of an inspection by keyboard and pointer, in two themes and at a phone's width; without axe findings."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from mm_interleaved import Document, Image, MMInterleaved, MMInterleavedPipeline, MMInterleavedProcessor, Text
from mm_interleaved.inspection import inspect

from ..conftest import make_image

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def file(model: MMInterleaved, processor: MMInterleavedProcessor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a document with two given images, a generated text and a generated image."""
    segments = [Image(make_image(1)), Text("<i>a</i>"), Image(make_image(2)), Text(), Image()]
    pipe = MMInterleavedPipeline(model, processor)
    found = inspect(pipe, Document(segments), max_new_tokens=6, num_inference_steps=3, seed=1)
    path = tmp_path_factory.mktemp("inspection") / "inspection.html"
    path.write_text(found.to_html(), "utf-8")
    return path


@pytest.fixture(params=[("light", 1300), ("dark", 1300), ("light", 390)], ids=["light", "dark", "phone"])
def page(browser: Browser, file: Path, request: pytest.FixtureRequest) -> Iterator[Page]:
    scheme, width = request.param
    context = browser.new_context(color_scheme=scheme, viewport={"width": width, "height": 850}, offline=True)
    page, problems = context.new_page(), []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda said: problems.append(said.text))
    page.on("request", lambda asked: problems.append(asked.url) if asked.url.startswith("http") else None)
    page.goto(file.as_uri())
    yield page
    context.close()
    assert not problems


def test_every_control_changes_what_is_shown(page: Page) -> None:
    from axe_playwright_python.sync_playwright import Axe

    status, words, region = page.locator("#status"), page.locator(".word"), page.locator(".regions")
    assert page.locator("p.given").inner_text() == "<i>a</i>"
    words.nth(0).focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    assert "(kept)" in status.inner_text()
    assert words.nth(1).get_attribute("aria-pressed") == "true"
    page.keyboard.press("Shift+ArrowRight")
    assert page.locator(".word.chosen").count() == 2
    page.keyboard.press("Escape")
    assert "(kept)" not in status.inner_text()
    assert page.locator("#images canvas").count() == 2
    page.select_option("#a", "0")
    page.select_option("#b", "1")
    assert page.locator("#images figure").count() == 2
    page.get_by_role("radio", name="Heat map").check()
    before = status.inner_text()
    page.locator("#heads button").first.click()
    assert page.locator("#head").input_value() == "0"
    assert status.inner_text() != before
    region.focus()
    page.keyboard.press("ArrowRight")
    assert status.inner_text().startswith("A region of Image 3 looks at Image 2")
    page.keyboard.press("Enter")
    page.keyboard.press("Shift+ArrowDown")
    assert status.inner_text().startswith("2 regions of Image 3 look at")
    page.locator("#step").fill("0")
    assert page.locator("#step-text").inner_text().startswith("Step 1 of 3")
    page.select_option("#map", "1")
    assert "Image 2" in status.inner_text()
    found = Axe().run(page).response["violations"]
    assert not [violation["id"] for violation in found if violation["impact"] in ("serious", "critical")]
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")

"""Take the screenshots of docs/guides/page.md: the web page with the small model, in Chromium.

python -m tests.browser.screenshots docs/images

It needs what scripts/setup-browser installs. Files are PNG with a palette, to keep the repository small.
"""

from __future__ import annotations

import io
import shutil
import sys
from pathlib import Path

import PIL.Image
from playwright.sync_api import Browser, Page, sync_playwright

from mm_interleaved.pretrained import load
from mm_interleaved.serving.config import ServeConfig
from mm_interleaved.serving.model import make_engine

from ..serving.conftest import running
from .writer import Writer

PATIENCE = 300_000  # milliseconds, on a machine with other work
COLORS = 256


def open_page(browser: Browser, address: str, width: int, height: int, scheme: str = "light") -> Writer:
    """The page in a context of its own."""
    context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
    context.set_default_timeout(PATIENCE)
    page = context.new_page()
    page.goto(f"{address}/")
    page.locator("#status[data-state=ok]").wait_for()
    return Writer(page, address)


def shoot(page: Page, path: Path) -> None:
    """Write a screenshot with a palette."""
    page.wait_for_timeout(500)
    image = PIL.Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    palette = image.quantize(COLORS, PIL.Image.Quantize.MAXCOVERAGE, kmeans=2, dither=PIL.Image.Dither.NONE)
    palette.save(path, optimize=True)
    print(path, path.stat().st_size // 1024, "kB")


def main(folder: Path) -> None:
    """Write all screenshots into a folder."""
    config = ServeConfig(rows=2)
    with running(make_engine(load("small"), "small", config), config) as address, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        writer = open_page(browser, address, 1040, 800)
        shoot(writer.page, folder / "page_empty.png")
        writer.set(seed="4", maxImages="2")
        writer.example("Story")
        writer.grown(3)
        writer.done()
        writer.page.get_by_label("Title").fill("Rex and Tia")
        writer.use(3, "Several candidates")
        writer.done()
        writer.page.locator("#segments > li").nth(2).evaluate("part => scrollTo(0, part.offsetTop - 60)")
        shoot(writer.page, folder / "page_story.png")

        writer = open_page(browser, address, 1040, 800, "dark")
        writer.example("Find")
        writer.page.locator(".box").wait_for()
        writer.page.evaluate("scrollTo(0, 60)")
        shoot(writer.page, folder / "page_find.png")

        writer = open_page(browser, address, 360, 720)
        writer.example("Dialogue")
        writer.grown(4)
        writer.done()
        writer.write("Where is it?")
        shoot(writer.page, folder / "page_phone.png")
        browser.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))

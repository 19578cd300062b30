"""The page as its user sees it: what can be done, by the names that screen readers say."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from playwright.sync_api import Locator, Page, Request


class Writer:
    """Someone who writes with the page.

    Attributes:
        page: the page.
        sent: the bodies of the requests for responses so far.
    """

    def __init__(self, page: Page, address: str) -> None:
        self.page, self.address = page, address
        self.sent: list[dict[str, Any]] = []
        page.on("request", self._keep)

    def _keep(self, request: Request) -> None:
        if request.url.endswith("/v1/responses"):
            self.sent.append(json.loads(request.post_data or ""))

    @property
    def field(self) -> Locator:
        """Where one writes."""
        return self.page.locator("#field")

    @property
    def segments(self) -> Locator:
        """The parts of the document."""
        return self.page.locator("#segments > li")

    @property
    def stop(self) -> Locator:
        """The button that stops."""
        return self.page.get_by_role("button", name="Stop")

    @property
    def notice(self) -> Locator:
        """The message at the edge."""
        return self.page.locator(".notice")

    def text(self, number: int) -> Locator:
        """The text field of a part."""
        return self.segments.nth(number).locator("textarea")

    def texts(self) -> list[str]:
        """The document: texts, and "image"."""
        return self.page.evaluate(
            "[...document.querySelectorAll('#segments > li')].map(li => li.querySelector('textarea')?.value ?? 'image')"
        )

    def tool(self, number: int, name: str) -> Locator:
        """A tool of a part."""
        return self.segments.nth(number).get_by_role("button", name=name)

    def use(self, number: int, name: str) -> None:
        """Use a tool of a part as with a mouse."""
        self.segments.nth(number).locator(".content").hover()
        self.tool(number, name).click()

    def until(self, condition: str, seconds: float = 15.0) -> None:
        """Wait until a condition in JavaScript holds; the page's policy forbids Playwright's own waiting for it."""
        until = time.monotonic() + seconds
        while not self.page.evaluate(condition):
            assert time.monotonic() < until, f"not within {seconds:g} s: {condition}"
            self.page.wait_for_timeout(30)

    def grown(self, count: int) -> None:
        """Wait until the document has so many parts."""
        self.until(f"document.querySelectorAll('#segments > li').length >= {count}")

    def done(self) -> None:
        """Wait until nothing is generated."""
        self.stop.wait_for(state="hidden")

    def write(self, text: str, wants: str | None = None, mode: str | None = None, *, wait: bool = True) -> None:
        """Write a text and let the model go on."""
        if mode is not None:
            self.page.get_by_label("Mode", exact=True).select_option(label=mode)
        if wants is not None:
            self.page.locator(f"#composer input[value={wants}]").check()
        self.field.fill(text)
        self.field.press("Enter")
        if wait:
            self.done()

    def example(self, name: str) -> None:
        """Try the example of a mode."""
        self.page.locator(".example", has=self.page.get_by_text(name, exact=True)).click()

    def color(self, number: int) -> list[int]:
        """The colour of the image of a part, somewhere in it."""
        return self.page.evaluate(
            """(number) => {
                const context = document.createElement("canvas").getContext("2d");
                context.drawImage(document.querySelectorAll("#segments > li")[number].querySelector("img"), 0, 0);
                return [...context.getImageData(9, 9, 1, 1).data].slice(0, 3);
            }""",
            number,
        )

    def set(self, **values: str) -> None:
        """Change settings by their labels' ids."""
        self.page.get_by_role("button", name="Settings").click()
        for name, value in values.items():
            field = self.page.locator(f"#setting-{name}")
            if field.evaluate("field => field.tagName") == "SELECT":
                field.select_option(value)
            else:
                field.fill(value)
                field.press("Tab")
        self.page.keyboard.press("Escape")

    def given(self, number: int = -1) -> list[str]:
        """What a request gave: texts, and "image"."""
        parts = [message["content"][0] for message in self.sent[number]["input"]]
        return [part.get("text", "image") for part in parts]

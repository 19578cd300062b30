"""What the page exports, and that nothing anyone writes becomes markup."""

from __future__ import annotations

from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import PIL.Image
import pytest

from mm_interleaved.document import Image, Text, load_documents
from mm_interleaved.io.images import load_image

from .conftest import Open
from .files import drop, png
from .writer import Writer

pytestmark = pytest.mark.browser
EVIL = "<img src=x onerror=\"document.title='run'\"><script>document.title='run'</script> & co"
Export = Callable[[str], Path]


@pytest.fixture
def export(stub: str, open_page: Open, tmp_path: Path) -> Export:
    """A document with a text like markup, an image and a generated one; returns the file of a format."""
    writer: Writer = open_page(stub, accept_downloads=True)
    drop(writer.page, png((64, 64), (10, 120, 200)), "image/png", "a.png")
    writer.write(EVIL, wants="image")
    writer.page.get_by_label("Title").fill("A <b>title")

    def save(name: str) -> Path:
        writer.page.get_by_role("button", name="Export").click()
        with writer.page.expect_download() as found:
            writer.page.get_by_role("menuitem", name=name).click()
        path = tmp_path / found.value.suggested_filename
        found.value.save_as(path)
        assert writer.page.title() == "A <b>title – MM-Interleaved"
        assert writer.page.locator("#segments script, #segments textarea img").count() == 0
        return path

    return save


def test_json_is_read_by_mmi_generate(export: Export) -> None:
    path = export("Document for mmi generate")
    assert path.name == "a-b-title.json"
    (document,) = load_documents(path)
    image, text, generated = document.segments
    assert isinstance(image, Image)
    assert isinstance(text, Text)
    assert isinstance(generated, Image)
    assert text.text == EVIL
    assert load_image(image.source).getpixel((5, 5)) == (10, 120, 200)
    assert load_image(generated.source).size == (64, 64)
    assert document.id == "A <b>title"


class Page(HTMLParser):
    """Elements of a page, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.images: list[str] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Count an element."""
        self.tags.append(tag)
        if tag == "img":
            self.images.append(dict(attrs)["src"] or "")

    def handle_data(self, data: str) -> None:
        """Add text."""
        self.text += data


def test_html_needs_nothing_else(export: Export) -> None:
    page = Page(export("Web page").read_text())
    assert page.tags.count("img") == 2
    assert all(url.startswith("data:image/png;base64,") for url in page.images)
    assert not {"script", "link", "iframe", "b"} & set(page.tags)
    assert EVIL in page.text
    assert "A <b>title" in page.text


def test_png_shows_texts_and_images(export: Export) -> None:
    with PIL.Image.open(export("One image")) as image:
        assert image.format == "PNG"
        assert image.width == 1280
        colors = {color: count for count, color in image.convert("RGB").getcolors(1 << 24) or []}
    assert colors[10, 120, 200] > 500_000  # the first image, enlarged
    assert colors[34, 33, 30] > 100  # ink
    assert colors[251, 250, 247] > 200_000  # paper


def test_an_empty_document_exports_nothing(stub: str, open_page: Open) -> None:
    writer = open_page(stub)
    writer.page.get_by_role("button", name="Export").click()
    writer.page.get_by_role("menuitem", name="Web page").click()
    assert writer.notice.inner_text().startswith("There is nothing to export yet.")

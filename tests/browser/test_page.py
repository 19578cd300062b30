"""A walk through the web page on the stub engine: each test is something that its user does."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Callable

import PIL.Image
import pytest

from mm_interleaved.serving.config import ServeConfig
from mm_interleaved.serving.stub import StubEngine

from .conftest import Open
from .files import PNG, drop, paste
from .wire import Wire

pytestmark = pytest.mark.browser
Serve = Callable[..., str]


def test_stop_keeps_what_has_arrived(serve: Serve, open_page: Open) -> None:
    engine = StubEngine("small", image_size=64, delay=0.1, words=1000)
    writer = open_page(serve(engine))
    writer.write("Once", wants="text", wait=False)
    writer.until("document.querySelectorAll('textarea')[1].value.split(' ').length > 2")
    writer.page.keyboard.press("Escape")
    writer.done()
    text = writer.texts()[1]
    assert 2 < len(text.split()) < 100
    writer.page.wait_for_timeout(300)
    assert writer.texts()[1] == text
    assert engine.load.cancelled == 1
    writer.write("", wants="image", wait=False)  # half an image is no image
    writer.page.locator(".pending").wait_for()
    writer.stop.click()
    writer.done()
    assert writer.texts() == ["Once", text]
    assert not writer.page.locator(".problem:visible").count()


def test_an_image_shows_previews_and_its_progress(serve: Serve, open_page: Open) -> None:
    writer = open_page(serve(StubEngine("small", image_size=64, delay=0.08)))
    writer.set(steps="8")
    writer.write("A house.", wants="image", wait=False)
    progress = writer.page.get_by_role("progressbar")
    progress.wait_for()
    writer.until("document.querySelector('.pending progress').value === 0.5")
    assert writer.page.locator(".pending img").first.get_attribute("src", timeout=1000)
    writer.done()
    assert not progress.is_visible()
    assert writer.sent[0]["num_inference_steps"] == 8


def test_edit_and_go_on_from_there(stub: str, open_page: Open) -> None:
    writer = open_page(stub)
    writer.write("A fox.")
    before = writer.texts()
    assert before[1:] == [before[1], "image", before[3], "image"]
    writer.text(1).fill("It sleeps.")
    writer.text(1).press("Control+Enter")
    writer.done()
    after = writer.texts()
    assert writer.given() == after[:2] == ["A fox.", "It sleeps."]
    assert len(after) == 6
    writer.notice.get_by_role("button", name="Undo").click()
    assert writer.texts() == ["A fox.", "It sleeps.", *before[2:]]


def test_redo_an_image_with_another_seed(stub: str, open_page: Open) -> None:
    writer = open_page(stub)
    writer.write("A fox.")
    parts = writer.texts()
    first = writer.segments.nth(2).locator(".frame-of-image img").get_attribute("src")
    writer.use(2, "Another version")
    writer.done()
    assert writer.texts() == parts
    assert writer.given() == parts[:2]
    assert writer.sent[-1]["tool_choice"] == {"type": "image_generation"}
    assert writer.sent[-1]["seed"] != writer.sent[0]["seed"]
    assert (
        writer.segments.nth(2).locator("figcaption").inner_text() == f"Version 2 of 2 · Seed {writer.sent[-1]['seed']}"
    )
    assert writer.segments.nth(2).locator(".frame-of-image img").get_attribute("src") != first
    writer.page.get_by_role("radio", name="Version 1").click()
    assert writer.segments.nth(2).locator(".frame-of-image img").get_attribute("src") == first


def test_choose_among_candidates(stub: str, open_page: Open) -> None:
    writer = open_page(stub)
    writer.set(candidates="3", seed="5", steps="2")
    writer.write("A fox.", wants="image")
    writer.use(1, "Several candidates")
    writer.done()
    assert writer.sent[-1]["num_candidates"] == 3
    versions = writer.page.get_by_role("radio", name="Version")
    assert versions.count() == 4
    assert versions.nth(1).get_attribute("aria-checked") == "true"
    versions.nth(1).focus()
    writer.page.keyboard.press("ArrowRight")
    assert versions.nth(2).get_attribute("aria-checked") == "true"
    assert "candidate 2" in writer.segments.nth(1).locator("figcaption").inner_text()
    writer.write("It sleeps.", wants="text")
    sent = writer.sent[-1]["input"][1]["content"][0]["image_url"]
    image = PIL.Image.open(io.BytesIO(base64.b64decode(sent.partition(",")[2]))).convert("RGB")
    assert list(image.getpixel((9, 9))) == writer.color(1)


def test_delete_move_and_insert(stub: str, open_page: Open) -> None:
    writer = open_page(stub)
    writer.write("A fox.", wants="text")
    writer.write("It sleeps.", wants="image")
    said = writer.texts()[1]
    writer.use(1, "Delete")
    assert writer.texts() == ["A fox.", "It sleeps.", "image"]
    writer.notice.get_by_role("button", name="Undo").click()
    assert writer.texts() == ["A fox.", said, "It sleeps.", "image"]
    writer.text(2).press("Alt+ArrowUp")
    assert writer.texts() == ["A fox.", "It sleeps.", said, "image"]
    assert writer.page.evaluate("document.activeElement.value") == "It sleeps."
    writer.segments.nth(1).get_by_role("button", name="Insert here").click()
    writer.page.get_by_role("menuitem", name="Write a text", exact=True).click()
    writer.page.keyboard.type("At night,")
    assert writer.texts()[:3] == ["A fox.", "At night,", "It sleeps."]
    writer.segments.nth(2).get_by_role("button", name="Insert here").click()
    writer.page.get_by_role("menuitem", name="Let the model draw an image").click()
    writer.done()
    assert writer.given() == ["A fox.", "At night,"]
    assert writer.texts() == ["A fox.", "At night,", "image", "It sleeps.", said, "image"]
    writer.text(1).fill("")
    writer.text(1).press("Backspace")
    assert writer.texts() == ["A fox.", "image", "It sleeps.", said, "image"]


def test_images_are_dropped_and_pasted(stub: str, open_page: Open) -> None:
    writer = open_page(stub)
    drop(writer.page, PNG, "image/png", "a.png")
    assert writer.segments.count() == 1
    writer.write("Describe it.", wants="text")
    paste(writer.page, PNG, "image/png")
    writer.segments.nth(3).wait_for()
    assert writer.texts()[::3] == ["image", "image"]
    assert writer.sent[0]["input"][0]["content"][0]["image_url"].startswith("data:image/png;base64,")
    drop(writer.page, b"no image", "image/png", "broken.png")
    writer.page.get_by_role("alert").filter(has_text="“broken.png” is no image").wait_for()
    assert writer.segments.count() == 4


@pytest.mark.parametrize(
    ("mode", "given", "wants"),
    [
        ("Story", ["On the snow", "image"], None),
        ("Caption", ["image", "a photo of"], "none"),
        ("Question", ["image", "Question: Which letter is on the pineapple? Short answer:"], "none"),
        ("Dialogue", ["image", "caption: ", "question: What color is the car? answer:"], "none"),
        ("Drawing", ["A pink tree"], {"type": "image_generation"}),
        ("Label map", ["image", "A blue fish"], {"type": "image_generation"}),
        ("Find", ["image", "Provide the bounding box coordinate of the region this sentence describes. the castle"],
         "none"),
    ],
)  # fmt: skip
def test_each_mode_has_an_example(stub: str, open_page: Open, mode: str, given: list[str], wants: object) -> None:
    writer = open_page(stub)
    writer.example(mode)
    writer.until("document.querySelectorAll('#segments > [data-by=model]').length > 0")
    writer.done()
    (sent,) = writer.sent
    assert all(said.startswith(expected) for said, expected in zip(writer.given(), given, strict=True))
    assert sent.get("tool_choice") == wants
    assert sent.get("temperature") == (0 if wants == "none" else None)


def test_a_question_needs_an_image(stub: str, open_page: Open) -> None:
    writer = open_page(stub)
    writer.write("What is it?", mode="Question")
    assert writer.page.get_by_role("alert").inner_text().startswith("Add an image first")
    assert writer.field.input_value() == "What is it?"
    assert not writer.sent


def test_the_history_survives_a_reload(stub: str, open_page: Open) -> None:
    writer = open_page(stub)
    writer.write("A fox.", wants="image")
    writer.page.get_by_label("Title").fill("Foxes")
    writer.page.get_by_role("button", name="New").click()
    writer.segments.first.wait_for(state="detached")
    writer.write("A house.", wants="text")
    parts = writer.texts()
    writer.page.wait_for_timeout(500)
    writer.page.reload()
    writer.page.locator("body[data-ready]").wait_for()
    assert writer.texts() == parts
    writer.page.get_by_role("button", name="Documents").click()
    entries = writer.page.locator("#document-list .entry-open")
    entries.first.wait_for()
    assert [text.split("\n")[0] for text in entries.all_inner_texts()] == ["A house.", "Foxes"]
    writer.page.get_by_role("button", name="Delete “A house.”").click()
    entries.nth(1).wait_for(state="detached")
    entries.click()
    writer.segments.nth(1).wait_for()
    assert writer.texts() == ["A fox.", "image"]
    assert writer.page.evaluate("document.querySelector('.frame-of-image img').naturalWidth") == 64


def test_a_key_is_asked_for_where_it_is_needed(serve: Serve, open_page: Open) -> None:
    writer = open_page(serve(config=ServeConfig(keys=["secret"])))
    writer.write("A fox.", wants="text")
    alert = writer.segments.last.get_by_role("alert")
    assert alert.inner_text() == "This server needs an API key."
    writer.page.locator("#problem-key").fill("wrong")
    writer.page.keyboard.press("Enter")
    alert.wait_for()
    writer.page.locator("#problem-key").fill("secret")
    writer.page.get_by_role("button", name="Use this key").click()
    writer.grown(2)
    assert writer.page.evaluate("[sessionStorage['mmi-key'], JSON.stringify(localStorage)]")[0] == "secret"
    assert "secret" not in writer.page.evaluate("JSON.stringify(localStorage)")


def test_a_busy_server_is_asked_again(serve: Serve, open_page: Open) -> None:
    address = serve(StubEngine("small", rows=1, queue=0, delay=0.25, words=8, image_size=64))
    first, second = open_page(address), open_page(address)
    first.write("A fox.", wants="text", wait=False)
    first.segments.nth(1).wait_for()
    second.write("A house.", wants="text", wait=False)
    second.page.get_by_role("alert").filter(has_text="busy").wait_for()
    second.segments.nth(1).wait_for()
    second.done()
    assert len(second.sent) > 1
    assert not second.page.locator(".problem:visible").count()


def test_the_server_is_gone_in_mid_stream(serve: Serve, open_page: Open) -> None:
    with Wire(serve(StubEngine("small", delay=0.1, words=100))) as wire:
        writer = open_page(wire.address)
        writer.write("A fox.", wants="text", wait=False)
        writer.until("document.querySelectorAll('textarea')[1]?.value.includes(' ')")
        wire.cut()
        writer.done()
        kept = writer.texts()[1]
        assert len(kept.split()) > 1
        alert = writer.segments.locator("[role=alert]")
        assert re.match("The connection (broke|ended early)", alert.inner_text())
        writer.page.locator("#gone").wait_for()
        assert writer.page.locator("#status").inner_text() == "Server not reachable"
        writer.page.get_by_role("button", name="Try again").click()
        writer.page.get_by_role("alert").filter(has_text="cannot be reached").wait_for()
        assert writer.texts() == ["A fox.", kept]
        wire.repair()
        writer.page.locator("#gone").wait_for(state="hidden")
        writer.page.get_by_role("button", name="Dismiss").click()
        writer.write("It sleeps.", wants="text", wait=False)
        writer.segments.nth(3).wait_for()


def test_a_failure_of_the_model_is_said_where_it_happened(stub: str, open_page: Open) -> None:
    writer = open_page(stub)
    writer.write("please fail")
    assert writer.segments.first.get_by_role("alert").inner_text() == "the model failed"
    writer.text(0).fill("A fox.")
    writer.page.get_by_role("button", name="Try again").click()
    writer.grown(3)
    assert writer.given() == ["A fox."]


def test_the_keyboard_suffices(serve: Serve, open_page: Open) -> None:
    writer = open_page(serve(StubEngine("small", image_size=64)))
    press, typed = writer.page.keyboard.press, writer.page.keyboard.type
    focused = "document.activeElement.getAttribute('aria-label') ?? document.activeElement.id"
    press("Tab")
    assert writer.page.evaluate("document.activeElement.textContent") == "Skip to writing"
    press("Enter")
    assert writer.page.evaluate("document.activeElement.id") == "field"
    typed("A fox.")
    press("Shift+Enter")
    typed("It sleeps.")
    press("Enter")
    writer.grown(5)
    writer.done()
    assert writer.texts()[0] == "A fox.\nIt sleeps."
    for _ in range(3):  # the tools and the + of the last part lie between
        press("Shift+Tab")
        if writer.page.evaluate("document.activeElement.tagName") == "FIGURE":
            break
    assert "Image 5 of 5" in writer.page.evaluate(focused)
    press("Alt+ArrowUp")
    assert "Image 4 of 5" in writer.page.evaluate(focused)
    press("Tab")
    assert writer.page.evaluate(focused) == "Another version, with another seed"
    press("ArrowRight")
    press("ArrowRight")
    assert writer.page.evaluate(focused) == "Go on from here"
    press("Shift+Tab")
    press("Delete")
    assert writer.segments.count() == 4
    outline = writer.page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"
    press("Escape")
    writer.page.locator("#theme").focus()
    press("?")
    assert writer.page.locator("#keys").is_visible()
    press("Escape")
    assert not writer.page.locator("#keys").is_visible()


def test_it_is_used_on_a_phone(stub: str, open_page: Open) -> None:
    writer = open_page(stub, width=360, height=700, has_touch=True, is_mobile=True)
    too_wide = "document.documentElement.scrollWidth > innerWidth"
    assert not writer.page.evaluate(too_wide)
    writer.write("A fox.")
    assert not writer.page.evaluate(too_wide)
    writer.text(1).tap()
    writer.tool(1, "Delete").tap()
    assert writer.segments.count() == 4
    for name in ("New", "Documents", "Export", "Settings"):
        box = writer.page.get_by_role("button", name=name, exact=True).bounding_box()
        assert box
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= 360
    for opener, dialog in (("Documents", "#documents"), ("Settings", "#settings")):
        writer.page.get_by_role("button", name=opener, exact=True).tap()
        writer.page.locator(dialog).wait_for()
        assert not writer.page.evaluate(too_wide)
        writer.page.locator(f"{dialog} .close").tap()


def test_dark_follows_the_system_and_can_be_chosen(stub: str, open_page: Open) -> None:
    writer = open_page(stub, color_scheme="dark")
    brightness = "Number(/\\d+/.exec(getComputedStyle(document.body).backgroundColor)[0])"
    assert writer.page.evaluate(brightness) < 40
    writer.page.get_by_role("button", name="Colours: as the system").click()
    assert writer.page.evaluate(brightness) > 200
    writer.page.reload()
    assert writer.page.evaluate(brightness) > 200
    writer.page.get_by_role("button", name="Colours: light").click()
    writer.page.emulate_media(color_scheme="light")
    assert writer.page.evaluate(brightness) < 40


def test_nothing_moves_if_the_reader_asked_for_that(serve: Serve, open_page: Open) -> None:
    writer = open_page(serve(StubEngine("small", delay=0.2, image_size=64)), reduced_motion="reduce")
    writer.write("A fox.", wants="image", wait=False)
    writer.page.locator(".pending").wait_for()
    assert writer.page.evaluate("document.getAnimations().length") == 0
    writer.stop.click()


def test_settings_are_sent_and_kept(stub: str, open_page: Open) -> None:
    writer = open_page(stub)
    writer.set(model="style", seed="11", steps="3", guidance="2.5", temperature="0.5", maxTokens="9", maxImages="1",
               scheduler="DDIMScheduler", size="64x64")  # fmt: skip
    writer.page.reload()
    writer.until("document.querySelector('#status').dataset.state === 'ok'")
    writer.write("A fox.")
    (sent,) = writer.sent
    expected = {
        "model": "style", "seed": 11, "num_inference_steps": 3, "guidance_scale": 2.5, "temperature": 0.5,
        "max_output_tokens": 9, "max_tool_calls": 1, "scheduler": "DDIMScheduler", "store": False, "stream": True,
    }  # fmt: skip
    assert {name: sent.get(name) for name in expected} == expected
    assert sent["tools"] == [{"type": "image_generation", "partial_images": 3, "size": "64x64"}]
    writer.page.get_by_role("button", name="Settings").click()
    assert writer.page.locator("#setting-steps").get_attribute("max") == "100"
    writer.page.locator("#setting-steps").fill("101")
    writer.page.keyboard.press("Tab")
    writer.page.get_by_role("button", name="Reset all settings").click()
    assert writer.page.locator("#setting-seed").input_value() == ""

"""Parts of the page on their own: the reader of streams, boxes, the frame of the inspection, and accessibility."""

from __future__ import annotations

import json
from typing import Any

import pytest

from .conftest import Open
from .files import drop, png
from .writer import Writer

pytestmark = pytest.mark.browser

READ = """
async ([chunks]) => {
    const { readEvents } = await import("/web/sse.js");
    const stream = new ReadableStream({
        start(controller) {
            for (const chunk of chunks) controller.enqueue(new Uint8Array(chunk));
            controller.close();
        },
    });
    const found = [];
    for await (const event of readEvents(stream)) found.push(event);
    return found;
}
"""


def test_events_are_read_wherever_chunks_end(stub: str, open_page: Open) -> None:
    page = open_page(stub).page
    events: list[Any] = [{"type": "a", "text": "fünf – 🦊"}, {"n": 2}, {"long": "x" * 5000}]
    lines = f": keep-alive\n\nevent: a\ndata: {json.dumps(events[0], ensure_ascii=False)}\n\n"
    lines += f"data:{json.dumps(events[1])}\r\n\r\n: keep-alive\n\n"
    lines += 'data: {"long":\ndata: ' + json.dumps(events[2]["long"]) + "}\n\ndata: [DONE]\n\n"
    data = (lines + 'data: {"cut": ').encode()
    for size in (1, 2, 3, 7, 1000, len(data)):
        chunks = [list(data[start : start + size]) for start in range(0, len(data), size)]
        assert page.evaluate(READ, [chunks]) == events, size


def answer_with(writer: Writer, text: str) -> None:
    """Let the server's next answers be this text."""
    item = {"id": "msg_1", "type": "message", "role": "assistant", "status": "completed"}
    events: list[dict[str, Any]] = [
        {"type": "response.created", "response": {"id": "resp_1", "seed": 1}},
        {"type": "response.output_item.added", "output_index": 0, "item": {**item, "content": []}},
        {"type": "response.output_item.done", "item": {**item, "content": [{"type": "output_text", "text": text}]}},
        {"type": "response.completed", "response": {"id": "resp_1"}},
    ]
    body = "".join(f"data: {json.dumps(event)}\n\n" for event in events)
    writer.page.route("**/v1/responses", lambda route: route.fulfill(body=body, content_type="text/event-stream"))


def test_boxes_lie_over_the_central_square(stub: str, open_page: Open) -> None:
    writer = open_page(stub)
    drop(writer.page, png((200, 100)), "image/png", "wide.png")
    answer_with(writer, "(000,500)(499,999)</box>")
    writer.write("the ball", mode="Find")
    box = writer.page.locator(".box")
    box.wait_for()
    outer, inner = writer.page.locator(".frame-of-image img").first.bounding_box(), box.bounding_box()
    assert outer
    assert inner
    assert box.inner_text() == "the ball"
    assert inner["x"] - outer["x"] == pytest.approx(outer["width"] / 4, abs=1)
    assert inner["width"] == pytest.approx(outer["width"] / 4, abs=1)
    assert inner["y"] - outer["y"] == pytest.approx(outer["height"] / 2, abs=1)
    alt = writer.page.locator(".frame-of-image img").first.get_attribute("alt")
    assert alt
    assert "the ball: 0 to 50 percent from the left, 50 to 100 percent from the top." in alt
    writer.use(0, "Show boxes")
    assert not box.count()


def test_phrases_name_their_boxes(stub: str, open_page: Open) -> None:
    writer = open_page(stub)
    drop(writer.page, png(), "image/png", "a.png")
    answer_with(writer, "<ref>the dog</ref><box>(100,100)(300,300)</box>, <ref>the fox</ref><box>(400,400)(900,900)"
                        "</box>: A dog and a fox. (500,500)(100,100)")  # fmt: skip
    writer.write("Generate the caption with grounding.", wants="text", mode="Story")
    writer.page.locator(".box").nth(1).wait_for()
    assert writer.page.locator(".box").all_inner_texts() == ["the dog", "the fox"]


def test_an_answer_that_is_not_ours_is_a_problem_in_words(stub: str, open_page: Open) -> None:
    writer = open_page(stub)
    writer.page.route("**/v1/responses", lambda route: route.fulfill(status=502, body="<h1>Bad Gateway</h1>"))
    writer.write("A fox.", wants="text")
    assert writer.segments.first.get_by_role("alert").inner_text() == "The server answered with status 502."


def test_the_inspection_is_shut_in(stub: str, open_page: Open) -> None:
    writer = open_page(stub)
    writer.until("document.querySelector('#setting-inspect') !== null")
    writer.page.get_by_role("button", name="Settings").click()
    writer.page.get_by_label("Keep what the model looks at").check()
    writer.page.keyboard.press("Escape")
    drop(writer.page, png(), "image/png", "a.png")
    writer.write("A fox.", wants="text")
    assert (writer.sent[0]["inspect"], writer.sent[0]["store"]) == (True, True)
    writer.use(2, "Show what the model looked at")
    frame = writer.page.frame_locator("#inspection iframe")
    frame.locator("body *").first.wait_for()
    inside = next(frame for frame in writer.page.frames if frame.parent_frame)
    reached = """() => {
        const tries = { parent: () => parent.document.title, storage: () => localStorage.length };
        const found = [];
        for (const [name, run] of Object.entries(tries)) try { run(); found.push(name); } catch { /* shut in */ }
        return found;
    }"""
    assert inside.evaluate(reached) == []
    writer.page.locator("#inspection .close").click()
    writer.page.locator("#inspection iframe").wait_for(state="detached")


def test_a_server_that_cannot_inspect_offers_no_inspection(stub: str, open_page: Open) -> None:
    writer = open_page(stub)
    description = writer.page.request.get(f"{stub}/openapi.json").json()
    del description["paths"]["/v1/responses/{response_id}/inspection"]
    writer.page.route("**/openapi.json", lambda route: route.fulfill(json=description))
    writer.page.reload()
    writer.until("document.querySelector('#setting-steps')?.max === '100'")
    assert not writer.page.locator("#setting-inspect").count()


def serious(writer: Writer) -> list[str]:
    """What axe finds that is serious or worse."""
    from axe_playwright_python.sync_playwright import Axe

    found = Axe().run(writer.page).response["violations"]
    return [f"{one['id']}: {[node['target'] for node in one['nodes']]}" for one in found
            if one["impact"] in ("serious", "critical")]  # fmt: skip


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious(stub: str, open_page: Open, scheme: str) -> None:
    writer = open_page(stub, color_scheme=scheme)
    writer.until("document.querySelector('#status').dataset.state === 'ok'")
    assert not serious(writer), "an empty document"
    drop(writer.page, png(), "image/png", "a.png")
    answer_with(writer, "(000,500)(499,999)</box>")
    writer.write("the ball", mode="Find")
    writer.page.unroute("**/v1/responses")
    writer.write("A fox.", mode="Story")
    writer.use(5, "Several candidates")
    writer.done()
    writer.write("please fail")
    assert not serious(writer), "a document with a problem and versions"
    for name in ("Documents", "Settings", "Keyboard shortcuts"):
        writer.page.get_by_role("button", name=name).click()
        assert not serious(writer), name
        writer.page.keyboard.press("Escape")
    writer.page.get_by_role("button", name="Export").click()
    assert not serious(writer), "a menu"
    writer.page.keyboard.press("Escape")
    writer.page.set_viewport_size({"width": 360, "height": 700})
    writer.text(1).focus()
    assert not serious(writer), "a phone"

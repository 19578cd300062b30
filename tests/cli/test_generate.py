"""`mmi generate`: real files in; images, results.json and report.html out; and what it says when that cannot be."""

from __future__ import annotations

import base64
import importlib
import io
import json
import re
import shutil
import signal
import time
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
from rich.console import Console

from mm_interleaved import Document, __version__
from mm_interleaved.document import Folder
from mm_interleaved.generation import InterleavedGenerator
from mm_interleaved.io.writing import LOCK
from mm_interleaved.pretrained import load

from ..conftest import make_image
from .conftest import EXAMPLES, Outcome, spawn

Mmi = Callable[..., Outcome]
QUICK = ("--model", "debug", "num_inference_steps=2", "max_new_tokens=4")


class Page(HTMLParser):
    """What a report shows: visible texts, images, and everything it would fetch from elsewhere."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.texts: list[str] = []
        self.images: list[PIL.Image.Image] = []
        self.fetched: list[str] = []
        self.tags: list[str] = []
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attributes:
            if name in ("src", "href"):
                header, _, data = (value or "").partition(",")
                if header.startswith("data:image/"):
                    self.images.append(PIL.Image.open(io.BytesIO(base64.b64decode(data))))
                else:
                    self.fetched.append(value or "")

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.texts.append(data.strip())


def write(folder: Path, data: Any, name: str = "input.json") -> Path:
    path = folder / name
    path.write_text(json.dumps(data))
    return path


def files(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*")} if folder.exists() else set()


def story(slots: int = 2, number: int = 0) -> dict[str, Any]:
    return {"id": f"story {number}", "segments": [{"text": f"{number} A cat."}, *[{"image": None}] * slots]}


# ---- what it writes


def test_the_originals_own_examples_run_unchanged(mmi: Mmi, tmp_path: Path) -> None:
    done = mmi("generate", EXAMPLES / "original.json", "-o", tmp_path / "out", *QUICK)
    assert done.code == 0, done.err
    records = json.loads((tmp_path / "out" / "results.json").read_text())
    given = json.loads((EXAMPLES / "original.json").read_text())
    for record, source in zip(records, given, strict=True):
        assert {k: record[k] for k in source} == source  # the original's fields as they were
    texts, drawn = records
    assert len(texts["generate_results"]) == 4  # num_iter turns, texts or images
    assert drawn["generate_results"][0] == "1_0_0.png"  # named as the original names them: sample, turn, number
    assert len(drawn["generate_results"]) == 3
    for record in records:
        for name in [r for r in record["generate_results"] if r.endswith(".png")]:
            assert PIL.Image.open(tmp_path / "out" / name).size == (32, 32)
        assert record["finish_reason"] == "turns"
        assert record["run"]["version"] == __version__
        assert record["run"]["seed"] == record["run"]["settings"]["seed"]


def test_the_demo_documents(mmi: Mmi, tmp_path: Path) -> None:
    done = mmi("generate", EXAMPLES / "demo.json", "-o", tmp_path / "out", "--seed", 7, *QUICK)
    assert done.code == 0, done.err
    assert "untrained" in done.err
    assert "3 of 3 documents" in done.out
    records = json.loads((tmp_path / "out" / "results.json").read_text())
    tale, beach, words = records
    kinds = ["image" if "image" in s else "text" for s in tale["segments"]]
    assert kinds == ["text", "image"] * 5
    assert [s["generated"] for s in tale["segments"]] == [False] * 2 + [True] * 8
    assert {r["finish_reason"] for r in records} == {"slots"}
    assert [s["generated"] for s in beach["segments"]] == [False, False, True]
    assert [s["generated"] for s in words["segments"]] == [False, True]
    for segment in (s for r in records for s in r["segments"] if "image" in s):
        assert (tmp_path / "out" / segment["image"]).is_file()


def test_who_says_what_in_a_conversation(mmi: Mmi, tmp_path: Path) -> None:
    (tmp_path / "tea.jpg").write_bytes((EXAMPLES / "images/tea.jpg").read_bytes())
    content = [{"type": "image", "path": "tea.jpg"}, {"type": "text", "text": "What is on the table?"}]
    source = write(tmp_path, {"messages": [{"role": "user", "content": content}]})
    assert mmi("generate", source, "-o", tmp_path / "out", *QUICK).code == 0
    (table,) = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [s.get("role") for s in table["segments"]][:2] == ["user", "user"]
    assert {s["role"] for s in table["segments"] if s["generated"]} == {"assistant"}


def test_results_can_be_read_again_as_documents(mmi: Mmi, tmp_path: Path) -> None:
    write(tmp_path, story())
    assert mmi("generate", tmp_path / "input.json", "-o", tmp_path / "out", *QUICK).code == 0
    (record,) = json.loads((tmp_path / "out" / "results.json").read_text())
    added = ("generated", "turn", "candidates")
    segments = [{k: v for k, v in s.items() if k not in added} for s in record["segments"]]
    document = Document.from_dict({"segments": segments}, Folder(tmp_path / "out"))
    assert [s.source.name for s in document.images] == ["0_0_0.png", "0_1_0.png"]


def test_the_report_holds_everything_it_shows(mmi: Mmi, tmp_path: Path) -> None:
    mmi("generate", EXAMPLES / "demo.json", "-o", tmp_path / "out", *QUICK)
    page = Page(tmp_path / "out" / "report.html")
    records = json.loads((tmp_path / "out" / "results.json").read_text())
    shown = [s for record in records for s in record["segments"]]
    assert len(page.images) == sum("image" in s for s in shown)
    assert not page.fetched
    assert "script" not in page.tags
    visible = "".join("".join(page.texts).split())
    for segment in shown:
        assert "".join(segment.get("text", "").split()) in visible
    assert any("untrained" in text for text in page.texts)


def test_text_in_the_report_is_only_text(mmi: Mmi, tmp_path: Path) -> None:
    nasty = "<script>alert(1)</script> \x00\x1b[31m \u202e &amp; [bold]x[/bold]"
    source = write(tmp_path, {"id": nasty, "segments": [{"text": nasty}, {"image": None}]})
    done = mmi("generate", source, "-o", tmp_path / "out", *QUICK)
    assert done.code == 0, done.err
    page = Page(tmp_path / "out" / "report.html")
    assert "script" not in page.tags
    assert sum("<script>alert(1)</script>" in text for text in page.texts) == 2
    assert any("[bold]x[/bold]" in text and "&amp;" in text for text in page.texts)
    assert "\x1b" not in done.err


def test_candidates_are_kept_and_shown(mmi: Mmi, tmp_path: Path) -> None:
    source = write(tmp_path, story(1))
    assert mmi("generate", source, "-o", tmp_path / "out", "num_candidates=3", *QUICK).code == 0
    (record,) = json.loads((tmp_path / "out" / "results.json").read_text())
    assert record["generate_results"] == ["0_0_0.png", "0_0_1.png", "0_0_2.png"]
    assert record["segments"][0] == {"text": "0 A cat.", "generated": False}
    assert record["segments"][1] == {"image": "0_0_0.png", "generated": True, "turn": 0,
                                     "candidates": record["generate_results"]}  # fmt: skip
    assert len({(tmp_path / "out" / n).read_bytes() for n in record["generate_results"]}) == 3
    assert len(Page(tmp_path / "out" / "report.html").images) == 3


def test_a_forced_text_and_what_was_generated_in_its_place(mmi: Mmi, tmp_path: Path) -> None:
    """The results list what the model generated, as the original does; the document has the forced text."""
    content = {"segments": [{"text": "A cat."}], "forced_texts": ["It sat."], "max_turns": 3}
    source = write(tmp_path, content)
    options = ("replace_texts=true", "force_image=true", "stop_at_eos=false", *QUICK)
    assert mmi("generate", source, "-o", tmp_path / "out", *options).code == 0
    (record,) = json.loads((tmp_path / "out" / "results.json").read_text())
    given, first, image, last = record["segments"]
    assert (given["generated"], first["text"]) == (False, "It sat.")
    assert [s["turn"] for s in (first, image, last)] == [0, 1, 2]
    assert record["generate_results"][1:] == ["0_1_0.png", last["text"]]
    assert record["generate_results"][0] != "It sat."
    assert image["candidates"] == [image["image"]] == record["files"]


def test_each_document_is_prepared_once(mmi: Mmi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = []
    prepare = InterleavedGenerator.prepare

    def counted(self: InterleavedGenerator, document: Document, name: str) -> object:
        prepared.append(document.id)
        return prepare(self, document, name)

    monkeypatch.setattr(InterleavedGenerator, "prepare", counted)
    source = write(tmp_path, [story(1, n) for n in range(3)])
    assert mmi("generate", source, "-o", tmp_path / "out", "--batch-size", 2, *QUICK).code == 0
    assert prepared == ["story 0", "story 1", "story 2"]


def test_a_given_image_that_is_no_file_is_saved(mmi: Mmi, tmp_path: Path) -> None:
    buffer = io.BytesIO()
    make_image(2).save(buffer, "PNG")
    url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    source = write(tmp_path, {"segments": [{"text": "A cat."}, {"image": url}, {"image": None}]})
    assert mmi("generate", source, "-o", tmp_path / "out", *QUICK).code == 0
    (record,) = json.loads((tmp_path / "out" / "results.json").read_text())
    assert record["segments"][1] == {"image": "0_given_1.png", "generated": False}
    assert record["files"] == ["0_0_0.png", "0_given_1.png"]
    assert PIL.Image.open(tmp_path / "out" / "0_given_1.png").tobytes() == make_image(2).tobytes()


def test_same_seed_same_files(mmi: Mmi, tmp_path: Path) -> None:
    source = write(tmp_path, {"segments": [{"text": "A cat."}, {"image": None}, {"text": None}]})
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        assert mmi("generate", source, "-o", tmp_path / name, "--seed", seed, *QUICK).code == 0
    a, b, c = ({n: (tmp_path / d / n).read_bytes() for n in files(tmp_path / d)} for d in "abc")
    assert a == b
    assert a["0_0_0.png"] != c["0_0_0.png"]
    assert a["results.json"] != c["results.json"]


def test_a_batch_gives_what_single_documents_give(mmi: Mmi, tmp_path: Path) -> None:
    source = write(
        tmp_path, [story(1, 0), {"segments": [{"text": "Longer, this one is."}], "max_turns": 2}, story(2, 2)]
    )
    for name, size in (("one", 1), ("all", 3)):
        assert mmi("generate", source, "-o", tmp_path / name, "--batch-size", size, *QUICK).code == 0
    one, many = (json.loads((tmp_path / n / "results.json").read_text()) for n in ("one", "all"))
    assert [r["generate_results"] for r in one] == [r["generate_results"] for r in many]


def test_options_reach_the_generator(mmi: Mmi, tmp_path: Path) -> None:
    source = write(tmp_path, {"segments": [{"text": "A cat."}]})
    options = ["max_turns=5", "max_images=1", "force_image=true", "vary_noise=true", "do_sample=false", "--seed", 9]
    options += ["guidance_scale=2.5", "scheduler=DDIMScheduler", "text.min_new_tokens=1"]
    done = mmi("generate", source, "-o", tmp_path / "out", *options, *QUICK)
    assert done.code == 0, done.err
    (record,) = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [("image" if "image" in s else "text") for s in record["segments"]][1:] == ["text", "image"]
    assert record["finish_reason"] == "images"
    settings = record["run"]["settings"]
    assert settings["seed"] == 9
    assert settings["vary_noise"]
    assert settings["image"]["guidance_scale"] == 2.5
    assert settings["image"]["scheduler"] == "DDIMScheduler"
    assert settings["text"]["do_sample"] is False


# ---- again, and on


def test_results_are_not_written_over_by_accident(mmi: Mmi, tmp_path: Path) -> None:
    source = write(tmp_path, story(1))
    assert mmi("generate", source, "-o", tmp_path / "out", *QUICK).code == 0
    before = (tmp_path / "out" / "results.json").read_bytes()
    refused = mmi("generate", source, "-o", tmp_path / "out", *QUICK)
    assert refused.code == 1
    assert "--resume" in refused.err
    assert "--overwrite" in refused.err
    assert mmi("generate", source, "-o", tmp_path / "out", "--resume", "--overwrite", *QUICK).code == 1
    assert (tmp_path / "out" / "results.json").read_bytes() == before
    (tmp_path / "out" / "mine.txt").write_text("not ours to remove")
    other = write(tmp_path, {"segments": [{"text": "No image."}], "max_turns": 1}, "other.json")
    assert mmi("generate", other, "-o", tmp_path / "out", "--overwrite", *QUICK, "--seed", 1).code == 0
    assert "mine.txt" in files(tmp_path / "out")
    assert (tmp_path / "out" / "results.json").read_bytes() != before


def test_overwriting_removes_only_what_it_made_itself(mmi: Mmi, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "precious.png").write_bytes(b"x")
    write(tmp_path / "out", [{"files": ["../precious.png"]}], "results.json")
    assert mmi("generate", write(tmp_path, story(1)), "-o", tmp_path / "out", "--overwrite", *QUICK).code == 0
    assert (tmp_path / "precious.png").exists()


def test_a_foreign_results_file_is_left_alone(mmi: Mmi, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    path = write(tmp_path / "out", {"accuracy": 1}, "results.json")
    for flag in ("--resume", "--overwrite"):
        done = mmi("generate", write(tmp_path, story(1)), "-o", tmp_path / "out", flag, *QUICK)
        assert done.code == 1
        assert "not a results file" in done.err
    assert json.loads(path.read_text()) == {"accuracy": 1}


def test_a_stopped_run_goes_on_as_if_it_had_not_stopped(mmi: Mmi, tmp_path: Path) -> None:
    source = write(tmp_path, [story(1, n) for n in range(3)])
    assert mmi("generate", source, "-o", tmp_path / "whole", *QUICK).code == 0
    assert mmi("generate", source, "-o", tmp_path / "out", *QUICK).code == 0
    records = json.loads((tmp_path / "out" / "results.json").read_text())
    write(tmp_path / "out", records[:1], "results.json")  # as if the run had been stopped after the first document
    (tmp_path / "out" / "1_0_0.png").unlink()
    for change in (("--seed", 5), ("--dtype", "bfloat16")):
        other = mmi("generate", source, "-o", tmp_path / "out", "--resume", *QUICK, *change)
        assert other.code == 1
        assert re.search(rf"'{change[0][2:]}' was .* and is now .*cannot be resumed", other.err)
    done = mmi("generate", source, "-o", tmp_path / "out", "--resume", *QUICK)
    assert done.code == 0, done.err
    assert "1_0_0.png" in done.err
    assert "0_0_0.png" not in done.err
    for name in files(tmp_path / "whole"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_records_of_version_0_1_0_are_taken_up(mmi: Mmi, tmp_path: Path) -> None:
    """Their segments do not say in which turn they were generated, nor name their candidates."""
    documents = [{"segments": [{"text": "A cat."}, {"image": None}, {"text": None}, {"image": None}]}, story(1)]
    source, options = write(tmp_path, documents), ("num_candidates=2", *QUICK)
    assert mmi("generate", source, "-o", tmp_path / "whole", *options).code == 0
    shutil.copytree(tmp_path / "whole", tmp_path / "out")
    (record, _) = json.loads((tmp_path / "out" / "results.json").read_text())
    for segment in record["segments"]:
        segment.pop("turn", None)
        segment.pop("candidates", None)
    write(tmp_path / "out", [record], "results.json")
    done = mmi("generate", source, "-o", tmp_path / "out", "--resume", *options)
    assert done.code == 0, done.err
    for name in files(tmp_path / "whole"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    assert len(Page(tmp_path / "out" / "report.html").images) == 6


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
@pytest.mark.slow
def test_an_interrupt_in_the_middle_of_an_image(mmi: Mmi, tmp_path: Path, how: signal.Signals) -> None:
    out = tmp_path / "out"
    source = write(tmp_path, [story(1, 0), {**story(2, 1), "id": "long"}])
    slow = ("--model", "debug", "num_inference_steps=40")
    process = spawn("generate", source, "-o", out, *slow)
    try:
        deadline = time.monotonic() + 200
        while not (out / "1_0_0.png").exists():  # now it draws the second image of the second document
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(how)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == (130 if how == signal.SIGINT else -signal.SIGKILL)
    expected = {"0_0_0.png", "1_0_0.png", "results.json"}
    if how == signal.SIGINT:
        assert "interrupted" in err
        assert "Traceback" not in err
        expected.add("report.html")
    else:
        expected.add(LOCK)  # which locks nothing once its process is gone
    assert files(out) == expected
    assert len(json.loads((out / "results.json").read_text())) == 1
    for name in ("0_0_0.png", "1_0_0.png"):
        PIL.Image.open(out / name).load()
    if how == signal.SIGINT:
        assert mmi("generate", source, "-o", out, "--resume", *slow).code == 0
        assert files(out) == {"0_0_0.png", "1_0_0.png", "1_1_0.png", "results.json", "report.html"}


# ---- what cannot be done

BAD_INPUTS = {
    "empty file": ("", "empty"),
    "not JSON": ("{'a': 1}", "not JSON: .* at column 2"),
    "empty list": ("[]", "empty"),
    "unknown field": (
        '[{"segments": [{"text": "A."}]}, {"segments": [{"txt": "A."}]}]',
        r"record 1, .*'txt'.*Did you mean 'text'",
    ),
    "no image file": ('{"segments": [{"text": "A."}, {"image": "none.png"}]}', r"segments\[1\].*none.png"),
    "outside": ('{"segments": [{"image": "../../etc/passwd"}]}', r"segments\[0\].*outside"),
    "sentence out of range": (
        '{"sentences": ["A."], "images": ["0.png"], "sentence_ixs": [1], "image_first": [true]}',
        r"sentence_ixs\[0\].*no sentence 1",
    ),
    "more places than images": (
        '{"sentences": ["A."], "images": ["0.png"], "sentence_ixs": [0, 0], "image_first": [true, true]}',
        "1, 2 and 2 entries",
    ),
    "nothing but a field": ('{"id": "x"}', "segments"),
    "too long": (json.dumps({"segments": [{"text": "word " * 3000}]}), "tokens are more than the"),
    "a mode that is a list": (
        '{"sentences": ["A."], "images": ["0.png"], "sentence_ixs": [0], "image_first": [true], "generate_mode": []}',
        "generate_mode: must be a string, not a list",
    ),
    "a null character in a path": (r'[{"segments": [{"image": "a\u0000"}]}]', r"record 0, segments\[0\].*no name"),
    "a path without end": (json.dumps({"segments": [{"image": "a" * 300}]}), r"segments\[0\].*File name too long"),
    "a number without end": ('{"segments": [{"text": "A."}], "max_turns": ' + "9" * 5000 + "}", "number is too long"),
    "not even base64": (
        json.dumps({"segments": [{"image": "data:image/png;base64,\u00e9\u00e9"}]}), r"segments\[0\].image.*data URL",
    ),
    "half a character": (r'[{"segments": [{"text": "A \ud800."}]}]', r"\[0\]\.segments\[0\].*ud800.*position 2"),
    "a name with half a character": (r'{"segments": [{"text": "A."}], "id": "\udfff"}', r"id: lone surrogate"),
    "a field with half a character": (r'{"segments": [{"\udfff": "A."}]}', r"segments\[0\], a field's name: lone surr"),
    "a forced text with an image": (
        json.dumps({"segments": [{"text": "A."}], "forced_texts": ["B.", "See <|image|>"]}),
        r"forced_texts\[1\].*<\|image\|>.*very end",
    ),
    "a forced text that goes on after asking": (
        '{"sentences": ["A."], "images": ["0.png"], "sentence_ixs": [0], "image_first": [true], '
        '"multiround_context": ["B<|beginofimage|>C"]}', r"multiround_context\[0\].*beginofimage",
    ),
    "fifty images": (json.dumps({"segments": [{"image": "0.png"}] * 50}), "50 images are more than the 49"),
}  # fmt: skip


@pytest.mark.parametrize(("content", "words"), BAD_INPUTS.values(), ids=BAD_INPUTS)
def test_bad_input(mmi: Mmi, tmp_path: Path, content: str, words: str) -> None:
    make_image().save(tmp_path / "0.png")
    source = tmp_path / "input.json"
    source.write_text(content)
    done = mmi("generate", source, "-o", tmp_path / "out", *QUICK)
    assert done.code == 1
    assert done.err.startswith("error:")
    assert "input.json" in done.err
    assert re.search(words, done.err), done.err
    assert not files(tmp_path / "out")


def save_truncated(path: Path) -> None:
    make_image(size=(300, 200)).save(path)
    path.write_bytes(path.read_bytes()[:2000])


def save_huge(path: Path) -> None:
    PIL.Image.new("1", (20000, 20000)).save(path)


BAD_IMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda path: None, "does not exist"),
    "0 bytes": (lambda path: path.write_bytes(b""), "empty"),
    "truncated": (save_truncated, "cannot be decoded|truncated|damaged"),
    "not an image": (lambda path: path.write_text("hello"), "not an image"),
    "20000x20000": (save_huge, "179 million pixels"),
}


@pytest.mark.parametrize(("save", "words"), BAD_IMAGES.values(), ids=BAD_IMAGES)
def test_bad_images_are_known_before_the_work_begins(mmi: Mmi, tmp_path: Path, save: Callable, words: str) -> None:
    make_image().save(tmp_path / "good.png")
    save(tmp_path / "bad.png")
    good = {"segments": [{"image": "good.png"}, {"text": None}]}
    bad = {"segments": [{"text": "A."}, {"image": "bad.png"}, {"text": None}]}
    done = mmi("generate", write(tmp_path, [good, bad]), "-o", tmp_path / "out", *QUICK)
    assert done.code == 1
    assert "record 1, segments[1]" in done.err
    assert "bad.png" in done.err
    assert re.search(words, done.err), done.err
    assert not files(tmp_path / "out")


def save_animation(path: Path) -> None:
    make_image(0).save(path, "GIF", save_all=True, append_images=[make_image(1)], duration=50)


ODD_IMAGES: dict[str, Callable[[Path], object]] = {
    "1x1": lambda path: make_image(size=(1, 1)).save(path, "PNG"),
    "CMYK": lambda path: make_image().convert("CMYK").save(path, "JPEG"),
    "palette": lambda path: make_image().convert("P").save(path, "PNG"),
    "16 bit": lambda path: PIL.Image.new("I;16", (9, 9), 40000).save(path, "PNG"),
    "animated": save_animation,
    "grey": lambda path: make_image().convert("L").save(path, "PNG"),
    "alpha": lambda path: make_image().convert("RGBA").save(path, "PNG"),
}


def test_odd_images_are_read_and_shown(mmi: Mmi, tmp_path: Path) -> None:
    for number, save in enumerate(ODD_IMAGES.values()):
        save(tmp_path / f"{number}.png")
    documents = [{"segments": [{"image": f"{n}.png"}, {"text": None}]} for n in range(len(ODD_IMAGES))]
    done = mmi("generate", write(tmp_path, documents), "-o", tmp_path / "out", *QUICK)
    assert done.code == 0, done.err
    assert len(Page(tmp_path / "out" / "report.html").images) == len(ODD_IMAGES)


BAD_OPTIONS = {
    "a wrong flag": (["--bogus"], 2, "No such option"),
    "no number": (["num_inference_steps=many"], 1, "num_inference_steps must be a whole number, not 'many'"),
    "no steps": (["num_inference_steps=0"], 1, "num_inference_steps must be at least 1, not 0"),
    "no candidates": (["num_candidates=0"], 1, "num_candidates must be at least 1"),
    "an endless temperature": (["do_sample=true", "temperature=.inf"], 1, "temperature must be a finite number"),
    "a penalty that is no number": (["repetition_penalty=.nan"], 1, "repetition_penalty must be a finite number"),
    "half a token": (["max_new_tokens=2.5"], 1, "max_new_tokens must be a whole number, not 2.5"),
    "no beams": (["num_beams=0"], 1, "num_beams must be at least 1"),
    "beams of another kind": (["num_beams=many"], 1, "num_beams must be a whole number"),
    "cold": (["temperature=0"], 1, "temperature must be at least 1e-6"),
    "no such setting": (["max_new_token=3"], 1, "unknown setting 'max_new_token'. Did you mean 'max_new_tokens'"),
    "no such setting of images": (["image.step=3"], 1, "unknown key 'step'.*Known: num_inference_steps"),
    "a part that is no mapping": (["text=short"], 1, "text must be a mapping of settings, not 'short'"),
    "no setting at all": (["quick"], 1, "override 'quick' must have the form key=value"),
    "a setting without a value": (["max_new_tokens="], 1, "'max_new_tokens' has no value"),
    "no such preset": (["--preset", "poem"], 1, "--preset must be one of .*caption.*, not .poem."),
    "no such image preset": (["--image-preset", "quick"], 1, "--image-preset must be one of .*unipc-20, not .quick."),
    "no such scheduler": (["scheduler=Magic"], 1, "'Magic'.*DDPMScheduler"),
    "a scheduler for flows": (["scheduler=FlowMatchEulerDiscreteScheduler"], 1, "another kind of diffusion"),
    "more steps than there are": (["num_inference_steps=2000"], 1, "num_inference_steps.*1000"),
    "more steps than memory": (
        ["num_inference_steps=2000000000", "scheduler=DDIMScheduler"],
        1,
        "num_inference_steps.*1000",
    ),
    "too few steps for the scheduler": (["num_inference_steps=1", "scheduler=PNDMScheduler"], 1, "PNDMScheduler.*=1"),
    "an enormous seed": (["--seed", str(10**30)], 1, "seed.*less than"),
    "a negative seed": (["--seed", "-1"], 1, "seed must be at least 0"),
    "no guidance at all": (["guidance_scale=.nan"], 1, "guidance_scale must be a finite number"),
    "no such type": (["--dtype", "float7"], 1, "bfloat16.*float7"),
    "no such quantization": (["--quantization", "int3"], 1, "int8, fp8, int4, nf4.*'int3'"),
    "no such device": (["--device", "abacus"], 1, "abacus.*cuda:1"),
    "a device that is not there": (["--device", "cuda:63"], 1, "cuda:63.*not there"),
    "no documents at a time": (["--batch-size", "0"], 2, "batch-size"),
}


@pytest.mark.parametrize(("options", "code", "words"), BAD_OPTIONS.values(), ids=BAD_OPTIONS)
def test_bad_options(mmi: Mmi, tmp_path: Path, options: list[str], code: int, words: str) -> None:
    done = mmi("generate", write(tmp_path, story(1)), "-o", tmp_path / "out", *QUICK, *options)
    assert done.code == code
    assert re.search(words, done.err), done.err
    assert not files(tmp_path / "out")


def test_the_output_folder_cannot_be_written(mmi: Mmi, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    done = mmi("generate", write(tmp_path, story(1)), "-o", tmp_path / "file" / "out", *QUICK)
    assert done.code == 1
    assert f"{tmp_path / 'file' / 'out'}: cannot be written: '{tmp_path / 'file'}' is a file" in done.err
    assert (tmp_path / "file").read_text() == "in the way"


def test_models_that_are_not_there(mmi: Mmi, tmp_path: Path) -> None:
    source = write(tmp_path, story(1))
    (tmp_path / "empty").mkdir()
    (tmp_path / "odd").mkdir()
    write(tmp_path / "odd", {"model_type": "bert"}, "config.json")
    for folder, words in (
        ("none", "no folder has this name"),
        ("empty", "has no config.json"),
        ("odd", "cannot be loaded"),
    ):
        done = mmi("generate", source, "-o", tmp_path / "out", "--model", tmp_path / folder)
        assert done.code == 1
        assert words in done.err, done.err
        assert "Traceback" not in done.err
    assert not files(tmp_path / "out")


def change_config(*keys: str, value: Any = None) -> Callable[[Path], object]:
    """Something that sets a value in a model's config.json, or takes it out."""

    def change(folder: Path) -> None:
        tree = inner = json.loads((folder / "config.json").read_text())
        for key in keys[:-1]:
            inner = inner[key]
        inner[keys[-1]] = value
        if value is None:
            del inner[keys[-1]]
        write(folder, tree, "config.json")

    return change


def cut(name: str, size: int) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size])


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "weights cut in the header": (cut("model.safetensors", 5000), "model.safetensors' is damaged or cut short"),
    "weights cut in the data": (cut("model.safetensors", 500_000), "model.safetensors' is damaged or cut short"),
    "weights of 0 bytes": (cut("model.safetensors", 0), "model.safetensors' is damaged or cut short"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "holds no .safetensors"),
    "config of 0 bytes": (cut("config.json", 0), "config.json: empty, where JSON was expected"),
    "config is a list": (lambda folder: write(folder, [], "config.json"), "config.json: must be an object, not a list"),
    "no text_config": (change_config("text_config"), "config.json'.*it lacks 'text_config'"),
    "text_config is a list": (change_config("text_config", value=[]), "config.json'.*'text_config' must be an object"),
    "a size is text": (change_config("vision_config", "image_size", value="56"), "config.json'.*'image_size'"),
    "a size of zero": (change_config("vision_config", "patch_size", value=0), "config.json' cannot be used"),
    "an empty UNet": (change_config("image_decoder", "unet", value={}), "config.json'.*lacks 'cross_attention_dim'"),
    "a wrong pattern": (change_config("frozen", value=["("]), "config.json'.*frozen.*regular expression"),
    "no layer sees images": (change_config("mmfs_every", value=0), "config.json'.*mmfs_every"),
    "tokenizer cut": (cut("tokenizer.model", 20), "processor of .*tokenizer.model"),
    "no tokenizer": (lambda folder: (folder / "tokenizer.model").unlink(), "lacks a vocabulary .tokenizer.model"),
    "no processor": (lambda folder: (folder / "processor_config.json").unlink(), "lacks processor_config"),
    "generation_config of half": (
        lambda folder: (folder / "generation_config.json").write_text('{"eos_tok'), "generation_config"
    ),
    "a misspelled key": (change_config("mmfs_evry", value=2), "config.json'.*'mmfs_evry'. Did you mean 'mmfs_every'"),
    "another kind": (change_config("model_type", value="llama"), "config.json'.*model_type is 'llama'"),
    "another shape": (change_config("mmfs", "max_images", value=9), r"another shape.*: \[\d+, \d+\] instead of \[9, "),
    "processor is a list": (lambda folder: write(folder, [], "processor_config.json"), "the processor of"),
}  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, loaded = tmp_path_factory.mktemp("checkpoint"), load("debug")
    loaded.model.save_pretrained(folder)
    loaded.processor.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("damage", "words"), DAMAGES.values(), ids=DAMAGES)
def test_damaged_models(mmi: Mmi, tmp_path: Path, checkpoint: Path, damage: Callable, words: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(checkpoint, folder)
    damage(folder)
    done = mmi("generate", write(tmp_path, story(1)), "-o", tmp_path / "out", *QUICK[2:], "--model", folder)
    assert done.code == 1
    assert re.search(words, done.err), done.err
    assert not files(tmp_path / "out")
    if "config.json" in words:
        shown = mmi("info", folder)
        assert shown.code == 1
        assert re.search(words, shown.err), shown.err


def test_loading_shows_that_it_goes_on(mmi: Mmi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    for module in ("generate", "models"):
        command = importlib.import_module(f"mm_interleaved.cli.{module}")
        monkeypatch.setattr(command, "console", Console(file=screen, force_terminal=True))
    assert mmi("generate", write(tmp_path, story(1)), "-o", tmp_path / "out", *QUICK).code == 0
    assert "loading debug" in screen.getvalue()


def test_images_may_come_from_a_folder_that_was_named(mmi: Mmi, tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    make_image().save(tmp_path / "a.png")
    source = write(tmp_path / "texts", {"segments": [{"image": "../a.png"}, {"text": None}]})
    refused = mmi("generate", source, "-o", tmp_path / "out", *QUICK)
    assert refused.code == 1
    assert "--image-root" in refused.err
    done = mmi("generate", source, "-o", tmp_path / "out", "--image-root", tmp_path, *QUICK)
    assert done.code == 0, done.err

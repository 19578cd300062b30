"""`mmi chat` with a scripted user."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import PIL.Image
import pytest

from mm_interleaved.cli.chat import inline_image

from ..conftest import make_image
from .conftest import Outcome

FEW = ("max_new_tokens=4", "min_new_tokens=1", "num_inference_steps=2", "max_turns=1")


@pytest.fixture
def chat(mmi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """`mmi chat` of the debug model, with these lines typed."""

    def call(*lines: str, options: tuple[str, ...] = FEW) -> Outcome:
        monkeypatch.chdir(tmp_path)
        typed = iter(lines)

        def answer(prompt: str = "") -> str:
            try:
                return next(typed)
            except StopIteration:
                raise EOFError from None

        monkeypatch.setattr("builtins.input", answer)
        return mmi("chat", "--model", "debug", *options)

    return call


def test_a_document_is_written_and_saved(chat, tmp_path: Path) -> None:
    make_image(3).save(tmp_path / "my cat.png")
    shown = chat("/image 'my cat.png'", "what is it?", "/draw a dog", "/save story", "/quit", "never read")
    assert shown.code == 0
    assert "chat/001.png" in shown.out
    assert PIL.Image.open(tmp_path / "chat" / "001.png").size[0] > 0
    segments = json.loads((tmp_path / "story" / "document.json").read_text())["segments"]
    assert [next(iter(segment)) for segment in segments] == ["image", "text", "text", "text", "image"]
    assert segments[1]["text"] == "what is it?"
    assert (tmp_path / "story" / segments[0]["image"]).is_file()


def test_mistakes_do_not_end_it(chat, tmp_path: Path) -> None:
    shown = chat("/draw", "/imag x", "/image nothing.png", "/save", "so", "/save a", "/save a", "/reset", "/help")
    assert shown.code == 0
    for words in ("nothing to draw yet", "Did you mean '/image'?", "nothing.png' does not exist", "needs a folder",
                  "(saved in a)", "already", "(a new document)"):  # fmt: skip
        assert words in shown.err + shown.out, words


def test_settings_are_checked_before_the_model_is_used(chat) -> None:
    shown = chat("hello", options=("max_tokns=3",))
    assert shown.code == 1
    assert "unknown setting 'max_tokns'. Did you mean 'max_tokens'?" in shown.err


@pytest.mark.parametrize("protocol", ["iterm", "kitty"])
def test_images_for_terminals(protocol: str) -> None:
    image = PIL.Image.effect_noise((90, 80), 99).convert("RGB")
    sequence = inline_image(image, protocol)
    if protocol == "iterm":
        data = sequence.partition(":")[2].removesuffix("\a")
    else:
        pieces = [piece.partition(";") for piece in sequence.removesuffix("\x1b\\").split("\x1b\\")]
        assert [("m=1" in head) for head, _, _ in pieces] == [True] * (len(pieces) - 1) + [False]
        assert max(len(piece) for _, _, piece in pieces) <= 4096
        data = "".join(piece for _, _, piece in pieces)
    assert base64.b64decode(data).startswith(b"\x89PNG")

"""Adapters that requests choose by name: each gives what it gives when it is loaded alone."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from mm_interleaved import Document, GenerationSettings, Image, ImageSettings, Text, TextSettings
from mm_interleaved.adapters.loading import load_choices
from mm_interleaved.generation import InterleavedGenerator
from mm_interleaved.pretrained import load
from mm_interleaved.serving.engine import GenerationRequest, ImageDone, TextDone
from mm_interleaved.serving.model import ModelEngine

from ..generation.test_interleaved import run, same
from .make_adapter import make

SETTINGS = GenerationSettings(TextSettings(max_new_tokens=6, num_beams=1), ImageSettings(num_inference_steps=2))


def document() -> Document:
    return Document([Text("a red house on a hill"), Text(), Image()])


@pytest.fixture
def folders(base: Path, tmp_path: Path) -> dict[str, Path]:
    for seed, name in enumerate(("one", "two")):
        make(base, tmp_path / name, seed=seed)
    return {name: tmp_path / name for name in ("one", "two")}


@pytest.mark.slow
def test_requests_choose_an_adapter(base: Path, folders: dict[str, Path]) -> None:
    loaded = load(base)
    switches = load_choices(loaded.model, folders, loaded.processor)
    engine = ModelEngine(loaded.model, loaded.processor, "base", rows=2,
                         adapters={n: switches[n] for n in folders}, without_adapter=switches[None])  # fmt: skip

    async def ask(name: str | None) -> list[Any]:
        stream = await engine.submit(GenerationRequest(document(), SETTINGS, name))
        return [e.text if isinstance(e, TextDone) else e.images[0] async for e in stream
                if isinstance(e, (TextDone, ImageDone))]  # fmt: skip

    async def whole() -> list[list[Any]]:
        await engine.start()
        try:
            return await asyncio.gather(*map(ask, (None, "one", "two", "one", None)))
        finally:
            await engine.stop(1.0)

    answers = asyncio.run(whole())
    for name, (text, image) in zip((None, "one", "two", "one", None), answers, strict=True):
        alone = load(base, adapters=[] if name is None else [folders[name]])
        (_,), (end,) = run(InterleavedGenerator(alone.model, alone.processor, SETTINGS), [document()])
        expected = end.result.generated
        assert text == expected[0].text
        assert same(image, expected[1].source)
    assert len({text for text, _ in answers}) == 3


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["--choice", "x"], "must be NAME=FOLDER"), (["--choice", "debug=a"], "is taken"),
     (["--choice", "x=nothing"], "nothing"), (["--choice", "x=a", "--adapter", "b"], "b")],
)  # fmt: skip
def test_choices_that_cannot_be_served(mmi, arguments: list[str], words: str) -> None:
    shown = mmi("serve", "--model", "debug", *arguments)
    assert shown.code == 1
    assert words in shown.err

"""`mmi info`, and what `mmi` says about itself."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from mm_interleaved import MMInterleaved, MMInterleavedConfig

from .conftest import Outcome

Mmi = Callable[..., Outcome]


@pytest.mark.slow
def test_the_release_needs_no_weights(mmi: Mmi) -> None:
    shown = mmi("info", "release")
    assert shown.code == 0, shown.err
    for words in (
        "language_model",
        "image_decoder",
        "trainable",
        "bfloat16",
        "a token, 5 images visible",
        "30 steps",
    ):
        assert words in shown.out
    numbers = json.loads(mmi("info", "release", "--json").out)
    assert numbers["parts"][0]["total"] == 14_868_037_913  # what is stored; tables that follow from the sizes are not
    assert numbers["token_with_images"] > numbers["token"] > 1e10
    gib = {kind: round(size / 2**30, 1) for kind, size in numbers["weight_bytes"].items()}
    assert gib == {"float32": 55.4, "bfloat16": 27.7, "int8": 15.9, "fp8": 15.9, "int4": 10.4, "nf4": 10.2}
    assert all(f"{size:.1f} GiB" in shown.out for size in gib.values())


def test_small_is_small(mmi: Mmi) -> None:
    numbers = json.loads(mmi("info", "small", "--json").out)
    assert 12e6 <= numbers["parts"][0]["total"] <= 16e6


def test_a_checkpoint(mmi: Mmi, tmp_path: Path, model: MMInterleaved) -> None:
    model.save_pretrained(tmp_path / "model")
    numbers = json.loads(mmi("info", tmp_path / "model", "--json").out)
    assert numbers["parts"][0]["total"] == sum(p.numel() for p in model.parameters())


@pytest.mark.slow
def test_more_images_and_steps_cost_more(mmi: Mmi) -> None:
    few, many = (json.loads(mmi("info", "debug", "--json", *o).out) for o in ((), ("--images", 9, "--steps", 60)))
    assert many["token_with_images"] > few["token_with_images"]
    assert many["draw_image"] > few["draw_image"]
    assert many["token"] == few["token"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nothing"], "neither a preset"),
        (["smal"], "'small'?"),
        (["debug", "--images", "500"], "--images must be at most"),
        (["BROKEN"], "cannot be used"),
    ],
)
def test_what_cannot_be_shown(mmi: Mmi, tmp_path: Path, arguments: list[str], words: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(MMInterleavedConfig.preset("debug").to_dict())[:-9])
    shown = mmi("info", *[str(tmp_path) if a == "BROKEN" else a for a in arguments])
    assert shown.code == 1
    assert words in shown.err


def test_help_names_the_commands(mmi: Mmi) -> None:
    shown = mmi("--help")
    assert shown.code == 0
    for name in ("generate", "info", "convert", "download", "assemble"):
        assert name in shown.out
        assert mmi(name, "--help").code == 0


def test_an_unknown_command(mmi: Mmi) -> None:
    shown = mmi("evalute")
    assert shown.code == 2  # as of a wrong option
    assert "unknown command 'evalute'. Did you mean 'evaluate'?" in " ".join(re.sub("[│╭╮╰╯─]", " ", shown.err).split())

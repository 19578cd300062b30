"""Settings: what is converted, and what is refused in words that name the setting."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, fields

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mm_interleaved import GenerationSettings, ImageSettings, TextSettings
from mm_interleaved.generation.settings import override

KINDS = [TextSettings, ImageSettings, GenerationSettings]
FLAGS = [(kind, f.name) for kind in KINDS for f in fields(kind) if isinstance(getattr(kind(), f.name), bool)]
FLOATS = [(kind, f.name) for kind in KINDS for f in fields(kind) if isinstance(getattr(kind(), f.name), float)]
COUNTS = [
    (kind, f.name)
    for kind in KINDS
    for f in fields(kind)
    if ((kind, f.name) not in FLAGS and type(getattr(kind(), f.name)) is int) or f.name.startswith("max_")
]
NUMBERS = [*FLOATS, *COUNTS, (ImageSettings, "guidance_scale")]


def test_every_numeric_setting_has_a_range() -> None:
    assert len(NUMBERS) == 20
    for kind, name in NUMBERS:
        with pytest.raises(ValueError, match=rf"^{name} must be "):
            kind(**{name: -(2**80)})


@pytest.mark.parametrize(("kind", "name"), NUMBERS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, "3", True, np.bool_(True), [1], 10**400, 1j])
def test_what_is_no_number_is_refused(kind: type, name: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"^{name} must be "):
        kind(**{name: value})


@pytest.mark.parametrize(("kind", "name"), COUNTS)
@pytest.mark.parametrize("value", [2.5, 3.0, np.float64(3), 2**63, torch.tensor(True), torch.tensor([1, 2])])
def test_counts_are_whole_numbers(kind: type, name: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"^{name} must be "):
        kind(**{name: value})


@pytest.mark.parametrize(("kind", "name"), COUNTS)
@pytest.mark.parametrize("value", [np.int64(3), np.uint8(3), torch.tensor(3)])
def test_whole_numbers_of_numpy_and_torch_are_stored_as_int(kind: type, name: str, value: object) -> None:
    stored = getattr(kind(**{name: value}), name)
    assert type(stored) is int
    assert stored == 3


def test_floats_of_numpy_are_stored_as_float() -> None:
    settings = TextSettings(
        do_sample=True, num_beams=1, temperature=np.float32(0.5), top_p=np.float64(0.25), length_penalty=2
    )
    assert (settings.temperature, settings.top_p, settings.length_penalty) == (0.5, 0.25, 2.0)
    assert {type(settings.temperature), type(settings.top_p), type(settings.length_penalty)} == {float}
    assert type(ImageSettings(guidance_scale=np.float16(3)).guidance_scale) is float
    json.dumps(asdict(GenerationSettings(text=settings, seed=np.int64(7), max_turns=np.int32(2))))


@pytest.mark.parametrize(("kind", "name"), FLAGS)
def test_flags_are_true_or_false(kind: type, name: str) -> None:
    assert getattr(kind(**{name: np.bool_(False)}), name) is False
    for value in (1, 0.0, "yes", None if name != "stop_at_eos" else "no"):
        with pytest.raises(ValueError, match=f"^{name} must be true or false"):
            kind(**{name: value})


@pytest.mark.parametrize(
    ("kind", "change", "words"),
    [
        (TextSettings, {"max_new_tokens": 0}, "max_new_tokens must be at least 1, not 0"),
        (TextSettings, {"temperature": 0}, "temperature must be at least 1e-6, not 0.*Set do_sample=False"),
        (TextSettings, {"top_p": 0}, "top_p must be greater than 0, not 0"),
        (TextSettings, {"top_p": 1.5}, "top_p"),
        (TextSettings, {"length_penalty": 1e9}, "length_penalty must be at most 10, not 1000000000.0"),
        (TextSettings, {"cache_implementation": 1}, "must be 'auto', 'static' or 'dynamic', not 1"),
        (ImageSettings, {"scheduler": 3}, "scheduler must be a string, not 3"),
        (ImageSettings, {"seed": 2**63}, f"seed must be less than {2**63}, not {2**63}"),
        (ImageSettings, {"seed": -1}, "seed must be at least 0"),
        (ImageSettings, {"seed": None}, "seed must be a whole number, not None"),
        (GenerationSettings, {"text": {}}, "text must be an instance of TextSettings, not {}"),
        (GenerationSettings, {"image": TextSettings()}, "image must be an instance of ImageSettings, not TextSettings"),
        (GenerationSettings, {"max_turns": 0}, "max_turns must be at least 1"),
    ],
)  # fmt: skip
def test_messages(kind: type, change: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        kind(**change)


@given(st.integers(-(2**70), 2**70))
def test_seeds_are_what_generators_take(seed: int) -> None:
    if 0 <= seed < 2**63:
        torch.Generator().manual_seed(GenerationSettings(seed=seed).seed + 1)
    else:
        with pytest.raises(ValueError, match="seed must be"):
            GenerationSettings(seed=seed)


@given(st.floats(allow_nan=True, allow_infinity=True))
def test_accepted_temperatures_keep_scores_finite(temperature: float) -> None:
    """A temperature near 0 would turn scores into infinities, and their softmax into NaN."""
    if 1e-6 <= temperature < math.inf:
        scores = torch.tensor([[-1e4, 0.0, 1e4]]) / TextSettings(temperature=temperature).temperature
        assert scores.softmax(-1).isfinite().all()
        return
    with pytest.raises(ValueError, match=r"^temperature must be"):
        TextSettings(temperature=temperature)


def test_settings_cannot_be_changed_past_the_checks() -> None:
    for settings in (TextSettings(), ImageSettings(), GenerationSettings()):
        with pytest.raises(AttributeError):
            settings.cache_implementation = "anything"


def test_an_unknown_setting_names_the_nearest_one() -> None:
    with pytest.raises(ValueError, match=r"unknown setting 'max_new_token'. Did you mean 'max_new_tokens'\?"):
        override(GenerationSettings(), max_new_token=3)


def test_changes_are_checked_as_settings() -> None:
    assert override(GenerationSettings(), seed=np.int64(3)).image.seed == 3
    with pytest.raises(ValueError, match=r"top_k must be a whole number, not 2\.5"):
        override(GenerationSettings(), top_k=2.5)
    with pytest.raises(ValueError, match=r"min_new_tokens must be a whole number, not '8'"):
        override(GenerationSettings(), min_new_tokens="8")

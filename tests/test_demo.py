"""`make demo` gives what it gave when its weights were committed (`tests/demo`)."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from .cli.conftest import Outcome, mmi

__all__ = ["mmi"]
ROOT = Path(__file__).parents[1]
WRITTEN = ROOT / "tests/demo"
Mmi = Callable[..., Outcome]
BOUND = 2  # of 255; how far images may be apart


@pytest.mark.slow
def test_the_demo_is_what_it_was(tmp_path: Path, mmi: Mmi) -> None:
    """Texts exactly, images within two steps of 255."""
    done = mmi("generate", ROOT / "examples/demo.json", "-o", tmp_path / "demo", "--seed", 7, "--device", "cpu")
    assert done.code == 0, done.err
    was, now = (
        [_texts(record) for record in json.loads((folder / "results.json").read_text())]
        for folder in (WRITTEN, tmp_path / "demo")
    )
    assert now == was
    assert sum(map(len, was)) >= 5
    images = sorted(path.relative_to(WRITTEN) for path in WRITTEN.rglob("*.png"))
    assert images == sorted(path.relative_to(tmp_path / "demo") for path in (tmp_path / "demo").rglob("*.png"))
    assert len(images) == 5
    differences = {str(name): _apart(WRITTEN / name, tmp_path / "demo" / name) for name in images}
    assert max(differences.values()) <= BOUND, differences


def _texts(record: dict[str, Any]) -> list[str]:
    """The texts of a finished document, given and written."""
    return [segment["text"] for segment in record["segments"] if segment.get("text") is not None]


def _apart(a: Path, b: Path) -> int:
    """The largest difference of two images, of 255."""
    x, y = (np.asarray(PIL.Image.open(path).convert("RGB")).astype(int) for path in (a, b))
    assert x.shape == y.shape
    return int(np.abs(x - y).max())

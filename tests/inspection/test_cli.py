"""`mmi inspect`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import PIL.Image
import pytest

from mm_interleaved.inspection import load_inspection

from ..cli.conftest import Outcome, mmi
from ..conftest import make_image

__all__ = ["mmi"]
FAST = ["--model", "debug", "--preset", "default", "num_beams=1", "max_new_tokens=4", "num_inference_steps=2"]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    for number in range(2):
        make_image(number).save(tmp_path / f"{number}.png")
    segments = [{"image": "0.png"}, {"text": "<a>"}, {"image": "1.png"}, {"text": None}, {"image": None}]
    path = tmp_path / "documents.json"
    path.write_text(json.dumps([{"segments": [{"text": "a"}]}, {"segments": segments}]))
    return path


def test_everything_is_written(mmi: Callable[..., Outcome], source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    said = mmi("inspect", str(source), "--document", "2", "-o", str(folder), "--compare", "1", "2", "--cells", "4",
               "--region", "0,0,0.5,0.5", *FAST)  # fmt: skip
    assert said.code == 0, said.err
    assert "image 1" in said.out
    found = load_inspection(folder)
    assert [r.images for r in found.texts] == [[1, 0]]
    assert found.images[0].images == [1]
    words, image = len(found.texts[0].words), found.images[0].segment
    heat = sorted(path.name for path in (folder / "heat").iterdir())
    assert len(heat) == 2 * words + 1
    assert f"{image}-{words:03}-0.00,0.00,0.50,0.50-image2.png" in heat
    assert PIL.Image.open(folder / "heat" / heat[0]).size == (240, 240)
    comparison = json.loads((folder / "comparison.json").read_text())
    assert comparison["images"] == [1, 2]
    for unit in comparison["units"]:
        assert sum(unit["shares"]) + unit["ignored"] == pytest.approx(1, abs=1e-5)
    page = (folder / "inspection.html").read_text()
    assert '"compared":[0,1]' in page
    assert "&lt;a&gt;" not in page  # the text is data, which the page's script writes as text
    assert "\\u003ca>" in page


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--layers", "1"], "layers: there is no 1. There are 0"),
        (["--heads", "a"], "--heads takes numbers separated by commas"),
        (["--region", "0,0,2,1"], "--region takes X0,Y0,X1,Y1 from 0 to 1"),
        (["--compare", "1", "1"], "--compare takes the numbers of two different images"),
        (["--compare", "1", "9"], "compare: nothing that was generated sees both image 1 and image 9"),
        (["--words", "nothing"], "words: the word 'nothing' was not generated"),
        (["--levels", "5"], "levels: there is no level of 5"),
        (["--document", "3"], "has 2 documents; there is no number 3"),
        (["--steps", "7"], "steps: there is no 7"),
        (["scheduler=HeunDiscreteScheduler", "num_inference_steps=1001"], "num_inference_steps=1001"),
    ],
)
def test_what_cannot_be_used(
    mmi: Callable[..., Outcome], source: Path, tmp_path: Path, options: list[str], message: str
) -> None:
    said = mmi("inspect", str(source), "--document", "2", "-o", str(tmp_path / "out"), *FAST, "max_turns=1", *options)
    assert said.code == 1
    assert message in " ".join(said.err.split())
    assert not (tmp_path / "out").exists()


def test_only_an_inspection_is_replaced(mmi: Callable[..., Outcome], source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "mine.txt").write_text("mine")
    said = mmi("inspect", str(source), "-o", str(folder), "--overwrite", *FAST)
    assert "is not an inspection" in " ".join(said.err.split())
    assert (folder / "mine.txt").read_text() == "mine"
    (folder / "mine.txt").unlink()
    assert mmi("inspect", str(source), "-o", str(folder), "--places", "none", *FAST, "max_turns=1").code == 0
    again = mmi("inspect", str(source), "-o", str(folder), *FAST, "max_turns=1")
    assert "--overwrite replaces it" in " ".join(again.err.split())

"""The most similar examples by CLIP, and their use as few-shot examples."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from mm_interleaved.document import Text
from mm_interleaved.io import InputError
from mm_interleaved.metrics.clip import CLIP
from mm_interleaved.tasks import TaskConfig, make_task
from mm_interleaved.tasks.neighbours import find_neighbours

from ..cli.conftest import Outcome, mmi
from ..conftest import make_image
from ..metrics.test_clip import clip

__all__ = ["clip", "mmi"]
PROMPT = "{examples}{image}{question}"
COLORS = {1: 1, 2: 2, 3: 3, 11: 2, 12: 3, 13: 7, 14: 1}  # images 1 to 3 of val are those of train with the same seed


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """VQAv2 in the official layout: a question for each image of val, two for each of train."""
    root = tmp_path / "datasets"
    (root / "VQAv2").mkdir(parents=True)
    for phase, images in (("val", (1, 2, 3)), ("train", (11, 12, 13, 14))):
        (root / f"coco/{phase}2014").mkdir(parents=True)
        for number in images:
            path = root / f"coco/{phase}2014/COCO_{phase}2014_{number:012d}.jpg"
            make_image(COLORS[number], (40, 40)).save(path, quality=100)
        asked = [(number, 10 * number + k) for number in images for k in range(1 if phase == "val" else 2)]
        questions = [{"image_id": image, "question_id": key, "question": f"Question {key}?"} for image, key in asked]
        answers = [{"answer": f"answer {key}"} for _, key in asked]
        annotations = [{"question_id": key, "answers": [answer] * 10}
                       for (_, key), answer in zip(asked, answers, strict=True)]  # fmt: skip
        (root / f"VQAv2/v2_OpenEnded_mscoco_{phase}2014_questions.json").write_text(
            json.dumps({"questions": questions})
        )
        (root / f"VQAv2/v2_mscoco_{phase}2014_annotations.json").write_text(json.dumps({"annotations": annotations}))
    return root


def expected(root: Path, clip: CLIP, sample: int, count: int) -> list[str]:
    """Both questions of each image of train, by the cosine with an image of val."""
    images = {n: root / f"coco/train2014/COCO_train2014_{n:012d}.jpg" for n in (11, 12, 13, 14)}
    own = clip.embed_images([root / f"coco/val2014/COCO_val2014_{sample:012d}.jpg"])[0]
    cosine = {n: float(clip.embed_images([path])[0] @ own) for n, path in images.items()}
    return [str(10 * n + k) for n in sorted(images, key=lambda n: -cosine[n]) for k in range(2)][:count]


def test_a_list_for_every_sample(root: Path, clip: CLIP) -> None:
    task = make_task(TaskConfig("vqav2", root=str(root)))
    found = find_neighbours(task, clip, 5)
    assert found == {str(10 * n): expected(root, clip, n, 5) for n in (1, 2, 3)}
    assert [found[key][:2] for key in ("10", "20", "30")] == [["140", "141"], ["110", "111"], ["120", "121"]]


def test_examples_of_the_same_phase_have_other_images(root: Path, clip: CLIP) -> None:
    config = TaskConfig("vqav2", root=str(root), phase="train", shot_phase="train")
    found = find_neighbours(make_task(config), clip, 6)
    assert len(found) == 8
    for key, others in found.items():
        assert len(others) == len(set(others)) == 6
        assert key[:2] not in {other[:2] for other in others}
    with pytest.raises(InputError, match="fewer than 7 examples have another image"):
        find_neighbours(make_task(config), clip, 7)


def test_damaged_images_stop_nothing(root: Path, clip: CLIP) -> None:
    """A damaged example is left out; a sample with a damaged or missing image has some list, as prompts need one."""
    (root / "coco/train2014/COCO_train2014_000000000014.jpg").write_bytes(b"\xff\xd8\xff")
    (root / "coco/val2014/COCO_val2014_000000000001.jpg").unlink()
    (root / "coco/val2014/COCO_val2014_000000000002.jpg").write_bytes(b"\xff\xd8\xff")
    found = find_neighbours(make_task(TaskConfig("vqav2", root=str(root))), clip, 2)
    assert found == {"10": ["110", "111"], "20": ["110", "111"], "30": ["120", "121"]}
    with pytest.raises(InputError, match="7 examples are wanted for each sample, but only 6 can be used"):
        find_neighbours(make_task(TaskConfig("vqav2", root=str(root))), clip, 7)


def test_the_command_writes_what_the_setting_reads(
    root: Path, clip: CLIP, mmi: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(root.parent)
    said = mmi("data", "neighbours", "vqav2", "--clip", clip.folder, "--count", "3", "--output", "near.json")
    assert said.code == 0, said.err
    assert "near.json: 3 examples for each of 3 samples" in said.out
    config = TaskConfig("vqav2", root=str(root), shots=2, neighbours="near.json", prompt=PROMPT)
    for sample, number in zip(make_task(config).samples(), (1, 2, 3), strict=True):
        first, second = expected(root, clip, number, 2)
        text = " ".join(s.text or "" for s in sample.document.segments if isinstance(s, Text))
        assert text.index(f"Question {second}?") < text.index(f"Question {first}?")  # the most similar last
        assert f"answer {first}" in text
    for arguments, words in [
        (("vqav2", "--clip", "nowhere"), "no CLIP model: nowhere has no config.json"),
        (("pororo", "--clip", clip.folder), "the task has no few-shot examples"),
        (("vqa2", "--clip", clip.folder), "Did you mean 'vqav2'?"),
    ]:
        refused = mmi("data", "neighbours", *arguments)
        assert refused.code == 1
        assert words in refused.err

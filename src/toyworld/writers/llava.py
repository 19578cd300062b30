"""Instruction data in LLaVA's form: `llava_instruct.json` and `images/`; some records have no image."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..language import paragraph, questions
from .base import Format, Job, write_image, write_json


def write(job: Job, indices: range, folder: Path) -> list[dict[str, Any]]:
    """Images; returns the records."""
    found = []
    for index in indices:
        scene, rng = job.scene(index)
        name = f"{job.number(index):09d}.jpg"
        rounds = [(q.question, q.answer) for q in questions(scene, rng, 1 + index % 3)]
        if index % 5 == 4:
            found.append({"id": name, "conversations": _turns([("What do you draw?", "A small world.")])})
            continue
        if index % 2:
            rounds.append(("Describe the picture in detail.", paragraph(scene, rng).text))
        write_image(job, scene, folder / "images" / name)
        where = "<image>\n{}" if index % 2 else "{}\n<image>"
        rounds[0] = (where.format(rounds[0][0]), rounds[0][1])
        found.append({"id": name.removesuffix(".jpg"), "image": name, "conversations": _turns(rounds)})
    return found


def _turns(rounds: list[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"from": who, "value": said} for turn in rounds for who, said in zip(("human", "gpt"), turn, strict=True)]


def finish(job: Job, results: list[list[dict[str, Any]]], folder: Path) -> None:
    """One list."""
    write_json([record for batch in results for record in batch], folder / "llava_instruct.json")


FORMATS = (Format("llava", "conversations about images, as LLaVA's instruction data", write, finish, 100),)

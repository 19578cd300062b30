"""Visual Dialog 1.0.

visdial_1.0_val.json                        dialogues, with questions and answers by number
visdial_1.0_val_dense_annotations.json      how well each of 100 answers fits, for one round of each
VisualDialog_val2018/VisualDialog_val2018_000001000001.jpg
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..language import Dialogue
from .base import Format, Job, write_image, write_json


def write(job: Job, indices: range, folder: Path) -> list[tuple[int, int, Dialogue]]:
    """Images; returns (number, annotated round from 0, dialogue)."""
    found = []
    for index in indices:
        scene, rng = job.scene(index)
        part = f"VisualDialog_{_phase(job)}2018"
        write_image(job, scene, folder / part / f"{part}_{job.number(index):012d}.jpg")
        conversation = job.world.dialogue(scene, rng)
        found.append((job.number(index), int(rng.random() * len(conversation.rounds)), conversation))
    return found


def finish(job: Job, results: list[list[tuple[int, int, Dialogue]]], folder: Path) -> None:
    """The two files."""
    questions: dict[str, int] = {}
    answers: dict[str, int] = {}
    dialogs, dense = [], []
    for number, chosen, conversation in (sample for batch in results for sample in batch):
        rounds = []
        for turn in conversation.rounds:
            options = [answers.setdefault(text, len(answers)) for text in turn.candidates]
            asked = questions.setdefault(turn.question.rstrip("?"), len(questions))
            rounds.append({"question": asked, "answer": options[turn.index], "answer_options": options,
                           "gt_index": turn.index})  # fmt: skip
        caption = conversation.caption.text.rstrip(".")
        dialogs.append({"image_id": number, "caption": caption, "dialog": rounds})
        relevance = list(conversation.rounds[chosen].relevance)
        dense.append({"image_id": number, "round_id": chosen + 1, "gt_relevance": relevance})
    data: dict[str, Any] = {"dialogs": dialogs, "questions": list(questions), "answers": list(answers)}
    whole = {"version": "1.0", "split": f"{_phase(job)}2018", "data": data}
    write_json(whole, folder / f"visdial_1.0_{_phase(job)}.json")
    write_json(dense, folder / f"visdial_1.0_{_phase(job)}_dense_annotations.json")


def _phase(job: Job) -> str:
    return "train" if job.split == "train" else "val"


FORMATS = (Format("visdial", "dialogues about images, each answer among 100, as VisDial", write, finish, 100),)

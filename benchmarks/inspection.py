"""Whether the strongest sampling points of an answer lie on the object that a question asks for.

python benchmarks/inspection.py small --output benchmarks/results/inspection.json

Questions "Where is ...?" about held-out scenes of the toy world, whose objects have known boxes. The points are those
that the model's answer was generated from, of all layers, heads and levels, the `--points` strongest ones. Figures are
shares from 0 to 1:

    hits        of these points that lie in the box of the asked object; intervals are bootstrap intervals of 95 % over
                questions
    shuffled    of the same points that lie in the boxes of the other questions: what a model would reach that looks at
                the same places whatever it is asked
    area        of the image that the box covers: what points at random would reach
    others      of the points that lie in the box of another object of the same image, by its number of other objects
    weight      of the weight of all points inside the image that lies in the box, and the same for `shuffled`
    p           of 10,000 assignments of boxes to questions that reach as many hits
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mm_interleaved import Document, GenerationSettings, Image, MMInterleavedPipeline, Text
from mm_interleaved.bench.machine import describe
from mm_interleaved.generation import TEXT_PRESETS
from mm_interleaved.inspection import InspectionSettings, TextRecord, inspect
from mm_interleaved.io import write_json
from mm_interleaved.metrics import confidence_interval
from mm_interleaved.tasks.vqa import SHORT_PROMPT
from toyworld.draw import boxes, draw
from toyworld.language import questions
from toyworld.language.phrases import CELL_NAMES
from toyworld.sampling import random_scene, scene_rng

SIDE = 256  # pixels of a scene
MANY = 64  # questions about a scene, more than there are


@dataclass
class Asked:
    """A question and what its answer looked at.

    Attributes:
        question, answer, said: the question, the right answer, the model's.
        box: of the asked object, (x0, y0, x1, y1) in shares of the image.
        others: boxes of the other objects.
        places: [M, 2] all points, the strongest first.
        weights: [M] their weights.
        ignored: share of the ignore slot.
    """

    question: str
    answer: str
    said: str
    box: np.ndarray
    others: np.ndarray
    places: np.ndarray
    weights: np.ndarray
    ignored: float

    def hits(self, box: np.ndarray, count: int) -> float:
        """The share of the strongest points in a box."""
        return float(inside(self.places[:count], box).mean())

    def weight(self, box: np.ndarray) -> float:
        """The share of the weight within the image that lies in a box."""
        seen = self.weights * inside(self.places, np.array([0, 0, 1, 1]))
        return float((seen * inside(self.places, box)).sum() / max(seen.sum(), 1e-9))


def inside(places: np.ndarray, box: np.ndarray) -> np.ndarray:
    """Whether each of `places` [M, 2] lies in `box` [4]."""
    return ((places >= box[:2]) & (places < box[2:])).all(-1)


def strongest(record: TextRecord) -> tuple[np.ndarray, np.ndarray]:
    """The points [M, 2] of an answer without its end token, the strongest first, and their weights [M]."""
    count = len(record.ids) - 1 if len(record.ids) > 1 else 1
    weights = record.points.weights[:count].sum(-2).reshape(-1)  # levels share their locations
    order = np.argsort(-weights, kind="stable")
    return record.points.locations[:count].reshape(-1, 2)[order], weights[order]


def ask(pipe: MMInterleavedPipeline, count: int, seed: int) -> list[Asked]:
    """Questions about as many scenes, in which one object alone is in the asked place."""
    found: list[Asked] = []
    for index in range(100 * count):
        if len(found) == count:
            break
        rng = scene_rng(seed, "test", index)
        scene = random_scene(rng, objects=(2, 4), split="test")
        wanted = [q for q in questions(scene, rng, MANY) if q.type == "where"]
        cells = [CELL_NAMES[obj.cell] for obj in scene.objects]
        wanted = [q for q in wanted if cells.count(q.answer) == 1]
        if not wanted:
            continue
        question, shapes = wanted[0], np.array(boxes(scene, SIDE)) / SIDE
        document = Document([Image(draw(scene, SIDE)), Text(SHORT_PROMPT.format(question=question.question)), Text()])
        result = inspect(pipe, document, InspectionSettings(places=[]))
        (record,), at = result.texts, cells.index(question.answer)
        said = result.document.segments[record.segment]
        assert isinstance(said, Text)
        places, weights = strongest(record)
        found.append(Asked(question.question, question.answer, (said.text or "").strip().lower().rstrip("."),
                           shapes[at], np.delete(shapes, at, 0), places, weights,
                           float(record.points.ignored.mean())))  # fmt: skip
    return found


def summary(asked: list[Asked], count: int, seed: int = 0) -> dict[str, Any]:
    """The figures of some questions, with the `count` strongest points of each."""
    table = np.array([[one.hits(other.box, count) for other in asked] for one in asked])  # [question, box]
    heavy = np.array([[one.weight(other.box) for other in asked] for one in asked])
    apart = ~np.eye(len(asked), dtype=bool)
    hits, shuffled = np.diag(table), np.array([row[keep].mean() for row, keep in zip(table, apart, strict=True)])
    rng, rows = np.random.default_rng(seed), np.arange(len(asked))
    reached = np.array([table[rows, rng.permutation(len(asked))].mean() for _ in range(10_000)])
    return {
        "questions": len(asked), "points": count,
        "right": float(np.mean([one.said == one.answer for one in asked])),
        "hits": float(hits.mean()), "hits_interval": confidence_interval(list(hits)),
        "shuffled": float(shuffled.mean()), "more_than_shuffled_interval": confidence_interval(list(hits - shuffled)),
        "p": float((1 + (reached >= hits.mean() - 1e-12).sum()) / (1 + len(reached))),
        "area": float(np.mean([np.prod(one.box[2:] - one.box[:2]) for one in asked])),
        "others": float(np.mean([one.hits(box, count) for one in asked for box in one.others])),
        "weight": float(np.diag(heavy).mean()), "weight_shuffled": float(heavy[apart].mean()),
        "weight_more_interval": confidence_interval(
            [float(row[i] - row[keep].mean()) for i, (row, keep) in enumerate(zip(heavy, apart, strict=True))]),
        "ignored": float(np.mean([one.ignored for one in asked])),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="small", help="a name, or the folder of a checkpoint")
    parser.add_argument("--questions", type=int, default=20)
    parser.add_argument("--points", type=int, default=16, help="strongest points of an answer")
    parser.add_argument("--seed", type=int, default=0, help="of the scenes")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    pipe = MMInterleavedPipeline.from_pretrained(options.model, device=options.device)
    pipe.settings = GenerationSettings(TEXT_PRESETS["vqa"])
    asked = ask(pipe, options.questions, options.seed)
    found = summary(asked, options.points)
    also = {count: summary(asked, count)["hits"] for count in (1, 4, 64, 256)}
    for name, value in found.items():
        print(f"{name:28} {value if not isinstance(value, float) else round(value, 4)}")
    print(f"hits of other numbers        { ({k: round(v, 3) for k, v in also.items()}) }")
    if options.output is not None:
        kept = ("question", "answer", "said")
        each = [{k: v for k, v in asdict(one).items() if k in kept} | {"hits": one.hits(one.box, options.points)}
                for one in asked]  # fmt: skip
        write_json(options.output, {"about": describe(), **found, "hits_by_points": also, "answers": each})


if __name__ == "__main__":
    main()

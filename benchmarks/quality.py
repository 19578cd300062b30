"""How well a model of the toy world reads and draws, on held-out scenes; every figure without a human.

python benchmarks/quality.py small --output benchmarks/results/quality.json
python benchmarks/quality.py runs/pretrain/final --samples 500 --device cuda

    captions    an image and the caption's prompt; what the text states is compared with the scene
    questions   an image and one question; the answer must be one that people give
    typed       the same, up to `--each` questions of each of `--types` about a scene, for what is rarely asked
    boxes       an image and an expression for one object in it; the box must overlap the object's by half or more
    drawing     a caption; the image is read by `toyworld.detector` and compared with what the caption states
    stories     text and first image are given, later texts too; each image is drawn from those drawn before it
    frames      the same, each image drawn from the true ones before it

`typed`, `boxes` and `frames` are asked where `--tasks` names them. `n_...` is how often a type was asked, `intervals`
are bootstrap intervals of 95 % over scenes or stories. `benchmarks/exam.py` asks a fixed selection of several models.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import PIL.Image
import torch
from rich.console import Console
from safetensors.torch import load_file

from mm_interleaved import Document, DocumentFinished, Image, ImageSettings, Text, TextSettings
from mm_interleaved.bench.machine import describe
from mm_interleaved.checkpoints.quantization import QUANTIZATIONS
from mm_interleaved.document import Box
from mm_interleaved.io import write_json
from mm_interleaved.metrics import confidence_interval
from mm_interleaved.metrics.grounding import grounding_accuracy, parse_box
from mm_interleaved.pretrained import Loaded, load
from mm_interleaved.tasks import render
from mm_interleaved.tasks.captions import PROMPT as CAPTION
from mm_interleaved.tasks.grounding import GROUNDING
from mm_interleaved.tasks.vqa import SHORT_PROMPT
from mm_interleaved.training.ema import FILE as AVERAGE
from toyworld.detector import Detection, Detector
from toyworld.draw import boxes, draw
from toyworld.language import caption, questions, referring, score_caption
from toyworld.language.questions import QUESTIONS, Question
from toyworld.sampling import random_scene, scene_rng
from toyworld.scene import Scene
from toyworld.score import SceneScore, match
from toyworld.stories import Frame, Story, story

T = TypeVar("T")
TASKS = ("captions", "questions", "drawing", "stories", "typed", "boxes", "frames")
BOX_TOKENS = 32  # "(012,045)(678,999)</box>" are 20
MANY = 64  # questions about a scene, more than there are, of which those of the wanted types are asked
say = Console(stderr=True).print


def batches(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """Parts of at most `size`."""
    for begin in range(0, len(items), size):
        yield items[begin : begin + size]


class Tally:
    """Counts and what they are out of, for each sample; samples are independent of each other."""

    def __init__(self) -> None:
        self.counted: defaultdict[str, list[tuple[float, float]]] = defaultdict(list)

    def add(self, ratios: Mapping[str, tuple[float, float]]) -> None:
        """One sample more."""
        for name, ratio in ratios.items():
            self.counted[name].append(ratio)

    def total(self, name: str) -> float:
        """What a count is out of."""
        return sum(whole for _, whole in self.counted[name])

    def rates(self) -> dict[str, float]:
        """Each count as a share; what was never asked for is left out."""
        return {name: sum(part for part, _ in found) / self.total(name)
                for name, found in self.counted.items() if self.total(name)}  # fmt: skip

    def intervals(self) -> dict[str, list[float]]:
        """95 % intervals of `rates`, by bootstrap over samples."""
        found = {}
        for name in self.rates():
            asked = [(part / whole, whole) for part, whole in self.counted[name] if whole]
            scores, weights = zip(*asked, strict=True)
            found[name] = [round(bound, 4) for bound in confidence_interval(scores, weights=weights)]
        return found

    def result(self, **counts: float) -> dict[str, Any]:
        """Rates, counts and intervals, as files have them."""
        rates = {name: round(rate, 4) for name, rate in self.rates().items()}
        return {**rates, **counts, "intervals": self.intervals()}


class Exam:
    """A model, its detector, and what both are asked."""

    def __init__(self, loaded: Loaded, detector: Detector, options: argparse.Namespace) -> None:
        self.model, self.processor, self.detector, self.options = loaded.model, loaded.processor, detector, options
        self.size = self.processor.target_size
        self.image = ImageSettings(
            num_inference_steps=options.steps, guidance_scale=options.guidance, batch_size=options.batch,
            seed=options.seed, scheduler=options.scheduler, cache_implementation=options.implementation,
        )  # fmt: skip

    def scenes(self, kind: int, count: int | None = None) -> Iterator[tuple[Scene, np.random.Generator]]:
        """Held-out scenes, others for every kind of task."""
        for index in range(count or self.options.samples):
            rng = scene_rng(self.options.seed + 1000 * kind, self.options.split, index)
            yield random_scene(rng, split=self.options.split), rng

    def write(self, documents: Sequence[Document], longest: int) -> list[str]:
        """Greedy continuations."""
        settings = TextSettings(max_new_tokens=longest, min_new_tokens=1, num_beams=1,
                                cache_implementation=self.options.implementation)  # fmt: skip
        texts = []
        for part in batches(documents, self.options.batch):
            batch = self.processor(list(part), padding_side="left").to(self.model.compute_device)
            texts += [self.processor.decode_text(row[0].ids) for row in self.model.generate_text(batch, settings)]
        return texts

    def paint(self, documents: Sequence[Document]) -> list[PIL.Image.Image]:
        """The last image of each document, drawn anew."""
        images = []
        for part in batches(documents, self.options.batch):
            batch = self.processor(list(part)).to(self.model.compute_device)
            last = [i for i, row in enumerate(batch.image_rows) if i + 1 == len(batch.image_rows)
                    or batch.image_rows[i + 1] != row]  # fmt: skip
            drawn = self.model.generate_images(batch, self.image, targets=last)
            values = (drawn.float().clamp(0, 1) * 255 + 0.5).byte().permute(0, 2, 3, 1).cpu().numpy()
            images += [PIL.Image.fromarray(v) for v in values]
        return images

    def captions(self) -> dict[str, Any]:
        """Facts that are right of those stated, objects mentioned of those there."""
        asked = list(self.scenes(1))
        given = [Document(render(CAPTION, {"image": Image(draw(s, self.size))})) for s, _ in asked]
        tally = Tally()
        for (scene, _), text in zip(asked, self.write(given, 80), strict=True):
            score = score_caption(text, scene)
            tally.add({"facts_right": (score.right, score.stated), "mentioned": (score.mentioned, score.objects)})
        return tally.result(facts=tally.total("facts_right"))

    def questions(self) -> dict[str, Any]:
        """Answers that are right, in all and by what is asked."""
        return self._answers([(scene, questions(scene, rng, 4)) for scene, rng in self.scenes(2)])

    def typed(self) -> dict[str, Any]:
        """The same, of the types that are wanted up to so many for each scene."""
        asked = []
        for scene, rng in self.scenes(5):
            found = questions(scene, rng, MANY)
            by_type = [[q for q in found if q.type == name][: self.options.each] for name in self.options.types]
            asked.append((scene, [q for some in by_type for q in some]))
        return self._answers(asked)

    def _answers(self, asked: Sequence[tuple[Scene, Sequence[Question]]]) -> dict[str, Any]:
        images = [Image(draw(scene, self.size)) for scene, _ in asked]
        pairs = [(image, q) for image, (_, some) in zip(images, asked, strict=True) for q in some]
        given = [Document([image, Text(SHORT_PROMPT.format(question=q.question))]) for image, q in pairs]
        texts, tally = iter(self.write(given, 6)), Tally()
        for _, some in asked:
            right: defaultdict[str, list[bool]] = defaultdict(list)
            for question in some:
                said = next(texts).strip().lower().rstrip(".")
                for name in ("right", question.type):
                    right[name].append(said in {question.answer, *question.answers})
            tally.add({name: (sum(found), len(found)) for name, found in right.items()})
        counts = {f"n_{name}": int(tally.total(name)) for name in sorted(tally.counted) if name != "right"}
        return {"right": 0.0, **tally.result(questions=int(tally.total("right")), **counts)}

    def boxes(self) -> dict[str, Any]:
        """Objects that are meant and found: boxes that overlap theirs by half or more; how much all do."""
        asked = [(scene, referring(scene, rng)) for scene, rng in self.scenes(6)]
        given = [Document(render(GROUNDING, {"image": Image(draw(s, self.size)), "caption": m.text})) for s, m in asked]
        places = [Box.from_pixels(boxes(s, self.size)[m.index], (self.size, self.size)) for s, m in asked]
        told = [parse_box(str(place)) for place in places]
        result = grounding_accuracy(dict(enumerate(self.write(given, BOX_TOKENS))), dict(enumerate(told)))
        tally = Tally()
        for name, scores in result.per_sample.items():
            for score in scores.values():
                tally.add({name: (score / 100, 1)})
        return tally.result(boxes=len(asked))

    def drawing(self) -> dict[str, Any]:
        """What is found of what the caption asked for."""
        asked = [(scene, caption(scene, rng)) for scene, rng in self.scenes(3, self.options.drawn)]
        blank = PIL.Image.new("RGB", (self.size, self.size), (128, 128, 128))
        images = self.paint([Document([Text(told.text), Image(blank)]) for _, told in asked])
        tally = Tally()
        for (scene, told), seen in zip(asked, self._read(images), strict=True):
            relations = [(f.obj, f.value, f.other) for f in told.facts if f.name == "relation"]
            tally.add(match(scene, seen, relations).ratios())
        self._keep("drawing", [(told.text, image) for (_, told), image in zip(asked, images, strict=True)])
        return tally.result(images=len(asked))

    def stories(self) -> dict[str, Any]:
        """Attributes that no text tells and that are kept; objects that are where and what the text makes them."""
        scores: list[SceneScore] = []
        shown: list[tuple[str, PIL.Image.Image]] = []
        for part in batches(self._stories(), self.options.batch):
            for number, result in self._tell(part):
                images = [s.source for s in result.segments if isinstance(s, Image)][1:]
                scores.append(self._compared(part[number].frames[1:], images))
                shown += zip([f.text for f in part[number].frames[1:]], images, strict=True)
        self._keep("stories", shown)
        return self._tallied(scores)

    def frames(self) -> dict[str, Any]:
        """The same where nothing that was drawn before can be wrong."""
        given, told = [], self._stories()
        blank = PIL.Image.new("RGB", (self.size, self.size), (128, 128, 128))
        for one in told:
            seen = [[Text(frame.text), Image(draw(frame.scene, self.size))] for frame in one.frames]
            for number, frame in enumerate(one.frames[1:], 1):
                before = [segment for pair in seen[:number] for segment in pair]
                given.append(Document([*before, Text(frame.text), Image(blank)]))
        images = self.paint(given)
        asked = [frame for one in told for frame in one.frames[1:]]
        self._keep("frames", [(frame.text, image) for frame, image in zip(asked, images, strict=True)])
        drawn = iter(images)
        return self._tallied([self._compared(one.frames[1:], [next(drawn) for _ in one.frames[1:]]) for one in told])

    def _stories(self) -> list[Story]:
        rngs = [scene_rng(self.options.seed + 4000, self.options.split, i)
                for i in range(self.options.drawn or self.options.samples)]  # fmt: skip
        return [story(rng, frames=(3, 5), split=self.options.split) for rng in rngs]

    def _compared(self, frames: Sequence[Frame], images: Sequence[PIL.Image.Image]) -> SceneScore:
        found = [match(f.scene, seen, (), f.unsaid) for f, seen in zip(frames, self._read(images), strict=True)]
        return sum(found, SceneScore())

    @staticmethod
    def _tallied(scores: Sequence[SceneScore]) -> dict[str, Any]:
        """Of stories: images of one story are one sample, since each follows from the one before."""
        tally, total = Tally(), sum(scores, SceneScore())
        for score in scores:
            tally.add(score.ratios() | {"in_place": (score.right_cell, score.requested)})
        return tally.result(frames=total.images, unsaid=total.unsaid)

    def _tell(self, part: Sequence[Story]) -> Iterator[tuple[int, Document]]:
        documents = []
        for one in part:
            first, *later = one.frames
            start = [Text(first.text), Image(draw(first.scene, self.size))]
            texts = [t for frame in later for t in (frame.text, "")]
            documents.append(Document(start, max_turns=2 * len(later), forced_texts=texts, stop_at_eos=False))
        events = self.model.generate_interleaved(
            documents, self.processor, progress=False, force_image=True, replace_texts=True, num_beams=1,
            max_new_tokens=1, min_new_tokens=0, num_inference_steps=self.options.steps,
            guidance_scale=self.options.guidance, scheduler=self.options.scheduler, seed=self.options.seed,
            batch_size=self.options.batch, cache_implementation=self.options.implementation,
        )  # fmt: skip
        for event in events:
            if isinstance(event, DocumentFinished):
                yield event.document, event.result

    def _read(self, images: Sequence[PIL.Image.Image]) -> list[list[Detection]]:
        return [seen for part in batches(images, 64) for seen in self.detector.detect(part)]

    def _keep(self, name: str, shown: Sequence[tuple[str, PIL.Image.Image]]) -> None:
        if self.options.images is None:
            return
        self.options.images.mkdir(parents=True, exist_ok=True)
        side, columns = self.size, 8
        shown = shown[:48]
        sheet = PIL.Image.new("RGB", (columns * side, -(-len(shown) // columns) * side), "white")
        for index, (_, image) in enumerate(shown):
            sheet.paste(image, (index % columns * side, index // columns * side))
        sheet.save(self.options.images / f"{name}.png")
        (self.options.images / f"{name}.txt").write_text("\n".join(text for text, _ in shown) + "\n")


def averaged(folder: Path, model: torch.nn.Module) -> None:
    """Give `model` the average that the checkpoint of a run keeps beside its weights, as its `final` folder has it."""
    if (folder / AVERAGE).is_file():
        average = load_file(folder / AVERAGE)
        parameters = dict(model.named_parameters())
        with torch.no_grad():
            for name, value in average.items():
                parameters[name].copy_(value)


def arguments() -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="small, or the folder of a checkpoint")
    parser.add_argument("--split", default="test")
    parser.add_argument("--samples", type=int, default=200, help="scenes a task")
    parser.add_argument("--drawn", type=int, help="scenes or stories of each task that draws; default: as many")
    parser.add_argument(
        "--types", nargs="+", choices=sorted(QUESTIONS), default=["where", "count", "place", "relation"]
    )
    parser.add_argument("--each", type=int, default=2, help="questions of each of --types about a scene")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=30, help="of each image")
    parser.add_argument("--scheduler", default="DDPMScheduler", help="of diffusers")
    parser.add_argument("--guidance", type=float, help="default: the model's")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--implementation", choices=("auto", "static", "dynamic"), default="auto", help="of caches")
    parser.add_argument("--quantization", choices=QUANTIZATIONS, help="of the language model")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS[:4]))
    parser.add_argument("--images", type=Path, help="folder for sheets of what was drawn")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    return parser.parse_args()


def main() -> None:
    """Examine, print, and keep."""
    options = arguments()
    loaded = load(options.model, getattr(torch, options.dtype), options.device, options.quantization)
    averaged(Path(options.model), loaded.model)
    exam = Exam(loaded, Detector.load(device=options.device), options)
    drawn = exam.model.image_decoder.settled(exam.image)
    seconds: dict[str, float] = {}
    result: dict[str, object] = {**describe(), "image": asdict(drawn), "seconds": seconds}
    for task in options.tasks:
        begin = time.perf_counter()
        result[task] = scores = getattr(exam, task)()
        seconds[task] = round(time.perf_counter() - begin, 1)
        say(f"{task} ({seconds[task]:.0f} s):", {name: x for name, x in scores.items() if name != "intervals"})
        if options.output is not None:
            options.output.parent.mkdir(parents=True, exist_ok=True)
            write_json(options.output, result, indent=1)


if __name__ == "__main__":
    main()

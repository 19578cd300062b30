"""How well a model of the toy world reads and draws, on held-out scenes; every figure without a human.

python benchmarks/quality.py small --output benchmarks/results/quality.json
python benchmarks/quality.py runs/pretrain/final --samples 500 --device cuda

    captions    a picture and the caption's prompt; what the text states is compared with the scene
    questions   a picture and one question; the answer must be one that people give
    drawing     a caption; the picture is read by `toyworld.reader` and compared with what the caption states
    stories     text and first picture are given, later texts too; each picture is drawn from those drawn before it
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

import numpy as np
import PIL.Image
import torch
from rich.console import Console

from mm_interleaved import Document, DocumentFinished, Image, ImageSettings, Text, TextSettings
from mm_interleaved.bench.machine import describe
from mm_interleaved.model.quantization import QUANTIZATIONS
from mm_interleaved.pretrained import Loaded, load
from mm_interleaved.toyworld.documents import CAPTION_PROMPT, VQA_SHORT
from mm_interleaved.toyworld.draw import draw
from mm_interleaved.toyworld.language import caption, questions, score_caption
from mm_interleaved.toyworld.reader import Reader, Seen
from mm_interleaved.toyworld.sampling import random_scene, scene_rng
from mm_interleaved.toyworld.scene import Scene
from mm_interleaved.toyworld.score import SceneScore, match
from mm_interleaved.toyworld.stories import Story, story

T = TypeVar("T")
say = Console(stderr=True).print


def batches(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """Parts of at most `size`."""
    for begin in range(0, len(items), size):
        yield items[begin : begin + size]


class Exam:
    """A model, its reader, and what both are asked."""

    def __init__(self, loaded: Loaded, reader: Reader, options: argparse.Namespace) -> None:
        self.model, self.processor, self.reader, self.options = loaded.model, loaded.processor, reader, options
        self.size = self.processor.target_size
        self.image = ImageSettings(
            num_inference_steps=options.steps, guidance_scale=options.guidance, batch_size=options.batch,
            seed=options.seed, scheduler=options.scheduler,
        )  # fmt: skip

    def scenes(self, kind: int) -> Iterator[tuple[Scene, np.random.Generator]]:
        """Held-out scenes, others for every kind of task."""
        for index in range(self.options.samples):
            rng = scene_rng(self.options.seed + 1000 * kind, self.options.split, index)
            yield random_scene(rng, split=self.options.split), rng

    def write(self, documents: Sequence[Document], longest: int) -> list[str]:
        """Greedy continuations."""
        settings = TextSettings(max_new_tokens=longest, min_new_tokens=1, num_beams=1)
        texts = []
        for part in batches(documents, self.options.batch):
            batch = self.processor(list(part), padding_side="left").to(self.model.compute_device)
            texts += [self.processor.decode_text(row[0].ids) for row in self.model.generate_text(batch, settings)]
        return texts

    def paint(self, documents: Sequence[Document]) -> list[PIL.Image.Image]:
        """The last picture of each document, drawn anew."""
        pictures = []
        for part in batches(documents, self.options.batch):
            batch = self.processor(list(part)).to(self.model.compute_device)
            last = [i for i, row in enumerate(batch.image_rows) if i + 1 == len(batch.image_rows)
                    or batch.image_rows[i + 1] != row]  # fmt: skip
            drawn = self.model.generate_images(batch, self.image, targets=last)
            values = (drawn.float().clamp(0, 1) * 255 + 0.5).byte().permute(0, 2, 3, 1).cpu().numpy()
            pictures += [PIL.Image.fromarray(v) for v in values]
        return pictures

    def captions(self) -> dict[str, float]:
        """Facts that are right of those stated, things mentioned of those there."""
        asked = list(self.scenes(1))
        given = [Document([Image(draw(s, self.size)), Text(CAPTION_PROMPT)]) for s, _ in asked]
        total: Counter[str] = Counter()
        for (scene, _), text in zip(asked, self.write(given, 80), strict=True):
            total.update(asdict(score_caption(text, scene)))
        return {"facts_right": total["right"] / max(total["stated"], 1),
                "mentioned": total["mentioned"] / total["things"],
                "facts": total["stated"]}  # fmt: skip

    def questions(self) -> dict[str, float]:
        """Answers that are right, in all and by what is asked."""
        asked = [(scene, question) for scene, rng in self.scenes(2) for question in questions(scene, rng, 4)]
        given = [Document([Image(draw(s, self.size)), Text(VQA_SHORT.format(question=q.question))]) for s, q in asked]
        right, count = Counter(), Counter()
        for (_, question), text in zip(asked, self.write(given, 6), strict=True):
            said = text.strip().lower().rstrip(".")
            right[question.type] += said in {question.answer, *question.answers}
            count[question.type] += 1
        by_type = {name: right[name] / count[name] for name in sorted(count)}
        return {"right": right.total() / count.total(), "questions": count.total(), **by_type}

    def drawing(self) -> dict[str, float]:
        """What is found of what the caption asked for."""
        asked = [(scene, caption(scene, rng)) for scene, rng in self.scenes(3)]
        blank = PIL.Image.new("RGB", (self.size, self.size), (128, 128, 128))
        pictures = self.paint([Document([Text(told.text), Image(blank)]) for _, told in asked])
        total = SceneScore()
        for (scene, told), seen in zip(asked, self._read(pictures), strict=True):
            relations = [(f.thing, f.value, f.other) for f in told.facts if f.name == "relation"]
            total = total + match(scene, seen, relations)
        self._keep("drawing", [(told.text, picture) for (_, told), picture in zip(asked, pictures, strict=True)])
        return total.rates()

    def stories(self) -> dict[str, float]:
        """Looks that no text tells and that are kept; things that are where and what the text makes them."""
        told = []
        for index in range(self.options.samples):
            rng = scene_rng(self.options.seed + 4000, self.options.split, index)
            told.append(story(rng, frames=(3, 5), split=self.options.split))
        total = SceneScore()
        shown: list[tuple[str, PIL.Image.Image]] = []
        for part in batches(told, self.options.batch):
            for number, result in self._tell(part):
                pictures = [s.source for s in result.segments if isinstance(s, Image)][1:]
                for frame, picture, seen in zip(
                    part[number].frames[1:], pictures, self._read(pictures), strict=True
                ):  # fmt: skip
                    total = total + match(frame.scene, seen, (), frame.unsaid)
                    shown.append((frame.text, picture))
        self._keep("stories", shown)
        return total.rates() | {"frames": total.pictures, "unsaid": total.unsaid}

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
        )  # fmt: skip
        for event in events:
            if isinstance(event, DocumentFinished):
                yield event.document, event.result

    def _read(self, pictures: Sequence[PIL.Image.Image]) -> list[list[Seen]]:
        return [seen for part in batches(pictures, 64) for seen in self.reader.read(part)]

    def _keep(self, name: str, shown: Sequence[tuple[str, PIL.Image.Image]]) -> None:
        if self.options.pictures is None:
            return
        self.options.pictures.mkdir(parents=True, exist_ok=True)
        side, columns = self.size, 8
        shown = shown[:48]
        sheet = PIL.Image.new("RGB", (columns * side, -(-len(shown) // columns) * side), "white")
        for index, (_, picture) in enumerate(shown):
            sheet.paste(picture, (index % columns * side, index // columns * side))
        sheet.save(self.options.pictures / f"{name}.png")
        (self.options.pictures / f"{name}.txt").write_text("\n".join(text for text, _ in shown) + "\n")


def main() -> None:
    """Examine, print, and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="small, or the folder of a checkpoint")
    parser.add_argument("--split", default="test")
    parser.add_argument("--samples", type=int, default=200, help="scenes a task")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=30, help="of each picture")
    parser.add_argument("--scheduler", default="DDPMScheduler", help="of diffusers")
    parser.add_argument("--guidance", type=float, help="default: the model's")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--quantization", choices=QUANTIZATIONS, help="of the language model")
    parser.add_argument("--tasks", nargs="+", default=["captions", "questions", "drawing", "stories"])
    parser.add_argument("--pictures", type=Path, help="folder for sheets of what was drawn")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    options = parser.parse_args()
    loaded = load(options.model, torch.float32, options.device, options.quantization)
    exam = Exam(loaded, Reader.load(device=options.device), options)
    drawn = exam.model.image_decoder.settled(exam.image)
    result: dict[str, object] = {**describe(), "image": asdict(drawn)}
    for task in options.tasks:
        begin = time.perf_counter()
        scores = {name: round(value, 4) for name, value in getattr(exam, task)().items()}
        result[task] = scores
        say(f"{task} ({time.perf_counter() - begin:.0f} s):", scores)
        if options.output is not None:
            options.output.parent.mkdir(parents=True, exist_ok=True)
            options.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

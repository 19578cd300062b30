"""What a model makes of a task's samples, batch by batch.

Batches are made of the whole task before it is dealt out, and every sample has its own seed. So a prediction depends
neither on how many processes there are nor on where a run was interrupted.
"""

from __future__ import annotations

import copy
import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import PIL.Image
import torch

from ..document import Document, DocumentError, Image, Text
from ..generation import DocumentFinished, GenerationSettings, InterleavedGenerator, MMInterleaved, SegmentFinished
from ..generation.settings import override
from ..metrics.clip import CLIP
from ..processor import MMInterleavedProcessor
from ..processor.images import CROPS, load_picture
from ..processor.tokenizer import encode_text
from ..tasks import Sample, Task, TaskError
from .config import TaskSuite
from .predictions import REFERENCES, Predictions, Record

WINDOW = 32  # batches of samples that are sorted by length among themselves


def sample_seed(seed: int, task: str, sample: str) -> int:
    """The seed of a sample: the same wherever and whenever it is drawn."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{task}/{sample}".encode()).digest()[:6], "big")


def plan_batches(samples: Sequence[Sample], size: int, parts: Sequence[int] = ()) -> list[list[int]]:
    """Numbers of samples that go together: of similar length, and not far apart in the task.

    Args:
        samples: of a task.
        size: samples a batch, at most.
        parts: where batches may not reach beyond, as numbers of samples from the start.
    """

    def length(index: int) -> int:
        segments = samples[index].document.segments
        return sum(200 if isinstance(s, Image) else len(s.text or "") for s in segments)

    batches = []
    for first, end in pairwise([0, *parts] if parts else [0, len(samples)]):
        for begin in range(first, end, WINDOW * size):
            window = sorted(range(begin, min(begin + WINDOW * size, end)), key=length)
            batches += [window[i : i + size] for i in range(0, len(window), size)]
    return batches


@dataclass
class Speed:
    """What was done in this run of the program, and how long it took.

    Attributes:
        samples: finished by this process; what was there already does not count.
        seconds: of which `model_seconds` were spent in the model.
    """

    samples: int = 0
    seconds: float = 0.0
    model_seconds: float = 0.0

    def to_dict(self) -> dict[str, float]:
        """For the results."""
        share = self.model_seconds / self.seconds if self.seconds else 0.0
        rate = self.samples / self.seconds if self.seconds else 0.0
        return {"samples": self.samples, "seconds": round(self.seconds, 3), "samples_per_second": round(rate, 3),
                "model_share": round(share, 3)}  # fmt: skip


class Predictor:
    """A model that is asked one task.

    Args:
        model, processor: what reads and writes.
        task: what is asked.
        suite: seed and sizes of batches.

    Raises:
        TaskError: the settings of generation cannot be used, or the model that chooses among candidates.
    """

    def __init__(self, model: MMInterleaved, processor: MMInterleavedProcessor, task: Task, suite: TaskSuite) -> None:
        self.model, self.task, self.suite = model, task, suite
        self.processor = copy.copy(processor)
        self.processor.crop = task.crop
        self.settings = effective_settings(task, suite)
        self.clip = clip_of(task, suite, model.compute_device)
        if self.clip is not None:
            try:
                self.clip.embed_texts(["a picture"])
            except (
                ValueError,
                OSError,
                RuntimeError,
            ) as error:  # what the libraries raise for folders they cannot load
                raise TaskError(f"the CLIP model cannot be used: {str(error).splitlines()[0]}",
                                f"task '{task.name}', 'metrics.clip'", "Fetch it again") from None  # fmt: skip
        self.generator = InterleavedGenerator(model, self.processor, self.settings, progress=False)

    def load(self, sample: Sample) -> Document | str:
        """The document with its pictures as the model sees them, or why it cannot be used. Any thread may call it."""
        if sample.problem:
            return sample.problem
        segments = []
        try:
            for segment in sample.document.segments:
                if isinstance(segment, Image) and segment.source is not None:
                    seen = CROPS[self.task.crop](load_picture(segment.source), self.processor.image_size)
                    segment = replace(segment, source=PIL.Image.fromarray(seen))
                segments.append(segment)
            for path in _true_pictures(sample) if self.task.makes == "image" else ():
                load_picture(path)  # a metric that meets a damaged one has no result at all
        except DocumentError as error:
            return str(error)
        return replace(sample.document, segments=segments)

    def problem(self, sample: Sample, document: Document) -> str:
        """Why a document does not fit the model; "": it does."""
        try:
            self.generator.start([document])
            if sample.options:
                longest = max(len(ids) for ids in self._options(sample))
                self.processor([_without_slots(document)], max_length=self.generator.limit - longest)
        except DocumentError as error:
            return str(error)
        return ""

    def predict(self, samples: Sequence[Sample], documents: Sequence[Document], indices: Sequence[int],
                predictions: Predictions) -> list[Record]:  # fmt: skip
        """Records of samples, whose pictures are then in the folder."""
        if self.task.makes == "scores":
            made = self._score(samples, documents)
        else:
            made = self._generate(samples, documents, indices, predictions)
        return [
            {"index": i, "id": s.id, **content} for i, s, content in zip(indices, samples, made, strict=True)
        ]  # fmt: skip

    def _generate(self, samples: Sequence[Sample], documents: Sequence[Document], indices: Sequence[int],
                  predictions: Predictions) -> list[Record]:  # fmt: skip
        seeds = [sample_seed(self.suite.seed, self.task.name, s.id) for s in samples]
        finished: list[list[SegmentFinished]] = [[] for _ in samples]
        reasons = [""] * len(samples)
        for event in self.generator.run(documents, seeds):
            if isinstance(event, SegmentFinished):
                finished[event.document].append(event)
            elif isinstance(event, DocumentFinished):
                reasons[event.document] = event.reason
        records = []
        for sample, events, index, reason in zip(samples, finished, indices, reasons, strict=True):
            if len(events) < sum(s.is_open for s in sample.document.segments):
                records.append({"problem": f"ended by '{reason}' before all slots were filled; shorten it"})
            elif self.task.makes == "text":
                text = " ".join(e.segment.text or "" for e in events if isinstance(e.segment, Text))
                records.append({"text": text, "prediction": self.task.post(text)})
            else:
                drawn = [e for e in events if e.candidates]
                records.append(self._keep(sample, drawn, index, predictions))
        return records

    def _keep(self, sample: Sample, drawn: Sequence[SegmentFinished], index: int, predictions: Predictions) -> Record:
        """Choose among candidates and write the pictures, and the true ones if they are no files."""
        record: Record = {"images": []}
        for slot, event in enumerate(drawn):
            best = 0
            if self.clip is not None and len(event.candidates) > 1:
                best, cosines = self.clip.rerank(event.candidates, str(sample.meta["caption"]))
                record |= {"candidate": best, "cosines": [round(c, 6) for c in cosines]}
            record["images"].append(predictions.save_picture(event.candidates[best], index, slot))
        references = sample.reference if isinstance(sample.reference, list) else []
        if any(isinstance(r, PIL.Image.Image) for r in references):
            record["references"] = [
                predictions.save_picture(r, index, slot, REFERENCES) for slot, r in enumerate(references)
            ]
        return record

    def _score(self, samples: Sequence[Sample], documents: Sequence[Document]) -> list[Record]:
        options = [self._options(sample) for sample in samples]
        batch = self.processor([_without_slots(d) for d in documents], padding_side="left")
        scores = self.model.score(batch.to(self.model.compute_device), options, self.suite.option_batch_size)
        return [
            {"scores": row, "lengths": [len(ids) for ids in ids_of_row]}
            for row, ids_of_row in zip(scores, options, strict=True)
        ]

    def _options(self, sample: Sample) -> list[list[int]]:
        found = [encode_text(self.processor.tokenizer, option) for option in sample.options]
        for option, ids in zip(sample.options, found, strict=True):
            if not ids:
                raise DocumentError(f"the option {option!r} has no tokens", f"sample {sample.id}", "Correct the file")
        return found


def effective_settings(task: Task, suite: TaskSuite) -> GenerationSettings:
    """How a task's slots are filled. Without CLIP there is nothing to choose candidates by, and one is drawn.

    Raises:
        TaskError: the task's settings name what an evaluation decides.
    """
    for name, instead in (("seed", "'seed' of the evaluation"), ("num_return_sequences", "num_beams")):
        if name in task.config.generation:
            raise TaskError(f"'{name}' cannot be set for a task", f"task '{task.name}', 'generation'", f"Use {instead}")
    changes: dict[str, Any] = {"batch_size": suite.batch_size}
    if task.select == "clip" and suite.metrics.clip is None:
        changes["num_candidates"] = 1
    return override(task.settings, **changes)


def clip_of(task: Task, suite: TaskSuite, device: torch.device | str) -> CLIP | None:
    """What chooses among candidates; None: the first counts.

    Raises:
        TaskError: the folder that is named has no model.
    """
    if task.select != "clip" or suite.metrics.clip is None:
        return None
    folder = Path(suite.metrics.clip)
    if not (folder / "config.json").is_file():
        raise TaskError(f"'{folder}' has no config.json, so it is no CLIP model to choose pictures by",
                        f"task '{task.name}', 'metrics.clip'", "Correct it, or leave it out to draw one")  # fmt: skip
    return CLIP(folder, device)


def _true_pictures(sample: Sample) -> list[str]:
    """Paths of the pictures that drawn ones are compared with."""
    if isinstance(sample.reference, dict):
        return [sample.reference["photo"], sample.reference["labels"]]
    return [path for path in sample.reference if isinstance(path, str)]


def _without_slots(document: Document) -> Document:
    return replace(document, segments=[s for s in document.segments if not s.is_open])


def run_batches(
    predictor: Predictor,
    samples: Sequence[Sample],
    batches: Sequence[Sequence[int]],
    done: Mapping[int, Record],
    predictions: Predictions,
    advance: Callable[[int], None] = lambda count: None,
) -> Speed:
    """Finish what is not done of some batches.

    A batch of which a part is done runs as a whole, so that its rounding is the same, and only the rest is written.
    Samples that could not be read before are looked at again.

    Args:
        predictor: makes the predictions.
        samples: of the whole task.
        batches: this process's share, as numbers of samples.
        done: records that are there, by number.
        predictions: where new ones go.
        advance: told how many samples were finished.
    """
    speed, begin = Speed(), time.perf_counter()
    for batch, pending, loaded in _ahead(predictor, samples, batches, done):
        records, ready = [], {}
        for index, document in zip(pending, loaded, strict=True):
            problem = document if isinstance(document, str) else predictor.problem(samples[index], document)
            if not problem:
                ready[index] = document
            elif done.get(index, {}).get("problem") != problem:
                records.append({"index": index, "id": samples[index].id, "problem": problem})
        if ready:
            for index in batch:
                if index not in pending:
                    ready[index] = predictor.load(samples[index])
            together = [index for index in batch if isinstance(ready.get(index), Document)]
            start = time.perf_counter()
            made = predictor.predict(
                [samples[i] for i in together], [ready[i] for i in together], together, predictions
            )  # fmt: skip
            speed.model_seconds += time.perf_counter() - start
            records += [record for record in made if record["index"] in pending]
        if records:
            predictions.add(records)
        speed.samples += len(ready)
        advance(len(batch))
    speed.seconds = time.perf_counter() - begin
    return speed


def _ahead(
    predictor: Predictor, samples: Sequence[Sample], batches: Sequence[Sequence[int]], done: Mapping[int, Record]
) -> Iterator[tuple[Sequence[int], list[int], list[Document | str]]]:
    """(batch, what is pending of it, that read); the pictures of the next batch are read meanwhile."""

    def pending_of(batch: Sequence[int]) -> list[int]:
        return [i for i in batch if i not in done or "problem" in done[i]]

    with ThreadPoolExecutor(predictor.suite.workers) as pool:
        waiting: list[tuple[Sequence[int], list[int], list[Future[Document | str]]]] = []
        for batch in batches:
            pending = pending_of(batch)
            waiting.append((batch, pending, [pool.submit(predictor.load, samples[i]) for i in pending]))
            if len(waiting) > 1:
                now, left, futures = waiting.pop(0)
                yield now, left, [future.result() for future in futures]
        for now, left, futures in waiting:
            yield now, left, [future.result() for future in futures]

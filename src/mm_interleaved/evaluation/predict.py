"""Predictions of a model for the samples of a task, batch by batch.

The whole task is divided into batches before these are distributed to processes, and every sample has its own seed. So
a prediction depends neither on the number of processes nor on where a run was interrupted.

While the model processes a batch, threads load the next one and write the results of the last one.
"""

from __future__ import annotations

import copy
import hashlib
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import PIL.Image
import torch

from ..document import Document, Image, Text, place_boxes
from ..generation import DocumentFinished, GenerationSettings, InterleavedGenerator, MMInterleaved
from ..generation.interleaved import PreparedDocument
from ..generation.settings import override
from ..io import InputError
from ..io.images import load_image
from ..metrics.clip import CLIP
from ..processor import MMInterleavedProcessor
from ..processor.packing import TokenStream
from ..processor.tokenizer import encode_plain
from ..tasks import Sample, Task
from .config import TaskSuite
from .predictions import IMAGES, REFERENCES, Prediction, Predictions, Record, image_name

WINDOW = 32  # batches whose samples are sorted by length together


def sample_seed(seed: int, task: str, sample: str) -> int:
    """The seed of a sample, which depends on no other sample and on no process."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{task}/{sample}".encode()).digest()[:6], "big")


def plan_batches(samples: Sequence[Sample], size: int, parts: Sequence[int] = ()) -> list[list[int]]:
    """Divide samples into batches of similar length, from the same section of the task.

    Args:
        samples: the samples of a task.
        size: maximum number of samples in a batch.
        parts: boundaries that a batch may not cross, as numbers of samples from the start.
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
    """Samples and time of this run of the program.

    Attributes:
        samples: number of samples that this process finished in this run.
        seconds: total time.
        model_seconds: time from loaded batches to their texts, scores and images, work of the host included; the rest
            is waiting for files. Reading and writing threads slow it down, since they share Python's lock. So a
            fraction of 1 means that the model never waits for a batch, and not that the device is never idle.
    """

    samples: int = 0
    seconds: float = 0.0
    model_seconds: float = 0.0

    def to_dict(self) -> dict[str, float]:
        """The values for the results."""
        share = self.model_seconds / self.seconds if self.seconds else 0.0
        rate = self.samples / self.seconds if self.seconds else 0.0
        return {"samples": self.samples, "seconds": round(self.seconds, 3), "samples_per_second": round(rate, 3),
                "model_share": round(share, 3)}  # fmt: skip


@dataclass(frozen=True)
class PreparedSample:
    """The inputs of the model for a sample.

    Attributes:
        sample: the sample.
        prepared: its document with preprocessed images; without slots if options are scored.
        options: the token ids of its candidate answers.
    """

    sample: Sample
    prepared: PreparedDocument
    options: Sequence[list[int]]


class Predictor:
    """Predicts the samples of one task.

    Args:
        model, processor: the model and its processor.
        task: the task.
        suite: the seed and the batch sizes.

    Raises:
        InputError: the settings of generation or the CLIP model that selects candidates cannot be used.
    """

    def __init__(self, model: MMInterleaved, processor: MMInterleavedProcessor, task: Task, suite: TaskSuite) -> None:
        self.model, self.task, self.suite = model, task, suite
        self.processor = copy.copy(processor)
        self.processor.crop = task.crop
        self.settings = effective_settings(task, suite)
        self.clip = clip_of(task, suite, model.compute_device)
        if self.clip is not None:
            try:
                self.clip.embed_texts(["an image"])
            except (
                ValueError,
                OSError,
                RuntimeError,
            ) as error:  # the libraries' errors for folders that they cannot load
                raise InputError(f"the CLIP model cannot be used: {str(error).splitlines()[0]}",
                                 f"task '{task.name}', 'metrics.clip'", "Fetch it again") from None  # fmt: skip
        self.generator = InterleavedGenerator(model, self.processor, self.settings, progress=False)

    def load(self, sample: Sample) -> PreparedSample | str:
        """The inputs for a sample, or why it cannot be used. Thread-safe."""
        if sample.problem:
            return sample.problem
        try:
            document = self._opened(sample.document)
            for path in _true_images(sample) if self.task.makes == "image" else ():
                load_image(path)  # metrics fail on a damaged image
            if self.task.makes == "scores":
                document = replace(document, segments=[s for s in document.segments if not s.is_open])
            return self._fitting(sample, document)
        except InputError as error:
            return str(error)

    def _opened(self, document: Document) -> Document:
        """A document whose images are reduced to the size that the model sees."""
        segments = []
        for segment in place_boxes(document.segments):
            if isinstance(segment, Image) and segment.source is not None:
                seen = self.processor.views(segment, training=False).input
                segment = replace(segment, source=PIL.Image.fromarray(seen), transform=None)
            segments.append(segment)
        return replace(document, segments=segments)

    def _fitting(self, sample: Sample, document: Document) -> PreparedSample:
        """Tokenize a sample, and check that it fits into the model's context with its longest option."""
        prepared = self.generator.prepare(document)
        options = [encode_plain(self.processor.tokenizer, option) for option in sample.options]
        for option, ids in zip(sample.options, options, strict=True):
            if not ids:
                raise InputError(f"the option {option!r} has no tokens", f"sample {sample.id}", "Correct the file")
        limit = self.generator.limit - max(map(len, options), default=0)
        tokens = sum(len(item) for item in prepared.plan if isinstance(item, TokenStream))
        if tokens > limit:
            raise InputError(f"{tokens} tokens are more than the {limit} of the model's context before an option",
                                document.name, "Shorten it")  # fmt: skip
        return PreparedSample(sample, prepared, options)

    def predict(self, batch: Sequence[PreparedSample], indices: Sequence[int]) -> list[Prediction]:
        """The predictions for samples; `indices` are their numbers in the task."""
        contents = self._score(batch) if self.task.makes == "scores" else self._generate(batch, indices)
        return [
            replace(made, record={"index": index, "id": ready.sample.id, **made.record})
            for index, ready, made in zip(indices, batch, contents, strict=True)
        ]

    def _generate(self, batch: Sequence[PreparedSample], indices: Sequence[int]) -> list[Prediction]:
        seeds = [sample_seed(self.suite.seed, self.task.name, ready.sample.id) for ready in batch]
        events = self.generator.run([ready.prepared for ready in batch], seeds)
        ends = {event.document: event for event in events if isinstance(event, DocumentFinished)}
        found = []
        for number, (ready, index) in enumerate(zip(batch, indices, strict=True)):
            generated = ends[number].result.generated
            if len(generated) < sum(s.is_open for s in ready.sample.document.segments):
                reason = ends[number].reason
                found.append(Prediction({"problem": f"ended by '{reason}' before all slots were filled; shorten it"}))
            elif self.task.makes == "text":
                text = " ".join(s.text or "" for s in generated if isinstance(s, Text))
                found.append(Prediction({"text": text, "prediction": self.task.post(text)}))
            else:
                candidates = [s.generated.candidates for s in generated if s.generated and isinstance(s, Image)]
                found.append(self._chosen(ready.sample, candidates, index))
        return found

    def _chosen(self, sample: Sample, candidates: Sequence[Sequence[PIL.Image.Image]], index: int) -> Prediction:
        """The selected candidates, and the reference images unless they are files."""
        record: Record = {"images": []}
        files: dict[str, PIL.Image.Image] = {}
        for slot, images in enumerate(candidates):
            best = 0
            if self.clip is not None and len(images) > 1:
                best, cosines = self.clip.rerank(images, str(sample.meta["caption"]))
                record |= {"candidate": best, "cosines": [round(c, 6) for c in cosines]}
            files[image_name(IMAGES, index, slot)] = images[best]
        record["images"] = list(files)
        references = sample.reference if isinstance(sample.reference, list) else []
        if any(isinstance(r, PIL.Image.Image) for r in references):
            true = {image_name(REFERENCES, index, slot): r for slot, r in enumerate(references)}
            record["references"] = list(true)
            files |= true
        return Prediction(record, files)

    def _score(self, batch: Sequence[PreparedSample]) -> list[Prediction]:
        options = [ready.options for ready in batch]
        prompts = self.processor.collate([_prompt(ready) for ready in batch], padding_side="left")
        scores = self.model.score(prompts.to(self.model.compute_device), options, self.suite.option_batch_size)
        return [
            Prediction({"scores": row, "lengths": [len(ids) for ids in ids_of_row]})
            for row, ids_of_row in zip(scores, options, strict=True)
        ]


def _prompt(ready: PreparedSample) -> TokenStream:
    """The tokens before the options: all of a document without slots."""
    prompt = ready.prepared.plan[0]
    assert isinstance(prompt, TokenStream)
    return prompt


def effective_settings(task: Task, suite: TaskSuite) -> GenerationSettings:
    """The settings of generation for a task. Without CLIP, only one candidate image is generated.

    Raises:
        InputError: the task sets something that the evaluation decides.
    """
    for name, instead in (("seed", "'seed' of the evaluation"), ("num_return_sequences", "num_beams")):
        if name in task.config.generation:
            raise InputError(
                f"'{name}' cannot be set for a task", f"task '{task.name}', 'generation'", f"Use {instead}"
            )
    changes: dict[str, Any] = {"batch_size": suite.batch_size}
    if task.select == "clip" and suite.metrics.clip is None:
        changes["num_candidates"] = 1
    return override(task.settings, **changes)


def clip_of(task: Task, suite: TaskSuite, device: torch.device | str) -> CLIP | None:
    """The CLIP model that selects a candidate image; None: the first is used.

    Raises:
        InputError: the folder has no CLIP model.
    """
    if task.select != "clip" or suite.metrics.clip is None:
        return None
    folder = Path(suite.metrics.clip)
    if not (folder / "config.json").is_file():
        raise InputError(f"'{folder}' has no config.json, so it is not a CLIP model",
                         f"task '{task.name}', 'metrics.clip'", "Correct it, or leave it out")  # fmt: skip
    return CLIP(folder, device)


def _true_images(sample: Sample) -> list[str]:
    """Paths of the reference images."""
    if isinstance(sample.reference, dict):
        return [sample.reference["photo"], sample.reference["labels"]]
    return [path for path in sample.reference if isinstance(path, str)]


def run_batches(
    predictor: Predictor,
    samples: Sequence[Sample],
    batches: Sequence[Sequence[int]],
    done: Mapping[int, Record],
    predictions: Predictions,
    advance: Callable[[int], None] = lambda count: None,
) -> Speed:
    """Predict the samples of some batches that have no prediction yet.

    If a part of a batch is done, the whole batch runs, so that rounding is the same, and only the rest is written.
    Samples that could not be read before are tried again. A batch is written while the next one runs.

    Args:
        predictor: makes the predictions.
        samples: the samples of the whole task.
        batches: the batches of this process, as numbers of samples.
        done: existing records by number.
        predictions: receives new predictions.
        advance: called with the number of finished samples.
    """
    speed, begin = Speed(), time.perf_counter()
    with ThreadPoolExecutor(1) as writer:
        writing: Future[None] | None = None
        for batch, pending, loaded in _ahead(predictor, samples, batches, done):
            problems = {i: found for i, found in loaded.items() if isinstance(found, str)}
            together = {i: found for i, found in loaded.items() if isinstance(found, PreparedSample)}
            made = [
                Prediction({"index": i, "id": samples[i].id, "problem": problems[i]})
                for i in pending
                if i in problems and done.get(i, {}).get("problem") != problems[i]
            ]
            if any(i in together for i in pending):
                start = time.perf_counter()
                found = predictor.predict(list(together.values()), list(together))
                speed.model_seconds += time.perf_counter() - start
                speed.samples += len(together)
                made += [one for one in found if one.record["index"] in pending]
            if made:
                if writing is not None:
                    writing.result()  # raises errors of writing, and limits the waiting batches to one
                writing = writer.submit(predictions.add, made)
            advance(len(batch))
        if writing is not None:
            writing.result()
    speed.seconds = time.perf_counter() - begin
    return speed


def _ahead(
    predictor: Predictor, samples: Sequence[Sample], batches: Sequence[Sequence[int]], done: Mapping[int, Record]
) -> Iterator[tuple[Sequence[int], list[int], dict[int, PreparedSample | str]]]:
    """(batch, its pending samples, its loaded samples if any are pending). The next batch loads in the background."""
    waiting: deque[tuple[Sequence[int], list[int], dict[int, Future[PreparedSample | str]]]] = deque()
    with ThreadPoolExecutor(predictor.suite.workers) as pool:
        for batch in (*batches, ()):  # the empty batch yields the last one
            pending = [i for i in batch if i not in done or "problem" in done[i]]
            loading = {i: pool.submit(predictor.load, samples[i]) for i in (batch if pending else ())}
            waiting.append((batch, pending, loading))
            if len(waiting) > 1:
                now, left, futures = waiting.popleft()
                yield now, left, {i: future.result() for i, future in futures.items()}

"""What a model makes of a task's samples, batch by batch.

Batches are made of the whole task before it is dealt out, and every sample has its own seed. So a prediction depends
neither on how many processes there are nor on where a run was interrupted.

While the model has a batch, threads load the next one and write what came of the last.
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
from typing import Any, cast

import PIL.Image
import torch

from ..document import Document, Image, Text
from ..generation import DocumentFinished, GenerationSettings, InterleavedGenerator, MMInterleaved
from ..generation.interleaved import PreparedDocument
from ..generation.settings import override
from ..io import InputError
from ..io.images import ImageSource, load_image
from ..metrics.clip import CLIP
from ..processor import MMInterleavedProcessor
from ..processor.images import CROPS
from ..processor.packing import TokenStream
from ..processor.tokenizer import encode_text
from ..tasks import Sample, Task
from .config import TaskSuite
from .predictions import IMAGES, REFERENCES, Prediction, Predictions, Record, image_name

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
        seconds: in all.
        model_seconds: of these, from loaded batches to their texts, scores and images. The rest is waiting for files
            to be read and written. What the host does for the model is part of it, and so is what the threads that
            read and write cost the host, as they share Python's lock: a share of 1 means that the model never waits
            for a batch, not that the device is never idle. Samples a second tell of both.
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


@dataclass(frozen=True)
class PreparedSample:
    """A sample that the model can be asked: nothing is left to do but what the model does.

    Attributes:
        sample: what is asked.
        prepared: its document, with its images as the model sees them; without slots where options are scored.
        options: the tokens of its candidate answers.
    """

    sample: Sample
    prepared: PreparedDocument
    options: Sequence[list[int]]


class Predictor:
    """A model that is asked one task.

    Args:
        model, processor: what reads and writes.
        task: what is asked.
        suite: seed and sizes of batches.

    Raises:
        InputError: the settings of generation cannot be used, or the model that chooses among candidates.
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
            ) as error:  # what the libraries raise for folders they cannot load
                raise InputError(f"the CLIP model cannot be used: {str(error).splitlines()[0]}",
                                 f"task '{task.name}', 'metrics.clip'", "Fetch it again") from None  # fmt: skip
        self.generator = InterleavedGenerator(model, self.processor, self.settings, progress=False)

    def load(self, sample: Sample) -> PreparedSample | str:
        """A sample ready for the model, or why it cannot be used. Any thread may call it."""
        if sample.problem:
            return sample.problem
        try:
            document = self._opened(sample.document)
            for path in _true_images(sample) if self.task.makes == "image" else ():
                load_image(path)  # a metric that meets a damaged one has no result at all
            if self.task.makes == "scores":
                document = replace(document, segments=[s for s in document.segments if not s.is_open])
            return self._fitting(sample, document)
        except InputError as error:
            return str(error)

    def _opened(self, document: Document) -> Document:
        """A document with its images as the model sees them, which are small."""
        segments = []
        for segment in document.segments:
            if isinstance(segment, Image) and segment.source is not None:
                seen = CROPS[self.task.crop](load_image(cast(ImageSource, segment.source)), self.processor.image_size)
                segment = replace(segment, source=PIL.Image.fromarray(seen))
            segments.append(segment)
        return replace(document, segments=segments)

    def _fitting(self, sample: Sample, document: Document) -> PreparedSample:
        """A sample in tokens, the model having room for them and for its longest option."""
        prepared = self.generator.prepare(document)
        options = [encode_text(self.processor.tokenizer, option) for option in sample.options]
        for option, ids in zip(sample.options, options, strict=True):
            if not ids:
                raise InputError(f"the option {option!r} has no tokens", f"sample {sample.id}", "Correct the file")
        room = self.generator.limit - max(map(len, options), default=0)
        tokens = sum(len(item) for item in prepared.plan if isinstance(item, TokenStream))
        if tokens > room:
            raise InputError(f"{tokens} tokens are more than the {room} of the model's context before an option",
                                document.name, "Shorten it")  # fmt: skip
        return PreparedSample(sample, prepared, options)

    def predict(self, batch: Sequence[PreparedSample], indices: Sequence[int]) -> list[Prediction]:
        """What comes of samples; `indices` are their numbers in the task."""
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
        """The images, chosen among candidates, and the true ones if they are no files."""
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
    """The tokens before the options; a document without slots has nothing else."""
    prompt = ready.prepared.plan[0]
    assert isinstance(prompt, TokenStream)
    return prompt


def effective_settings(task: Task, suite: TaskSuite) -> GenerationSettings:
    """How a task's slots are filled. Without CLIP there is nothing to choose candidates by, and one is drawn.

    Raises:
        InputError: the task's settings name what an evaluation decides.
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
    """What chooses among candidates; None: the first counts.

    Raises:
        InputError: the folder that is named has no model.
    """
    if task.select != "clip" or suite.metrics.clip is None:
        return None
    folder = Path(suite.metrics.clip)
    if not (folder / "config.json").is_file():
        raise InputError(f"'{folder}' has no config.json, so it is no CLIP model to choose images by",
                         f"task '{task.name}', 'metrics.clip'", "Correct it, or leave it out to draw one")  # fmt: skip
    return CLIP(folder, device)


def _true_images(sample: Sample) -> list[str]:
    """Paths of the images that drawn ones are compared with."""
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
    """Finish what is not done of some batches.

    A batch of which a part is done runs as a whole, so that its rounding is the same, and only the rest is written.
    Samples that could not be read before are looked at again. What one batch gave is written while the next runs.

    Args:
        predictor: makes the predictions.
        samples: of the whole task.
        batches: this process's share, as numbers of samples.
        done: records that are there, by number.
        predictions: where new ones go.
        advance: told how many samples were finished.
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
                    writing.result()  # what went wrong there ends the run; and no more than one batch waits
                writing = writer.submit(predictions.add, made)
            advance(len(batch))
        if writing is not None:
            writing.result()
    speed.seconds = time.perf_counter() - begin
    return speed


def _ahead(
    predictor: Predictor, samples: Sequence[Sample], batches: Sequence[Sequence[int]], done: Mapping[int, Record]
) -> Iterator[tuple[Sequence[int], list[int], dict[int, PreparedSample | str]]]:
    """(batch, what is pending of it, all of it loaded, if any is pending); the next batch is loaded meanwhile."""
    waiting: deque[tuple[Sequence[int], list[int], dict[int, Future[PreparedSample | str]]]] = deque()
    with ThreadPoolExecutor(predictor.suite.workers) as pool:
        for batch in (*batches, ()):  # the empty one lets the last go
            pending = [i for i in batch if i not in done or "problem" in done[i]]
            loading = {i: pool.submit(predictor.load, samples[i]) for i in (batch if pending else ())}
            waiting.append((batch, pending, loading))
            if len(waiting) > 1:
                now, left, futures = waiting.popleft()
                yield now, left, {i: future.result() for i, future in futures.items()}

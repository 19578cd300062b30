"""Only answers are learned, in every task with a phase for training, and training has the prompt of evaluation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mm_interleaved.data import SourceConfig
from mm_interleaved.data.readers import make_reader
from mm_interleaved.document import Document, Image, Segment, Text
from mm_interleaved.processor import MMInterleavedProcessor
from mm_interleaved.tasks import TASKS, Task, make_task

from ..tasks.conftest import FILES

TRAINED = [name for name in TASKS if TASKS[name].train]
LONG = Document([Text("word " * 120)])
ToyTask = Callable[..., Task]


def training_task(name: str, toy_task: ToyTask) -> Task:
    task = toy_task(name, "train", phase=TASKS[name].train)
    if name != "flickr30k":
        return task
    file = Path(str(task.config.annotations), "test1k.token.coco_format")  # the only one that the toy world writes
    return make_task(replace(task.config, annotations=str(file)))


def test_every_task_with_a_phase_for_training_is_tested() -> None:
    assert set(TRAINED) <= set(FILES)
    assert len(TRAINED) >= 20


def without_space(text: str) -> str:
    return "".join(text.split())


def check_labels(document: Document, answers: list[Segment], processor: MMInterleavedProcessor) -> None:
    """Compare what is learned of a document, in a batch with padding, with its answers."""
    batch = processor([document, LONG], training=True, max_length=2048, truncation=True)
    labels, ids = batch.labels[0], batch.input_ids[0]
    assert (labels[batch.attention_mask[0] == 0] == -100).all()
    assert (labels[ids == processor.image_token_id] == -100).all()
    learned = labels[labels != -100].tolist()
    texts = [answer.text or "" for answer in answers if isinstance(answer, Text)]
    assert without_space(processor.decode_text(learned)) == without_space("".join(texts))
    drawn = [isinstance(segment, Image) and segment in answers for segment in document.segments]
    first = int(drawn[0])  # the token that starts an image right after <s> is never learned
    assert learned.count(processor.soi_token_id) == sum(drawn) - first
    wanted = [float(is_drawn) for is_drawn, s in zip(drawn, document.segments, strict=True) if isinstance(s, Image)]
    assert batch.image_loss_mask.tolist() == wanted


@pytest.mark.parametrize("name", TRAINED)
def test_training_has_the_prompt_of_evaluation(name: str, toy_task: ToyTask, processor: MMInterleavedProcessor) -> None:
    """A training document without its answers is the document of the evaluation."""
    task = training_task(name, toy_task)
    number = 0
    for item, sample in zip(task.items(), task.samples(), strict=True):
        assert not item.problem
        asked, document = sample.document, task.document(item)
        slots = [segment.is_open for segment in asked.segments]
        given = [s for s, is_slot in zip(document.segments, slots, strict=True) if not is_slot]
        answers = [s for s, is_slot in zip(document.segments, slots, strict=True) if is_slot]
        assert given == [segment for segment in asked.segments if not segment.is_open]
        assert answers == list(item.answer)
        assert not any(segment.supervise for segment in given)
        assert all(segment.supervise for segment in answers)
        check_labels(document, answers, processor)
        number += 1
    assert number


@pytest.mark.parametrize("name", TRAINED)
def test_only_answers_are_learned_in_each_epoch(
    name: str, toy_task: ToyTask, processor: MMInterleavedProcessor
) -> None:
    """Also with the random choices of an epoch."""
    config = training_task(name, toy_task).config
    options = {"task": name, "images": config.images, "annotations": config.annotations}
    reader = make_reader(SourceConfig("task", options=options), Path())
    assert reader.crop == TASKS[name].crop  # type: ignore[attr-defined]
    for record in [record for shard in range(len(reader.shards.names)) for record in reader.shards.records(shard)]:
        for epoch in range(3):
            document = reader.document(record, np.random.default_rng(epoch), lambda reason, example: None)
            answers = [segment for segment in document.segments if segment.supervise]
            assert answers
            assert document.segments[-1].supervise
            check_labels(document, answers, processor)

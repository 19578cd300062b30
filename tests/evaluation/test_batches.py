"""While the model has a batch, threads load the next one and write what came of the last."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import PIL.Image
import pytest

from mm_interleaved import MMInterleaved, MMInterleavedProcessor
from mm_interleaved.evaluation import TaskSuite, predict, predictions
from mm_interleaved.evaluation.predict import Predictor, PreparedSample
from mm_interleaved.evaluation.predictions import Predictions
from mm_interleaved.processor import processor
from mm_interleaved.tasks import make_task

from .conftest import MakeTask, Run, contents, lines

PATIENCE = 20  # seconds


def meanwhile(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, before: Callable[..., None]) -> None:
    """Let something happen before each call of a method."""
    method = getattr(owner, name)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        before(*args)
        return method(self, *args, **kwargs)

    monkeypatch.setattr(owner, name, call)


@pytest.mark.parametrize("name", ["vqav2", "visdial", "pororo"])
def test_samples_are_prepared_once_and_by_threads(
    name: str, task: MakeTask, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[threading.Thread] = []
    meanwhile(monkeypatch, MMInterleavedProcessor, "encode", lambda *_: encoded.append(threading.current_thread()))
    read: list[threading.Thread] = []
    load_image = predict.load_image

    def reading(source: Any, *arguments: Any) -> Any:
        here = threading.current_thread() is threading.main_thread()
        if not here or isinstance(source, (str, Path)):  # here also images that were reduced before
            read.append(threading.current_thread())
        return load_image(source, *arguments)

    for module in (predict, processor):  # true images, and those of prompts
        monkeypatch.setattr(module, "load_image", reading)
    asked = task(name)
    run(asked)
    samples = list(make_task(asked).samples())
    if name != "pororo":  # there the stretches between slots are encoded one by one
        assert len(encoded) == len(samples) == 4
    given = [i for s in samples for i in s.document.images if not i.is_open]
    true = [r for s in samples if name == "pororo" for r in s.reference if isinstance(r, str)]
    assert len(read) == len(given) + len(true)
    assert threading.main_thread() not in {*encoded, *read}


def test_the_next_batch_is_loaded_while_the_model_has_one(
    task: MakeTask, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = threading.Semaphore(0)
    load = Predictor.load

    def loading(self: Predictor, sample: Any) -> Any:
        ready = load(self, sample)
        loaded.release()
        return ready

    monkeypatch.setattr(Predictor, "load", loading)
    in_time: list[bool] = []

    def wait(*_: Any) -> None:
        if not in_time:  # the first of two batches finds its own two samples loaded, and then the other's
            in_time.extend(loaded.acquire(timeout=PATIENCE) for _ in range(4))

    meanwhile(monkeypatch, Predictor, "predict", wait)
    run(task("vqav2"))
    assert in_time == [True] * 4


def test_a_batch_is_written_while_the_model_has_the_next(
    task: MakeTask, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, in_time = [threading.Event(), threading.Event()], []
    begins = iter(begun)
    meanwhile(monkeypatch, Predictor, "predict", lambda *_: next(begins).set())
    meanwhile(monkeypatch, Predictions, "add", lambda *_: in_time.append(begun[1].wait(PATIENCE)))
    run(task("coco"))
    assert in_time == [True, True]


def test_no_line_is_written_before_its_images(
    task: MakeTask, run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The disk is full at the third image; the run is then resumed."""
    write, left = predictions.write_image, iter(range(3))

    def full(path: Path, image: PIL.Image.Image) -> None:
        if next(left) == 2:
            raise OSError(28, "No space left on device")
        write(path, image)

    with monkeypatch.context() as patched:
        patched.setattr(predictions, "write_image", full)
        with pytest.raises(OSError, match="No space left"):
            run(task("coco"))
    folder = tmp_path / "out/coco"
    written = lines(folder / "part-0.jsonl")
    assert len(written) == 2
    assert all((folder / record["images"][0]).is_file() for record in written)
    assert run(task("coco")).speed["coco"]["samples"] == 2
    run(task("coco"), folder="whole")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_what_is_done_of_a_batch_is_not_written_again(task: MakeTask, run: Run, tmp_path: Path) -> None:
    run(task("coco", limit=2))
    before = contents(tmp_path / "out")
    folder = tmp_path / "out/coco"
    kept, redone = (folder / record["images"][0] for record in lines(folder / "predictions.jsonl"))
    (folder / "predictions.jsonl").write_text((folder / "predictions.jsonl").read_text().splitlines(True)[0])
    redone.unlink()
    time = kept.stat().st_mtime_ns
    assert run(task("coco", limit=2)).speed["coco"]["samples"] == 2
    assert contents(tmp_path / "out") == before
    assert kept.stat().st_mtime_ns == time


@pytest.mark.parametrize(("owner", "method"), [(Predictor, "load"), (Predictions, "add")])
def test_what_goes_wrong_in_a_thread_ends_the_run(
    owner: type, method: str, task: MakeTask, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("in a thread")

    monkeypatch.setattr(owner, method, fail)
    with pytest.raises(RuntimeError, match="in a thread"):
        run(task("vqav2", limit=2))


def test_a_prompt_leaves_room_for_its_longest_option(
    task: MakeTask, model: MMInterleaved, processor: MMInterleavedProcessor
) -> None:
    suite = TaskSuite([task("visdial")])
    asked = make_task(suite.tasks[0])
    predictor, sample = Predictor(model, processor, asked, suite), next(asked.samples())
    ready = predictor.load(sample)
    assert isinstance(ready, PreparedSample)
    tokens, longest = len(ready.prepared.plan[0]), max(map(len, ready.options))
    assert longest > 1
    predictor.generator.limit = tokens + longest
    assert isinstance(predictor.load(sample), PreparedSample)
    predictor.generator.limit -= 1
    assert f"{tokens} tokens are more than the {tokens - 1} of the model's context" in str(predictor.load(sample))

"""An evaluation from its settings to its results."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import platform
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import nn

from ..configuration import to_yaml
from ..generation import MMInterleaved
from ..io import InputError, read_json, write_atomic, write_json, write_json_lines
from ..model.weights import stored
from ..processor import MMInterleavedProcessor
from ..tasks import Sample, Task, make_task
from ..tasks.facts import find_facts
from .config import TaskSuite, task_name
from .predict import Predictor, Speed, clip_of, effective_settings, plan_batches, run_batches
from .predictions import Predictions
from .processes import on_all, on_main, start_processes
from .report import markdown
from .scoring import NAMED, SampleScores, ScoringInputs, TaskResult, score_task

FORMAT = 2  # of the folder; another one is not continued
RESULTS, TABLE, SCORES = "results.json", "results.md", "scores.jsonl"
PACKAGES = ("mm-interleaved", "torch", "transformers", "diffusers", "accelerate", "numpy", "pillow", "pycocoevalcap")
ELSEWHERE = ("root", "images", "annotations", "shot_images", "shot_annotations", "neighbours")
OnScored = Callable[[ScoringInputs, SampleScores, TaskResult], object]  # what it returns is not used


@dataclass
class Results:
    """What came out of an evaluation.

    Attributes:
        model: name of the model, digest of its weights, whether they are trained.
        config: all settings.
        tasks: by name.
        speed: of each task, what this run did and how fast, on the main process.
    """

    model: dict[str, Any]
    config: dict[str, Any]
    tasks: dict[str, TaskResult]
    speed: dict[str, dict[str, float]] = field(default_factory=dict)

    def to_dict(self, processes: int, device: str) -> dict[str, Any]:
        """For `results.json`."""
        return {
            "model": self.model,
            "seed": self.config["seed"],
            "tasks": {name: asdict(task) for name, task in self.tasks.items()},
            "speed": self.speed,
            "machine": {"processes": processes, "device": device, "python": platform.python_version()},
            "versions": _versions(),
            "config": self.config,
        }


def evaluate(
    config: TaskSuite,
    model: MMInterleaved,
    processor: MMInterleavedProcessor,
    folder: Path,
    *,
    name: str = "",
    trained: bool = True,
    weights: str | None = None,
    state: PartialState | None = None,
    console: Console | None = None,
    on_scored: OnScored = lambda given, scores, result: None,
) -> Results | None:
    """Run tasks over a model and score what it makes of them.

    Every process calls this with the same arguments. What is there in the folder already is kept. A process alone
    scores and writes every task as soon as it is done, so that a run that is cut off leaves what it has.

    Args:
        config: the tasks.
        model, processor: what is evaluated.
        folder: of the results.
        name, trained: of the model, for the record.
        weights: tells these weights from others; None: a digest of them all, which takes a while for large models.
        state: this process among others; None: as it was launched.
        console: where progress is shown; None: nowhere.
        on_scored: called with every task's scores, on the main process.

    Returns:
        The results, on the main process; None on others.

    Raises:
        InputError: a task's settings are not possible, or its files cannot be read.
        EvaluationError: the folder belongs to another run.
    """
    state = state or start_processes(cpu=model.compute_device.type == "cpu")
    console = console if console is not None and state.is_main_process else Console(quiet=True)
    _align(model)
    tasks = [make_task(task) for task in config.chosen()]
    digest = weights or on_main(state, lambda: weights_digest(model))
    on_main(state, lambda: _start(config, tasks, folder, digest))
    results = Results({"name": name, "weights": digest, "trained": trained}, plain(config), {})
    known = _earlier(config, folder, digest)

    def finish(task: Task, result: TaskResult) -> None:
        """Score a task and write down all that is known by now."""
        if not result.failed:
            with console.status(f"scoring {task.name}"):
                _score(config, task, result, folder / task.name, model.compute_device, on_scored)
        known[task.name] = result
        results.tasks = {name: known[name] for name in map(task_name, config.tasks) if name in known}
        _write(results, folder, state, model)

    waiting = []
    for task in tasks:
        result = TaskResult(task.kind.name, _phase(task))
        try:
            results.speed[task.name] = _predict(config, task, model, processor, folder, digest, state, console)
        except InputError as error:
            result.failed = str(error)
            console.print(f"[red]{task.name}:[/] {_escaped(result.failed)}", highlight=False)
        if state.num_processes == 1:
            finish(task, result)
        else:  # while the main one scored, the others would stand in the next task's first collective
            waiting.append((task, result))
    if not state.is_main_process:
        return None
    for task, result in waiting:
        finish(task, result)
    return results


# ---- before


def _align(model: nn.Module) -> None:
    """Weights on a CPU at multiples of 64 bytes, as PyTorch's own: the last bits of a product depend on where they lie.

    Those that are still parts of a file, as some processes have them and others not, lie anywhere.
    """
    for parameter in model.parameters():
        if type(parameter) is nn.Parameter and parameter.device.type == "cpu" and parameter.data_ptr() % 64:
            parameter.data = parameter.data.clone()


def _start(config: TaskSuite, tasks: Sequence[Task], folder: Path, digest: str) -> None:
    """Look at every task's files and at the folder before any work begins."""
    problems = []
    for task in tasks:
        clip_of(task, config, "cpu")
        Predictions(folder / task.name).check(identity(config, task, digest))
        try:
            next(task.samples())
        except InputError as error:
            problems.append(str(error))
    if problems:
        more = "" if len(problems) == 1 else f"{len(problems)} tasks cannot be read; run the others with only=[...].\n"
        raise InputError(more + "\n".join(problems))
    write_atomic(folder / "config.yaml", to_yaml(config))


def identity(config: TaskSuite, task: Task, digest: str, samples: Sequence[Sample] | None = None) -> dict[str, Any]:
    """What decides a task's predictions; where its files lie and how large batches are does not.

    Args:
        config, task: the settings.
        digest: of the model's weights.
        samples: of the task; None: they have not been read yet.
    """
    settings = asdict(effective_settings(task, config))
    settings.pop("seed")
    for key in ("seed", "batch_size", "preview_every"):
        settings["image"].pop(key)
    told = (*ELSEWHERE, "generation", "limit")  # below, by effective settings and by the samples
    asked = {key: value for key, value in asdict(task.config).items() if key not in told}
    chooser = Path(config.metrics.clip).name if task.select == "clip" and config.metrics.clip else None
    found = {"format": FORMAT, "version": version("mm-interleaved"), "weights": digest, "seed": config.seed,
             "task": asked, "generation": settings, "chosen_by": chooser}  # fmt: skip
    if samples is not None:
        found["samples"] = {"count": len(samples), "digest": samples_digest(samples)}
    return found


def weights_digest(model: MMInterleaved) -> str:
    """SHA-256 of the configuration and of all weights with their names and types."""
    tree = {
        k: v for k, v in model.config.to_dict().items() if k not in ("transformers_version", "_name_or_path", "dtype")
    }
    digest = hashlib.sha256(json.dumps(tree, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        for part in stored(tensor):
            digest.update(part.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def samples_digest(samples: Iterable[Sample]) -> str:
    """SHA-256 of ids, texts and candidate answers."""
    digest = hashlib.sha256()
    for sample in samples:
        texts = [getattr(segment, "text", None) for segment in sample.document.segments]
        digest.update(json.dumps([sample.id, texts, sample.options]).encode())
    return digest.hexdigest()


# ---- predictions


def _predict(config: TaskSuite, task: Task, model: MMInterleaved, processor: MMInterleavedProcessor, folder: Path,
             digest: str, state: PartialState, console: Console) -> dict[str, float]:  # fmt: skip
    """This process's share of a task; how fast it went.

    Raises:
        InputError: the task's files cannot be read to their end.
        EvaluationError: the folder belongs to another run.
    """
    try:
        samples = on_all(state, lambda: list(_checked(task)))
        predictor = on_all(state, lambda: Predictor(model, processor, task, config))
    except ValueError as error:
        raise InputError(str(error)) from None
    predictions = Predictions(folder / task.name, state.process_index)
    on_main(state, lambda: predictions.prepare(lambda n: identity(config, task, digest, samples[:n])))
    done = predictions.read()
    batches = plan_batches(samples, config.batch_size, predictions.parts())
    mine = batches[state.process_index :: state.num_processes]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
               TimeRemainingColumn())  # fmt: skip
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        shown = progress.add_task(task.name, total=sum(map(len, mine)))
        speed = run_batches(predictor, samples, mine, done, predictions, lambda n: progress.advance(shown, n))
    speeds: list[Speed] = gather_object([speed]) if state.num_processes > 1 else [speed]
    state.wait_for_everyone()
    on_main(state, predictions.join)
    whole = Speed(sum(s.samples for s in speeds), max(s.seconds for s in speeds), max(s.model_seconds for s in speeds))
    rate = f", {whole.samples} of them now, {whole.samples / whole.seconds:.1f}/s" if whole.samples else ""
    console.print(f"{task.name}: {len(samples):,} samples{rate}", highlight=False, markup=False)
    return whole.to_dict()


def _checked(task: Task) -> Iterator[Sample]:
    """The samples of a task that can be evaluated."""
    for sample in task.samples():
        slots = [segment.is_open for segment in sample.document.segments]
        if any(segment.role for segment in sample.document.segments) and any(slots[: -sum(slots)]):
            raise InputError("an answer stands before a question here; such conversations are for training",
                             sample.document.name, "Evaluate single rounds, as llava_instruct has them")  # fmt: skip
        yield sample


# ---- scores


def _phase(task: Task) -> str:
    return task.config.phase or task.kind.phases[0]


def _score(config: TaskSuite, task: Task, result: TaskResult, folder: Path, device: torch.device,
           on_scored: OnScored) -> None:  # fmt: skip
    """Fill in a result from the predictions in the folder."""
    records = Predictions(folder).read()
    samples = list(task.samples())
    unreadable = {r["id"]: r["problem"] for r in records.values() if "problem" in r}
    good = [(s, records[i]) for i, s in enumerate(samples) if "problem" not in records[i]]
    result.samples, result.evaluated = len(samples), len(good)
    result.unreadable = unreadable
    share = len(unreadable) / len(samples)
    if share > config.max_unreadable:
        result.unreadable = dict(list(unreadable.items())[:NAMED])  # the predictions have all
        first, why = next(iter(unreadable.items()))
        result.failed = (
            f"{len(unreadable)} of {len(samples)} samples are unreadable, {share:.1%}, and max_unreadable allows "
            f"{config.max_unreadable:.1%}; the first is {first}: {why}. The predictions of the others are kept"
        )
        return
    if task.select == "clip" and config.metrics.clip is None:
        result.notes.append(f"one image for each text: there is no CLIP model (metrics.clip) to choose among "
                            f"{task.settings.image.num_candidates}")  # fmt: skip
    if not task.metrics:
        result.notes.append("nothing is measured: the task is for training")
    facts = find_facts(task)
    result.origin = facts.origin if facts is not None else ""
    given = ScoringInputs(task, [s for s, _ in good], [r for _, r in good], folder, config.metrics, device, facts)
    result.metrics, scores = score_task(given, config.seed)
    write_json_lines(folder / SCORES, ({"id": s.id, "scores": _scores_of(s.id, scores)} for s, _ in good))
    on_scored(given, scores, result)


def _scores_of(sample: str, scores: SampleScores) -> dict[str, dict[str, float]]:
    """A sample's scores by metric and value."""
    found = {metric: {name: of[sample] for name, of in values.items() if sample in of}
             for metric, values in scores.items()}  # fmt: skip
    return {metric: values for metric, values in found.items() if values}


def _earlier(config: TaskSuite, folder: Path, digest: str) -> dict[str, TaskResult]:
    """What `results.json` has of the same weights and seed, so that tasks left out by `only` keep their results."""
    try:
        found = read_json(folder / RESULTS)
        if (found["model"]["weights"], found["seed"]) != (digest, config.seed):
            return {}
        known = {name: TaskResult(**result) for name, result in found["tasks"].items()}
        return {name: result for name, result in known.items() if result.samples and not result.failed}
    except (ValueError, KeyError, TypeError):  # none there yet, or another program's; it is written anew
        return {}


def _write(results: Results, folder: Path, state: PartialState, model: MMInterleaved) -> None:
    """`results.json` and `results.md`, as far as they are known."""
    data = results.to_dict(state.num_processes, _device_name(model.compute_device))
    write_json(folder / RESULTS, data)
    write_atomic(folder / TABLE, markdown(results.tasks, results.model))


def plain(config: TaskSuite) -> dict[str, Any]:
    """Settings as plain data."""
    return dataclasses.asdict(config)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def _escaped(text: str) -> str:
    return text.replace("[", r"\[")

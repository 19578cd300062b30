"""The whole evaluation, from settings to results."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import platform
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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

from ..adapters.loading import adapter_settings
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

FORMAT = 2  # version of the output folder; a run in a folder of another version is not resumed
RESULTS, TABLE, SCORES = "results.json", "results.md", "scores.jsonl"
SUBMISSION = "submission.json"
PACKAGES = ("mm-interleaved", "torch", "transformers", "diffusers", "accelerate", "numpy", "pillow", "pycocoevalcap")
ELSEWHERE = ("root", "images", "annotations", "shot_images", "shot_annotations", "neighbours")
OnScored = Callable[[ScoringInputs, SampleScores, TaskResult], object]  # its result is ignored


@dataclass
class Results:
    """The results of an evaluation.

    Attributes:
        model: name of the model, digest of its weights, and whether they are trained.
        config: all settings.
        tasks: results by name of the task.
        speed: number of samples and time of each task in this run, on the main process.
    """

    model: dict[str, Any]
    config: dict[str, Any]
    tasks: dict[str, TaskResult]
    speed: dict[str, dict[str, float]] = field(default_factory=dict)

    def to_dict(self, processes: int, device: str) -> dict[str, Any]:
        """The content of `results.json`."""
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
    """Evaluate a model on tasks.

    Every process calls this with the same arguments. Existing predictions in the folder are used. A single process
    scores each task as soon as it is finished, so that an interrupted run leaves results.

    Args:
        config: the tasks.
        model, processor: the model to evaluate.
        folder: the folder of the results.
        name, trained: name of the model and whether it is trained, for the results.
        weights: an identifier of the weights; None: a digest of all weights, which is slow for large models.
        state: the state of this process among others; None: from the environment.
        console: shows progress; None: no progress.
        on_scored: called with the scores of every task, on the main process.

    Returns:
        The results on the main process; None on the others.

    Raises:
        InputError: a setting of a task is invalid, or its files cannot be read.
        EvaluationError: the folder belongs to another run.
    """
    state = state or start_processes(cpu=model.compute_device.type == "cpu")
    console = console if console is not None and state.is_main_process else Console(quiet=True)
    _align(model)
    tasks = [make_task(task) for task in config.chosen()]
    digest = weights or on_main(state, lambda: weights_digest(model))
    on_main(state, lambda: _start(config, tasks, folder, digest))
    results = Results({"name": name, "weights": digest, "trained": trained}, plain(config), {})
    known, speeds = _earlier(config, folder, digest)

    def finish(task: Task, result: TaskResult) -> None:
        """Score a task and write all results so far."""
        if not result.failed:
            with console.status(f"scoring {task.name}"):
                _score(config, task, result, folder / task.name, model.compute_device, on_scored)
        known[task.name] = result
        results.tasks = {name: known[name] for name in map(task_name, config.tasks) if name in known}
        _write(results, speeds, folder, state, model)

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
        else:  # scoring at once would make the other processes wait in a collective of the next task
            waiting.append((task, result))
    if not state.is_main_process:
        return None
    for task, result in waiting:
        finish(task, result)
    return results


# ---- before


def _align(model: nn.Module) -> None:
    """Align weights on a CPU to 64 bytes, as PyTorch's allocator does: the rounding of products depends on alignment.

    Weights that are memory-mapped from a file, which may differ between processes, have any alignment.
    """
    for parameter in model.parameters():
        if type(parameter) is nn.Parameter and parameter.device.type == "cpu" and parameter.data_ptr() % 64:
            parameter.data = parameter.data.clone()


def _start(config: TaskSuite, tasks: Sequence[Task], folder: Path, digest: str) -> None:
    """Check the files of every task and the folder before the work starts."""
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
    """Everything that the predictions of a task depend on. Paths and batch sizes are not part of it.

    Args:
        config, task: the settings.
        digest: the digest of the model's weights.
        samples: the samples of the task; None: they have not been read yet.
    """
    settings = asdict(effective_settings(task, config))
    settings.pop("seed")
    for key in ("seed", "batch_size", "preview_every"):
        settings["image"].pop(key)
    separate = (*ELSEWHERE, "generation", "limit")  # the last two are covered by effective settings and samples
    asked = {key: value for key, value in asdict(task.config).items() if key not in separate}
    chooser = Path(config.metrics.clip).name if task.select == "clip" and config.metrics.clip else None
    found = {"format": FORMAT, "version": version("mm-interleaved"), "weights": digest, "seed": config.seed,
             "task": asked, "generation": settings, "chosen_by": chooser}  # fmt: skip
    if samples is not None:
        found["samples"] = {"count": len(samples), "digest": samples_digest(samples)}
    return found


def weights_digest(model: MMInterleaved) -> str:
    """SHA-256 of the configuration, of all weights with their names and types, and of how adapters are scaled."""
    tree = {
        k: v for k, v in model.config.to_dict().items() if k not in ("transformers_version", "_name_or_path", "dtype")
    }
    if adapters := adapter_settings(model):
        tree["adapters"] = adapters
    digest = hashlib.sha256(json.dumps(tree, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        for part in stored(tensor):
            flat = part.detach().cpu().reshape(-1).clone(memory_format=torch.contiguous_format)
            digest.update(flat.view(torch.uint8).numpy().data)
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
    """Predict this process's batches of a task. Returns the speed.

    Raises:
        InputError: the files of the task cannot be read completely.
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
        result.unreadable = dict(list(unreadable.items())[:NAMED])  # the file of predictions has all of them
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
    if task.kind.submission is not None and _phase(task) in task.kind.blind:
        path, scores = folder / SUBMISSION, {}
        write_json(path, submission(task, samples, records))
        why = f"the answers of phase '{_phase(task)}' are not published"
        result.metrics = {name: {"values": {}, "skipped": why, "fix": f"submit {path}"} for name in task.metrics}
    else:
        result.metrics, scores = score_task(given, config.seed)
    write_json_lines(folder / SCORES, ({"id": s.id, "scores": _scores_of(s.id, scores)} for s, _ in good))
    on_scored(given, scores, result)


def submission(task: Task, samples: Sequence[Sample], records: Mapping[int, dict[str, Any]]) -> list[dict[str, Any]]:
    """The official list of results. Samples that cannot be read have an empty text, since no sample may be missing."""
    assert task.kind.submission is not None
    return [task.kind.submission(sample.id, sample.meta, records[index].get("prediction", ""))
            for index, sample in enumerate(samples) if sample.meta]  # fmt: skip


def _scores_of(sample: str, scores: SampleScores) -> dict[str, dict[str, float]]:
    """The scores of a sample, by metric and value."""
    found = {metric: {name: of[sample] for name, of in values.items() if sample in of}
             for metric, values in scores.items()}  # fmt: skip
    return {metric: values for metric, values in found.items() if values}


def _earlier(config: TaskSuite, folder: Path, digest: str) -> tuple[dict[str, TaskResult], dict[str, Any]]:
    """Results and speeds of the same weights and seed in `results.json`: what a run does not do again keeps its own."""
    try:
        found = read_json(folder / RESULTS)
        if (found["model"]["weights"], found["seed"]) != (digest, config.seed):
            return {}, {}
        known = {name: TaskResult(**result) for name, result in found["tasks"].items()}
        good = {name: result for name, result in known.items() if result.samples and not result.failed}
        return good, dict(found["speed"])
    except (ValueError, KeyError, TypeError):  # it is missing or of another program, and will be replaced
        return {}, {}


def _write(results: Results, speeds: dict[str, Any], folder: Path, state: PartialState, model: MMInterleaved) -> None:
    """Write `results.json` and `results.md` so far; a task without anything left to predict keeps its earlier speed."""
    data = results.to_dict(state.num_processes, _device_name(model.compute_device))
    data["speed"] = {name: now if now["samples"] else speeds.get(name, now) for name, now in results.speed.items()}
    write_json(folder / RESULTS, data)
    write_atomic(folder / TABLE, markdown(results.tasks, results.model))


def plain(config: TaskSuite) -> dict[str, Any]:
    """The settings as plain data."""
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

"""How training at the release's size runs on one and on two GPUs, with random weights and synthetic packed rows.

python benchmarks/scaling.py all OUT --limit 430
python benchmarks/scaling.py merge OUT/results/*.json --output benchmarks/results/scaling-h200.json

`all` starts the jobs of `TURNS`, each job one process for each of its GPUs. The processes of later turns import their
libraries meanwhile and wait. A job has its own time limit and writes each result at once, so a job that fails or hangs
costs only itself. `ddp`, `zero1` and `fsdp2` jobs run the trainer of `mmi train`; the cases of `FIT` and `JUDGE` are
plain steps on one GPU, for the planner's coefficients (`FIT`) and for judging them (`JUDGE`).

With `--preset debug --device cpu --float32` everything takes minutes on a CPU, through gloo; FSDP2 needs GPUs.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from torch import nn
from transformers import TrainerCallback

from mm_interleaved import MMInterleaved
from mm_interleaved.bench.base import fresh
from mm_interleaved.bench.machine import describe
from mm_interleaved.configuration import make_config
from mm_interleaved.document import Document, Image, Segment, Text
from mm_interleaved.model import MMInterleavedConfig
from mm_interleaved.model.cost import Cost, measure
from mm_interleaved.processor import Batch, MMInterleavedProcessor
from mm_interleaved.training.adapters import attach_adapter
from mm_interleaved.training.arguments import divides, training_arguments
from mm_interleaved.training.building import freeze_parts, frozen_layers, set_types
from mm_interleaved.training.checkpointing import disable_checkpointing, enable_checkpointing
from mm_interleaved.training.config import TrainConfig
from mm_interleaved.training.flops import StepCost, peak_flops, step_cost
from mm_interleaved.training.memory import BatchSizes
from mm_interleaved.training.optimizer import build_optimizer
from mm_interleaved.training.pipeline import BatchPipeline, prepare_documents
from mm_interleaved.training.run import branches_of
from mm_interleaved.training.sharded_checkpoints import STATE, StateWriter, TrainedState
from mm_interleaved.training.sharding import ShardingCallback, reshard
from mm_interleaved.training.trainer import RunTrainer

ROOT = Path(__file__).parents[1]
VAE = r"image_decoder\.vae\."  # frozen in every run
PER_DOCUMENT = 5  # most images of a document
WARM_UP, TIMED = 2, 2  # plain steps: not timed, and timed


# ---- what is measured


@dataclass(frozen=True)
class Case:
    """Steps of one kind.

    Attributes:
        rows: rows of a batch of one process; each holds documents of up to five images.
        images: images of a row; all are to be generated, or `targets` of them.
        length: tokens of a row.
        targets: share of the images in the image loss.
        checkpointing: none, full or selective.
        settings: further settings of the run.
        all_weights: whether also the language model and the image encoder are trained.
        way: one, ddp, zero1 or fsdp2.
    """

    rows: int = 4
    images: int = 15
    length: int = 2048
    targets: float = 1.0
    checkpointing: str = "full"
    settings: dict[str, Any] = field(default_factory=dict)
    all_weights: bool = False
    way: str = "one"


LORA = {"model": {"init_from": {"checkpoint": "base"}}, "adapter": {"preset": "both", "rank": 16}}
# One GPU. Which half fits the planner and which half judges it was chosen before anything was measured.
FIT = {
    "rows-4x15": Case(),
    "rows-1x15": Case(rows=1),
    "rows-4x5": Case(images=5),
    "text": Case(images=0),
    "no-drawing": Case(targets=0.0, settings={"freeze": ["image_decoder"]}),
    "plain-1x10": Case(rows=1, images=10, checkpointing="none"),
}
JUDGE = {
    "rows-2x30": Case(rows=2, images=30),
    "rows-2x15": Case(rows=2),
    "short-8x5": Case(rows=8, images=5, length=1024),
    "quarter": Case(targets=0.25),
    "mmfs-only": Case(rows=2, settings={"freeze": ["image_decoder", "vision"]}),
    "plain-2x5": Case(rows=2, images=5, checkpointing="none"),
    "selective-2x15": Case(rows=2, checkpointing="selective"),
    "lora-4x5": Case(images=5, settings=LORA),
}
WAYS: dict[str, dict[str, Any]] = {
    "one": {},
    "ddp": {"ddp": {"find_unused_parameters": False}},
    "zero1": {"deepspeed": str(ROOT / "configs/deepspeed/zero1.json")},
    "fsdp2": {"fsdp": {"fsdp_version": 2}},
}


def config_of(case: Case, preset: str = "release", **further: Any) -> TrainConfig:
    """The settings of a run of that case."""
    source = {"type": "documents", "shards": ["none"], "batch_size": case.rows, "max_length": case.length}
    if case.images:
        source["max_images_per_sequence"] = case.images
    losses = {"image": 10.0 if case.targets and case.images else 0.0, "image_fraction": case.targets or 1.0}
    shared = {
        "output": "none", "steps": 1, "model": {"init_from": {"preset": preset}}, "data": {"sources": [source]},
        "gradient_checkpointing": case.checkpointing != "none", "losses": losses,
        "selective_checkpointing": case.checkpointing == "selective", "save_every": 0,
    }  # fmt: skip
    return make_config(shared | WAYS[case.way] | case.settings | further, TrainConfig)


def model_config_of(preset: str, case: Case) -> MMInterleavedConfig:
    """The model of that size, with the frozen parts of the case."""
    config = MMInterleavedConfig.preset(preset)
    if case.all_weights:
        config.frozen = [VAE]
    return config


# ---- rows and models


def documents(processor: MMInterleavedProcessor, case: Case, seed: int) -> list[Document]:
    """Documents that fill the rows of a case, with images of noise."""
    noise = torch.Generator().manual_seed(seed)
    side = processor.image_size
    count = max(-(-case.images // PER_DOCUMENT), 1)  # documents of a row
    found = []
    for number in range(count):
        images = case.images * (number + 1) // count - case.images * number // count
        of_images = images * (len(processor.encode([_noise(side, noise)], close=True)) - 2) if images else 0
        words = (case.length // count - of_images - 8) // (images + 1)
        segments: list[Segment] = [_words(processor, words, noise)]
        for _ in range(images):
            segments += [_noise(side, noise), _words(processor, words, noise)]
        found.append(Document(segments))
    return found


def _noise(side: int, generator: torch.Generator) -> Image:
    import PIL.Image

    pixels = torch.randint(0, 256, (side, side, 3), generator=generator, dtype=torch.uint8)
    return Image(PIL.Image.fromarray(pixels.numpy()))


def _words(processor: MMInterleavedProcessor, tokens: int, generator: torch.Generator) -> Text:
    """A text of about so many tokens."""
    known = ["red", "hat", "a", "ball", "on", "the", "and", "small"]
    per_word = len(processor.encode([Text(" ".join(known) * 4)], close=False)) / (4 * len(known))
    chosen = torch.randint(0, len(known), (max(int(tokens / per_word), 1),), generator=generator)
    return Text(" ".join(known[i] for i in chosen))


def batch_of(processor: MMInterleavedProcessor, case: Case, seed: int = 0) -> Batch:
    """A batch of the case."""
    made = [document for row in range(case.rows) for document in documents(processor, case, seed * 1000 + row)]
    return processor(made, training=True, packing="samples", max_length=case.length)


class Rows:
    """A loader of synthetic batches; number n over all ranks is batch `n % len(batches)`."""

    def __init__(self, batches: Sequence[Batch], first: int, rank: int, world_size: int) -> None:
        self.batches, self.number, self.world_size = batches, first + rank, world_size

    def __iter__(self) -> Iterator[Batch]:
        while True:
            yield self.batches[self.number % len(self.batches)]
            self.number += self.world_size

    def set_epoch(self, epoch: int) -> None:
        """There is one epoch."""

    def state_dict(self) -> dict[str, Any]:
        """The position."""
        return {"number": self.number}

    def load_states(self, states: Sequence[dict[str, Any]]) -> int:
        """Continue from the positions of all processes, of which the first one's suffices: all are equally far."""
        self.number = states[0]["number"]
        return 0

    def take_seconds(self) -> dict[str, float]:
        """Its work takes no time."""
        return {}


@dataclass(frozen=True)
class Place:
    """Where a process works: size and type of the model, its device, the folder of results."""

    preset: str
    device: torch.device
    dtype: torch.dtype
    out: Path

    @property
    def precision(self) -> str:
        """The name of the type in settings."""
        return str(self.dtype).removeprefix("torch.")

    def fitting(self, case: Case) -> Case:
        """The case with rows that this size of model takes."""
        if self.preset == "release":
            return case
        changes = {"length": 256, "rows": min(case.rows, 2), "images": min(case.images, 10)}
        return Case(**{**{n: getattr(case, n) for n in case.__dataclass_fields__}, **changes})


def made(place: Place) -> tuple[MMInterleaved, MMInterleavedProcessor]:
    """A model with random weights, equal on all ranks, and its processor."""
    loaded = fresh(place.preset, place.device, place.dtype)
    return loaded.model, loaded.processor


def choose_trained(model: MMInterleaved, case: Case, config: TrainConfig) -> None:
    """Set what is trained, and the types of weights."""
    if case.all_weights:
        model.config.frozen = [VAE]
    model.freeze()
    freeze_parts(model, config.freeze)
    attach_adapter(model, config, frozen_layers(model, config.freeze))
    set_types(model, config)


class Results:
    """Rows of a results file, which is written at each new row."""

    def __init__(self, path: Path, write: bool) -> None:
        self.path, self.write, self.rows = path, write, list[dict[str, Any]]()

    def add(self, row: dict[str, Any]) -> None:
        """Add a row."""
        self.rows.append(row)
        if self.write:
            print(json.dumps(row), flush=True)
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(json.dumps({"machine": describe(), "rows": self.rows}, indent=1))


# ---- plain steps on one GPU


def run_cases(place: Place, names: Sequence[str], half: str, results: Results) -> None:
    """Measure plain steps of several cases on one model."""
    begin = time.perf_counter()
    model, processor = made(place)
    results.add({"case": "build", "seconds": time.perf_counter() - begin})
    for name in names:
        case = place.fitting((FIT | JUDGE)[name])
        row: dict[str, Any] = {"case": name, "half": half, "preset": place.preset, "world_size": 1, "way": "plain"}
        try:
            row |= _steps(place, case, model, processor)
        except RuntimeError as error:  # also without memory; other cases go on
            row["problem"] = str(error).splitlines()[0]
        model.zero_grad(set_to_none=True)
        if place.device.type == "cuda":
            torch.cuda.empty_cache()
        results.add(row)


def _steps(place: Place, case: Case, model: MMInterleaved, processor: MMInterleavedProcessor) -> dict[str, Any]:
    config = config_of(case, place.preset, precision=place.precision)
    choose_trained(model, case, config)
    disable_checkpointing(model)
    if config.gradient_checkpointing:
        enable_checkpointing(model, config.selective_checkpointing)
    model.train()
    batch = batch_of(processor, case)
    inputs = prepare_documents(model, config.losses)(batch, 0, place.device)
    stats = inputs.pop("stats")
    optimizer = build_optimizer(model, config.optimizer)

    def step() -> None:
        with torch.autocast(place.device.type, torch.bfloat16, enabled=config.precision != "float32"):
            loss = model(**inputs).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    watch = Watch(place.device)
    for number in range(WARM_UP + TIMED):
        if number == WARM_UP:
            watch.start()
        step()
    seconds = watch.stop() / TIMED
    targets = stats.noise_samples if config.losses.image else 0
    sizes = BatchSizes(len(batch.input_ids), batch.input_ids.shape[1], stats.images, targets)
    return {
        "sizes": asdict(sizes), "tokens": stats.tokens, "seconds": seconds,
        "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        **_speed(place, cost_of(place, model), seconds, stats.tokens, stats.images, targets), **watch.memory(),
    }  # fmt: skip


def _speed(
    place: Place, cost: StepCost, seconds: float, tokens: int, images: int, targets: int, world: int = 1
) -> dict[str, Any]:
    """Tokens per second of all GPUs, and the share of their arithmetic (MFU); counts are those of one GPU."""
    peak = peak_flops(place.device)
    share = cost.of(tokens, images, targets) / seconds / peak if peak else None
    return {"tokens_per_second": world * tokens / seconds, "mfu": share}


@cache
def measured_cost(preset: str) -> Cost:
    """The cost of a model, which takes seconds to count."""
    return measure(MMInterleavedConfig.preset(preset), images=1)


def cost_of(place: Place, model: MMInterleaved) -> StepCost:
    """The cost of a step of the model; call it before parameters are divided."""
    return step_cost(MMInterleavedConfig.preset(place.preset), model, measured_cost(place.preset))


class Watch:
    """Measures time and memory on a device."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.begin = device, 0.0
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()

    def start(self) -> None:
        """Begin; later memory counts from here."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        self.begin = time.perf_counter()

    def stop(self) -> float:
        """Seconds since `start`."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - self.begin

    def memory(self) -> dict[str, int | None]:
        """Most bytes since `start`."""
        on_gpu = self.device.type == "cuda"
        return {
            "max_allocated": torch.cuda.max_memory_allocated() if on_gpu else None,
            "max_reserved": torch.cuda.max_memory_reserved() if on_gpu else None,
        }


# ---- steps of the trainer


@dataclass(frozen=True)
class Training:
    """A run of the trainer.

    Attributes:
        case: its steps.
        steps: number of steps.
        first: number of steps that were made before (resumed runs).
        load, save: folders of checkpoints under the folder of results.
        batches: number of different batches.
        accumulation: batches of a step and process.
        timed: whether the steps are timed; otherwise their losses are recorded.
    """

    case: Case
    steps: int = 6
    first: int = 0
    load: str = ""
    save: str = ""
    batches: int = 1
    accumulation: int = 1
    timed: bool = True


class Recorder(TrainerCallback):
    """Loads a checkpoint when training begins, times the steps, and keeps their losses."""

    def __init__(self, place: Place, load: Callable[[], object], timed: bool) -> None:
        self.watch, self.load, self.timed = Watch(place.device), load, timed
        self.seconds: float | None = None
        self.memory: dict[str, int | None] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Load."""
        self.load()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Time."""
        if self.timed and state.global_step == WARM_UP:
            self.watch.start()
        if self.timed and state.global_step == state.max_steps:
            self.seconds = self.watch.stop() / (state.max_steps - WARM_UP)
            self.memory = self.watch.memory()


def run_training(name: str, place: Place, work: Training, results: Results) -> None:
    """Run the trainer and record what it did."""
    case, begin = place.fitting(work.case), time.perf_counter()
    config = config_of(
        case, place.preset, output=str(place.out / f"run-{name}"), steps=work.steps, precision=place.precision,
        accumulation=work.accumulation, log_every=10_000 if work.timed else 1, schedule={"kind": "constant"},
    )  # fmt: skip
    args = training_arguments(config, "cpu" if place.device.type == "cpu" else None)
    model, processor = made(place)
    choose_trained(model, case, config)
    if config.gradient_checkpointing:
        enable_checkpointing(model, config.selective_checkpointing)
    world, rank = args.world_size, args.process_index
    first = work.first * world * work.accumulation
    made_batches = [batch_of(processor, case, seed) for seed in range(work.batches)]
    rows = Rows(made_batches, first, rank, world)
    pipeline = BatchPipeline(rows, prepare_documents(model, config.losses), config.seed, args.device, rank, world)
    pipeline.number = work.first * work.accumulation
    branches = branches_of(config) if divides(config) else None
    trainer = RunTrainer(model, args, config, pipeline, branches=branches)
    row: dict[str, Any] = {
        "case": name, "way": case.way, "preset": place.preset, "world_size": world, "steps": work.steps,
        "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
    }  # fmt: skip
    fixed = prepare_documents(model, config.losses)(made_batches[0], 1, args.device)
    fixed.pop("stats")

    def load() -> None:
        row["prepare_seconds"] = time.perf_counter() - begin
        if place.device.type == "cuda":
            torch.cuda.empty_cache()  # what the whole weights had, before they were divided
        if work.load:
            row["load_seconds"] = _timed(lambda: load_sharded(trainer, place.out / work.load), place.device)
            row["fixed_loss_loaded"] = fixed_loss(trainer, fixed)

    recorder = Recorder(place, load, work.timed)
    trainer.add_callback(recorder)
    if trainer.is_fsdp_enabled:
        trainer.add_callback(ShardingCallback(Console(stderr=True)))
    cost = cost_of(place, model)
    trainer.train()
    stats = pipeline.stats  # of all steps, since nothing was logged while it was timed
    row["losses"] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry] if not work.timed else []
    if recorder.seconds is not None:
        tokens, images, targets = (n // work.steps for n in (stats.tokens, stats.images, stats.noise_samples))
        shape = made_batches[0].input_ids.shape
        row |= {
            "sizes": asdict(BatchSizes(shape[0], shape[1], images, targets)), "tokens": tokens,
            "seconds": recorder.seconds, **_speed(place, cost, recorder.seconds, tokens, images, targets, world),
            **recorder.memory, "sent_gb_per_second": collective_speed(place.device),
        }  # fmt: skip
    results.add(dict(row))
    if work.save:
        row["fixed_loss_saved"] = fixed_loss(trainer, fixed)
        folder = place.out / work.save
        row["save_seconds"] = _timed(lambda: save_sharded(trainer, folder), place.device)
        row["save_bytes"] = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
        row["free_bytes"] = shutil.disk_usage(folder).free
    if not work.timed:
        row["digest"] = digest(trainer.model)
    results.rows.pop()
    results.add(row)


def collective_speed(device: torch.device) -> float | None:
    """GB/s that a GPU sends while all of them add up 1 GiB; None: there is no other."""
    if not dist.is_initialized() or dist.get_world_size() == 1 or device.type != "cuda":
        return None
    numbers = torch.zeros(2**28, device=device)
    watch = Watch(device)
    for number in range(6):
        if number == 1:
            watch.start()
        dist.all_reduce(numbers)
    world = dist.get_world_size()
    return 2 * (world - 1) / world * 5 * numbers.nbytes / watch.stop() / 1e9


def _timed(work: Callable[[], object], device: torch.device) -> float:
    watch = Watch(device)
    watch.start()
    work()
    if dist.is_initialized():
        dist.barrier()
    return watch.stop()


def _states(trainer: RunTrainer) -> tuple[nn.Module, torch.optim.Optimizer]:
    model, optimizer = trainer.model, trainer.optimizer
    assert isinstance(model, nn.Module)
    assert optimizer is not None
    return model, getattr(optimizer, "optimizer", optimizer)


def save_sharded(trainer: RunTrainer, folder: Path) -> None:
    """Write trained weights and the optimizer's state as a run does, each process its own part, with digests."""
    model, optimizer = _states(trainer)
    (folder / STATE).mkdir(parents=True, exist_ok=True)
    writer = StateWriter(trainer.args.device, background=False)
    state = TrainedState(model, optimizer, only_trained=True)
    writer.write(state.tensors(), folder, folder, lambda files: None)
    writer.close()


def load_sharded(trainer: RunTrainer, folder: Path) -> None:
    """Read what `save_sharded` wrote, with any number of processes."""
    model, optimizer = _states(trainer)
    TrainedState(model, optimizer, only_trained=True).load(folder)


@torch.no_grad()
def fixed_loss(trainer: RunTrainer, inputs: dict[str, Any]) -> float:
    """The loss of one batch, equal for all processes."""
    model = trainer.model_wrapped
    assert isinstance(model, nn.Module)
    with trainer.accelerator.autocast():
        loss = float(trainer.compute_outputs(model, inputs)["loss"])
    reshard(model)
    return loss


@torch.no_grad()
def digest(model: Any) -> dict[str, float]:
    """Sums of absolute trained weights by name; small models only."""
    from torch.distributed.tensor import DTensor

    found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
            found[name.removeprefix("module.")] = float(whole.double().abs().sum())
    return found


# ---- jobs


@dataclass(frozen=True)
class Job:
    """Processes that work together.

    Attributes:
        work: the plain cases of a half (`FIT` or `JUDGE`), or a run of the trainer.
        gpus: numbers of the GPUs, a process for each.
        grouped: whether a single process is a process group, too.
        small: whether it is a debug model in float32.
    """

    work: str | Training
    gpus: tuple[int, ...] = (0, 1)
    grouped: bool = False
    small: bool = False


@dataclass(frozen=True)
class Turn:
    """Jobs that run at the same time, and the seconds that they may take."""

    jobs: dict[str, Job]
    seconds: int


def _curve(way: str, processes: int) -> Job:
    work = Training(Case(way=way), steps=10, batches=8, accumulation=3 - processes, timed=False)
    return Job(work, tuple(range(processes)), small=True)


def _part(first: int, steps: int, load: str, save: str, processes: int = 2) -> Job:
    work = Training(Case(way="fsdp2"), steps, first, load, save, 8, 3 - processes, timed=False)
    return Job(work, (0, 1) if processes == 2 else (1,), small=True)


def _timed_run(way: str, gpus: tuple[int, ...] = (0, 1), **further: Any) -> Job:
    return Job(Training(Case(images=8, way=way), **further), gpus, grouped=way == "zero1")


TURNS = [
    Turn({"one": _timed_run("one", (0,)), "zero1-one": _timed_run("zero1", (1,))}, 110),
    Turn({"ddp": _timed_run("ddp")}, 60),
    Turn({"zero1": _timed_run("zero1")}, 60),
    Turn({"fsdp2": _timed_run("fsdp2", save="sharded-a")}, 100),
    Turn({"fit": Job("fit", (0,)), "judge": Job("judge", (1,))}, 110),
    Turn({"fsdp2-all": Job(Training(Case(rows=1, targets=0.25, way="fsdp2", all_weights=True)))}, 60),
    Turn({"curve-one": _curve("one", 1), "curve-ddp": _curve("ddp", 2), "curve-zero1": _curve("zero1", 2),
          "curve-fsdp2": _curve("fsdp2", 2), "small-2a": _part(0, 3, "", "small-a")}, 45),
    Turn({"resume-1": _timed_run("fsdp2", (0,), steps=4, first=6, load="sharded-a", save="sharded-b"),
          "small-1": _part(3, 3, "small-a", "small-b", 1)}, 80),
    Turn({"resume-2": _timed_run("fsdp2", steps=4, first=10, load="sharded-b"),
          "small-2b": _part(6, 3, "small-b", "")}, 60),
]  # fmt: skip


def work(name: str, turn: int, options: argparse.Namespace) -> None:
    """A process of a job: wait for its turn, then work."""
    job = TURNS[turn].jobs[name]
    preset = "debug" if job.small else options.preset
    measured_cost(preset)
    if isinstance(job.work, Training) and job.work.case.way == "zero1":
        import_module("deepspeed")  # takes seconds
    while not (options.out / "turns" / str(turn)).exists():
        time.sleep(0.05)
    cuda = options.device == "cuda"
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
        if job.small:
            torch.backends.cudnn.allow_tf32 = False
        else:
            torch.set_float32_matmul_precision("high")
    half = cuda and not job.small
    place = Place(preset, device, torch.bfloat16 if half else torch.float32, options.out)
    results = Results(options.out / "results" / f"{name}.json", os.environ.get("RANK", "0") == "0")
    try:
        if isinstance(job.work, str):
            run_cases(place, [*(FIT if job.work == "fit" else JUDGE)], job.work, results)
        else:
            run_training(name, place, job.work, results)
    except RuntimeError as error:
        results.add({"case": name, "problem": str(error).splitlines()[0]})
        raise
    if dist.is_initialized():
        dist.destroy_process_group()


def start(name: str, turn: int, job: Job, options: argparse.Namespace) -> list[subprocess.Popen[bytes]]:
    """Start the processes of a job."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(len(job.gpus)),
             "LOCAL_WORLD_SIZE": str(len(job.gpus))}  # fmt: skip
    grouped = job.grouped or len(job.gpus) > 1
    command = [sys.executable, *options.runner, str(Path(__file__).resolve()), "work", name, str(turn),
               str(options.out), "--preset", options.preset, "--device", options.device]  # fmt: skip
    (options.out / "logs").mkdir(parents=True, exist_ok=True)
    started = []
    for rank in range(len(job.gpus)):
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ",".join(str(gpu) for gpu in job.gpus)}
        if grouped:
            environment |= group | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        with (options.out / "logs" / f"{name}-{rank}.txt").open("wb") as log:
            started.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True))
    return started


def run_turn(turn: int, processes: dict[str, list[subprocess.Popen[bytes]]], seconds: float, out: Path) -> None:
    """Let the jobs of a turn work; one that fails or takes too long is stopped."""
    begin = time.monotonic()
    (out / "turns").mkdir(parents=True, exist_ok=True)
    (out / "turns" / str(turn)).touch()
    left = dict(processes)
    while left and time.monotonic() < begin + seconds:
        for name, group in [*left.items()]:
            codes = [process.poll() for process in group]
            if all(code == 0 for code in codes) or any(codes):
                stop(group)
                del left[name]
                print(f"{name}: {codes}, {time.monotonic() - begin:.0f} s", flush=True)
        time.sleep(0.1)
    for name, group in left.items():
        stop(group)
        print(f"{name}: stopped after {seconds:.0f} s", flush=True)


def stop(group: list[subprocess.Popen[bytes]]) -> None:
    """End the processes of a job."""
    for process in group:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    for process in group:
        process.wait()


def run_all(options: argparse.Namespace) -> None:
    """Run all turns, or those with a job of `--only`."""
    deadline = time.monotonic() + options.limit
    chosen = [n for n, turn in enumerate(TURNS) if not options.only or set(options.only) & set(turn.jobs)]
    waiting: dict[int, dict[str, list[subprocess.Popen[bytes]]]] = {}

    def prepare(turn: int) -> None:
        if turn not in waiting:
            jobs = {n: j for n, j in TURNS[turn].jobs.items() if not options.only or n in options.only}
            waiting[turn] = {name: start(name, turn, job, options) for name, job in jobs.items()}

    try:
        for place, turn in enumerate(chosen):
            left = deadline - time.monotonic()
            if left < 15:
                print(f"no time left for {', '.join(TURNS[turn].jobs)}", flush=True)
                continue
            for following in chosen[place : place + 1 + options.ahead]:
                prepare(following)
            run_turn(turn, waiting[turn], min(TURNS[turn].seconds * options.patience, left - 3), options.out)
    finally:
        for jobs in waiting.values():
            for group in jobs.values():
                stop(group)


def merge(files: Sequence[Path], output: Path) -> None:
    """Put all results into one file."""
    read = [json.loads(file.read_text()) for file in files]
    rows = [row for one in read for row in one["rows"]]
    output.write_text(json.dumps({"machine": read[0]["machine"], "rows": rows}, indent=1) + "\n")


def main() -> None:
    """Run all, one job, or merge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    everything, one, merging = (commands.add_parser(name) for name in ("all", "work", "merge"))
    one.add_argument("name")
    one.add_argument("turn", type=int)
    for command in (everything, one):
        command.add_argument("out", type=Path, help="folder of the results")
        command.add_argument("--preset", default="release")
        command.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    everything.add_argument("--limit", type=float, default=430, help="seconds for everything")
    everything.add_argument("--ahead", type=int, default=3, help="turns whose processes wait already")
    everything.add_argument("--patience", type=float, default=1.0, help="factor of the time limits")
    everything.add_argument("--only", nargs="*", default=[], help="jobs")
    everything.add_argument("--runner", nargs="*", default=[], help="arguments of Python before the script")
    merging.add_argument("files", nargs="+", type=Path)
    merging.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    if options.command == "all":
        run_all(options)
    elif options.command == "work":
        work(options.name, options.turn, options)
    else:
        merge(options.files, options.output)


if __name__ == "__main__":
    main()

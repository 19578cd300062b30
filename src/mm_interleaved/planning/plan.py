"""The plan of a run: whether it fits, how long it takes, and what it writes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from ..data.mixture import source_weights
from ..model import MMInterleavedConfig
from ..training.config import TrainConfig
from ..training.memory import GIB, BatchSizes, MemoryEstimate, estimate, zero_stage
from .coefficients import MEASURED, Coefficients
from .step import Cluster, StepTime, mean_of_slowest, step_time, traffic
from .work import ModelWork, step_work

CONTEXT = GIB  # bytes that CUDA and NCCL take beside the tensors
DAY = 24 * 3600


@dataclass(frozen=True)
class SourcePlan:
    """The batches of one source.

    Attributes:
        name: the source.
        share: the share of all batches.
        sizes: sizes of a batch of one GPU.
        time: of a step in which all GPUs have such a batch.
    """

    name: str
    share: float
    sizes: BatchSizes
    time: StepTime


@dataclass
class Plan:
    """What a run needs.

    Attributes:
        cluster: its GPUs.
        division: how they share the work: one GPU, DDP, ZeRO-1 to 3, or FSDP2.
        memory: bytes of each GPU at the largest moment.
        sources: the batches of each source.
        step_seconds: seconds of a step.
        tokens, images: mean number in a step, of all GPUs.
        mfu: share of the GPUs' peak, without what checkpointing computes again.
        sent: bytes that a GPU sends in a step.
        steps: configured steps; None: the settings name epochs.
        checkpoint, final: bytes of a checkpoint and of the final folder.
        kept: number of checkpoints that are kept.
        assumptions: what the figures assume.
        suggestions: what to change, if it does not fit.
    """

    cluster: Cluster
    division: str
    memory: MemoryEstimate
    sources: list[SourcePlan]
    step_seconds: float
    tokens: float
    images: float
    mfu: float
    sent: float
    steps: int | None
    checkpoint: int
    final: int
    kept: int
    assumptions: list[str]
    suggestions: list[str] = field(default_factory=list)

    @property
    def available(self) -> int:
        """Bytes of a GPU that tensors can have."""
        return self.cluster.gpu.memory - CONTEXT

    @property
    def fits(self) -> bool:
        """Whether the memory suffices."""
        return self.memory.total <= self.available

    @property
    def days(self) -> float | None:
        """Days of all steps, without evaluations and restarts; None: their number is not known."""
        return None if self.steps is None else self.steps * self.step_seconds / DAY

    def as_dict(self) -> dict[str, Any]:
        """Everything as JSON holds it; bytes, seconds and FLOP/s."""
        return {
            "gpu": asdict(self.cluster.gpu), "gpus": self.cluster.gpus, "gpus_per_node": self.cluster.per_node,
            "nodes": self.cluster.nodes, "division": self.division, "fits": self.fits,
            "memory": {"available": self.available, "total": self.memory.total, "parts": self.memory.parts},
            "sources": [{"name": s.name, "share": s.share, "batch": asdict(s.sizes),
                         "step": asdict(s.time) | {"total": s.time.total}} for s in self.sources],
            "step_seconds": self.step_seconds, "tokens_per_second": self.tokens / self.step_seconds,
            "images_per_second": self.images / self.step_seconds, "mfu": self.mfu, "sent_per_step": self.sent,
            "steps": self.steps, "days": self.days,
            "disk": {"checkpoint": self.checkpoint, "kept": self.kept, "final": self.final},
            "assumptions": self.assumptions, "suggestions": self.suggestions,
        }  # fmt: skip


def make_plan(
    config: TrainConfig,
    model_config: MMInterleavedConfig,
    cluster: Cluster,
    images: int | None = None,
    reached: Coefficients = MEASURED,
) -> Plan:
    """Plan a run. Takes some twenty seconds and little memory at any size.

    Args:
        config: settings of the run.
        model_config: the model, for instance from `building.build_config(config.model)`.
        cluster: its GPUs.
        images: images of a row; None: the most that the settings allow.
        reached: what steps reach.

    Raises:
        ValueError: the settings do not fit together, or not to the GPUs.
    """
    _check(config, cluster)
    batches = [_with_images(sizes, images, config) for sizes in BatchSizes.of_sources(config, model_config)]
    model = ModelWork.of(config, model_config)
    shares, assumptions = _shares(config)
    works = [step_work(config, model, sizes, cluster.gpus) for sizes in batches]
    times = [step_time(config, model, work, cluster, reached) for work in works]
    seconds = mean_of_slowest([time.total for time in times], shares, 1 if config.data.mix == "row" else cluster.gpus)
    mean = lambda values: sum(s * v for s, v in zip(shares, values, strict=True))  # noqa: E731
    micro = cluster.gpus * config.accumulation
    plain = replace(config, gradient_checkpointing=False, selective_checkpointing=False)
    needed = [step_work(plain, model, sizes, cluster.gpus).flops for sizes in batches]
    names = [source.name or source.type for source in config.training_data.sources]
    return Plan(
        cluster=cluster,
        division=division_of(config, cluster),
        memory=_largest(config, model_config, cluster, batches),
        sources=[SourcePlan(*values) for values in zip(names, shares, batches, times, strict=True)],
        step_seconds=seconds,
        tokens=micro * mean([sizes.rows * sizes.tokens for sizes in batches]),
        images=micro * mean([sizes.images for sizes in batches]),
        mfu=mean(needed) / seconds / (cluster.gpu.tflops * 1e12),
        sent=sum(traffic(config, model, cluster)),
        steps=config.steps,
        checkpoint=_checkpoint_bytes(config, model),
        final=model.frozen_bytes + 4 * model.trained,
        kept=config.keep_checkpoints,
        assumptions=assumptions + _assumptions(config, cluster, images, len(batches)),
    )


def division_of(config: TrainConfig, cluster: Cluster) -> str:
    """How processes share weights, gradients and optimizer states."""
    if config.fsdp:
        return "FSDP2"
    if config.deepspeed:
        return f"ZeRO-{zero_stage(config)}"
    return "DDP" if cluster.gpus > 1 else "one GPU"


def _check(config: TrainConfig, cluster: Cluster) -> None:
    if cluster.gpus < 1 or cluster.per_node < 1:
        raise ValueError("a run needs at least one GPU, and a machine has at least one")
    if cluster.gpus > cluster.per_node and cluster.gpus % cluster.per_node:
        raise ValueError(f"{cluster.gpus} GPUs do not fill machines of {cluster.per_node}; give a multiple, or another "
                         "number of GPUs per machine")  # fmt: skip
    if not config.training_data.sources:
        raise ValueError("data.sources names no source, so the sizes of batches are not known")


def _with_images(sizes: BatchSizes, images: int | None, config: TrainConfig) -> BatchSizes:
    """Sizes with another number of images a row."""
    if images is None:
        return sizes
    targets = round(sizes.rows * images * config.losses.image_fraction) if sizes.targets else 0
    return replace(sizes, images=sizes.rows * images, targets=targets)


def _shares(config: TrainConfig) -> tuple[list[float], list[str]]:
    """The share of each source, and what that assumes."""
    data = config.training_data
    if data.probabilities == "sqrt_size":
        count = len(data.sources)
        return [1 / count] * count, ["sources are equally frequent (data.probabilities: sqrt_size needs their files)"]
    weights = source_weights(data)
    return [weight / sum(weights) for weight in weights], []


def _largest(
    config: TrainConfig, model_config: MMInterleavedConfig, cluster: Cluster, batches: Sequence[BatchSizes]
) -> MemoryEstimate:
    """The memory of the source that needs most."""
    distinct = sorted(set(batches), key=lambda sizes: (sizes.rows * sizes.tokens, sizes.images))
    candidates = {max(distinct, key=lambda sizes: (sizes.targets, sizes.images)), distinct[-1]}
    found = [estimate(config, model_config, cluster.gpus, sizes) for sizes in candidates]
    return max(found, key=lambda memory: memory.total)


def _checkpoint_bytes(config: TrainConfig, model: ModelWork) -> int:
    """Bytes of a checkpoint: weights, the optimizer's float32 states, and averaged weights."""
    weights = 4 * model.trained + (0 if config.adapter is not None else model.frozen_bytes)
    states = (4 if config.optimizer.kind == "muon" else 8) * model.trained
    return weights + states + (4 * model.trained if config.ema.decay else 0)


def _assumptions(config: TrainConfig, cluster: Cluster, images: int | None, sources: int) -> list[str]:
    found = ["rows are full, and the loader is never waited for"]
    if images is None:
        found.append("rows hold as many images as the settings allow (--images gives another number)")
    if sources > 1 and config.data.mix == "batch" and cluster.gpus > 1:
        found.append("GPUs choose their sources independently and wait for the slowest batch")
    if cluster.nodes > 1:
        network = cluster.gpu.network * cluster.per_node
        found.append(f"machines of {cluster.per_node} GPUs send {network:.0f} GB/s to each other, all adapters at once")
    found.append("evaluations, samples, checkpoints and restarts take no time")
    return found


def suggest(
    config: TrainConfig, model_config: MMInterleavedConfig, cluster: Cluster, images: int | None = None
) -> list[str]:
    """Changes of the settings with which a run fits that does not; the least change first, [] if none was found."""
    changes: list[tuple[str, TrainConfig]] = []
    current = config
    if not current.gradient_checkpointing and not current.shapes.graph:
        current = replace(current, gradient_checkpointing=True)
        changes.append(("gradient_checkpointing=true", current))
    if cluster.gpus > 1 and not current.fsdp and not current.deepspeed and current.model.quantize == "none":
        current = replace(current, fsdp={"fsdp_version": 2})
        changes.append(("fsdp={fsdp_version: 2}", current))
    fewer = _fewer_rows(current)
    while fewer is not None:
        rows = max(source.batch_size for source in fewer.data.sources)
        changes.append((f"at most {rows} rows a batch (batch_size)", fewer))
        fewer = _fewer_rows(fewer)
    available, made = cluster.gpu.memory - CONTEXT, list[str]()
    for name, changed in changes:
        made = [*(n for n in made if not ("rows" in n and "rows" in name)), name]
        batches = [_with_images(sizes, images, changed) for sizes in BatchSizes.of_sources(changed, model_config)]
        memory = _largest(changed, model_config, cluster, batches)
        if memory.total <= available:
            return [f"{' and '.join(made)}: {memory}"]
    return []


def _fewer_rows(config: TrainConfig) -> TrainConfig | None:
    """The settings with half as many rows a batch; None: there is one."""
    if max(source.batch_size for source in config.data.sources) == 1:
        return None
    sources = [replace(source, batch_size=max(source.batch_size // 2, 1)) for source in config.data.sources]
    return replace(config, data=replace(config.data, sources=sources, batch_size=max(config.data.batch_size // 2, 1)))

"""The time of a training step: arithmetic, the optimizer, and what processes send each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from ..training.config import TrainConfig
from ..training.gpus import GIGA, GPU
from ..training.memory import zero_stage
from .coefficients import MEASURED, Coefficients
from .work import ModelWork, StepWork

PARTS = ("language", "vision", "denoising", "latents", "queries")
OVERLAP = 3.0  # exponent of the sum of the GPU's and the host's time


@dataclass(frozen=True)
class Cluster:
    """The GPUs of a run.

    Attributes:
        gpu: their kind.
        gpus: their number, each with a process.
        per_node: how many a machine has.
    """

    gpu: GPU
    gpus: int = 1
    per_node: int = 8

    @property
    def nodes(self) -> int:
        """Number of machines."""
        return -(-self.gpus // self.per_node)

    @property
    def bandwidth(self) -> float:
        """Bytes per second that a GPU sends in a collective operation, by data sheet.

        Between machines all network adapters of a machine work at once, each for one ring through all GPUs.
        """
        inside = self.gpu.link
        return GIGA * (inside if self.nodes == 1 else min(inside, self.gpu.network * min(self.per_node, self.gpus)))


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step.

    Attributes:
        language, vision, denoising, latents, queries, adapter, optimizer: of the GPU, see `StepWork`.
        host: how much longer it takes because the host starts kernels too slowly.
        communication: seconds of all collective operations, if nothing else ran.
        waiting: the part of them that computation does not hide.
    """

    language: float
    vision: float
    denoising: float
    latents: float
    queries: float
    adapter: float
    optimizer: float
    host: float
    communication: float
    waiting: float

    @property
    def total(self) -> float:
        """Seconds of the step."""
        return sum(asdict(self).values()) - self.communication


def gpu_seconds(work: StepWork, gpu: GPU, reached: Coefficients) -> dict[str, float]:
    """Seconds of a GPU for the parts of a step's work."""
    peak, bandwidth = gpu.tflops * 1e12, gpu.bandwidth * GIGA * reached.memory
    parts = {name: getattr(work, name) / (peak * getattr(reached, name)) for name in PARTS}
    return parts | {
        "adapter": work.adapter / bandwidth,
        "optimizer": work.optimizer / bandwidth + work.owned * reached.owned / GIGA,
    }


def host_seconds(config: TrainConfig, work: StepWork, cluster: Cluster, reached: Coefficients) -> float:
    """Seconds in which the host starts all kernels of a step."""
    return reached.host * work.launches * (reached.divided_host if config.fsdp and cluster.gpus > 1 else 1.0)


def together(gpu: float, host: float) -> float:
    """Seconds of a step whose kernels take `gpu` and are started in `host` seconds: the longer, and a little more."""
    return (gpu**OVERLAP + host**OVERLAP) ** (1 / OVERLAP)


def step_time(
    config: TrainConfig, model: ModelWork, work: StepWork, cluster: Cluster, reached: Coefficients = MEASURED
) -> StepTime:
    """The time of a step on a cluster."""
    parts = gpu_seconds(work, cluster.gpu, reached)
    busy = sum(parts.values())
    hideable, exposed = traffic(config, model, cluster)
    speed = cluster.bandwidth * reached.link
    computing = busy - parts["optimizer"]
    beside = reached.hidden * computing * (1.0 if config.fsdp else work.backward / work.micro_batches)
    host = together(busy, host_seconds(config, work, cluster, reached)) - busy
    waiting = max(hideable / speed - beside, 0.0) + exposed / speed
    return StepTime(**parts, host=host, communication=(hideable + exposed) / speed, waiting=waiting)


def traffic(config: TrainConfig, model: ModelWork, cluster: Cluster) -> tuple[float, float]:
    """Bytes that a GPU sends in a step: beside computation, and while nothing is computed.

    DDP reduces float32 gradients to all in the last backward pass. ZeRO reduces them in the type of computation; stages
    1 and 2 gather updated weights after the optimizer. FSDP2 and stage 3 gather all weights for the forward and for the
    backward pass of each micro-batch, and reduce gradients to their owners, FSDP2 in float32.
    """
    share = (cluster.gpus - 1) / cluster.gpus
    half = 4 if config.precision == "float32" else 2
    stage = zero_stage(config)
    if config.fsdp or stage >= 3:
        gathered = 2 * half * model.whole * config.accumulation
        return share * (gathered + (4 if config.fsdp else half) * model.trained * config.accumulation), 0.0
    if config.deepspeed:
        return share * 2 * half * model.trained, share * half * model.trained if stage >= 1 else 0.0
    return share * 2 * 4 * model.trained, 0.0


def mean_of_slowest(seconds: Sequence[float], shares: Sequence[float], gpus: int) -> float:
    """The mean time of steps of GPUs that choose their batches independently, and wait for the slowest.

    Args:
        seconds: time with each kind of batch.
        shares: their probabilities, which sum to 1.
        gpus: number of GPUs.
    """
    total = below = 0.0
    for time, share in sorted(zip(seconds, shares, strict=True)):
        total += time * ((below + share) ** gpus - below**gpus)
        below += share
    return total

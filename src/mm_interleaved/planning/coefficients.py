"""What training steps reach of a GPU's data sheet: the one place of these figures.

`benchmarks/fit_planner.py` fits them to steps of the release's size on H200 (`benchmarks/results/scaling-h200.json`),
whose other half judges them (docs/internals/performance.md, "The planner"). `latents` is the VAE's 0.21 s for 32 images
of a profile there, `memory` is what copies reach. Other kinds of GPU, and faster or slower processors, are assumed to
reach the same.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Coefficients:
    """What a step reaches.

    Attributes:
        language, vision, denoising, latents, queries: shares of the bf16 peak for the parts of `StepWork`; that of
            queries is small, because sampling moves many bytes for its arithmetic.
        memory: share of the memory's bandwidth, for the optimizer and adapters.
        owned: seconds in which DeepSpeed updates a billion weights.
        host: seconds in which the host starts the kernels of a forward pass.
        divided_host: the same with FSDP2, as a factor.
        link: share of the links' speed in a collective operation.
        hidden: share of the backward pass beside which gradients are reduced.
    """

    language: float
    vision: float
    denoising: float
    latents: float
    queries: float
    memory: float
    owned: float
    host: float
    divided_host: float
    link: float
    hidden: float


MEASURED = Coefficients(
    language=0.85, vision=0.0976, denoising=0.1894, latents=0.172, queries=0.00724, memory=0.8, owned=0.37, host=0.32,
    divided_host=2.35, link=0.712, hidden=0.7,
)  # fmt: skip

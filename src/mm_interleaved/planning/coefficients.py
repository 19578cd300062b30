"""How much of a GPU's data sheet training steps reach: the one place of these figures.

They follow from steps of the release's size on H200 (docs/internals/performance.md, "Training", and
`benchmarks/results/finetuning-h200.json`), by hand: products of the language model, the VAE, and the rest. Other kinds
of GPU are assumed to reach the same shares.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Coefficients:
    """What a step reaches.

    Attributes:
        language, vision, denoising, latents: shares of the bf16 peak for the parts of `StepWork`.
        memory: share of the memory's bandwidth for the optimizer.
        fixed: seconds of a micro-batch that do not depend on its size.
        link: share of the links' speed in a collective operation.
        hidden: share of the backward pass beside which gradients are reduced.
    """

    language: float
    vision: float
    denoising: float
    latents: float
    memory: float
    fixed: float
    link: float
    hidden: float


MEASURED = Coefficients(
    language=0.75, vision=0.1, denoising=0.2, latents=0.17, memory=0.8, fixed=0.1, link=0.75, hidden=0.7
)  # fmt: skip

"""Fit the coefficients of the planner to measured steps of one GPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..training.gpus import GIGA, GPU
from .coefficients import Coefficients
from .work import StepWork

PARTS = ("language", "vision", "denoising", "latents")
MOST = 0.85  # share of the peak; large products alone reach no more
WEIGHT = 0.02  # of the values of the start, against a relative error of a step


@dataclass(frozen=True)
class Measured:
    """A measured step of one GPU: its work, and its seconds."""

    work: StepWork
    seconds: float


def fit(rows: Sequence[Measured], gpu: GPU, start: Coefficients) -> Coefficients:
    """The shares of the peak, and the fixed seconds, that explain measured steps with the least relative error.

    Seconds are a sum of the parts' work, each with a factor of at least 1 / `MOST`. The values of `start` have a small
    weight, so what the steps say nothing about keeps them; so do the memory's share and those of communication.

    Args:
        rows: measured steps of one GPU.
        gpu: its kind.
        start: other coefficients.

    Raises:
        ValueError: there are no rows.
    """
    if not rows:
        raise ValueError("there is no measured step to fit")
    peak = gpu.tflops * 1e12
    columns = [[getattr(row.work, name) / peak for name in PARTS] + [row.work.micro_batches] for row in rows]
    optimizer = np.array([row.work.optimizer / (gpu.bandwidth * GIGA * start.memory) for row in rows])
    seconds = np.array([row.seconds for row in rows])
    before = np.array([1 / getattr(start, name) for name in PARTS] + [max(start.fixed, 1e-3)])
    least = np.array([1 / MOST] * len(PARTS) + [0.0])
    matrix = np.vstack([np.array(columns, dtype=float) / seconds[:, None], np.diag(WEIGHT / before)])
    wanted = np.concatenate([1 - optimizer / seconds, np.full(len(before), WEIGHT)])
    factors = least + _nonnegative(matrix, wanted - matrix @ least)
    shares = {name: float(1 / factor) for name, factor in zip(PARTS, factors, strict=False)}
    return replace(start, fixed=float(factors[-1]), **shares)


def _nonnegative(matrix: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Least squares with factors of at least 0 (Lawson and Hanson 1974, algorithm NNLS)."""
    count = matrix.shape[1]
    factors, chosen = np.zeros(count), np.zeros(count, dtype=bool)
    for _ in range(10 * count):
        gradient = matrix.T @ (wanted - matrix @ factors)
        gradient[chosen] = 0
        if gradient.max() <= 1e-12:
            break
        chosen[int(gradient.argmax())] = True
        while chosen.any():
            found = np.zeros(count)
            found[chosen] = np.linalg.lstsq(matrix[:, chosen], wanted, rcond=None)[0]
            if found[chosen].min() > 0:
                factors = found
                break
            low = chosen & (found <= 0)
            step = float((factors[low] / (factors[low] - found[low])).min())
            factors = factors + step * (found - factors)
            chosen &= factors > 1e-15
    return factors

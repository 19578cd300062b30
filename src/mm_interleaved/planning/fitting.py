"""Fit the coefficients of the planner to measured steps of one GPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..training.gpus import GPU
from .coefficients import Coefficients
from .step import OVERLAP, gpu_seconds, together
from .work import StepWork

FITTED = ("language", "vision", "denoising", "queries")
MOST = 0.85  # share of the peak; large products alone reach no more
WEIGHT = 0.02  # of the values of the start, against a relative error of a step
HOSTS = np.arange(0.05, 0.6, 0.01)  # seconds of a forward pass that are tried


@dataclass(frozen=True)
class Measured:
    """A measured step of one GPU: its work, and its seconds."""

    work: StepWork
    seconds: float


def fit(rows: Sequence[Measured], gpu: GPU, start: Coefficients) -> Coefficients:
    """The coefficients of one GPU that explain measured steps with the least relative error.

    These are the shares of the peak of `FITTED`, at most `MOST`, and the time of the host. The shares of `start` have a
    small weight, so what the steps say nothing about keeps them. All others stay as they are.

    Args:
        rows: measured steps of one GPU.
        gpu: its kind.
        start: other coefficients.

    Raises:
        ValueError: there are no rows.
    """
    if not rows:
        raise ValueError("there is no measured step to fit")
    found = [_with_host(rows, gpu, replace(start, host=float(host))) for host in HOSTS]
    return min(found, key=lambda reached: sum(_error(row, gpu, reached) ** 2 for row in rows))


def _error(row: Measured, gpu: GPU, reached: Coefficients) -> float:
    """The relative error of a step's time."""
    busy = sum(gpu_seconds(row.work, gpu, reached).values())
    return together(busy, reached.host * row.work.launches) / row.seconds - 1


def _with_host(rows: Sequence[Measured], gpu: GPU, start: Coefficients) -> Coefficients:
    """The best coefficients with the host's time of `start`."""
    peak = gpu.tflops * 1e12
    seconds = np.array([row.seconds for row in rows])
    hosts = np.array([start.host * row.work.launches for row in rows])
    busy = np.maximum(seconds**OVERLAP - hosts**OVERLAP, (0.3 * seconds) ** OVERLAP) ** (1 / OVERLAP)
    known = [sum(v for n, v in gpu_seconds(row.work, gpu, start).items() if n not in FITTED) for row in rows]
    columns = [[getattr(row.work, name) / peak for name in FITTED] for row in rows]
    before = np.array([1 / getattr(start, name) for name in FITTED])
    least = np.full(len(FITTED), 1 / MOST)
    matrix = np.vstack([np.array(columns, dtype=float) / seconds[:, None], np.diag(WEIGHT / before)])
    wanted = np.concatenate([(busy - np.array(known)) / seconds, np.full(len(before), WEIGHT)])
    factors = least + _nonnegative(matrix, wanted - matrix @ least)
    return replace(start, **{name: float(1 / factor) for name, factor in zip(FITTED, factors, strict=True)})


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

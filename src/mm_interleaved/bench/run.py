"""Runs the lines of the benchmark one after the other. A failure is reported, and the other lines still run."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch

from ..ops.mmfs_attention import HAS_TRITON
from . import images, mmfs, requests, session, text, training
from .base import Bench, Row

__all__ = ["LINES", "USUAL", "Bench", "Row", "Trouble", "run_lines"]

LINES: dict[str, Callable[[Bench], Iterator[Row]]] = {
    "decode": text.decode,
    "image": images.image,
    "admission": text.admission,
    "decode-step": text.decode_step,
    "pixels": images.pixels,
    "encode": images.encode,
    "prefill": text.prefill,
    "op": mmfs.op,
    "layer": mmfs.layer,
    "adapter": images.adapter,
    "training": training.training,
    "training-compiled": training.training_compiled,
    "session": session.session,
    "first-token": requests.first_token,
    "two-sessions": requests.two_sessions,
    "evaluation": requests.evaluation,
    "layer-by-images": mmfs.layer_by_images,
    "decode-by-images": text.decode_by_images,
    "products": text.products,
    "recorder": mmfs.recorder,
}
USUAL = [name for name in LINES if name not in ("products", "training-compiled")]


def _triton_errors() -> tuple[type[BaseException], ...]:
    if not HAS_TRITON:
        return ()
    from triton.errors import TritonError

    return (TritonError,)


# Exceptions that a line may raise on an untested machine: out of memory, a kernel that does not compile, a bad setting.
_TROUBLE = (
    *_triton_errors(), subprocess.SubprocessError, RuntimeError, ValueError, TypeError, LookupError, AttributeError,
    ArithmeticError, OSError, ImportError, AssertionError,
)  # fmt: skip


@dataclass
class Trouble:
    """A line that did not finish.

    Attributes:
        line: its name.
        reason: the reason.
        skipped: whether it was not started.
    """

    line: str
    reason: str
    skipped: bool = False


def run_lines(bench: Bench, names: Iterable[str], time_limit: float | None = None) -> Iterator[Row | Trouble]:
    """Yields rows as they are measured.

    Args:
        bench: sizes, device and model.
        names: names of lines, keys of `LINES`.
        time_limit: seconds after which no further row is started; None: no limit.
    """
    begin = time.perf_counter()
    for name in names:
        if time_limit is not None and time.perf_counter() - begin > time_limit:
            yield Trouble(name, f"the time limit of {time_limit:.0f} s was reached before it", skipped=True)
            continue
        try:
            bench.clock.reset_reserved()
            for row in LINES[name](bench):
                row.reserved_bytes = bench.clock.reserved()
                yield row
                bench.clock.reset_reserved()
                if time_limit is not None and time.perf_counter() - begin > time_limit:
                    yield Trouble(name, f"the time limit of {time_limit:.0f} s was reached; more rows are missing")
                    break
        except _TROUBLE as error:
            kind = type(error).__name__
            yield Trouble(name, f"{kind}: {' '.join(str(error).split())[:300] or 'no message'}{_place(error)}")
        if bench.device.type == "cuda":
            torch.cuda.empty_cache()


def _place(error: BaseException) -> str:
    """The place in the code where an error was raised."""
    trace, place = error.__traceback__, ""
    while trace is not None:  # the innermost frame of ours
        _, ours, name = trace.tb_frame.f_code.co_filename.rpartition("mm_interleaved/")
        place = f" ({name}:{trace.tb_lineno})" if ours else place
        trace = trace.tb_next
    return place

"""Fit the planner to one half of the measured steps, and judge it by the other.

python benchmarks/fit_planner.py benchmarks/results/scaling-h200.json --output benchmarks/results/planner.json

The halves were chosen before anything was measured: cases of `scaling.FIT` and `ddp` fit, all others judge, also the
steps of `benchmarks/results/finetuning-h200.json`, which were measured in another run. Needs no GPU. Prints the
coefficients for `planning/coefficients.py`, and for each case planned and measured seconds and bytes.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import finetuning
import scaling

from mm_interleaved.model import MMInterleavedConfig
from mm_interleaved.planning.coefficients import MEASURED, Coefficients
from mm_interleaved.planning.fitting import Measured, fit
from mm_interleaved.planning.step import Cluster, step_time
from mm_interleaved.planning.work import ModelWork, StepWork, step_work
from mm_interleaved.training.config import TrainConfig
from mm_interleaved.training.gpus import GPUS
from mm_interleaved.training.memory import BatchSizes, estimate

GPU = GPUS["h200"]
OLDER = Path(__file__).parent / "results/finetuning-h200.json"
FITTING = "ddp"  # the step that says how much of the communication computation hides


@dataclass
class Case:
    """A measured step, and what the planner needs to know of it."""

    row: dict[str, Any]
    config: TrainConfig
    sizes: BatchSizes
    cluster: Cluster
    model_config: MMInterleavedConfig
    model: ModelWork
    half: str

    @property
    def work(self) -> StepWork:
        """The work of its step."""
        return step_work(self.config, self.model, self.sizes, self.cluster.gpus)


def read(path: Path) -> list[Case]:
    """The measured steps of a results file."""
    found = []
    for row in json.loads(path.read_text())["rows"]:
        if "sizes" not in row or row.get("preset") != "release":
            continue
        name = row["case"]
        if name in finetuning.CASES:
            given = finetuning.CASES[name]
            config, sizes_of = finetuning.config_of(given), finetuning.model_config_of("release", given)
        else:
            case = case_of(name)
            config, sizes_of = scaling.config_of(case), scaling.model_config_of("release", case)
        half = "fit" if row.get("half") == "fit" or name == FITTING else "judge"
        cluster = Cluster(GPU, row["world_size"])
        model = ModelWork.of(config, sizes_of)
        found.append(Case(row, config, BatchSizes(**row["sizes"]), cluster, sizes_of, model, half))
        print(f"{name}: {half}", flush=True)
    return found


def case_of(name: str) -> scaling.Case:
    """The case of that name."""
    if name in scaling.FIT or name in scaling.JUDGE:
        return (scaling.FIT | scaling.JUDGE)[name]
    jobs = {n: job.work for turn in scaling.TURNS for n, job in turn.jobs.items()}
    work = jobs[name]
    assert isinstance(work, scaling.Training)
    return work.case


def fitted(cases: Sequence[Case]) -> Coefficients:
    """The coefficients that explain the fitting half."""
    alone = [Measured(c.work, c.row["seconds"]) for c in cases if c.half == "fit" and c.cluster.gpus == 1]
    found = fit(alone, GPU, MEASURED)
    for case in cases:
        if case.half == "fit" and case.cluster.gpus > 1:
            found = replace(found, link=case.row["sent_gb_per_second"] / GPU.link)
    return found


def judged(case: Case, reached: Coefficients) -> dict[str, Any]:
    """Planned and measured seconds and bytes of a case."""
    row = case.row
    planned = step_time(case.config, case.model, case.work, case.cluster, reached)
    memory = estimate(case.config, case.model_config, case.cluster.gpus, case.sizes)
    reserved = row.get("max_reserved")
    return {
        "case": row["case"], "half": case.half, "gpus": case.cluster.gpus, "sizes": row["sizes"],
        "work": asdict(case.work), "seconds": row["seconds"], "planned_seconds": planned.total,
        "planned_parts": asdict(planned), "of_seconds": planned.total / row["seconds"],
        "reserved": reserved, "allocated": row.get("max_allocated"), "planned_bytes": memory.total,
        "planned_memory": memory.parts, "of_reserved": memory.total / reserved if reserved else None,
    }  # fmt: skip


def main() -> None:
    """Fit and judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    cases = [*read(options.results), *read(OLDER)]
    reached = fitted(cases)
    print({name: round(value, 4) for name, value in asdict(reached).items()}, flush=True)
    rows = []
    for case in cases:
        rows.append(judged(case, reached))
        one = rows[-1]
        print(f"{one['case']:16} {one['half']:6} {one['seconds']:6.2f} s, planned {one['planned_seconds']:6.2f} "
              f"({one['of_seconds'] - 1:+.0%}); {(one['reserved'] or 0) / 2**30:6.1f} GiB, planned "
              f"{one['planned_bytes'] / 2**30:6.1f} ({(one['of_reserved'] or 1) - 1:+.0%})", flush=True)  # fmt: skip
        options.output.write_text(json.dumps({"coefficients": asdict(reached), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Fit the planner to one half of the measured steps, and judge it by the other.

python benchmarks/fit_planner.py benchmarks/results/scaling-h200.json --output benchmarks/results/planner.json

Cases of `scaling.FIT` and `ddp` fit, as was chosen before anything was measured. `zero1-one` and `fsdp2-all` were to
judge, but without them nothing says how long DeepSpeed's updates and the host with FSDP2 take, so they fit these two
coefficients. All others judge, also the steps of `benchmarks/results/finetuning-h200.json`, from another run.

Needs no GPU. Prints the coefficients for `planning/coefficients.py`, and for each case planned and measured seconds and
bytes.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import finetuning
import numpy as np
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
FITTING = ("ddp", "zero1-one", "fsdp2-all")  # the links, DeepSpeed's updates, the host with FSDP2


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
    found, models = [], dict[str, ModelWork]()
    for row in json.loads(path.read_text())["rows"]:
        name = row["case"]
        if "sizes" not in row or row.get("preset") != "release" or name.startswith("resume"):  # the same steps again
            continue
        if name in finetuning.CASES:
            given = finetuning.CASES[name]
            config, sizes_of = finetuning.config_of(given), finetuning.model_config_of("release", given)
        else:
            case = case_of(name)
            config, sizes_of = scaling.config_of(case), scaling.model_config_of("release", case)
        half = "fit" if row.get("half") == "fit" or name in FITTING else "judge"
        cluster = Cluster(GPU, row["world_size"])
        kind = repr((config.freeze, config.adapter, sizes_of.frozen))
        if kind not in models:
            models[kind] = ModelWork.of(config, sizes_of, scaling.measured_cost("release"))
        sizes = BatchSizes(**row["sizes"])
        if not config.losses.image:  # noise was made for the images, and not used
            sizes = replace(sizes, targets=0)
        found.append(Case(row, config, sizes, cluster, sizes_of, models[kind], half))
        print(f"{name}: {half}", flush=True)
    return found


def case_of(name: str) -> scaling.Case:
    """The case of that name."""
    if name in scaling.FIT or name in scaling.JUDGE:
        return (scaling.FIT | scaling.JUDGE)[name]
    work = {n: job.work for turn in scaling.TURNS for n, job in turn.jobs.items()}[name]
    assert isinstance(work, scaling.Training)
    return work.case


def fitted(cases: Sequence[Case]) -> Coefficients:
    """The coefficients that explain the fitting half."""
    by_name = {case.row["case"]: case for case in cases}
    alone = [Measured(c.work, c.row["seconds"]) for c in cases if c.row.get("half") == "fit"]
    found = fit(alone, GPU, MEASURED)
    found = replace(found, link=by_name["ddp"].row["sent_gb_per_second"] / GPU.link)
    for name, one in {"zero1-one": "owned", "fsdp2-all": "divided_host"}.items():
        tried = [replace(found, **{one: float(value)}) for value in np.arange(0.0, 4.0, 0.01)]
        found = min(tried, key=lambda reached: abs(planned(by_name[name], reached) / by_name[name].row["seconds"] - 1))
    return found


def planned(case: Case, reached: Coefficients) -> float:
    """Planned seconds of a case."""
    return step_time(case.config, case.model, case.work, case.cluster, reached).total


def judged(case: Case, reached: Coefficients, with_memory: bool) -> dict[str, Any]:
    """Planned and measured seconds and bytes of a case; without memory, 0 bytes are planned."""
    row = case.row
    time = step_time(case.config, case.model, case.work, case.cluster, reached)
    reserved, parts = row.get("max_reserved"), dict[str, int]()
    if with_memory:
        parts = estimate(case.config, case.model_config, case.cluster.gpus, case.sizes).parts
    total = sum(parts.values())
    return {
        "case": row["case"], "half": case.half, "older": row["case"] in finetuning.CASES,
        "gpus": case.cluster.gpus, "sizes": row["sizes"],
        "work": asdict(case.work), "seconds": row["seconds"], "planned_seconds": time.total,
        "planned_parts": asdict(time), "of_seconds": time.total / row["seconds"],
        "reserved": reserved, "allocated": row.get("max_allocated"), "planned_bytes": total, "planned_memory": parts,
        "of_reserved": total / reserved if reserved and total else None,
    }  # fmt: skip


def main() -> None:
    """Fit and judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--cases", nargs="*", help="judge only these; rows of others stay as they are in the output")
    parser.add_argument("--no-memory", action="store_true", help="leave memory out, which takes most of the time")
    options = parser.parse_args()
    cases = [*read(options.results), *read(OLDER)]
    reached = fitted(cases)
    print({name: round(value, 4) for name, value in asdict(reached).items()}, flush=True)
    rows: dict[str, dict[str, Any]] = {}
    if options.cases is not None and options.output.is_file():
        rows = {row["case"]: row for row in json.loads(options.output.read_text())["rows"]}
    for case in cases:
        if options.cases is not None and case.row["case"] not in options.cases:
            continue
        one = rows[case.row["case"]] = judged(case, reached, not options.no_memory)
        print(f"{one['case']:16} {one['half']:6} {one['seconds']:6.2f} s, planned {one['planned_seconds']:6.2f} "
              f"({one['of_seconds'] - 1:+.0%}); {(one['reserved'] or 0) / 2**30:6.1f} GiB, planned "
              f"{one['planned_bytes'] / 2**30:6.1f} ({(one['of_reserved'] or 1) - 1:+.0%})", flush=True)  # fmt: skip
        found = {"coefficients": asdict(reached), "rows": [*rows.values()]}
        options.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()

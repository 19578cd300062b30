"""Runs of the debug model under a real Slurm; see `slurm`."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from ..programs import Program
from ..training.conftest import arguments
from .kills import SETTINGS, is_same, last_step, train_whole
from .slurm import Cluster

ROOT = Path(__file__).parents[2]
THREADS = {"OMP_NUM_THREADS": "1"}
STEPS = "steps=22"  # processes agree on a signal within ten steps


def submit(cluster: Cluster, folder: Path, config: Path, *options: object) -> str:
    """The number of a job that `mmi launch slurm` submits from a folder."""
    given = ["launch", "slurm", config, "--gpus-per-node", 0, "--submit", "--script", folder / "job.sbatch", *options]
    program = Program("mm_interleaved.cli", *given, environment={**cluster.environment, **THREADS})
    said, errors = program.communicate()
    assert program.returncode == 0, said + errors
    return said.split("job ")[-1].split(";")[0]


def wait_for(true: Callable[[], bool], cluster: Cluster, logs: Path, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        if time.monotonic() > deadline:
            written = "\n".join(f"== {log.name}\n{log.read_text()}" for log in sorted(logs.glob("*.txt")))
            pytest.fail(f"{written}\n{cluster.said()}")
        time.sleep(0.1)


def rank(number: int, job: str) -> psutil.Process:
    """The process of a rank of a job."""
    wanted = {"SLURM_JOB_ID": job, "SLURM_PROCID": str(number), "SLURM_STEP_ID": "0"}
    found = []
    for process in psutil.process_iter():
        try:
            if "mm_interleaved.cli" in process.cmdline() and wanted.items() <= process.environ().items():
                found.append(process)
        except psutil.Error:  # it has ended meanwhile
            continue
    return min(found, key=lambda process: process.pid)


@pytest.mark.slow
def test_a_job_survives_a_dead_process_and_its_time_limit(cluster: Cluster, tmp_path: Path) -> None:
    """One process on each of two nodes. One is killed; later the job is signalled as before its time limit."""
    train_whole(tmp_path / "whole", STEPS)
    run, logs = tmp_path / "run", tmp_path / "logs"
    settings = [*arguments(run, *SETTINGS, STEPS), "--", "--device", "cpu"]
    job = submit(cluster, tmp_path, ROOT / "configs/debug.yaml", "--nodes", 2, "--logs", logs, *settings)

    wait_for(lambda: (run / "checkpoint-3").is_dir(), cluster, logs)
    begin = time.monotonic()
    rank(1, job).kill()
    batch = logs / f"debug-{job}.txt"
    wait_for(lambda: "ended with status" in batch.read_text(), cluster, logs, 60)
    assert time.monotonic() - begin < 60
    wait_for(lambda: "going on from" in (logs / f"debug-{job}-rank0.txt").read_text(), cluster, logs)

    reached = last_step(run)
    wait_for(lambda: last_step(run) > reached, cluster, logs)
    cluster.run("scancel", "--batch", "--signal=USR1", job)
    wait_for(lambda: cluster.job(job)["Restarts"] == "1", cluster, logs)
    assert not (run / "final").exists()
    wait_for(lambda: cluster.job(job)["JobState"] == "COMPLETED", cluster, logs)

    written = batch.read_text()
    assert "start 0 of run 0, on node[1-2]" in written
    assert "start 1 of run 0" in written
    assert "putting the job back into the queue" in written
    assert "start 0 of run 1" in written
    assert (logs / f"debug-{job}-rank1.txt").is_file()
    assert is_same(run, tmp_path / "whole")

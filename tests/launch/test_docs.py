"""What docs/guides/scaling.md shows is true, and the examples for other schedulers have documented fields only."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from mm_interleaved.cli import app
from mm_interleaved.configuration import load_config
from mm_interleaved.launch import exits
from mm_interleaved.training.config import TrainConfig

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs/guides/scaling.md").read_text()
BLOCKS = re.findall(r"```sh\n(.*?)```", TEXT, re.DOTALL)
COMMANDS = [line for block in BLOCKS for line in block.splitlines() if line.startswith("mmi launch ")]


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for folder in ("configs", "examples"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_commands_write_scripts_that_bash_accepts(elsewhere: Path) -> None:
    assert len(COMMANDS) >= 4
    for command in COMMANDS:
        result = CliRunner().invoke(app, shlex.split(command)[1:])
        assert result.exit_code == 0, f"{command}: {result.output} {result.exception}"
    scripts = sorted(elsewhere.glob("*.sbatch"))
    assert [path.stem for path in scripts] == ["captions", "debug", "demo"]
    for path in scripts:
        subprocess.run(["bash", "-n", path], check=True)
    assert "--shared" in (elsewhere / "demo.sbatch").read_text()


def test_options_and_statuses_are_those_of_the_code() -> None:
    known = CliRunner().invoke(app, ["launch", "slurm", "--help"], env={"COLUMNS": "200"}).output
    table = re.search(r"\| option \|.*?\n\n", TEXT, re.DOTALL)[0]
    options = re.findall(r"`(--[a-z-]+)", table)
    assert len(options) >= 10
    assert not [option for option in options if option not in known]
    statuses = {int(number) for number in re.findall(r"^\| (\d+) \|", TEXT, re.MULTILINE)}
    assert statuses == {0, 1, 2, exits.PEER_FAILED, exits.STOPPED}


# Fields of the documentation: docs.skypilot.co (SkyPilot YAML), jobset.sigs.k8s.io (API v1alpha2), kubernetes.io (Job).
SKYPILOT = {
    "name", "workdir", "num_nodes", "resources", "envs", "secrets", "volumes", "file_mounts", "setup", "run", "config",
}  # fmt: skip
SKYPILOT_RESOURCES = {
    "infra", "accelerators", "accelerator_args", "cpus", "memory", "instance_type", "use_spot", "disk_size",
    "disk_tier", "network_tier", "max_hourly_cost", "image_id", "ports", "labels", "autostop", "any_of", "ordered",
    "job_recovery",
}  # fmt: skip
SKYPILOT_MOUNT = {"name", "source", "store", "mode", "persistent"}
JOBSET = {
    "replicatedJobs", "network", "successPolicy", "failurePolicy", "startupPolicy", "suspend", "coordinator",
    "managedBy", "ttlSecondsAfterFinished",
}  # fmt: skip
JOB = {
    "parallelism", "completions", "completionMode", "backoffLimit", "activeDeadlineSeconds", "podFailurePolicy",
    "successPolicy", "template", "suspend", "podReplacementPolicy", "backoffLimitPerIndex", "maxFailedIndexes",
}  # fmt: skip


def test_the_skypilot_example() -> None:
    task: dict[str, Any] = yaml.safe_load((ROOT / "examples/skypilot/train.yaml").read_text())
    assert set(task) <= SKYPILOT
    assert set(task["resources"]) <= SKYPILOT_RESOURCES
    assert set(task["resources"]["job_recovery"]) <= {"strategy", "max_restarts_on_errors", "recover_on_exit_codes"}
    assert all(set(mount) <= SKYPILOT_MOUNT for mount in task["file_mounts"].values())
    assert all(isinstance(value, str) for value in task["envs"].values())
    for part in ("setup", "run"):
        subprocess.run(["bash", "-n"], input=task[part], text=True, check=True)
    known = {"SKYPILOT_NODE_IPS", "SKYPILOT_NUM_NODES", "SKYPILOT_NODE_RANK", "SKYPILOT_NUM_GPUS_PER_NODE"}
    assert set(re.findall(r"SKYPILOT_\w+", task["run"])) == known
    load_config(ROOT / task["envs"]["CONFIG"], TrainConfig, ["output=/runs/release"])


def test_the_kubernetes_example() -> None:
    found: dict[str, Any] = yaml.safe_load((ROOT / "examples/kubernetes/train.yaml").read_text())
    assert (found["apiVersion"], found["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    name, spec = found["metadata"]["name"], found["spec"]
    assert set(spec) <= JOBSET
    assert set(spec["failurePolicy"]) <= {"maxRestarts", "restartStrategy", "rules"}
    assert set(spec["network"]) <= {"enableDNSHostnames", "subdomain", "publishNotReadyAddresses"}
    (replicated,) = spec["replicatedJobs"]
    assert set(replicated) <= {"name", "groupName", "replicas", "template", "dependsOn"}
    job = replicated["template"]["spec"]
    assert set(job) <= JOB
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    assert pod["restartPolicy"] == "Never"
    claims = {volume["name"] for volume in pod["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == claims
    command = container["command"]
    assert f"--master-addr={name}-{replicated['name']}-0-0.{name}" in command
    assert f"--nnodes={job['completions']}" in command
    assert job["completions"] == job["parallelism"]
    assert f"--nproc-per-node={container['resources']['limits']['nvidia.com/gpu']}" in command
    assert command[command.index("-m") + 1 :][:2] == ["mm_interleaved.cli", "train"]
    load_config(ROOT / command[-2], TrainConfig, [command[-1]])

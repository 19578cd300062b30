"""The variables of Slurm as those of torchrun."""

from __future__ import annotations

import shutil
import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mm_interleaved.evaluation.processes import start_processes
from mm_interleaved.launch import count_processes, expand_nodes, join_processes
from mm_interleaved.launch.slurm import FIRST_PORT, PORTS, LaunchError
from mm_interleaved.pretrained import TOKENIZER
from mm_interleaved.training.run import train

from ..training.conftest import settings  # noqa: F401  a fixture

TASK = {
    "SLURM_JOB_ID": "4711", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "5", "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1", "SLURM_NODEID": "1", "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
    "SLURM_STEP_NODELIST": "gpu[01-02],login2", "SLURM_JOB_NODELIST": "gpu[01-02],login2",
}  # fmt: skip


def joined(**changes: str | None) -> dict[str, str]:
    """What is added to the variables of a task."""
    before = {name: value for name, value in {**TASK, **changes}.items() if value is not None}
    after = dict(before)
    join_processes(after)
    return {name: value for name, value in after.items() if name not in before}


def test_a_task_of_srun_becomes_a_process() -> None:
    port = joined()["MASTER_PORT"]
    assert joined() == {
        "RANK": "3", "WORLD_SIZE": "5", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "gpu01",
        "MASTER_PORT": port,
    }  # fmt: skip
    last = joined(SLURM_PROCID="4", SLURM_LOCALID="0", SLURM_NODEID="2")
    assert (last["LOCAL_RANK"], last["LOCAL_WORLD_SIZE"], last["MASTER_PORT"]) == ("0", "1", port)
    assert joined(SLURM_STEP_ID="1")["MASTER_PORT"] != port  # another srun of the same job
    assert joined(SLURM_STEP_NODELIST="login2")["MASTER_ADDR"] == "login2"  # a step on some of the job's nodes
    assert joined(SLURM_STEP_NODELIST=None)["MASTER_ADDR"] == "gpu01"


@given(st.integers(1, 10**9), st.integers(0, 10**4))
def test_ports_are_those_that_a_process_can_open(job: int, step: int) -> None:
    port = int(joined(SLURM_JOB_ID=str(job), SLURM_STEP_ID=str(step))["MASTER_PORT"])
    assert FIRST_PORT <= port < FIRST_PORT + PORTS <= 32768


def test_what_is_given_stays() -> None:
    assert "MASTER_ADDR" not in joined(MASTER_ADDR="10.0.0.1", MASTER_PORT="29500", WORLD_SIZE="5")
    assert joined(SLURM_STEP_NUM_TASKS="1", SLURM_PROCID="0") == {}
    assert joined(SLURM_STEP_NUM_TASKS=None) == {}  # the batch script of a job
    elastic = {"TORCHELASTIC_RUN_ID": "none", "RANK": "17", "WORLD_SIZE": "40", "LOCAL_RANK": "1"}
    assert joined(**elastic, GROUP_WORLD_SIZE="5") == {}  # torchrun in each of five tasks
    assert count_processes(TASK) == 5
    assert count_processes({**TASK, **elastic}) == 40
    assert count_processes({}) == 1


def test_a_task_that_sees_its_own_gpu_takes_it() -> None:
    assert joined(CUDA_VISIBLE_DEVICES="0")["LOCAL_RANK"] == "0"
    assert joined(CUDA_VISIBLE_DEVICES="0,1")["LOCAL_RANK"] == "1"
    with pytest.raises(LaunchError, match="8 tasks run on this node, and they see 4 GPUs"):
        joined(SLURM_STEP_TASKS_PER_NODE="8(x2)", CUDA_VISIBLE_DEVICES="0,1,2,3")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"TORCHELASTIC_RUN_ID": "none", "GROUP_WORLD_SIZE": "1"}, "5 tasks, each with a torchrun of 1 node"),
        ({"RANK": "0"}, "RANK is 0, but srun started this process as task 3 of 5"),
        ({"WORLD_SIZE": "40"}, "WORLD_SIZE is 40, but .* makes it 5"),
        ({"SLURM_PROCID": None}, "5 tasks, but SLURM_PROCID is not set: each would do the whole work.*torchrun"),
        ({"SLURM_STEP_NODELIST": "gpu[1-"}, r"'gpu\[1-' is no list of nodes"),
        ({"SLURM_STEP_TASKS_PER_NODE": "two"}, "'two' does not say how many tasks"),
        ({"SLURM_NODEID": "7"}, "SLURM_NODEID is 7"),
    ],
    ids=str,
)  # fmt: skip
def test_contradictions_are_refused(changes: dict[str, str | None], words: str) -> None:
    with pytest.raises(LaunchError, match=words):
        joined(**changes)


def test_training_and_evaluation_refuse_them(settings, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "8")
    for action in (lambda: train(settings("steps=2"), TOKENIZER, "cpu"), lambda: start_processes(cpu=True)):
        with pytest.raises(ValueError, match=r"srun started 8 tasks.*torchrun"):
            action()
    assert not (tmp_path / "run").exists()


# ---- lists of nodes


def test_lists_of_nodes() -> None:
    for text, hosts in {
        "gpu[01-03,07],login2": "gpu01 gpu02 gpu03 gpu07 login2",
        "n1": "n1",
        "n[8-11]": "n8 n9 n10 n11",
        "a[1-2]-b[03-04].x,c": "a1-b03.x a1-b04.x a2-b03.x a2-b04.x c",
        "n[098-101]": "n098 n099 n100 n101",
    }.items():
        assert expand_nodes(text) == hosts.split()


@pytest.mark.parametrize("text", ["", ",", "a,,b", "a[", "a]", "a[]", "a[1-]", "a[2-1]", "a[x]", "a[1[2]]", "a,"])
def test_what_is_no_list_is_refused(text: str) -> None:
    with pytest.raises(LaunchError, match="no list of nodes"):
        expand_nodes(text)


NUMBERS = st.lists(st.integers(0, 999), min_size=1, max_size=12, unique=True)
PREFIX = st.from_regex(r"[a-z]([a-z0-9-]{0,5}[a-z-])?", fullmatch=True)


def compressed(prefix: str, numbers: list[int], width: int) -> str:
    """Hosts as Slurm writes them: runs of numbers with leading zeros."""
    ranges: list[list[int]] = []
    for number in sorted(numbers):
        if ranges and ranges[-1][1] == number - 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    parts = [f"{a:0{width}d}" if a == b else f"{a:0{width}d}-{b:0{width}d}" for a, b in ranges]
    return f"{prefix}[{','.join(parts)}]"


@given(st.lists(st.tuples(PREFIX, NUMBERS, st.integers(1, 4)), min_size=1, max_size=4))
def test_a_compressed_list_names_its_hosts(groups: list[tuple[str, list[int], int]]) -> None:
    hosts = [f"{prefix}{n:0{width}d}" for prefix, numbers, width in groups for n in sorted(numbers)]
    assert expand_nodes(",".join(compressed(*group) for group in groups)) == hosts
    assert expand_nodes(",".join(hosts)) == hosts


@pytest.mark.skipif(shutil.which("scontrol") is None, reason="Slurm is not installed")
def test_slurm_expands_lists_the_same(tmp_path) -> None:
    """`scontrol show hostnames` needs no cluster, only a configuration."""
    (tmp_path / "slurm.conf").write_text("ClusterName=test\nSlurmctldHost=localhost\n")
    for text in ("gpu[01-03,07],login2", "a[1-2]-b[03-04]", "n[098-101],m[5,9-11]", "one"):
        done = subprocess.run(
            ["scontrol", "show", "hostnames", text], env={"SLURM_CONF": str(tmp_path / "slurm.conf")},
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert expand_nodes(text) == done.stdout.split()

"""The tasks of `srun` as processes of one run.

torchrun and `accelerate launch` describe a process in RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and
MASTER_PORT. `join_processes` sets these from the variables of Slurm, if `srun` started several tasks without them:

    RANK                SLURM_PROCID
    WORLD_SIZE          SLURM_STEP_NUM_TASKS
    LOCAL_RANK          SLURM_LOCALID; 0 if the task sees a single GPU, its own
    LOCAL_WORLD_SIZE    the place of SLURM_NODEID in SLURM_STEP_TASKS_PER_NODE
    MASTER_ADDR         the first host of SLURM_STEP_NODELIST, which has task 0
    MASTER_PORT         a number that follows from SLURM_JOB_ID and SLURM_STEP_ID

MASTER_ADDR and MASTER_PORT stay as they are if they are set. Nothing else here reads these variables of Slurm.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, MutableMapping

from ..io import InputError

FIRST_PORT, PORTS = 12_000, 20_000  # below the ports that Linux gives to outgoing connections
ONE_A_NODE = (
    "Start one task for each node, with torchrun in it (srun --ntasks-per-node=1 torchrun --nnodes=... -m "
    "mm_interleaved.cli train ...), or leave torchrun out: each task of srun is then a process"
)


class LaunchError(InputError):
    """Processes that were started in a way that cannot work."""


def count_processes(environment: Mapping[str, str] = os.environ) -> int:
    """How many processes torchrun, `accelerate launch` or srun started for this command."""
    return int(environment.get("WORLD_SIZE") or environment.get("SLURM_STEP_NUM_TASKS") or 1)


def join_processes(environment: MutableMapping[str, str] = os.environ) -> None:
    """Describe this process as torchrun does, if it is one of several tasks that `srun` started without torchrun.

    Args:
        environment: variables of this process; those in the docstring of this module are added.

    Raises:
        LaunchError: variables contradict each other, or each of several tasks would do the whole work.
    """
    tasks = int(environment.get("SLURM_STEP_NUM_TASKS") or 1)
    if tasks == 1:
        return
    if "TORCHELASTIC_RUN_ID" in environment:
        _check_torchrun(environment, tasks)
        return
    given = {
        "RANK": _need(environment, "SLURM_PROCID"),
        "WORLD_SIZE": str(tasks),
        "LOCAL_RANK": str(_local_rank(environment)),
        "LOCAL_WORLD_SIZE": str(_tasks_here(environment)),
    }
    for name, value in given.items():
        if environment.get(name, value) != value and name != "LOCAL_RANK":
            raise LaunchError(
                f"{name} is {environment[name]}, but srun started this process as task {given['RANK']} of {tasks}, "
                f"which makes it {value}",
                "the environment",
                f"Do not export {name}; it follows from Slurm's variables",
            )
        environment.setdefault(name, value)
    environment.setdefault("MASTER_ADDR", next(_hosts(_nodes(environment))))
    environment.setdefault("MASTER_PORT", str(_port(environment)))


def _check_torchrun(environment: Mapping[str, str], tasks: int) -> None:
    """Check that the torchruns in the tasks of `srun` are agents of one run."""
    agents = int(environment.get("GROUP_WORLD_SIZE") or 1)
    if agents != tasks:
        raise LaunchError(
            f"srun started {tasks} tasks, each with a torchrun of {agents} node{'s' * (agents > 1)}: {tasks // agents} "
            "runs would do the whole work in one folder", "", ONE_A_NODE,
        )  # fmt: skip


def _need(environment: Mapping[str, str], name: str) -> str:
    value = environment.get(name)
    if not value:
        raise LaunchError(
            f"srun started {environment['SLURM_STEP_NUM_TASKS']} tasks, but {name} is not set: each would do the whole "
            "work",
            "the environment",
            f"Let srun's variables reach the command, or start it with torchrun. {ONE_A_NODE}",
        )
    return value


def _nodes(environment: Mapping[str, str]) -> str:
    return environment.get("SLURM_STEP_NODELIST") or _need(environment, "SLURM_JOB_NODELIST")


def _port(environment: Mapping[str, str]) -> int:
    """A port for the steps of a job, which other jobs on the node hardly have."""
    job, step = int(_need(environment, "SLURM_JOB_ID")), int(environment.get("SLURM_STEP_ID") or 0)
    return FIRST_PORT + (job * 37 + step) % PORTS


def _tasks_here(environment: Mapping[str, str]) -> int:
    """How many tasks of the step run on this node."""
    counts = _tasks_per_node(_need(environment, "SLURM_STEP_TASKS_PER_NODE"))
    node = int(_need(environment, "SLURM_NODEID"))
    if node >= len(counts):
        raise LaunchError(f"SLURM_NODEID is {node}, and SLURM_STEP_TASKS_PER_NODE names {len(counts)} nodes",
                          "the environment", "Start the command with srun anew")  # fmt: skip
    return counts[node]


def _tasks_per_node(text: str) -> list[int]:
    """`2(x3),1` as [2, 2, 2, 1]."""
    counts = []
    for part in text.split(","):
        found = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if found is None:
            raise LaunchError(f"'{text}' does not say how many tasks each node has", "SLURM_STEP_TASKS_PER_NODE",
                              "It should be like 8(x2),4")  # fmt: skip
        counts += [int(found[1])] * int(found[2] or 1)
    return counts


def _local_rank(environment: Mapping[str, str]) -> int:
    """The number of this process's GPU among those that it sees; without GPUs, its number on the node.

    With `--gpus-per-task` a process sees its own GPU only, as the first one.
    """
    number = int(_need(environment, "SLURM_LOCALID"))
    visible = len([name for name in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()])
    if visible == 1:
        return 0
    if visible and _tasks_here(environment) > visible:
        raise LaunchError(
            f"{_tasks_here(environment)} tasks run on this node, and they see {visible} GPUs",
            "CUDA_VISIBLE_DEVICES",
            "Start one task for each GPU: --ntasks-per-node as --gpus-per-node",
        )
    return number


# ---- lists of nodes


def expand_nodes(text: str) -> list[str]:
    """The hosts of a node list of Slurm: `gpu[01-03,07],login2` is gpu01, gpu02, gpu03, gpu07, login2.

    Several brackets in a name give every combination, the last one changing first, as in `rack[1-2]node[1-2]`.

    Raises:
        LaunchError: it is not such a list.
    """
    return list(_hosts(text))


def _hosts(text: str) -> Iterator[str]:
    parts = re.findall(r"(?:[^,\[\]]|\[[^\[\]]*\])+", text)
    if not parts or ",".join(parts) != text:
        raise _no_list(text)
    for part in parts:
        yield from _combinations(re.findall(r"[^\[\]]+|\[[^\[\]]*\]", part), text)


def _combinations(pieces: list[str], text: str) -> Iterator[str]:
    if not pieces:
        yield ""
        return
    first, *others = pieces
    for begin in _numbers(first[1:-1], text) if first.startswith("[") else [first]:
        for rest in _combinations(others, text):
            yield begin + rest


def _numbers(text: str, whole: str) -> Iterator[str]:
    """The numbers of a bracket, with the leading zeros that they have there: `08-10` is 08, 09, 10."""
    for part in text.split(","):
        found = re.fullmatch(r"([0-9]+)(?:-([0-9]+))?", part)
        first, last = (found[1], found[2] or found[1]) if found else ("", "")
        if not found or int(last) < int(first):
            raise _no_list(whole)
        width = len(first)
        yield from (f"{number:0{width}d}" for number in range(int(first), int(last) + 1))


def _no_list(text: str) -> LaunchError:
    return LaunchError(f"'{text}' is no list of nodes", "", "It should be like gpu[01-03,07],login2")

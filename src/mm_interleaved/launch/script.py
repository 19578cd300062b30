"""Batch scripts for Slurm: what `mmi launch slurm` writes, for people to read and to change."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from .exits import STOPPED
from .slurm import LaunchError

COMMANDS = ("train", "finetune", "evaluate", "generate")
_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"
_TIME = r"\d+|\d+(:\d\d){1,2}|\d+-\d{1,2}(:\d\d){0,2}"  # minutes, minutes:seconds, hours:..., days-hours:...
_PLAIN = re.compile(r"[A-Za-z0-9%@:,./=+_-]+")

HEAD = """\
#!/bin/bash
# Written by: {written_by}
# Submit with: sbatch {file}
#
# {requeue_seconds} s before the time limit, Slurm sends USR1 to this script, which passes it on to all processes. They
# save a checkpoint and end with status {stopped}, and the script puts the job back into the queue. When the job starts
# again, the same command goes on from that checkpoint. If a process fails, Slurm ends the others, and the script starts
# all of them again from the last complete checkpoint, at most {restarts} times. After `scancel` nothing starts again.
"""

BODY = """\

restarts={restarts}    # after failures, each time the job runs
requeues={requeues}  # of the job

status=127
step=
interrupted=
stopping=
cancelled=
trap 'interrupted=1; stopping=1; kill -USR1 "$step"' USR1
trap 'interrupted=1; cancelled=1' TERM

for ((attempt = 0; attempt <= restarts; attempt++)); do
    echo "$(date -Is) start $attempt of run ${{SLURM_RESTART_COUNT:-0}}, on $SLURM_JOB_NODELIST"
    srun --kill-on-bad-exit=1 --output={logs} --open-mode=append \\
        {command} &
    step=$!
    interrupted=1
    while [ "$interrupted" ]; do  # a signal interrupts `wait`
        interrupted=
        wait "$step"
        code=$?
        [ "$code" -eq 127 ] || status=$code
    done
    echo "$(date -Is) ended with status $status"
    if [ "$status" -eq 0 ] || [ "$status" -eq 2 ] || [ "$cancelled" ]; then  # 2: wrong arguments
        exit "$status"
    fi
    if [ "$status" -eq {stopped} ] || [ "$stopping" ]; then
        if [ "${{SLURM_RESTART_COUNT:-0}}" -ge "$requeues" ]; then
            echo "the job was requeued $requeues times; submit it again to go on"
            exit "$status"
        fi
        echo "putting the job back into the queue"
        scontrol requeue "$SLURM_JOB_ID" && sleep 60  # Slurm ends this script
        exit "$status"
    fi
done
echo "failed $((restarts + 1)) times; the reasons are in {logs_shown}"
exit "$status"
"""


@dataclass(frozen=True)
class SlurmJob:
    """A command of `mmi` as a job of Slurm, with a task for each process.

    Attributes:
        name: name of the job, and of its log files.
        command: the program and its arguments.
        folder: working folder of the job, an absolute path.
        nodes: number of nodes.
        gpus_per_node: GPUs of each node; 0: the job runs on CPUs.
        tasks_per_node: processes of each node; None: as many as GPUs, or one.
        cpus_per_task: CPU cores of each process; None: as the cluster has it.
        time: time limit as Slurm writes it; None: that of the partition.
        signal_before: seconds before the time limit at which processes are asked to save; 0: never.
        logs: folder of the log files, relative to `folder`.
        restarts: how often failed processes are started again while the job runs.
        requeues: how often the job goes back into the queue.
        options: further options of sbatch by name, such as {"partition": "gpu"}.
        environment: variables for the processes.
        written_by: the command line that made this job.
        file: file name of the script, for its first lines.
    """

    name: str
    command: Sequence[str]
    folder: str
    nodes: int = 1
    gpus_per_node: int = 8
    tasks_per_node: int | None = None
    cpus_per_task: int | None = None
    time: str | None = None
    signal_before: int = 300
    logs: str = "logs"
    restarts: int = 2
    requeues: int = 100
    options: Mapping[str, str] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    written_by: str = "mmi launch slurm"
    file: str = ""

    def __post_init__(self) -> None:
        if not re.fullmatch(_NAME, self.name):
            raise LaunchError(f"'{self.name}' cannot be the name of a job", "--job-name",
                              "Use letters, digits, dots, dashes and underscores")  # fmt: skip
        if self.time is not None and not re.fullmatch(_TIME, self.time):
            raise LaunchError(
                f"'{self.time}' is no time limit", "--time", "Write hours as 24:00:00 or days as 3-00:00:00"
            )
        limit = None if self.time is None else seconds_of(self.time)
        if limit is not None and limit < 2 * self.signal_before:
            raise LaunchError(
                f"with a time limit of {self.time} the signal would come {self.signal_before} s before it, when hardly "
                "anything is done", "--signal-before", "Name fewer seconds, or a longer --time",
            )  # fmt: skip
        if re.search(r"[%\\]", self.logs):
            raise LaunchError("Slurm gives % and \\ a meaning in names of log files", f"--logs '{self.logs}'",
                              "Name a folder without them")  # fmt: skip
        for name in self.environment:
            if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
                raise LaunchError(f"'{name}' is no name of a variable", "--env", "Write --env NAME=VALUE")

    def directives(self) -> dict[str, str | None]:
        """The options of sbatch in the order of the script; None: an option without a value."""
        tasks = self.tasks_per_node or max(self.gpus_per_node, 1)
        found: dict[str, str | None] = {
            "job-name": self.name,
            "chdir": self.folder,
            "nodes": str(self.nodes),
            "ntasks-per-node": str(tasks),
        }
        if self.gpus_per_node:
            found["gpus-per-node"] = str(self.gpus_per_node)
        if self.cpus_per_task is not None:
            found["cpus-per-task"] = str(self.cpus_per_task)
        if self.time is not None:
            found["time"] = self.time
        found["output"] = f"{self.logs}/%x-%j.txt"
        found["open-mode"] = "append"
        found["requeue"] = None
        if self.signal_before:
            found["signal"] = f"B:USR1@{self.signal_before}"
        return {**found, **self.options}

    def script(self) -> str:
        """The text of the script.

        Raises:
            LaunchError: the name or value of an option of sbatch cannot be written into a script.
        """
        head = HEAD.format(
            written_by=self.written_by.replace("\n", " "), file=shlex.quote(self.file), stopped=STOPPED,
            restarts=self.restarts, requeue_seconds=self.signal_before,
        )  # fmt: skip
        lines = [_directive(name, value) for name, value in self.directives().items()]
        exports = [f"export {name}={shlex.quote(value)}" for name, value in self.environment.items()]
        if self.cpus_per_task is not None:
            # srun takes over the value of --cpus-per-task through this variable only, from Slurm 22.05 on
            exports.append(f"export SRUN_CPUS_PER_TASK={self.cpus_per_task}")
        body = BODY.format(
            restarts=self.restarts, requeues=self.requeues, stopped=STOPPED, command=shlex.join(self.command),
            logs=shlex.quote(f"{self.logs}/%x-%j-rank%t.txt"),
            logs_shown=f"{self.logs}/$SLURM_JOB_NAME-$SLURM_JOB_ID-rank*.txt",
        )  # fmt: skip
        return "\n".join([head.rstrip("\n"), *lines, *([""] if exports else []), *exports, ""]) + body


def seconds_of(time: str) -> int:
    """The seconds of a time limit: minutes, minutes:seconds, hours:minutes:seconds, days-hours[:minutes[:seconds]]."""
    days, dash, rest = time.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if dash:
        hours, minutes, seconds = [*parts, 0, 0][:3]
    elif len(parts) == 3:
        hours, minutes, seconds = parts
    else:
        hours, (minutes, seconds) = 0, [*parts, 0][:2]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


def _directive(name: str, value: str | None) -> str:
    """A line with an option of sbatch."""
    if not re.fullmatch(_NAME, name):
        raise LaunchError(f"'{name}' is no option of sbatch", "--option", "Write --option NAME=VALUE, without dashes")
    if value is None:
        return f"#SBATCH --{name}"
    if not value.isprintable():
        raise LaunchError(f"the value of --{name} has a line break or another character that no script can hold",
                          repr(value), "Use another value")  # fmt: skip
    if not _PLAIN.fullmatch(value):
        value = '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    return f"#SBATCH --{name}={value}"

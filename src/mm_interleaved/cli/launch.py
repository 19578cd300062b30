"""`mmi launch`: writes and submits what starts a command on several machines."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from ..io import write_atomic
from ..launch.script import COMMANDS, SlurmJob
from .console import console, output
from .errors import UsageError

launch = typer.Typer(no_args_is_help=True, help="Start a command on several machines.")


@launch.callback()
def _launch() -> None:
    pass


@launch.command(no_args_is_help=True)
def slurm(
    context: typer.Context,
    config: Annotated[
        str,
        typer.Argument(metavar="CONFIG", help="YAML file of the run; a recipe for finetune, the input for generate."),
    ],
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE...", help="Settings for the command; its options follow after --, as in -- --device cpu."
        ),
    ] = None,
    *,
    command: Annotated[str, typer.Option(help=f"What runs: {', '.join(COMMANDS)}.")] = "train",
    nodes: Annotated[int, typer.Option(help="Number of nodes.", min=1)] = 1,
    gpus_per_node: Annotated[int, typer.Option(help="GPUs of each node; 0: the job runs on CPUs.", min=0)] = 8,
    tasks_per_node: Annotated[
        int | None, typer.Option(help="Processes of each node; by default one for each GPU.", min=1)
    ] = None,
    cpus_per_task: Annotated[int | None, typer.Option(help="CPU cores of each process.", min=1)] = None,
    partition: Annotated[str | None, typer.Option(help="Partition of the cluster.")] = None,
    account: Annotated[str | None, typer.Option(help="Account that is charged.")] = None,
    time: Annotated[str | None, typer.Option(help="Time limit: 24:00:00, 3-00:00:00.")] = None,
    job_name: Annotated[str | None, typer.Option(help="Name of the job; by default that of the file.")] = None,
    signal_before: Annotated[
        int, typer.Option(help="Seconds before the time limit at which the run saves; 0: never.", min=0, max=65535)
    ] = 300,
    restarts: Annotated[int, typer.Option(help="How often failed processes start again in the job.", min=0)] = 2,
    requeues: Annotated[int, typer.Option(help="How often the job goes back into the queue.", min=0)] = 100,
    logs: Annotated[str, typer.Option(help="Folder of the log files.")] = "logs",
    option: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="A further option of sbatch; may be repeated.")
    ] = None,
    env: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="A variable for the processes; may be repeated.")
    ] = None,
    script: Annotated[Path | None, typer.Option(help="File of the script; by default JOB_NAME.sbatch.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace another script of that name.")] = False,
    submit: Annotated[bool, typer.Option("--submit", help="Submit the script with sbatch.")] = False,
) -> None:
    """Write a batch script for Slurm that starts a command on all nodes, restarts and requeues it.

    The command and its settings are checked here, so that mistakes show before the job has waited in the queue.
    """
    given = [config, *(arguments or [])]
    _check(context, command, given)
    if command == "generate" and "--shared" not in given:
        given.append("--shared")  # so that it continues after it was requeued
    name = job_name or re.sub(r"[^A-Za-z0-9._-]+", "-", Path(config).stem).strip("-.") or "job"
    path = script or Path(f"{name}.sbatch")
    options = {"partition": partition, "account": account, **_pairs("--option", option)}
    job = SlurmJob(
        name=name, command=[sys.executable, "-m", "mm_interleaved.cli", command, *given], folder=os.getcwd(),
        nodes=nodes, gpus_per_node=gpus_per_node, tasks_per_node=tasks_per_node, cpus_per_task=cpus_per_task,
        time=time, signal_before=signal_before, logs=logs, restarts=restarts, requeues=requeues,
        options={key: value for key, value in options.items() if value is not None},
        environment=_pairs("--env", env), written_by=shlex.join(["mmi", *sys.argv[1:]]), file=str(path),
    )  # fmt: skip
    _write(path, job.script(), overwrite)
    Path(logs).mkdir(parents=True, exist_ok=True)  # Slurm makes no folder, and a job without one fails without a word
    output.print(str(path), highlight=False, soft_wrap=True, markup=False)
    if submit:
        output.print(f"job {_submit(path)}; its logs are in {logs}", highlight=False, soft_wrap=True, markup=False)
    else:
        console.print(f"submit it with: sbatch {shlex.quote(str(path))}", highlight=False, soft_wrap=True, markup=False)


def _pairs(option: str, given: list[str] | None) -> dict[str, str]:
    pairs = {}
    for text in given or []:
        name, sign, value = text.partition("=")
        if not sign:
            raise UsageError(f"{option} must have the form NAME=VALUE, not '{text}'")
        pairs[name] = value
    return pairs


# ---- checks of the command that the job runs


def _check(context: typer.Context, command: str, given: list[str]) -> None:
    """Check the command and its settings.

    Raises:
        UsageError, ConfigError: they cannot be used.
    """
    if command not in COMMANDS:
        raise UsageError(f"--command must be one of {', '.join(COMMANDS)}, not '{command}'")
    if "--overwrite" in given:
        raise UsageError("--overwrite would remove the results each time the job starts again; remove them yourself")
    root = context.find_root()
    target: Any = cast(Any, root.command).get_command(root, command)
    values = target.make_context(command, list(given), parent=root).params
    _CHECKS[command](values)


def _check_train(values: dict[str, Any]) -> None:
    from ..configuration import load_config
    from ..training.config import TrainConfig

    load_config(values["config"], TrainConfig, values["settings"] or [])


def _check_finetune(values: dict[str, Any]) -> None:
    from ..training.recipes import load_recipe

    folder = values["folder"]
    load_recipe(values["recipe"], values["model"], values["lora"], None if folder is None else str(folder),
                values["settings"] or [])  # fmt: skip


def _check_evaluate(values: dict[str, Any]) -> None:
    from ..configuration import load_config
    from ..evaluation import EvaluateConfig

    load_config(values["config"], EvaluateConfig, values["settings"] or [])


def _check_generate(values: dict[str, Any]) -> None:
    from ..batch.shared import SharedRun
    from .shared import check_shared

    check_shared(values["output_folder"], values["source"], overwrite=False)
    SharedRun(values["output_folder"], values["source"], {})  # raises for what is not JSON lines


_CHECKS = {"train": _check_train, "finetune": _check_finetune, "evaluate": _check_evaluate, "generate": _check_generate}


# ---- the file


def _write(path: Path, text: str, overwrite: bool) -> None:
    """Write a script. Another script of that name is replaced if that is wanted, which a terminal is asked.

    Raises:
        UsageError: another one exists and stays.
    """
    if path.exists() and path.read_text(errors="replace") != text and not overwrite:
        wanted = sys.stdin.isatty() and typer.confirm(f"'{path}' is another script; replace it?")
        if not wanted:
            raise UsageError(f"'{path}' is another script. Replace it with --overwrite, or name another --script")
    write_atomic(path, text)
    path.chmod(0o755)


def _submit(path: Path) -> str:
    """Submit a script; the number of the job.

    Raises:
        UsageError: sbatch is missing or refuses it.
    """
    try:
        done = subprocess.run(["sbatch", "--parsable", str(path)], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise UsageError(f"there is no sbatch here; copy '{path}' to a login node of the cluster") from None
    if done.returncode:
        raise UsageError(f"sbatch refused '{path}': {done.stderr.strip()}")
    return done.stdout.strip().partition(";")[0]

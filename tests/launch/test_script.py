"""The batch script of `mmi launch slurm`, run by bash with stand-ins for the programs of Slurm."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from mm_interleaved.cli import app
from mm_interleaved.launch.exits import STOPPED
from mm_interleaved.launch.script import SlurmJob, seconds_of
from mm_interleaved.launch.slurm import LaunchError

ROOT = Path(__file__).parents[2]
STAND_IN = """\
#!{python}
import json, os, signal, sys, time
from pathlib import Path
here = Path({folder!r})
name = Path(sys.argv[0]).name
count = len(list(here.glob(name + "-*.json")))
(here / f"{{name}}-{{count}}.json").write_text(json.dumps(sys.argv[1:]))
if name == "srun":
    plan = (here / "plan").read_text().split()[count]
    if plan == "wait":
        signal.signal(signal.SIGUSR1, lambda *_: os._exit({stopped}))
        signal.signal(signal.SIGTERM, lambda *_: os._exit(143))
        (here / "waiting").touch()
        time.sleep(30)
    os._exit(int(plan))
"""


def job(**changes: object) -> SlurmJob:
    values = {"name": "run", "command": ["python", "-m", "x"], "folder": "/", "gpus_per_node": 2, **changes}
    return SlurmJob(**values)


class Runner:
    """Runs a script in a folder of stand-ins; `plan` says how each call of srun ends."""

    def __init__(self, folder: Path, plan: str) -> None:
        self.folder = folder
        (folder / "plan").write_text(plan)
        for name in ("srun", "scontrol", "sleep"):
            (folder / name).write_text(STAND_IN.format(python=sys.executable, folder=str(folder), stopped=STOPPED))
            (folder / name).chmod(0o755)

    def start(self, script: SlurmJob, **environment: str) -> subprocess.Popen[str]:
        text = script.script()
        (self.folder / "run.sbatch").write_text(text)
        values = {**os.environ, "PATH": f"{self.folder}:/usr/bin:/bin", "SLURM_JOB_ID": "7", **environment}
        values["SLURM_JOB_NODELIST"] = "n[1-2]"
        return subprocess.Popen(["bash", self.folder / "run.sbatch"], env=values, text=True, stdout=subprocess.PIPE)

    def calls(self, name: str) -> list[list[str]]:
        paths = sorted(self.folder.glob(f"{name}-*.json"))
        return [json.loads(path.read_text()) for path in paths]

    def until_waiting(self) -> None:
        deadline = time.monotonic() + 20
        while not (self.folder / "waiting").exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)


REQUEUE = [["requeue", "7"]]


@pytest.mark.parametrize(
    ("plan", "starts", "requeued", "status"),
    [
        ("0", 1, [], 0),
        ("1 0", 2, [], 0),  # failed once
        ("137 1 9", 3, [], 9),  # failed each time
        ("2", 1, [], 2),  # wrong arguments do not become right
        (f"{STOPPED}", 1, REQUEUE, STOPPED),
        (f"1 {STOPPED}", 2, REQUEUE, STOPPED),
    ],
)
def test_how_a_run_ends_decides_what_follows(
    tmp_path: Path, plan: str, starts: int, requeued: list[list[str]], status: int
) -> None:
    runner = Runner(tmp_path, plan)
    process = runner.start(job(restarts=2))
    process.communicate(timeout=30)
    assert process.returncode == status
    assert len(runner.calls("srun")) == starts
    assert runner.calls("scontrol") == requeued


def test_the_signal_before_the_time_limit_reaches_the_run(tmp_path: Path) -> None:
    runner = Runner(tmp_path, "wait")
    process = runner.start(job())
    runner.until_waiting()
    process.send_signal(signal.SIGUSR1)
    said, _ = process.communicate(timeout=30)
    assert f"ended with status {STOPPED}" in said
    assert runner.calls("scontrol") == REQUEUE


def test_a_job_is_not_requeued_for_ever(tmp_path: Path) -> None:
    runner = Runner(tmp_path, f"{STOPPED}")
    process = runner.start(job(requeues=3), SLURM_RESTART_COUNT="3")
    said, _ = process.communicate(timeout=30)
    assert "requeued 3 times; submit it again" in said
    assert runner.calls("scontrol") == []


def test_a_cancelled_job_stays_cancelled(tmp_path: Path) -> None:
    """Slurm signals the script and the processes of srun."""
    runner = Runner(tmp_path, "wait 0")
    process = runner.start(job())
    runner.until_waiting()
    process.send_signal(signal.SIGTERM)
    child = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True).stdout.split()
    os.kill(int(child[0]), signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 143
    assert len(runner.calls("srun")) == 1
    assert runner.calls("scontrol") == []


ODD = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=12)


@settings(max_examples=12)
@given(st.lists(ODD, max_size=4), ODD)
def test_any_value_reaches_the_command_unchanged(tmp_path_factory: pytest.TempPathFactory, words, value: str) -> None:
    runner = Runner(tmp_path_factory.mktemp("run"), "0")
    process = runner.start(job(command=["mmi", *words], environment={"A": value}, written_by=f"mmi {value}"))
    process.communicate(timeout=30)
    (call,) = runner.calls("srun")
    assert call[call.index("mmi") + 1 :] == words
    assert process.returncode == 0


def test_the_options_of_sbatch() -> None:
    script = job(nodes=4, gpus_per_node=8, time="2-12:00:00", options={"partition": "a b", "comment": 'say "x\\y"'})
    directives = re.findall(r"^#SBATCH (.*)$", script.script(), re.MULTILINE)
    assert directives == [
        "--job-name=run", "--chdir=/", "--nodes=4", "--ntasks-per-node=8", "--gpus-per-node=8", "--time=2-12:00:00",
        "--output=logs/%x-%j.txt", "--open-mode=append", "--requeue", "--signal=B:USR1@300", '--partition="a b"',
        '--comment="say \\"x\\\\y\\""',
    ]  # fmt: skip
    cpu = job(gpus_per_node=0, tasks_per_node=2, cpus_per_task=3, signal_before=0).script()
    assert "gpus" not in cpu
    assert "--ntasks-per-node=2\n#SBATCH --cpus-per-task=3" in cpu
    assert "--signal" not in cpu


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"name": "a b"}, "'a b' cannot be the name of a job"),
        ({"time": "soon"}, "'soon' is no time limit"),
        ({"time": "5"}, "time limit of 5 the signal would come 300 s before it"),
        ({"logs": "a%j"}, "meaning in names of log files"),
        ({"environment": {"A B": "1"}}, "'A B' is no name of a variable"),
        ({"options": {"a b": "1"}}, "'a b' is no option of sbatch"),
        ({"options": {"comment": "a\nb"}}, "has a line break"),
    ],
)
def test_what_cannot_be_written_is_refused(changes: dict[str, object], words: str) -> None:
    with pytest.raises(LaunchError, match=words):
        job(**changes).script()


def test_time_limits() -> None:
    for text, seconds in {"90": 5400, "1:30": 90, "2:00:00": 7200, "1-0": 86400, "2-03:04": 183840}.items():
        assert seconds_of(text) == seconds


# ---- the command


def launch(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["launch", "slurm", *map(str, arguments)])
    return result.exit_code, result.output + (f"{result.exception}" if result.exception else "")


@pytest.fixture
def _in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


DEBUG = ROOT / "configs/debug.yaml"


@pytest.mark.usefixtures("_in_folder")
def test_a_script_is_written_and_never_replaced_unasked(tmp_path: Path) -> None:
    assert launch(DEBUG, "steps=7", "--partition", "gpu", "--option", "qos=low", "--", "--device", "cpu")[0] == 0
    script = tmp_path / "debug.sbatch"
    text = script.read_text()
    assert f"-m mm_interleaved.cli train {DEBUG} steps=7 --device cpu" in text
    assert f"#SBATCH --chdir={tmp_path}\n" in text
    assert "#SBATCH --partition=gpu\n#SBATCH --qos=low\n" in text
    assert (tmp_path / "logs").is_dir()
    status, said = launch(DEBUG, "steps=8")
    assert status
    assert "'debug.sbatch' is another script. Replace it with --overwrite" in said
    assert script.read_text() == text
    assert launch(DEBUG, "steps=8", "--overwrite")[0] == 0
    assert "steps=8" in script.read_text()


@pytest.mark.usefixtures("_in_folder")
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((DEBUG, "stepz=7"), "unknown key 'stepz'"),
        ((DEBUG, "--", "--devise", "cpu"), "No such option: --devise"),
        ((DEBUG, "--command", "serve"), "--command must be one of train, finetune, evaluate, generate, not 'serve'"),
        ((DEBUG, "--command", "evaluate"), "unknown key"),
        (("no-recipe", "--command", "finetune"), "no-recipe"),
        (("none.jsonl", "--command", "generate", "--", "--output", "out"), "'none.jsonl' is not a file"),
        ((DEBUG, "--command", "evaluate", "--", "--overwrite"), "--overwrite would remove the results"),
        ((DEBUG, "--option", "qos"), "--option must have the form NAME=VALUE"),
    ],
    ids=str,
)
def test_mistakes_show_before_the_job_waits(tmp_path: Path, arguments: tuple[object, ...], words: str) -> None:
    status, said = launch(*arguments)
    assert status
    assert words in re.sub(r"\s+", " ", said)
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("_in_folder")
def test_submitting_needs_sbatch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "there is no sbatch here" in launch(DEBUG, "--submit")[1]


# ---- the original's positional form


def slurm_run(folder: Path, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    values = {**os.environ, "PYTHON": sys.executable, "DRY_RUN": "1", **environment}
    given = ["sh", str(ROOT / "scripts/slurm_run.sh"), *map(str, arguments)]
    return subprocess.run(given, cwd=folder, env=values, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_the_positional_form_of_the_original(tmp_path: Path) -> None:
    done = slurm_run(
        tmp_path, 16, 8, "pretrain", "reserved", "gpu", "./train.py", DEBUG, "steps=9", OPTIONS="--time 60"
    )
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "pretrain.sbatch").read_text()
    directives = re.findall(r"^#SBATCH --(.*)$", text, re.MULTILINE)
    assert {"job-name=pretrain", "nodes=2", "ntasks-per-node=8", "gpus-per-node=8", "partition=gpu", "qos=reserved",
            "time=60"} <= set(directives)  # fmt: skip
    assert f"mm_interleaved.cli train {DEBUG} steps=9 &" in text


def test_mistakes_in_the_positional_form(tmp_path: Path) -> None:
    for arguments, words in (
        ([8], "usage: scripts/slurm_run.sh GPUS"),
        ([12, 8, "a", "-", "gpu", "train.py", DEBUG], "12 GPUS are no multiple of 8"),
        (["x", 8, "a", "-", "gpu", "train.py", DEBUG], "must be numbers, not 'x'"),
        ([8, 8, "a", "-", "gpu", "other.py", DEBUG], "no command stands for 'other.py'"),
    ):
        done = slurm_run(tmp_path, *arguments)
        assert done.returncode == 2
        assert words in done.stderr
    assert not list(tmp_path.iterdir())

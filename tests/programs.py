"""Programs in processes of their own that start at once: they are forked from a server that has imported the libraries.

Importing torch, transformers and diffusers takes five seconds of CPU time in every new interpreter. A program here has
its own process, environment, signals and exit status; only its interpreter is not new. Tests of how an interpreter
starts and ends (`python -m`, torchrun) use `subprocess`.
"""

from __future__ import annotations

import os
import runpy
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from multiprocessing import forkserver, get_context
from pathlib import Path

import torch
import transformers.trainer  # noqa: F401  imported for the programs

import mm_interleaved.bench
import mm_interleaved.cli
import mm_interleaved.evaluation.run
import mm_interleaved.training.run  # noqa: F401
from mm_interleaved.cli.console import console
from mm_interleaved.cli.console import output as output_console

ROOT = Path(__file__).parents[1]
CONTEXT = get_context("forkserver")
CONTEXT.set_forkserver_preload([__name__])


def start_server() -> None:
    """Start the server of this process; it imports the libraries in the meantime.

    There is one for a process, with the modules of the last `set_forkserver_preload` before its start.
    """
    CONTEXT.set_forkserver_preload([__name__])
    forkserver.ensure_running()


def _work(program: str, arguments: Sequence[str], environment: Mapping[str, str], output: Path, errors: Path) -> None:
    """In the new process: become the program."""
    os.chdir(ROOT)
    for path, descriptor in ((output, 1), (errors, 2)):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, descriptor)
        os.close(file)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.default_int_handler)
    os.environ.update(environment)
    console.width = output_console.width = 200  # they were made when the libraries were imported
    torch.set_num_threads(int(environment.get("OMP_NUM_THREADS", 1)))
    sys.argv = [program, *arguments]
    if program.endswith(".py"):
        sys.path.insert(0, str(Path(program).parent))
        runpy.run_path(program, run_name="__main__")
    else:
        runpy.run_module(program, run_name="__main__", alter_sys=True)


class Program:
    """A module (`package.module`) or a script (`file.py`) in a process of its own; used like `subprocess.Popen`.

    Args:
        program: what runs as `__main__`, in the project's folder.
        arguments: of its command line.
        environment: added to that of this process.
        merge: whether errors are written where the output is.
    """

    def __init__(
        self, program: str, *arguments: object, environment: Mapping[str, str] | None = None, merge: bool = False
    ) -> None:
        self.folder = tempfile.TemporaryDirectory(prefix="program-")
        self.output = Path(self.folder.name, "output.txt")
        self.errors = self.output if merge else Path(self.folder.name, "errors.txt")
        values = (program, [str(a) for a in arguments], environment or {}, self.output, self.errors)
        self.process = CONTEXT.Process(target=_work, args=values)
        self.process.start()

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    def poll(self) -> int | None:
        return self.process.exitcode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float = 120) -> tuple[str, str]:
        """Wait for the end; the output, and the errors unless they are merged."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.kill()
            self.process.join()
            raise TimeoutError(f"a program that should have ended after {timeout} s:\n{self.said()}")
        return self.output.read_text(), "" if self.errors == self.output else self.errors.read_text()

    def said(self) -> str:
        """Everything that it wrote so far."""
        return "".join(path.read_text() for path in {self.output, self.errors} if path.exists())


def start_together(processes: int, program: str, *arguments: object, **environment: str) -> list[Program]:
    """Start processes that work together, with the environment that torchrun gives them."""
    if processes == 1:
        return [Program(program, *arguments, environment=environment)]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    sizes = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, **sizes, **environment}
    return [
        Program(program, *arguments, environment={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(processes)
    ]


def run_together(processes: int, program: str, *arguments: object, **environment: str) -> tuple[bool, str]:
    """Run processes that work together: whether all ended well, and what they said. If one fails, the others end."""
    started = start_together(processes, program, *arguments, **environment)
    deadline = time.monotonic() + 300
    while any(p.poll() is None for p in started) and not any(p.poll() for p in started):
        assert time.monotonic() < deadline, "\n".join(p.said() for p in started)
        time.sleep(0.01)
    for program_ in started:
        program_.kill()
        program_.process.join()
    return all(p.returncode == 0 for p in started), "\n".join(p.said() for p in started)

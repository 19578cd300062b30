"""`mmi` in processes of its own, quickly: they come from a server that has imported everything once."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

from mm_interleaved.cli import main

from ..programs import CONTEXT


def work(arguments: list[str], ranks: dict[str, str], log: Path) -> None:
    """One process, as torchrun would start it."""
    os.environ.update(ranks)
    torch.set_num_threads(1)
    with log.open("w") as file, contextlib.redirect_stderr(file), contextlib.redirect_stdout(file):
        sys.exit(main([arguments[0], "--device", "cpu", *arguments[1:]]))


def start(config: Path, *changes: str, processes: int = 1, command: str = "evaluate") -> list[BaseProcess]:
    """Start processes that work together; what they say goes to files beside the configuration."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    started = []
    for rank in range(processes):
        ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
        together = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, **{k: str(v) for k, v in ranks.items()}}
        log = config.with_name(f"log-{processes}-{rank}.txt")
        arguments = ([command, str(config), *changes], together if processes > 1 else {}, log)
        started.append(CONTEXT.Process(target=work, args=arguments))
        started[-1].start()
    return started


def finish(config: Path, started: list[BaseProcess]) -> None:
    """Wait for processes, which must end well."""
    for rank, process in enumerate(started):
        process.join(120)
        log = config.with_name(f"log-{len(started)}-{rank}.txt")
        assert process.exitcode == 0, log.read_text()[-4000:]

"""Records of the last collective operations of NCCL, for operations that time out.

PyTorch's log then names the rank and the operation (`Watchdog caught collective operation timeout: WorkNCCL(SeqNum=...,
OpType=ALLREDUCE, ...)`), and every process writes its last operations to a file. `torchfrtrace FOLDER --prefix
nccl-trace-rank` compares the files and says which process did not take part in which operation.
"""

from __future__ import annotations

import os
from collections.abc import MutableMapping
from pathlib import Path

PREFIX = "nccl-trace-rank"


def trace_collectives(folder: Path, environment: MutableMapping[str, str] = os.environ) -> None:
    """Let NCCL's last operations be written into `folder` when one times out. Call it before the process group exists.

    Variables that are set stay as they are. Their names with FR are those of PyTorch 2.9 and later.
    """
    values = {
        "TORCH_FR_BUFFER_SIZE": "2000",  # operations of each process, a few hundred bytes each
        "TORCH_FR_DUMP_TEMP_FILE": str(folder.absolute() / PREFIX),
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
    }
    for name, value in values.items():
        environment.setdefault(name, value)

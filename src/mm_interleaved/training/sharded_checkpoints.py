"""Checkpoints of which every process writes and reads its own part, by `torch.distributed.checkpoint`.

    state/             a folder in the checkpoint
      .metadata        names, shapes and places of all tensors
      __R_0.distcp     what process R has written

Tensors have global names (`model.NAME`, `average.NAME`, `optimizer.STATE.NAME`) and shapes, so a state can be read by
another number of processes than wrote it, and with or without FSDP. Tensors that all processes have are written once.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from ..io import writing
from .checkpoints import describe_file
from .config import TrainingError
from .muon import Muon
from .sharding import reshard

STATE = "state"
_THREADS = 2  # that write the part of a process
log = logging.getLogger(__name__)


@dataclass
class TrainedState:
    """What a sharded checkpoint has of a run, besides its small files.

    Attributes:
        model: the model, sharded or not.
        optimizer: its optimizer; None: only weights.
        average: averaged weights by name.
        only_trained: whether frozen weights are left out, because the run gets them elsewhere (the base of an adapter).
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer | None = None
    average: Mapping[str, Tensor] = field(default_factory=dict)
    only_trained: bool = False

    def weights(self) -> dict[str, Tensor]:
        """Weights, buffers and averaged weights; the tensors themselves, not copies. Gathered weights are freed."""
        reshard(self.model)
        own = {n: p for n, p in self.model.named_parameters() if p.requires_grad or not self.only_trained}
        if not self.only_trained:
            saved = self.model.state_dict()
            own |= {name: buffer for name, buffer in self.model.named_buffers() if name in saved}
        found = {f"model.{name}": tensor.detach() for name, tensor in own.items()}
        return found | {f"average.{name}": tensor.detach() for name, tensor in self.average.items()}

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by their names in a checkpoint; the tensors themselves, not copies."""
        found = self.weights()
        if self.optimizer is not None:
            for name, parameter in self._optimized():
                values = self.optimizer.state.get(parameter, {})
                found |= {f"optimizer.{key}.{name}": value for key, value in values.items()}
        return found

    def load(self, folder: Path, group: dist.ProcessGroup | None = None) -> None:
        """Read everything from the folder of a checkpoint; every process calls this.

        Raises:
            ValueError: the checkpoint lacks weights, or they have other shapes.
        """
        reader = dcp.FileSystemReader(folder / STATE)
        with _explained(folder):
            known = reader.read_metadata()
            wanted = self.weights()
            states = self._empty_states(known)
            self._check(wanted, known, folder)
            wanted |= {name: value for values in states.values() for name, value in values.items()}
            alone = not (dist.is_available() and dist.is_initialized())
            dcp.load(wanted, storage_reader=reader, process_group=group, no_dist=alone)
        if self.optimizer is not None:
            self.optimizer.state.clear()
            for parameter, values in states.items():
                self.optimizer.state[parameter] = {name.split(".")[1]: value for name, value in values.items()}

    def _optimized(self) -> list[tuple[str, nn.Parameter]]:
        assert self.optimizer is not None
        own = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        known = {p for group in self.optimizer.param_groups for p in group["params"]}
        missing = [name for name, p in own if p not in known]
        if missing:
            raise TrainingError(f"the optimizer does not have {len(missing)} of {len(own)} trained parameters, first "
                                f"'{missing[0]}'; a checkpoint would lack their states")  # fmt: skip
        return own

    def _empty_states(self, known: Metadata) -> dict[nn.Parameter, dict[str, Tensor]]:
        """For each parameter, tensors for the states that the checkpoint has of it."""
        found: dict[nn.Parameter, dict[str, Tensor]] = {}
        if self.optimizer is None:
            return found
        on_device = {
            p for g in self.optimizer.param_groups if g.get("fused") or g.get("capturable") for p in g["params"]
        }
        saved: dict[str, list[str]] = {}
        for key in known.state_dict_metadata:
            if key.startswith("optimizer."):
                saved.setdefault(key.split(".", 2)[2], []).append(key)
        for name, parameter in self._optimized():
            values: dict[str, Tensor] = {}
            for key in saved.get(name, []):
                about = known.state_dict_metadata[key]
                assert isinstance(about, TensorStorageMetadata)
                if about.size == parameter.shape and about.size:
                    values[key] = torch.zeros_like(parameter, dtype=about.properties.dtype, requires_grad=False)
                else:  # a number, such as that of its steps
                    device = parameter.device if parameter in on_device else torch.device("cpu")
                    values[key] = torch.zeros(about.size, dtype=about.properties.dtype, device=device)
            if values:
                found[parameter] = values
        return found

    @staticmethod
    def _check(wanted: Mapping[str, Tensor], known: Metadata, folder: Path) -> None:
        for name, tensor in wanted.items():
            about = known.state_dict_metadata.get(name)
            if about is None:
                why = "; the run that wrote it kept no average (ema.decay)" if name.startswith("average.") else ""
                raise ValueError(f"'{folder}' has no '{name}'{why}")
            if isinstance(about, TensorStorageMetadata) and about.size != tensor.shape:
                raise ValueError(f"'{name}' in '{folder}' has the shape {tuple(about.size)}, and the model has "
                                 f"{tuple(tensor.shape)}")  # fmt: skip


def check_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """Refuse an optimizer whose state cannot be divided like its parameters.

    Raises:
        ValueError: it is none of PyTorch's own, nor Muon.
    """
    kind = type(getattr(optimizer, "optimizer", optimizer))  # accelerate wraps it
    if kind is not Muon and not kind.__module__.startswith("torch.optim."):
        raise ValueError(f"'sharded_checkpoints' and 'fsdp' divide the states of PyTorch's optimizers and Muon, not of "
                         f"{kind.__name__}; leave 'trainer.optim' out, or 'sharded_checkpoints'")  # fmt: skip


class _explained:
    """Raise errors of `torch.distributed.checkpoint`, which are no `Exception`, as errors of their cause."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if not isinstance(error, CheckpointException):
            return
        causes = {rank: failure[0] for rank, failure in error.failures.items()}
        rank, cause = next(iter(causes.items()))
        if isinstance(cause, OSError):
            raise cause
        raise TrainingError(f"process {rank}, checkpoint '{self.folder}': {cause or error}") from None


class StateWriter:
    """Writes the parts of a state that this process has, and their digests; every process has one.

    Args:
        device: device of the tensors.
        background: whether training goes on while files are written. Tensors are copied to the CPU beside the next
            forward and backward pass, and must not change before `wait_copied`.
    """

    def __init__(self, device: torch.device, background: bool) -> None:
        self.background = background
        shared = dist.is_available() and dist.is_initialized()
        # beside the group of the devices: its work neither waits for them nor mixes with the work of steps
        self.group = cast("dist.ProcessGroup", dist.new_group(backend="gloo")) if shared else None
        self._rank = dist.get_rank() if shared else 0
        self._stager: DefaultStager | None = None
        self._threads: ThreadPoolExecutor | None = None
        self._copied: Future[Any] | None = None
        self._written: Future[None] | None = None
        if background:
            accelerated = device.type == "cuda"
            self._stager = DefaultStager(StagingOptions(accelerated, False, True, accelerated))
            self._threads = ThreadPoolExecutor(1, "checkpoint")

    def write(
        self, tensors: dict[str, Tensor], folder: Path, target: Path, finish: Callable[[dict[str, Any]], object]
    ) -> None:
        """Write tensors, whose device has finished computing them, into an existing folder.

        Args:
            tensors: by name; the names are the same on all processes.
            folder: folder of the checkpoint, under its temporary name.
            target: its final name, for messages.
            finish: called on every process with the sizes and digests of the files of all, by their path in `folder`.

        Raises:
            OutputError: it cannot be written. In the background, `check` or `wait` raise it.
        """
        self.wait()
        if self._stager is None or self._threads is None:
            self._write(tensors, folder, target, finish)
            return
        copied = self._stager.stage(tensors)
        assert isinstance(copied, Future)  # as its options say
        self._copied = copied
        self._written = self._threads.submit(lambda: self._write(copied.result(), folder, target, finish))

    def _write(
        self, tensors: dict[str, Tensor], folder: Path, target: Path, finish: Callable[[dict[str, Any]], object]
    ) -> None:
        with writing(target):
            with _explained(target):
                dcp.save(
                    tensors,
                    storage_writer=dcp.FileSystemWriter(folder / STATE, thread_count=_THREADS),
                    process_group=self.group,
                    no_dist=self.group is None,
                )
            own = {f"{STATE}/{p.name}": describe_file(p) for p in (folder / STATE).glob(f"__{self._rank}_*")}
            parts = [own]
            if self.group is not None:
                parts = [None] * dist.get_world_size(self.group)
                dist.all_gather_object(parts, own, self.group)
            finish({name: about for part in parts for name, about in (part or {}).items()})

    def wait_copied(self) -> None:
        """Wait until the tensors are copied, so that they may change."""
        if self._copied is not None:
            self._copied.result()
            self._copied = None

    def check(self) -> None:
        """Raise the error of a finished writing in the background, if there was one."""
        if self._written is not None and self._written.done():
            self.wait()

    def wait(self) -> None:
        """Wait until everything is written, and raise the error if it failed."""
        self.wait_copied()
        written, self._written = self._written, None
        if written is None:
            return
        begin = time.perf_counter()
        was_done = written.done()
        written.result()
        if not was_done:
            seconds = time.perf_counter() - begin
            log.info("waited %.1f s for a checkpoint that was still being written", seconds)

    def close(self) -> None:
        """Wait for the last checkpoint, and end the threads."""
        try:
            self.wait()
        finally:
            if self._threads is not None:
                self._threads.shutdown()
            if self._stager is not None:
                self._stager.close()

    def agree(self, value: Any) -> Any:
        """The value of the first process, on every process."""
        if self.group is None:
            return value
        shared = [value]
        dist.broadcast_object_list(shared, 0, self.group)
        return shared[0]

    def barrier(self) -> None:
        """Wait for all processes, without waiting for their devices."""
        if self.group is not None:
            dist.barrier(self.group)


def is_sharded(checkpoint: Path) -> bool:
    """Whether a checkpoint has a sharded state."""
    return (checkpoint / STATE / ".metadata").is_file()

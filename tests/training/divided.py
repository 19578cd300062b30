"""Small weights that FSDP divides over processes: two updates of each optimizer, and a sharded checkpoint of them.

The arguments: `alone` (writes what a process with whole weights has), `write` or `read` (divided, and compared with
that), a folder, and perhaps `background`.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from mm_interleaved.training.checkpoints import write_manifest
from mm_interleaved.training.config import EMAConfig
from mm_interleaved.training.ema import EMA
from mm_interleaved.training.muon import Muon
from mm_interleaved.training.sharded_checkpoints import STATE, StateWriter, TrainedState


def trained(divided: bool) -> tuple[nn.Module, Muon, EMA]:
    """Weights of odd sizes, of which the first layer is frozen."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 5), nn.Linear(7, 5), nn.Conv2d(3, 7, 3))
    model[0].requires_grad_(False)
    if divided:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for layer in model:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    own = [p for p in model.parameters() if p.requires_grad]
    matrices = {"params": [p for p in own if p.ndim > 1], "momentum": 0.9, "scale": 0.2}
    optimizer = Muon([matrices, {"params": [p for p in own if p.ndim == 1]}], lr=0.1)
    return model, optimizer, EMA(model, EMAConfig(decay=0.5))


def step(model: nn.Module, optimizer: Muon, ema: EMA, number: int) -> None:
    """An update by a gradient that follows from the weights, and one of the average."""
    for p in model.parameters():
        if p.requires_grad:
            p.grad = torch.sin(p.detach() * (3 + number))
    optimizer.step()
    ema.update(number)


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def values(model: nn.Module, ema: EMA) -> dict[str, Tensor]:
    """Weights and averages."""
    found = {name: whole(p.detach()).clone() for name, p in model.named_parameters()}
    return found | {f"average.{name}": whole(p).clone() for name, p in ema.average.items()}


def main(command: str, folder: Path, background: bool) -> None:
    """Two updates, of which the checkpoint has the first."""
    shared = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if shared:
        dist.init_process_group("gloo")
    model, optimizer, ema = trained(divided=shared)
    checkpoint = folder / "checkpoint-2"
    writer = StateWriter(torch.device("cpu"), background)
    if command == "read":
        with torch.no_grad():
            for p in model.parameters():
                p.zero_()
        TrainedState(model, optimizer, ema.average).load(checkpoint, writer.group)
    else:
        step(model, optimizer, ema, 1)
    if command == "write":
        (checkpoint / STATE).mkdir(parents=True, exist_ok=True)
        writer.barrier()

        def finish(files: dict[str, object]) -> None:
            if dist.get_rank() == 0:
                write_manifest(checkpoint, files)

        writer.write(TrainedState(model, optimizer, ema.average).tensors(), checkpoint, checkpoint, finish)
        writer.wait_copied()
    step(model, optimizer, ema, 2)
    writer.close()
    found = values(model, ema)
    if command == "alone":
        torch.save(found, folder / "alone.pt")
    for name, expected in torch.load(folder / "alone.pt", weights_only=True).items():
        torch.testing.assert_close(found[name], expected, rtol=1e-5, atol=1e-6, msg=name)
    with ema.applied():
        for name, p in model.named_parameters():
            if p.requires_grad:
                assert torch.equal(whole(p), found[f"average.{name}"])
    assert all(torch.equal(whole(p), found[name]) for name, p in model.named_parameters())
    if shared:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), "background" in sys.argv[3:])

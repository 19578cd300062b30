"""A digest of a model's weights, which tells whether an adapter belongs to them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor, nn

from ..model.weights import stored
from .checkpoint import read_weights, weight_files


def weights_digest(source: Path | nn.Module) -> str:
    """SHA-256 of names, types, shapes and values of all weights of a checkpoint folder, or of a model in memory.

    Both are equal if the model has the types of the folder. Adapters of the model are left out.

    Raises:
        CheckpointError: the folder has no weights, or a file is damaged.
    """
    tensors = _of_model(source) if isinstance(source, nn.Module) else _of_folder(source)
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:  # hashing needs no interpreter lock
        lines = sorted(pool.map(lambda item: _line(*item), tensors))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _of_folder(folder: Path) -> Iterator[tuple[str, Tensor]]:
    files = weight_files(folder)
    for file in [f for f in files if f.name.startswith("model")] or files:  # not a moving average
        yield from read_weights(file).items()


def _of_model(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in model.state_dict().items():
        if ".lora_" not in name:
            yield name.replace(".base_layer.", "."), tensor


def _line(name: str, tensor: Tensor) -> str:
    digest = hashlib.sha256()
    for part in stored(tensor):
        digest.update(part.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return f"{name} {tensor.dtype} {list(tensor.shape)} {digest.hexdigest()}\n"

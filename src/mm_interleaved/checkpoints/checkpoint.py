"""Conversion of checkpoints: from the original release's format to ours and back.

Names, shapes and derivable tables are compared with the configuration first, from the headers of the files, and nothing
is written unless everything fits. Then tensors are converted one output shard at a time. The result is written to a
temporary folder, which gets the name of the target when it is complete.
"""

from __future__ import annotations

import pickle
import re
import struct
import zipfile
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F
from transformers.utils import GENERATION_CONFIG_NAME

from ..io import InputError, atomic_folder, read_json, write_json
from ..model.config import MMInterleavedConfig
from ..model.mm_interleaved import MMInterleavedModel
from .original import NameTable, derived_tensors

SHARD_BYTES = 800_000_000  # size of an output shard; writing one takes twice as much memory
NOT_WEIGHTS = ("training_args.bin", "optimizer.bin", "optimizer.pt", "scheduler.bin", "scheduler.pt", "scaler.pt")
# Exceptions of the readers of both formats for files that are truncated, damaged, or of another kind.
_UNREADABLE = (
    SafetensorError, RuntimeError, EOFError, OSError, LookupError, ValueError, TypeError, AttributeError, struct.error,
)  # fmt: skip
POSITION_TABLE = "visual_tokenizer.encoder.vision_model.embeddings.position_embedding.weight"
Progress = Callable[[str, int, int], None]  # (what, done, total)


class CheckpointError(InputError):
    """A checkpoint that cannot be used; the message says why and what to do."""


@dataclass
class Mismatch:
    """The differences between a checkpoint and its configuration."""

    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    misshaped: list[str] = field(default_factory=list)
    different: list[str] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected or self.misshaped or self.different)

    def __str__(self) -> str:
        groups = {
            "missing": self.missing,
            "unexpected": self.unexpected,
            "of another shape": self.misshaped,
            "unlike the table that follows from the configuration": self.different,
        }
        lines = []
        for name, keys in groups.items():
            if keys:
                shown = ", ".join(keys[:5]) + (f" and {len(keys) - 5} more" if len(keys) > 5 else "")
                lines.append(f"{len(keys)} {name}: {shown}")
        return "; ".join(lines)


# ---- reading


def weight_files(source: Path) -> list[Path]:
    """The files with weights in a folder (or the one file): `.safetensors` if there are any, else `.bin` and `.pt`.

    Raises:
        CheckpointError: there are none, or an index names a file that is not there.
    """
    if source.is_file():
        return [source]
    if not source.is_dir():
        raise CheckpointError(f"'{source}' does not exist")
    files = sorted(source.glob("*.safetensors"))
    if not files:
        files = sorted(f for p in ("*.bin", "*.pt") for f in source.glob(p) if f.name not in NOT_WEIGHTS)
    if not files:
        inner = sorted({f.parent for p in ("*/*.safetensors", "*/*.bin") for f in source.glob(p)})
        hint = f"; there are some in '{inner[0]}': name that folder" if inner else ""
        raise CheckpointError(f"'{source}' holds no .safetensors, .bin or .pt file{hint}")
    absent = sorted(_promised(source, files) - {f.name for f in files})
    if absent:
        raise CheckpointError(f"'{source}' lacks {', '.join(absent)}; fetch the whole checkpoint")
    return files


def _promised(source: Path, files: list[Path]) -> set[str]:
    """Names of files that must exist: those that an index lists, and all N files of a "00001-of-0000N"."""
    kinds = {f.suffix for f in files}
    names: set[str] = set()
    for index in source.glob("*.index.json"):
        try:
            names |= set(read_json(index)["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError):
            raise CheckpointError(f"'{index}' is not an index of weights") from None
    for file in files:
        if match := re.search(r"-(\d{5})-of-(\d{5})(?=\.)", file.name):
            head, tail, count = file.name[: match.start()], file.name[match.end() :], match[2]
            names |= {f"{head}-{n:05d}-of-{count}{tail}" for n in range(1, int(count) + 1)}
    return {name for name in names if Path(name).suffix in kinds}


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, memory-mapped where the format allows. A pickle may hold tensors only.

    Raises:
        CheckpointError: the file is damaged, or holds more than tensors.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        reason = str(error).split("\n")[0]
        raise CheckpointError(f"'{path}' is refused, because it holds more than tensors: {reason}") from None
    except _UNREADABLE as error:
        reason = str(error).split("\n")[0] or type(error).__name__
        raise CheckpointError(f"'{path}' is damaged or no checkpoint: {reason}") from None
    tensors = loaded.get("state_dict", loaded) if isinstance(loaded, dict) else None
    if not isinstance(tensors, dict) or not all(isinstance(t, Tensor) for t in tensors.values()):
        raise CheckpointError(f"'{path}' is not a dictionary of tensors")
    return tensors


def check_folder(source: Path) -> None:
    """Check the files of a model's folder that libraries read without useful errors, before they read them.

    Raises:
        ValueError: there are no weights, or a file is missing, damaged or cut short; names it.
    """
    if (generation := source / GENERATION_CONFIG_NAME).is_file():
        read_json(generation, dict)  # transformers would silently take defaults instead
    for path in weight_files(source):
        if path.suffix == ".safetensors":
            try:
                with safe_open(path, "pt"):
                    pass
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"'{path}' is damaged or cut short: {error}; fetch or convert the checkpoint "
                                      "again") from None  # fmt: skip


def check_tokenizer(source: Path) -> None:
    """Check that a folder has the files of a tokenizer.

    Raises:
        CheckpointError: it lacks one; names it.
    """
    names = ("tokenizer.model", "tokenizer.json", "vocab.json")
    lacks = [name for name in ("tokenizer_config.json",) if not (source / name).is_file()]
    if not any((source / name).is_file() for name in names):
        lacks.append("a vocabulary (tokenizer.model, tokenizer.json or vocab.json)")
    if lacks:
        raise CheckpointError(f"'{source}' lacks {' and '.join(lacks)}; fetch or convert the whole checkpoint")


# ---- writing


class ShardWriter:
    """Collects tensors in the order of a plan and writes them shard by shard.

    Args:
        folder: where the shards go.
        sizes: bytes of every tensor, in the order of the calls of `add`.
        stem, suffix: names of the shards, as the libraries expect them.
        save: writes one shard.
    """

    def __init__(
        self,
        folder: Path,
        sizes: dict[str, int],
        stem: str,
        suffix: str,
        save: Callable[[dict[str, Tensor], Path], None],
    ) -> None:
        self.folder, self.save, self.index = folder, save, f"{stem}{suffix}.index.json"
        blank = {name: torch.empty(size, dtype=torch.uint8, device="meta") for name, size in sizes.items()}
        self.plan = split_torch_state_dict_into_shards(
            blank, filename_pattern=f"{stem}{{suffix}}{suffix}", max_shard_size=SHARD_BYTES
        )
        self.held: dict[str, dict[str, Tensor]] = defaultdict(dict)

    def add(self, name: str, tensor: Tensor) -> None:
        """Take the next tensor of the plan; a shard is written with its last one."""
        file = self.plan.tensor_to_filename[name]
        self.held[file][name] = tensor
        if len(self.held[file]) == len(self.plan.filename_to_tensors[file]):
            self.save(self.held.pop(file), self.folder / file)

    def finish(self) -> None:
        """Write the index, if there are several shards."""
        assert not self.held
        if self.plan.is_sharded:
            index = {"metadata": self.plan.metadata, "weight_map": self.plan.tensor_to_filename}
            path = self.folder / self.index
            write_json(path, index)


def _save_safetensors(tensors: dict[str, Tensor], path: Path) -> None:
    save_file({k: v.contiguous() for k, v in tensors.items()}, path, metadata={"format": "pt"})


def _save_pickle(tensors: dict[str, Tensor], path: Path) -> None:
    torch.save({k: v.clone() for k, v in tensors.items()}, path)


# ---- the original's checkpoint, ours, and back


def expected_parameters(config: MMInterleavedConfig) -> dict[str, torch.Size]:
    """Names and shapes of all parameters, without allocating them."""
    with torch.device("meta"):
        model = MMInterleavedModel(config)
    return {name: p.shape for name, p in model.named_parameters()}


def upscale(config: MMInterleavedConfig, factor: float) -> MMInterleavedConfig:
    """The configuration for images `factor` times as large (the original's `image_upscale`).

    The patch grid grows to int(factor * grid), and every map with it. Offsets keep their unit, a fraction of the image.
    """
    tree = config.to_dict()
    grid = int(config.grid_size * factor)
    tree["vision_config"]["image_size"] = grid * config.vision_config.patch_size
    scaled = [4 * grid, 2 * grid, grid, grid // 2]
    level = dict(zip(config.pyramid_sides, scaled, strict=True))
    tree["mmfs"]["base_size"] = config.mmfs.base_size or config.grid_size
    tree["mmfs"]["levels"] = [level[side] for side in config.mmfs.levels]
    tree["image_decoder"]["mmfs"]["levels"] = scaled
    return MMInterleavedConfig(**tree)


def resize_positions(table: Tensor, grid: int) -> Tensor:
    """CLIP's position table [1 + n * n, width] for a patch grid of another side, bicubically; the class row is kept."""
    side = int((len(table) - 1) ** 0.5)
    cells = table[1:].float().T.reshape(1, -1, side, side)
    cells = F.interpolate(cells, size=(grid, grid), mode="bicubic", align_corners=False).flatten(2)[0].T
    return torch.cat([table[:1], cells.to(table.dtype)])


def _check_original(
    files: list[Path], config: MMInterleavedConfig, expected: dict[str, torch.Size]
) -> tuple[Mismatch, dict[str, Tensor]]:
    """The differences between files and configuration, and their parameters on the meta device under our names."""
    names, derived, found = NameTable(config), derived_tensors(config), {}
    mismatch = Mismatch()
    for path in files:
        for name, tensor in read_weights(path).items():
            if name in derived:
                table = derived[name]()
                tolerance = 4 * torch.finfo(tensor.dtype).eps if tensor.is_floating_point() else 0
                if table.shape != tensor.shape:
                    mismatch.misshaped.append(_shapes(name, tensor.shape, table.shape))
                elif (table.double() - tensor.double()).abs().max() > tolerance:
                    mismatch.different.append(name)
                continue
            ours = names.ours(name)
            if ours not in expected or ours in found:
                mismatch.unexpected.append(name + (" (twice)" if ours in found else ""))
                continue
            if tensor.shape != expected[ours]:
                mismatch.misshaped.append(_shapes(name, tensor.shape, expected[ours]))
            found[ours] = torch.empty_like(tensor, device="meta")
    mismatch.missing = [_original_name(names, name) for name in expected if name not in found]
    return mismatch, found


def _original_name(names: NameTable, name: str) -> str:
    """The original's name of our parameter `name`; every parameter of a checkpoint has one."""
    original = names.theirs(name)
    assert original is not None, name
    return original


def _shapes(name: str, found: torch.Size, wanted: torch.Size) -> str:
    return f"{name} {list(found)} instead of {list(wanted)}"


def convert_from_original(
    source: Path,
    target: Path,
    config: MMInterleavedConfig,
    dtype: torch.dtype | None = None,
    image_upscale: float | None = None,
    progress: Progress = lambda what, done, total: None,
    finish: Callable[[Path, MMInterleavedConfig], None] = lambda folder, config: None,
) -> MMInterleavedConfig:
    """Write the original's checkpoint as ours.

    Args:
        source: its folder, or one file.
        target: the folder to write.
        config: configuration of the checkpoint's model.
        dtype: type of the weights; None: unchanged. The VAE's weights do not change: it always computes in float32.
        image_upscale: see `upscale`.
        progress: called during the conversion.
        finish: adds further files to the folder before it is renamed.

    Returns:
        The configuration of the written checkpoint.

    Raises:
        CheckpointError: a key is missing, unexpected or of another shape, or the source is one of ours; nothing is
            written then.
    """
    if (source / "config.json").is_file():
        kind = read_json(source / "config.json", dict).get("model_type")
        if kind == MMInterleavedConfig.model_type:
            raise CheckpointError(f"'{source}' is a checkpoint of this package already; --to-original converts back")
    expected = expected_parameters(config)
    files = weight_files(source)
    progress("checking", 0, len(files))
    mismatch, found = _check_original(files, config, expected)
    if mismatch:
        raise CheckpointError(f"'{source}' does not fit the configuration. {mismatch}. Nothing was written")
    names, ours = NameTable(config), config
    if image_upscale is not None:
        ours = upscale(config, image_upscale)
    table = names.ours(POSITION_TABLE)
    sizes = {n: expected[n].numel() * _kind(n, t, dtype).itemsize for n, t in found.items()}
    with atomic_folder(target) as folder:
        writer = ShardWriter(folder, sizes, "model", ".safetensors", _save_safetensors)
        for number, path in enumerate(files):
            progress("converting", number, len(files))
            for name, tensor in read_weights(path).items():
                mine = names.ours(name)
                if mine == table and ours is not config:
                    tensor = resize_positions(tensor, ours.grid_size)
                if mine in expected:
                    writer.add(mine, tensor.to(_kind(mine, tensor, dtype)))
        writer.finish()
        ours.architectures = ["MMInterleaved"]
        ours.dtype = dtype or next(iter(found.values())).dtype
        ours.save_pretrained(folder)
        finish(folder, ours)
    progress("converting", len(files), len(files))
    return ours


def convert_to_original(
    source: Path,
    target: Path,
    dtype: torch.dtype | None = None,
    progress: Progress = lambda what, done, total: None,
) -> None:
    """Write one of our checkpoints as the original's: `pytorch_model*.bin` with its names and its derivable tables.

    Raises:
        CheckpointError: the source is not one of ours, or incomplete.
    """
    if not (source / "config.json").is_file():
        raise CheckpointError(f"'{source}' has no config.json; it is not a checkpoint of this project")
    config = MMInterleavedConfig.from_pretrained(source)
    expected, names, derived = expected_parameters(config), NameTable(config), derived_tensors(config)
    files = weight_files(source)
    shapes: dict[str, Tensor] = {}
    for path in files:
        shapes |= {name: torch.empty_like(t, device="meta") for name, t in read_weights(path).items()}
    mismatch = Mismatch(
        missing=[n for n in expected if n not in shapes],
        unexpected=[n for n in shapes if n not in expected],
        misshaped=[
            _shapes(n, t.shape, expected[n]) for n, t in shapes.items() if n in expected and t.shape != expected[n]
        ],
    )
    if mismatch:
        raise CheckpointError(f"'{source}' does not fit its configuration. {mismatch}. Nothing was written")
    kind = dtype or next(iter(shapes.values())).dtype
    tables = {name: compute() for name, compute in derived.items()}
    sizes = {_original_name(names, n): t.numel() * _kind(n, t, dtype).itemsize for n, t in shapes.items()}
    sizes |= {name: t.numel() * _kind(name, t, kind).itemsize for name, t in tables.items()}
    with atomic_folder(target) as folder:
        writer = ShardWriter(folder, sizes, "pytorch_model", ".bin", _save_pickle)
        for number, path in enumerate(files):
            progress("converting", number, len(files))
            for name, tensor in read_weights(path).items():
                writer.add(_original_name(names, name), tensor.to(_kind(name, tensor, dtype)))
        for name, table in tables.items():
            writer.add(name, table.to(_kind(name, table, kind)))
        writer.finish()
    progress("converting", len(files), len(files))


def _kind(name: str, tensor: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    """The type in which a tensor, by our name, is written; tensors of the VAE keep theirs."""
    kept = not tensor.is_floating_point() or name.startswith("image_decoder.vae.")
    return tensor.dtype if dtype is None or kept else dtype

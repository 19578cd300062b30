"""Small real files of every type of source, and the words by which tests recognise documents."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from mm_interleaved.data import DataConfig, DocumentLoader, SourceConfig, build_loader
from mm_interleaved.processor import Batch, MMInterleavedProcessor

ROW = 24  # tokens of a row in most tests; an image of the debug model takes 5


def png(value: int = 0, size: tuple[int, int] = (8, 8)) -> bytes:
    """An image of one colour; its red and green values are the number `value`."""
    buffer = io.BytesIO()
    PIL.Image.new("RGB", size, (value % 256, value // 256, 128)).save(buffer, "PNG")
    return buffer.getvalue()


def number_of(pixels: np.ndarray) -> int:
    """The number that `png` was given, from uint8 [3, size, size]."""
    red, green = pixels[:2, 0, 0]
    return int(red) + 256 * int(green)


def write_images(folder: Path, count: int) -> list[str]:
    """Images `0.png`, `1.png`, ...; their names."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        (folder / f"{number}.png").write_bytes(png(number))
    return [f"{number}.png" for number in range(count)]


def write_lines(path: Path, records: Iterable[Any]) -> Path:
    """JSON lines, plain or by suffix in gzip or zip. Strings and bytes are written as they are."""
    lines = [r if isinstance(r, bytes) else (r if isinstance(r, str) else json.dumps(r)).encode() for r in records]
    data = b"".join(line + b"\n" for line in lines)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(data))
    elif path.suffix == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(path.name.removesuffix(".zip"), data)
    else:
        path.write_bytes(data)
    return path


def write_pairs(folder: Path, count: int, shards: int = 1, words: int = 1) -> list[str]:
    """Shards of `count` pairs in all, captioned by their numbers; the shards' names."""
    names = write_images(folder / "images", count)
    records = [{"image": f"images/{n}", "caption": " ".join([f"item {i}"] * words)} for i, n in enumerate(names)]
    for shard in range(shards):
        write_lines(folder / f"{shard}.jsonl", records[shard::shards])
    return [f"{shard}.jsonl" for shard in range(shards)]


def write_members(path: Path, files: list[tuple[str, bytes]]) -> None:
    """A tar archive, in which names may stand more than once."""
    with tarfile.open(path, "w") as archive:
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def write_tar(path: Path, files: dict[str, bytes]) -> None:
    """A tar archive."""
    write_members(path, [*files.items()])


def mmc4(sentences: Sequence[str], images: Sequence[tuple[str, int, float]], **more: Any) -> dict[str, Any]:
    """A record of MMC4; images are (name, sentence, similarity)."""
    infos = [{"image_name": n, "matched_text_index": i, "matched_sim": s} for n, i, s in images]
    return {"text_list": list(sentences), "image_info": infos, "similarity_matrix": [[]] * len(infos), **more}


def pairs_source(folder: Path, shards: list[str], **options: Any) -> SourceConfig:
    """Pairs as they stand, all of them, in short rows."""
    defaults = {"type": "pairs", "root": str(folder), "batch_size": 1, "max_length": ROW, "keep_remainder": True}
    return SourceConfig(**{**defaults, "shards": shards, **options})


def loader(
    processor: MMInterleavedProcessor, *sources: SourceConfig, rank: int = 0, world_size: int = 1, **options: Any
) -> DocumentLoader:
    """A loader of these sources."""
    config = DataConfig(sources=list(sources), **{"pin_memory": False, **options})
    return build_loader(config, processor, rank=rank, world_size=world_size)


def numbers(batches: Iterable[Batch]) -> list[int]:
    """The images of some batches by their numbers."""
    return [number_of(p) for batch in batches for p in batch.pixel_values.numpy()]


def texts(processor: MMInterleavedProcessor, batch: Batch) -> list[str]:
    """Rows of a batch as text: `<s>`, `</s>` and `[]` for an image."""
    rows = []
    for ids, mask in zip(batch.input_ids.tolist(), batch.attention_mask.tolist(), strict=True):
        tokens = processor.tokenizer.convert_ids_to_tokens([i for i, m in zip(ids, mask, strict=True) if m])
        text = "".join(tokens).replace("<|beginofimage|>", "[]").replace("<|image|>", "").replace("▁", " ")
        rows.append(text.replace("[] ", "[]").replace("<s> ", "<s>"))
    return rows

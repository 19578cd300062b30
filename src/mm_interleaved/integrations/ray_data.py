"""Batch generation as a Ray Data pipeline: an actor for each GPU or group of CPUs, each with a model of its own.

    generate_with_ray("documents.jsonl", "out", model="models/release", concurrency=8, num_gpus=1)

The rows of the data set are the shards of `mm_interleaved.batch.shared`. So the folder is that of `mmi generate
--shared`: a task that Ray repeats, or a job that starts again, continues what is there, and each document is in
`results.jsonl` exactly once. All nodes must share the storage of input and output. Needs the extra `ray`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # read when Ray starts

import numpy as np
import ray  # pyright: ignore[reportMissingImports] -- an optional extra
import ray.data  # pyright: ignore[reportMissingImports] -- an optional extra

from ..batch.records import describe_run
from ..batch.shared import SharedRun
from ..generation import InterleavedGenerator
from ..generation.settings import TEXT_PRESETS, GenerationSettings, override
from ..io import InputError, UserError
from ..pretrained import load


class ShardWorker:
    """An actor: loads a model once and finishes shards.

    Args:
        source: the file of documents.
        folder: the output folder.
        model: name or folder of the model.
        settings: changes of the settings of generation, by name.
        options: shard_size, batch_size and image_root of `SharedRun`.
        device: device of the model; None: a GPU if Ray gave one, else the CPU.
    """

    def __init__(
        self, source: str, folder: str, model: str, settings: Mapping[str, Any], options: Mapping[str, Any],
        device: str | None = None,
    ) -> None:  # fmt: skip
        found = device or ("cuda" if ray.get_gpu_ids() else "cpu")
        loaded = load(model, device=found)
        chosen = override(GenerationSettings(TEXT_PRESETS["interleaved"]), **settings)
        self.generator = InterleavedGenerator(loaded.model, loaded.processor, chosen)
        about = describe_run(loaded, self.generator.settings)
        self.run = SharedRun(Path(folder), Path(source), about, **options)
        self.run.begin()

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[int]]:
        """Finish the shards of a batch; rows are (shard, number of documents generated here)."""
        shards = [int(shard) for shard in batch["shard"]]
        return {"shard": shards, "generated": [self.run.work(self.generator, [shard]) for shard in shards]}


def generate_with_ray(
    source: str | Path, output: str | Path, *, model: str = "small", concurrency: int = 1, num_cpus: float = 1.0,
    num_gpus: float = 0.0, shard_size: int = 64, batch_size: int = 1, image_root: str | Path | None = None,
    device: str | None = None, settings: Mapping[str, Any] | None = None,
) -> Path:  # fmt: skip
    """Generate for a JSON-lines file of documents with Ray.

    Args:
        source: the file; all nodes must see it at this path.
        output: the folder of the results; all nodes must see it.
        model: a model of the package, or the folder of a checkpoint.
        concurrency: number of actors.
        num_cpus, num_gpus: what each of them has.
        shard_size: documents of a task.
        batch_size: documents that are generated together.
        image_root: the folder that images may come from; None: that of the file.
        device: device of the models; None: a GPU if an actor has one, else the CPU.
        settings: changes of `mmi generate`'s default settings, by name, such as {"num_inference_steps": 20}.

    Returns:
        The path of `results.jsonl`. A document that cannot be used has a record with an `error`.

    Raises:
        InputError: the file or a setting cannot be used, or the folder is of another run.
        ray.exceptions.RayError: an actor failed otherwise; the same call continues.
    """
    source, output = Path(source).absolute(), Path(output).absolute()
    options = {"shard_size": shard_size, "batch_size": batch_size,
               "image_root": None if image_root is None else Path(image_root).absolute()}  # fmt: skip
    changes = dict(settings or {})
    try:
        override(GenerationSettings(TEXT_PRESETS["interleaved"]), **changes)
    except ValueError as error:
        raise InputError(str(error), "settings") from None
    run = SharedRun(output, source, {}, **options)
    if not ray.is_initialized():
        ray.init(include_dashboard=False)
    shards = ray.data.from_items([{"shard": number} for number in run.shards], override_num_blocks=len(run.shards))
    work = shards.map_batches(
        ShardWorker, batch_size=1, concurrency=concurrency, num_cpus=num_cpus, num_gpus=num_gpus or None,
        fn_constructor_args=(str(source), str(output), model, changes, options, device),
    )  # fmt: skip
    work.materialize()
    path = run.merge()
    if path is None:
        raise UserError("Ray ended, but not all shards are finished", str(output), "Repeat the call; it continues")
    return path

"""How fast fine-tuning is and how much memory it takes, with random weights, beside the estimate of `training.memory`.

python benchmarks/finetuning.py run lora-vqa lora-story --output found.json
torchrun --nproc-per-node=2 benchmarks/finetuning.py run fsdp-vqa --output found2.json
python benchmarks/finetuning.py estimate found.json found2.json --output benchmarks/results/finetuning.json

Rows hold whole samples, which attend to themselves only: questions about an image with short answers, or stories of
five images that are all to be drawn. A step is forward, backward, clipping and AdamW, under autocast with
checkpointing. The estimates need no GPU, so they are made afterwards. With `--preset debug --device cpu` everything
takes seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from mm_interleaved import MMInterleaved
from mm_interleaved.bench.base import fresh
from mm_interleaved.bench.machine import describe
from mm_interleaved.configuration import make_config
from mm_interleaved.document import Document, Image, Segment, Text
from mm_interleaved.model import MMInterleavedConfig
from mm_interleaved.model.cost import Cost, Part, count_parts, measure
from mm_interleaved.processor import Batch, MMInterleavedProcessor
from mm_interleaved.training.adapters import attach_adapter
from mm_interleaved.training.building import freeze_parts, frozen_layers, set_types
from mm_interleaved.training.checkpointing import enable_checkpointing
from mm_interleaved.training.config import TrainConfig
from mm_interleaved.training.flops import peak_flops
from mm_interleaved.training.memory import GIB, BatchSizes, estimate
from mm_interleaved.training.optimizer import build_optimizer
from mm_interleaved.training.pipeline import prepare_documents
from mm_interleaved.training.sharding import BLOCKS

VAE = r"image_decoder\.vae\."  # frozen in every run


@dataclass(frozen=True)
class Case:
    """What is trained on which rows.

    Attributes:
        rows: rows of a batch of one process.
        story: whether they hold stories and not questions.
        settings: settings of the run that differ from `config_of`.
        all_weights: whether also the language model and the image encoder are trained.
    """

    rows: int
    story: bool
    settings: dict[str, Any]
    all_weights: bool = False


LORA = {"model": {"init_from": {"checkpoint": "base"}}, "adapter": {"preset": "both", "rank": 16}}
FSDP = {"fsdp": {"fsdp_version": 2}}
CASES = {
    "lora-vqa": Case(4, False, LORA | {"adapter": {"preset": "llm", "rank": 16}}),
    "lora-story": Case(4, True, LORA),
    "frozen-llm-vqa": Case(4, False, {"freeze": ["image_decoder"]}),  # MMFS and the visual tokenizer
    "frozen-llm-story": Case(4, True, {}),  # what the release trains
    "fsdp-vqa": Case(4, False, FSDP | {"freeze": ["image_decoder"]}, all_weights=True),
    "fsdp-story": Case(1, True, FSDP | {"losses": {"image": 10.0, "image_fraction": 0.25}}, all_weights=True),
}


def config_of(case: Case) -> TrainConfig:
    """The settings of a run of that case."""
    source = {"type": "documents", "shards": ["none"], "batch_size": case.rows}
    shared = {
        "output": "none", "steps": 1, "model": {"init_from": {"preset": "release"}}, "data": {"sources": [source]},
        "gradient_checkpointing": True, "losses": {"image": 10.0 if case.story else 0.0},
    }  # fmt: skip
    return make_config(shared | case.settings, TrainConfig)


def model_config_of(preset: str, case: Case) -> MMInterleavedConfig:
    """The model of that size, as `bench.base.fresh` makes it, with the frozen parts of the case."""
    config = MMInterleavedConfig.preset(preset)
    if case.all_weights:
        config.frozen = [VAE]
    return config


# ---- rows


def documents(case: Case, processor: MMInterleavedProcessor, length: int) -> list[Document]:
    """As many samples as fill the rows of the case."""
    side = processor.image_size
    noise = np.random.default_rng(0)

    def image(supervise: bool) -> Image:
        pixels = noise.integers(0, 256, (side, side, 3), dtype=np.uint8)
        return Image(PIL.Image.fromarray(pixels), supervise=supervise)

    def make() -> Document:
        if case.story:
            segments: list[Segment] = []
            for number in range(5):
                segments += [Text(f"{number} " + "a small red hat and a ball " * 5), image(supervise=True)]
            return Document(segments)
        question = Text("What is the small red one on the left called? Answer with one word.", supervise=False)
        return Document([image(supervise=False), question, Text("a hat")])

    first = make()
    tokens = len(processor.encode(first.segments, close=True))
    return [first, *(make() for _ in range(case.rows * max(length // tokens, 1) - 1))]


def batch_of(case: Case, processor: MMInterleavedProcessor, length: int) -> Batch:
    """A batch of the case."""
    return processor(documents(case, processor, length), training=True, packing="samples", max_length=length)


# ---- the model


def prepared(case: Case, config: TrainConfig, preset: str, device: torch.device) -> tuple[MMInterleaved, Any]:
    """A model with random weights, ready to train, and its processor."""
    loaded = fresh(preset, device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    model = loaded.model
    if case.all_weights:
        model.config.frozen = [VAE]
        model.freeze()
    freeze_parts(model, config.freeze)
    attach_adapter(model, config, frozen_layers(model, config.freeze))
    enable_checkpointing(model)
    if config.fsdp:
        shard(model)
    else:
        set_types(model, config)
    return model.train(), loaded.processor


def shard(model: MMInterleaved) -> None:
    """FSDP2 with float32 weights, as `training.sharding.configure` lets accelerate do it."""
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    vae = model.image_decoder.vae
    for module in [m for m in model.modules() if isinstance(m, BLOCKS)]:
        if not any(module is inner for inner in vae.modules()):
            fully_shard(module.float(), mp_policy=policy)
    for name, parameter in model.named_parameters():
        if "image_decoder.vae." not in name and parameter.dtype != torch.float32:
            parameter.data = parameter.data.float()
    fully_shard(model, mp_policy=policy, ignored_params=set(vae.parameters()))


# ---- measuring


def flops(cost: Cost, parts: dict[str, Part], tokens: int, images: int, targets: int) -> float:
    """Operations of a step without recomputation: forward, backward for activations, and for weights that are trained.

    Parts before everything that is trained have no backward pass.
    """

    def passes(name: str, reached: bool) -> float:
        return 1 + (1 + parts[name].trainable / max(parts[name].total, 1) if reached else 0)

    encoder = bool(parts["visual_tokenizer"].trainable)
    return 2 * (
        tokens * cost.token * passes("language_model", True)
        + images * cost.encode_image * passes("visual_tokenizer", encoder)
        + targets * cost.draw_step / 2 * passes("unet", True)  # `draw_step` counts both halves of guidance
    )


def timed(step: Callable[[], object], count: int, device: torch.device) -> float:
    """Seconds of a step, after two that are not counted."""
    for _ in range(2):
        step()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    begin = time.perf_counter()
    for _ in range(count):
        step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - begin) / count


def run(name: str, preset: str, device: torch.device, length: int, steps: int) -> dict[str, Any]:
    """Measure a case."""
    case, world = CASES[name], int(os.environ.get("WORLD_SIZE", "1"))
    config = config_of(case)
    model, processor = prepared(case, config, preset, device)
    batch = batch_of(case, processor, length)
    inputs = prepare_documents(model, config.losses)(batch, 0, device)
    stats = inputs.pop("stats")
    optimizer = build_optimizer(model, config.optimizer)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16):
            loss = model(**inputs).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    seconds = timed(step, steps, device)
    targets = len(inputs["layout"].target_images) if case.story else 0
    sizes = BatchSizes(len(batch.input_ids), batch.input_ids.shape[1], stats.images, targets)
    parts = {part.name.strip(): part for part in count_parts(model)}
    operations = flops(measure(model_config_of(preset, case), images=1), parts, stats.tokens, stats.images, targets)
    peak = peak_flops(device)
    on_gpu = device.type == "cuda"
    return {
        "case": name, "preset": preset, "world_size": world, "sizes": asdict(sizes), "tokens": stats.tokens,
        "trained_parameters": parts["model"].trainable,
        "seconds": seconds, "tokens_per_second": world * stats.tokens / seconds,
        "mfu": operations / seconds / peak if peak else None,
        "max_allocated": torch.cuda.max_memory_allocated() if on_gpu else None,
        "max_reserved": torch.cuda.max_memory_reserved() if on_gpu else None,
    }  # fmt: skip


def run_all(names: list[str], preset: str, device: torch.device, length: int, steps: int, output: Path) -> None:
    """Measure cases one after the other; each result is written at once."""
    found: list[dict[str, Any]] = []
    first = int(os.environ.get("RANK", "0")) == 0
    for name in names:
        try:
            found.append(run(name, preset, device, length, steps))
        except torch.OutOfMemoryError as error:
            found.append({"case": name, "preset": preset, "problem": str(error).splitlines()[0]})
        if device.type == "cuda":
            torch.cuda.empty_cache()
        if first:
            print(json.dumps(found[-1]), flush=True)
            output.write_text(json.dumps({"machine": describe(), "rows": found}, indent=1))


def add_estimates(files: list[Path], output: Path) -> None:
    """Put all results into one file, with the estimated memory of each."""
    read = [json.loads(file.read_text()) for file in files]
    rows = [row for one in read for row in one["rows"]]
    for row in rows:
        if "sizes" in row:
            case = CASES[row["case"]]
            config = model_config_of(row["preset"], case)
            guess = estimate(config_of(case), config, row["world_size"], BatchSizes(**row["sizes"]))
            row["estimated"], row["estimated_parts"] = guess.total, guess.parts
            if row["max_reserved"]:
                row["estimated_of_reserved"] = guess.total / row["max_reserved"]
            print(f"{row['case']}: {guess}; measured {(row['max_reserved'] or 0) / GIB:.1f} GiB", flush=True)
    output.write_text(json.dumps({"machine": read[0]["machine"], "rows": rows}, indent=1) + "\n")


def main() -> None:
    """Measure or estimate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    measuring = commands.add_parser("run")
    measuring.add_argument("cases", nargs="+", choices=[*CASES])
    measuring.add_argument("--preset", default="release")
    measuring.add_argument("--device", default="cuda")
    measuring.add_argument("--length", type=int, default=2048, help="tokens of a row")
    measuring.add_argument("--steps", type=int, default=3, help="steps that are timed")
    estimating = commands.add_parser("estimate")
    estimating.add_argument("files", nargs="+", type=Path)
    for command in (measuring, estimating):
        command.add_argument("--output", type=Path, required=True, help="JSON file to write")
    options = parser.parse_args()
    if options.command == "estimate":
        add_estimates(options.files, options.output)
        return
    device = torch.device(options.device)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    run_all(options.cases, options.preset, device, options.length, options.steps, options.output)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()

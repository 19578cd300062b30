"""Lines about training: one step, forward and backward."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ..model.roofline import Need
from ..training.checkpointing import disable_checkpointing, enable_checkpointing
from ..training.flops import step_cost
from ..training.run import compile_regions
from .base import Bench, Row, document

IN_A_ROW = 3  # steps without synchronisation in between, as in a training run


def training(bench: Bench) -> Iterator[Row]:
    """Both losses of a batch with gradient checkpointing, without the optimizer; the bound counts arithmetic only."""
    for selective in (False, True):
        yield _row(bench, selective, "selective checkpointing" if selective else "")


def training_compiled(bench: Bench) -> Iterator[Row]:
    """The same with compiled layers of the language model, which stay compiled: run this line alone."""
    compile_regions(bench.model, "decoder")
    for selective in (False, True):
        yield _row(bench, selective, f"layers compiled{', selective checkpointing' if selective else ''}")


def _row(bench: Bench, selective: bool, name: str) -> Row:
    sizes, model, config = bench.sizes, bench.model, bench.model.config
    count = sizes.batch * sizes.batch_images
    ids = document(config, sizes.batch_length, sizes.batch_images).expand(sizes.batch, -1)
    mask = torch.ones_like(ids)
    labels = ids.masked_fill(ids == config.image_token_id, -100)
    layout = model.plan(ids, mask, labels=labels).to(bench.device)
    generator = torch.Generator().manual_seed(0)
    side, drawn = config.vision_config.image_size, config.image_decoder.image_size
    inputs = {
        "input_ids": ids.to(bench.device), "attention_mask": mask.to(bench.device), "labels": labels.to(bench.device),
        "pixel_values": torch.rand(count, 3, side, side, generator=generator).to(bench.device, bench.dtype),
        "target_pixel_values": torch.rand(count, 3, drawn, drawn, generator=generator).to(bench.device),
        "noise_samples": model.image_decoder.sample_noise(count, generator).to(bench.device), "layout": layout,
    }  # fmt: skip

    def step() -> None:
        model(**inputs).loss.backward()
        model.zero_grad(set_to_none=True)

    def steps() -> None:
        for _ in range(IN_A_ROW):
            step()

    need = Need(step_cost(config).of(sizes.batch * sizes.batch_length, count, count))
    case = f"{sizes.batch} rows of {sizes.batch_length} tokens with {sizes.batch_images} images each"
    model.freeze()
    model.train()
    enable_checkpointing(model, selective)
    try:
        value, peak = bench.clock.time(steps, 1) / IN_A_ROW, bench.clock.peak(step)
    finally:
        disable_checkpointing(model)
        model.eval()
        model.zero_grad(set_to_none=True)
    return Row("training", f"{case}, {name}" if name else case, "s", value, bound=bench.bound(need), peak_bytes=peak)

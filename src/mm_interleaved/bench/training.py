"""The line about training: one step, forward and backward."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ..model.roofline import Need
from ..training.flops import step_cost
from .base import Bench, Row, document


def training(bench: Bench) -> Iterator[Row]:
    """Both losses of a batch with gradient checkpointing, without the optimizer; the bound counts arithmetic only."""
    sizes, model, config = bench.sizes, bench.model, bench.model.config
    count = sizes.batch * sizes.batch_pictures
    ids = document(config, sizes.batch_length, sizes.batch_pictures).expand(sizes.batch, -1)
    mask = torch.ones_like(ids)
    labels = ids.masked_fill(ids == config.image_token_id, -100)
    layout = model.plan(ids, mask, labels=labels).to(bench.device)
    generator = torch.Generator().manual_seed(0)
    side, drawn = config.vision_config.image_size, config.image_decoder.image_size
    inputs = {
        "input_ids": ids.to(bench.device), "attention_mask": mask.to(bench.device), "labels": labels.to(bench.device),
        "pixel_values": torch.rand(count, 3, side, side, generator=generator).to(bench.device, bench.dtype),
        "target_pixel_values": torch.rand(count, 3, drawn, drawn, generator=generator).to(bench.device),
        "draws": model.image_decoder.draw(count, generator).to(bench.device), "layout": layout,
    }  # fmt: skip

    def step() -> None:
        model(**inputs).loss.backward()
        model.zero_grad(set_to_none=True)

    model.freeze()
    model.train()
    _checkpointing(model, "enable", gradient_checkpointing_kwargs={"use_reentrant": False})
    try:
        value, peak = bench.clock.time(step, 2), bench.clock.peak(step)
    finally:
        _checkpointing(model, "disable")
        model.eval()
        model.zero_grad(set_to_none=True)
    need = Need(step_cost(config).of(sizes.batch * sizes.batch_length, count, count))
    case = f"{sizes.batch} rows of {sizes.batch_length} tokens with {sizes.batch_pictures} pictures each"
    yield Row("training", case, "s", value, bound=bench.bound(need), peak_bytes=peak)


def _checkpointing(model: torch.nn.Module, verb: str, **settings: object) -> None:
    name = f"activation_checkpointing_{verb}"  # its name from transformers 5.2x on
    if hasattr(model, name):
        settings = {k.replace("gradient", "activation"): v for k, v in settings.items()}
    else:
        name = f"gradient_checkpointing_{verb}"
    getattr(model, name)(**settings)

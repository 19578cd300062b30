"""The estimate of GPU memory: what is known exactly, and what each setting changes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mm_interleaved import MMInterleaved, MMInterleavedConfig
from mm_interleaved.configuration import make_config
from mm_interleaved.training.config import TrainConfig
from mm_interleaved.training.memory import GIB, BatchSizes, MemoryEstimate, estimate

ZERO1 = Path(__file__).parents[2] / "configs/deepspeed/zero1.json"
SIZES = BatchSizes(rows=2, tokens=96, images=4, targets=0)  # no image loss, which takes half of the time


def settings(**changes: Any) -> TrainConfig:
    source = {"type": "documents", "shards": ["none"], "batch_size": 3, "max_length": 96}
    shared = {"output": "none", "steps": 1, "model": {"init_from": {"preset": "debug"}}, "data": {"sources": [source]}}
    return make_config(shared | changes, TrainConfig)


@pytest.fixture(scope="module")
def plain(debug_config: MMInterleavedConfig) -> MemoryEstimate:
    """The estimate without any setting that saves memory."""
    return estimate(settings(), debug_config, sizes=SIZES)


def near(size: int, elements: int, width: int) -> bool:
    """Whether a size is that of so many elements; each tensor is rounded up to 512 bytes."""
    return elements * width <= size <= elements * width + 512 * 2000


def test_stored_tensors_are_those_of_the_model(plain: MemoryEstimate, debug_config: MMInterleavedConfig) -> None:
    parameters = list(MMInterleaved(debug_config).named_parameters())
    trained = sum(p.numel() for _, p in parameters if p.requires_grad)
    assert near(plain.parts["weights"], trained, 4)
    assert near(plain.parts["gradients"], trained, 4)
    assert plain.parts["optimizer"] == 8 * trained
    assert plain.total == sum(plain.parts.values())
    assert plain.parts["activations"] > 0


@pytest.mark.slow
def test_checkpointing_saves_activations_only(plain: MemoryEstimate, debug_config: MMInterleavedConfig) -> None:
    saved = estimate(settings(gradient_checkpointing=True), debug_config, sizes=SIZES)
    assert saved.parts["activations"] < 0.8 * plain.parts["activations"]
    drawing = estimate(settings(gradient_checkpointing=True), debug_config, sizes=replace(SIZES, targets=4))
    assert drawing.parts["activations"] > saved.parts["activations"]
    assert {n: v for n, v in saved.parts.items() if n not in ("activations", "overhead")} == {
        n: v for n, v in plain.parts.items() if n not in ("activations", "overhead")
    }


def test_an_adapter_has_gradients_of_its_own_weights_only(
    plain: MemoryEstimate, debug_config: MMInterleavedConfig
) -> None:
    model = {"init_from": {"checkpoint": "base"}}
    adapted = estimate(settings(model=model, adapter={"preset": "llm", "rank": 2}), debug_config, sizes=SIZES)
    assert adapted.parts["optimizer"] < 0.05 * plain.parts["optimizer"]
    assert adapted.parts["frozen weights"] > plain.parts["frozen weights"]
    fewer_bits = settings(model=model | {"quantize": "nf4"}, adapter={"preset": "llm", "rank": 2})
    quantized = estimate(fewer_bits, debug_config, sizes=SIZES)
    assert quantized.parts["optimizer"] == adapted.parts["optimizer"]
    assert 0.3 * adapted.parts["frozen weights"] < quantized.parts["frozen weights"] < adapted.parts["frozen weights"]


def test_fsdp_divides_what_is_stored(plain: MemoryEstimate, debug_config: MMInterleavedConfig) -> None:
    divided = estimate(settings(fsdp={"fsdp_version": 2}, freeze=[]), debug_config, world_size=4, sizes=SIZES)
    for part in ("weights", "gradients", "optimizer"):
        assert divided.parts[part] == plain.parts[part] // 4
    assert divided.parts["gathered weights"] > 0
    assert "on each of 4 GPUs" in str(divided)


@pytest.mark.slow
def test_deepspeed_keeps_weights_in_half_precision(plain: MemoryEstimate, debug_config: MMInterleavedConfig) -> None:
    trained = plain.parts["optimizer"] // 8
    zero = settings(deepspeed=str(ZERO1))
    shared = estimate(zero, debug_config, world_size=4, sizes=SIZES).parts
    assert near(shared["weights"], trained, 2)
    assert near(shared["gradients"], trained, 2)
    assert shared["float32 copies"] == trained  # 4 bytes for each, on four GPUs
    assert shared["optimizer"] == 2 * trained
    assert shared["buckets"] == 2 * 2 * trained  # two buckets, which hold more than there is
    assert shared["frozen weights"] < 0.75 * plain.parts["frozen weights"]  # the VAE, which was float32
    whole = estimate(settings(deepspeed=str(ZERO1), precision="float32"), debug_config, world_size=4, sizes=SIZES).parts
    assert "float32 copies" not in whole
    assert whole["weights"] == plain.parts["weights"]


def test_sizes_come_from_the_settings(debug_config: MMInterleavedConfig) -> None:
    sizes = BatchSizes.of(settings(), debug_config)
    assert (sizes.rows, sizes.tokens) == (3, 96)
    assert sizes.images == sizes.targets == 3 * (96 // 10)
    assert BatchSizes.of(settings(losses={"image": 0.0}), debug_config).targets == 0


def test_an_estimate_is_read_in_one_line() -> None:
    line = MemoryEstimate({"weights": 60 * GIB, "average": 1}, SIZES)
    assert str(line) == "about 60 GiB on one GPU (weights 60.0)"

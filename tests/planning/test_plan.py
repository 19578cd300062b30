"""The plan of a run: its memory is that of real tensors, and each setting changes it in the known direction."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mm_interleaved import MMInterleaved, MMInterleavedConfig
from mm_interleaved.configuration import make_config
from mm_interleaved.document import Document, Text
from mm_interleaved.planning.coefficients import MEASURED
from mm_interleaved.planning.fitting import Measured, fit
from mm_interleaved.planning.plan import Plan, make_plan, suggest
from mm_interleaved.planning.step import Cluster, gpu_seconds, mean_of_slowest, step_time, together, traffic
from mm_interleaved.planning.work import ModelWork, StepWork, step_work
from mm_interleaved.pretrained import load
from mm_interleaved.training.building import set_types
from mm_interleaved.training.config import TrainConfig
from mm_interleaved.training.gpus import GPUS
from mm_interleaved.training.memory import BatchSizes
from mm_interleaved.training.optimizer import build_optimizer

ROOT = Path(__file__).parents[2]
H200 = GPUS["h200"]
ONE_GPU = ("rows-4x15", "rows-1x15", "rows-4x5", "text", "no-drawing", "plain-1x10")  # that fit the planner
SIZES = BatchSizes(rows=2, tokens=96, images=4, targets=4)


def settings(**changes: Any) -> TrainConfig:
    source = {"type": "documents", "name": "own", "shards": ["none"], "batch_size": 2, "max_length": 96,
              "max_images_per_sequence": 2}  # fmt: skip
    shared = {"output": "none", "steps": 1000, "model": {"init_from": {"preset": "debug"}},
              "data": {"sources": [source]}}  # fmt: skip
    return make_config(shared | changes, TrainConfig)


@pytest.fixture(scope="module")
def plain(debug_config: MMInterleavedConfig) -> Plan:
    return make_plan(settings(), debug_config, Cluster(H200))


@pytest.fixture(scope="module")
def debug_work(debug_config: MMInterleavedConfig) -> ModelWork:
    return ModelWork.of(settings(), debug_config)


@pytest.mark.slow
def test_memory_is_that_of_the_tensors_of_a_step(plain: Plan) -> None:
    loaded = load("debug")
    model, config = loaded.model.train(), settings()
    set_types(model, config)
    optimizer = build_optimizer(model, config.optimizer)
    batch = loaded.processor(Document([Text("One step.")]), training=True)
    model(
        **batch, layout=model.plan(batch["input_ids"], batch["attention_mask"], None, batch["labels"])
    ).loss.backward()
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    trained = [p for p in model.parameters() if p.requires_grad]
    states = [s for p in trained for s in optimizer.state[p].values() if s.shape == p.shape]
    found = {
        "weights": trained,
        "gradients": [p.grad for p in trained],
        "frozen weights": [*(p for p in model.parameters() if not p.requires_grad), *model.buffers()],
        "optimizer": states,
    }
    for name, tensors in found.items():
        real = sum(t.untyped_storage().nbytes() for t in tensors if t is not None)
        rounding = 512 * len(tensors)  # the allocator's blocks
        assert real <= plain.memory.parts[name] <= real + rounding, name


def test_checkpoints_hold_weights_and_states(plain: Plan, debug_config: MMInterleavedConfig) -> None:
    model = MMInterleaved(debug_config)
    set_types(model, settings())
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert plain.final == weights
    assert plain.checkpoint == weights + 8 * trained


def test_a_plan_counts_what_the_settings_say(plain: Plan) -> None:
    (source,) = plain.sources
    assert (source.name, source.share, source.sizes) == ("own", 1.0, SIZES)
    assert (plain.tokens, plain.images, plain.steps) == (2 * 96, 4, 1000)
    assert plain.division == "one GPU"
    assert plain.days == pytest.approx(1000 * plain.step_seconds / 86400)
    assert plain.step_seconds == pytest.approx(source.time.total)
    assert plain.fits
    four = replace(plain.cluster, gpus=4)
    assert (four.nodes, replace(four, per_node=2).nodes) == (1, 2)


def seconds(config: TrainConfig, model: ModelWork, cluster: Cluster, sizes: BatchSizes = SIZES) -> float:
    return step_time(config, model, step_work(config, model, sizes, cluster.gpus), cluster).total


def test_more_work_takes_longer(debug_work: ModelWork) -> None:
    one = Cluster(H200)
    base = seconds(settings(), debug_work, one)
    for changes in ({"rows": 4}, {"tokens": 192}, {"targets": 8}):
        assert seconds(settings(), debug_work, one, replace(SIZES, **changes)) > base, changes
    with_images = step_work(settings(), debug_work, replace(SIZES, images=8))
    assert with_images.vision == 2 * step_work(settings(), debug_work, SIZES).vision
    assert seconds(settings(gradient_checkpointing=True), debug_work, one) > base
    assert seconds(settings(accumulation=3), debug_work, one) > 2 * base
    half = settings(gradient_checkpointing=True, selective_checkpointing=True)
    full = settings(gradient_checkpointing=True)
    plain, selected, recomputed = (step_work(c, debug_work, SIZES).flops for c in (settings(), half, full))
    assert plain < selected < recomputed
    assert seconds(half, debug_work, one) > seconds(full, debug_work, one)  # the host chooses each operator
    assert seconds(settings(), debug_work, Cluster(GPUS["l4"])) > base
    assert seconds(settings(), debug_work, Cluster(GPUS["l4"], 2)) >= seconds(
        settings(), debug_work, Cluster(GPUS["l4"])
    )


def test_what_is_sent_follows_from_the_weights(debug_work: ModelWork) -> None:
    eight, trained = Cluster(H200, 8), debug_work.trained
    assert traffic(settings(), debug_work, Cluster(H200)) == (0.0, 0.0)
    assert sum(traffic(settings(), debug_work, eight)) == pytest.approx(7 / 8 * 8 * trained)
    zero = settings(deepspeed=str(ROOT / "configs/deepspeed/zero1.json"))
    assert traffic(zero, debug_work, eight) == pytest.approx((7 / 8 * 4 * trained, 7 / 8 * 2 * trained))
    sharded = settings(fsdp={"fsdp_version": 2})
    assert sum(traffic(sharded, debug_work, eight)) == pytest.approx(7 / 8 * (4 * debug_work.whole + 4 * trained))
    apart = Cluster(GPUS["l40s"], 16, 4)
    assert apart.bandwidth == GPUS["l40s"].link * 1e9  # four adapters send more than the links inside a machine
    assert Cluster(GPUS["a100"], 16, 8).bandwidth == 8 * GPUS["a100"].network * 1e9


def test_gpus_wait_for_the_slowest_source() -> None:
    assert mean_of_slowest([2.0, 1.0], [0.25, 0.75], 1) == pytest.approx(0.75 * 1 + 0.25 * 2)
    assert mean_of_slowest([2.0, 1.0], [0.25, 0.75], 8) == pytest.approx(0.75**8 * 1 + (1 - 0.75**8) * 2)
    assert mean_of_slowest([1.0, 1.0, 1.0], [0.2, 0.3, 0.5], 64) == pytest.approx(1)


@pytest.mark.slow
def test_what_does_not_fit_is_told_what_would(debug_config: MMInterleavedConfig, plain: Plan) -> None:
    config = settings()
    small = replace(H200, mib=(plain.memory.total + plain.cluster.gpu.memory - plain.available) // 2**20 - 1)
    cluster = Cluster(small)
    assert not make_plan(config, debug_config, cluster).fits
    (advice,) = suggest(config, debug_config, cluster)
    assert advice.startswith("gradient_checkpointing=true: about")
    assert suggest(config, debug_config, Cluster(replace(H200, mib=1025))) == []


def work_of(language: float, vision: float, denoising: float, queries: float, launches: float = 2.6) -> StepWork:
    return StepWork(language, vision, denoising, 0.3 * denoising, queries, 0.0, 0.6, 1e10, 0.0, launches, 1)


def test_a_fit_finds_what_measured_steps_follow_from() -> None:
    rows = [
        work_of(6e14, 2e13, 1e14, 7e11), work_of(6e14, 5e13, 0.0, 1e12), work_of(2e13, 1e12, 1e12, 7e9),
        work_of(3e14, 4e13, 8e13, 7e10), work_of(1e13, 1e12, 1e12, 0.0, launches=1.6), work_of(1e14, 0.0, 5e13, 2e12),
    ]  # fmt: skip
    truth = replace(MEASURED, language=0.5, vision=0.15, denoising=0.3, queries=0.01, host=0.2)
    times = [together(sum(gpu_seconds(row, H200, truth).values()), truth.host * row.launches) for row in rows]
    found = fit([Measured(*pair) for pair in zip(rows, times, strict=True)], H200, MEASURED)
    for name in ("language", "vision", "denoising", "queries", "host"):
        assert getattr(found, name) == pytest.approx(getattr(truth, name), rel=0.1), name
    with pytest.raises(ValueError, match="no measured step"):
        fit([], H200, MEASURED)


def test_the_coefficients_follow_from_the_committed_results() -> None:
    """Also what the documentation says of the half that judges them."""
    rows = json.loads((ROOT / "benchmarks/results/planner.json").read_text())["rows"]
    fitting = [row for row in rows if row["case"] in ONE_GPU]
    assert len(fitting) == len(ONE_GPU)
    found = fit([Measured(StepWork(**row["work"]), row["seconds"]) for row in fitting], H200, MEASURED)
    for name, value in asdict(MEASURED).items():
        assert getattr(found, name) == pytest.approx(value, rel=0.02), name
    judging = [row for row in rows if row["half"] == "judge" and not row["older"]]
    assert len(judging) == 11
    assert max(abs(row["of_seconds"] - 1) for row in judging) < 0.15


@pytest.mark.parametrize(
    ("cluster", "message"),
    [(Cluster(H200, 0), "at least one GPU"), (Cluster(H200, 12, 8), "12 GPUs do not fill machines of 8")],
)
def test_impossible_clusters_are_refused(cluster: Cluster, message: str, debug_config: MMInterleavedConfig) -> None:
    with pytest.raises(ValueError, match=message):
        make_plan(settings(), debug_config, cluster)

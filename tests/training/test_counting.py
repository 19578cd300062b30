"""`losses.scale: global`: a step is the same however its rows are divided; and every process has a loss."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mm_interleaved.pretrained import load
from mm_interleaved.training.config import LossConfig
from mm_interleaved.training.pipeline import prepare_documents

from ..conftest import awaken
from ..programs import run_together
from . import steps

GLOBAL = "losses.scale=global"


def alone(kind: str, rows: int, folder: Path, *settings: str) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Trained weights after a step of one process, and what it logged."""
    accumulation = len(steps.KINDS[kind]) // rows
    model, trainer = steps.step(kind, rows, [f"accumulation={accumulation}", *settings], folder)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    held = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in trained.values()}  # no frozen ones
    return {n: p.detach().clone() for n, p in trained.items()}, trainer.state.log_history[0]


def together(kind: str, rows: int, folder: Path, *settings: str) -> dict[str, Tensor]:
    """Trained weights after a step of two processes."""
    accumulation = len(steps.KINDS[kind]) // rows // 2
    output = folder / "weights.safetensors"
    given = (str(output), kind, str(rows), f"accumulation={accumulation}", *settings)
    well, said = run_together(2, "tests.training.steps", *given, OMP_NUM_THREADS="1")
    assert well, said[-3000:]
    return load_file(output)


def compare(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    before = awaken(load("debug").model).state_dict()
    assert max(float((expected[n] - before[n]).abs().max()) for n in expected) > 0.1
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-5, atol=2e-6, msg=name)


@pytest.mark.slow
def test_accumulation_is_one_large_batch(tmp_path: Path) -> None:
    expected, whole = alone("unequal", 8, tmp_path, GLOBAL)
    for rows in (4, 1):
        found, logged = alone("unequal", rows, tmp_path, GLOBAL)
        compare(found, expected)
        for name in ("loss", "loss_txt", "loss_img"):
            assert logged[name] == pytest.approx(whole[name], rel=1e-5), (rows, name)


def test_means_over_batches_differ(tmp_path: Path) -> None:
    """The release's: otherwise the tests here would show nothing."""
    expected, _ = alone("unequal", 8, tmp_path)
    found, _ = alone("unequal", 1, tmp_path)
    assert max(float((found[n] - expected[n]).abs().max()) for n in expected) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("kind", [kind for kind, documents in steps.KINDS.items() if len(documents) == 8])
def test_two_processes_are_one_large_batch(tmp_path: Path, kind: str) -> None:
    """Also where one of them has no image, no image loss or no text to learn."""
    expected, _ = alone(kind, 8, tmp_path, GLOBAL)
    compare(together(kind, 4, tmp_path, GLOBAL), expected)
    compare(together(kind, 2, tmp_path, GLOBAL), expected)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["one without images", "one without text"])
def test_sharded_processes_are_one_large_batch(tmp_path: Path, kind: str) -> None:
    expected, _ = alone(kind, 8, tmp_path, GLOBAL)
    found = together(kind, 4, tmp_path, GLOBAL, "--shard", "fsdp={fsdp_version: 2}")
    compare(found, expected)


@pytest.mark.slow
def test_a_process_that_trains_nothing_waits_for_no_other(tmp_path: Path) -> None:
    """Only the image decoder is trained, and the second process has texts."""
    frozen = r"model.overrides.frozen=['(?!image_decoder)', 'image_decoder\.vae']"
    expected, _ = alone("one without images", 8, tmp_path, GLOBAL, frozen)
    assert all(name.startswith("image_decoder.") for name in expected)
    compare(together("one without images", 4, tmp_path, GLOBAL, frozen), expected)


def test_a_batch_without_a_loss_changes_nothing(tmp_path: Path) -> None:
    """Texts, of which only the image decoder could learn."""
    frozen = r"model.overrides.frozen=['(?!image_decoder)', 'image_decoder\.vae']"
    found, logged = alone("texts", 1, tmp_path, GLOBAL, frozen, "optimizer.weight_decay=0")
    before = awaken(load("debug").model).state_dict()
    assert all(torch.equal(weight, before[name]) for name, weight in found.items())
    assert logged["loss"] > 0
    assert "loss_img" not in logged


def test_weights_of_sources_scale_their_part(tmp_path: Path) -> None:
    """A step of two batches: text and image are sums over the step, each times the weight of its source."""
    whole = load("debug")
    model = awaken(whole.model).train()
    model.requires_grad_(False)
    model.context_proj.requires_grad_(True)
    model.lm_head.requires_grad_(True)
    documents = steps.KINDS["unequal"]
    weights = [{"loss_text_weight": 0.5, "loss_image_weight": 2.0}, {"loss_image_weight": 0.0}]
    config = LossConfig(text=1.5, image=3.0, scale="global")
    prepare = prepare_documents(model, config)
    batches, labels, images, parts = [], 0, 0, []
    for half, own in zip((documents[:4], documents[4:]), weights, strict=True):
        batch = whole.processor(half, training=True)
        batch.update(own)
        batches.append(prepare(batch, 3, torch.device("cpu")))
        layout = batches[-1]["layout"]
        labels += layout.num_labels
        images += len(layout.target_images) if own["loss_image_weight"] else 0
        given = {n: v for n, v in batches[-1].items() if n not in ("counts", "stats")}
        out = model(**given | {"loss_text_weight": 1.0, "loss_image_weight": own["loss_image_weight"] and 1.0})
        text = out.loss_txt * layout.num_labels
        image = 0 if out.loss_img is None else out.loss_img * len(layout.target_images)
        parts.append((own.get("loss_text_weight", 1.5) * text, own["loss_image_weight"] * image))
    expected = sum(p[0] for p in parts) / labels + sum(p[1] for p in parts) / images
    assert images == 3  # the story's two and the drawn one; not that of the question
    total = sum((b["counts"].labels, b["counts"].images)[0] for b in batches), sum(b["counts"].images for b in batches)
    assert total == (labels, images)
    found = 0
    for inputs in batches:
        given = {n: v for n, v in inputs.items() if n not in ("counts", "stats")}
        found += model(**given, num_items_in_batch=total[0], num_images_in_batch=total[1]).loss
    torch.testing.assert_close(found, expected)
    gradients = [
        torch.autograd.grad(loss, list(model.lm_head.parameters()) + list(model.context_proj.parameters()))
        for loss in (found, expected)
    ]
    for ours, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-7)


def test_only_images_with_a_loss_are_targets(tmp_path: Path) -> None:
    whole = load("debug")
    batch = whole.processor(steps.KINDS["unequal"], training=True)
    inputs = [
        prepare_documents(whole.model, LossConfig(scale=scale))(batch, 0, torch.device("cpu"))
        for scale in ("batch", "global")
    ]
    assert [len(i["layout"].target_images) for i in inputs] == [6, 3]
    assert "counts" not in inputs[0]
    assert inputs[1]["counts"].images == 3


@pytest.mark.parametrize("setting", ["normalize_image_loss=true", "conditions=1.0"])
def test_settings_of_means_over_a_batch(setting: str) -> None:
    name, value = setting.split("=")
    with pytest.raises(ValueError, match="scale: batch"):
        LossConfig(scale="global", **{name: float(value) if name == "conditions" else True})


def test_held_out_losses_are_over_all_items(tmp_path: Path) -> None:
    model, trainer = steps.step("texts", 1, ["accumulation=2", GLOBAL], tmp_path)
    found = []
    for rows in (8, 1):
        pipeline = steps.pipeline_of("unequal", rows, model, trainer.config)
        trainer.eval_pipeline = lambda pipeline=pipeline, rows=rows: (pipeline, 8 // rows)
        found.append(trainer.evaluate())
    for name in ("eval_loss_txt", "eval_loss_img"):
        assert found[1][name] == pytest.approx(found[0][name], rel=1e-5)

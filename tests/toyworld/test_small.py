"""Training of the small model: composed images, rows of fixed sizes, parts of the captured step, a run in two calls."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from mm_interleaved import ImageSettings, MMInterleaved, MMInterleavedProcessor, MMInterleavedTokenizer
from mm_interleaved.configuration import load_config
from mm_interleaved.io import InputError
from mm_interleaved.pretrained import TOKENIZER, load
from mm_interleaved.tasks.ade20k import colored
from mm_interleaved.training.muon import Muon
from toyworld.detector import MAP, OUTPUTS
from toyworld.documents import toy_document
from toyworld.draw import draw, label_map
from toyworld.sampling import random_scene, scene_rng
from toyworld.scene import SIZES
from toyworld.small import fast
from toyworld.small.autoencoder import edge_loss, latent_scale, psnr
from toyworld.small.compose import Composer, compose_reference
from toyworld.small.config import Arm
from toyworld.small.heads import MapReader, Readers
from toyworld.small.layers import Atlas, LayeredImages
from toyworld.small.optimizer import CapturableOptimizer, OptimizerSettings, Rule
from toyworld.small.ranks import Ranks
from toyworld.small.recipe import Recipe, Stage
from toyworld.small.rows import RowBatch, Sizes, ToyRows, tensors_of
from toyworld.small.run import Run, new_model
from toyworld.small.step import DocumentTask, TrainStep, Weights
from toyworld.train_detector import labels
from toyworld.train_detector import loss as scene_loss

from ..programs import run_together
from .two_ranks import RECIPE, TINY, stepped

ROOT = Path(__file__).resolve().parents[2]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SIZE = 128
SIZES_OF_ROWS = Sizes(rows=2, length=256, images=10, targets=4, samples=1, conditioning=3, context=240, labels=400)
MIX = {"rest": 0.0, "caption": 1.0, "draw": 2.0, "story": 1.0, "redraw": 1.0, "segmentation": 1.0}


@pytest.fixture(scope="module")
def atlas() -> Atlas:
    """Everything that images of 128 pixels show."""
    return Atlas(SIZE)


@pytest.fixture(scope="module")
def processor() -> MMInterleavedProcessor:
    """Of the tiny model."""
    return MMInterleavedProcessor.for_model(TINY.config(), MMInterleavedTokenizer.from_vocab(TOKENIZER))


def rows(atlas: Atlas, processor: MMInterleavedProcessor, seed: int = 3) -> ToyRows:
    """Small batches of documents."""
    return ToyRows(SIZES_OF_ROWS, processor, atlas, seed, MIX)


def test_composed_images_are_the_drawn_ones(atlas: Atlas) -> None:
    scenes = [random_scene(scene_rng(7, "train", i)) for i in range(60)]
    found = compose_reference(atlas, LayeredImages.join([atlas.image(s) for s in scenes])).astype(int)
    wanted = np.stack([np.asarray(draw(s, SIZE)) for s in scenes]).transpose(0, 3, 1, 2)
    apart = np.abs(found - wanted)
    assert apart.max() <= 1
    assert (apart > 0).mean() < 1e-4


def test_composed_label_maps_are_the_drawn_ones_but_for_single_pixels(atlas: Atlas) -> None:
    scenes = [random_scene(scene_rng(8, "train", i)) for i in range(40)]
    found = compose_reference(atlas, LayeredImages.join([atlas.label_map(s) for s in scenes]))
    wanted = np.stack([np.asarray(colored(label_map(s, SIZE))) for s in scenes]).transpose(0, 3, 1, 2)
    assert (found != wanted).any(1).mean() < 1e-3


@pytest.mark.kernels
def test_the_kernel_composes_as_numpy_does(atlas: Atlas) -> None:
    from toyworld.small.kernels import compose_tiles

    images = LayeredImages.join([atlas.image(random_scene(scene_rng(9, "train", i))) for i in range(3)], fill=4)
    composer = Composer(atlas, DEVICE)
    layers = torch.from_numpy(images.layers).to(DEVICE)
    planes, starts = (torch.from_numpy(x).to(DEVICE) for x in (images.planes, images.starts))
    out = torch.full((4, 3, SIZE, SIZE), 77, dtype=torch.uint8, device=DEVICE)
    compose_tiles[(4, 4)](out, composer.planes, planes, composer.values, starts, layers, layers.view(torch.int32),
                          SIZE, layers.shape[1], 64)  # fmt: skip
    apart = np.abs(out.cpu().numpy().astype(int) - compose_reference(atlas, images))
    assert apart.max() <= 1
    assert (apart > 0).mean() < 1e-4


def test_rows_hold_whole_documents_of_the_toy_world(atlas: Atlas, processor: MMInterleavedProcessor) -> None:
    batch = next(iter(rows(atlas, processor)))
    assert batch.input_ids.shape == (2, 256)
    text = processor.tokenizer.decode(batch.input_ids[0][batch.attention_mask[0] == 1])
    first = toy_document(3, "train", 0, size=SIZE, mix=rows(atlas, processor).mix)
    begin = processor.encode(first.segments, close=True)
    assert batch.input_ids[0, : len(begin)].tolist() == begin.ids.tolist()
    assert text.count("<s>") == text.count("</s>") > 1
    images = Composer(atlas, torch.device("cpu"))(batch.pictures)
    assert images.shape == (10, 3, SIZE, SIZE)
    wanted = np.asarray(first.images[0].source).astype(int).transpose(2, 0, 1)
    assert np.abs(images[0].numpy().astype(int) - wanted).max() <= 1
    assert not images[batch.images :].any()


def test_all_batches_have_the_same_sizes_and_follow_from_the_seed(
    atlas: Atlas, processor: MMInterleavedProcessor
) -> None:
    one, two, other = iter(rows(atlas, processor)), iter(rows(atlas, processor)), iter(rows(atlas, processor, seed=4))
    batches = [next(one) for _ in range(3)]
    again = [next(two) for _ in range(3)]
    shapes = [[x.shape for x in tensors_of(b)] for b in (*batches, next(other))]
    assert all(s == shapes[0] for s in shapes)
    for a, b in zip(batches, again, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(tensors_of(a), tensors_of(b), strict=True))
    assert not torch.equal(batches[0].input_ids, batches[1].input_ids)


def test_batches_without_earlier_images_have_the_same_sizes(atlas: Atlas, processor: MMInterleavedProcessor) -> None:
    shapes = []
    for mix in (MIX, {"rest": 0.0, "draw": 1.0}):
        batch = next(iter(ToyRows(SIZES_OF_ROWS, processor, atlas, 3, mix)))
        shapes.append([x.shape for x in tensors_of(batch)])
    assert shapes[0] == shapes[1]
    assert (batch.layout.earlier.images == -1).all()


def test_target_images_are_those_that_are_learned(atlas: Atlas, processor: MMInterleavedProcessor) -> None:
    for batch, _ in zip(rows(atlas, processor), range(4), strict=False):
        chosen = batch.layout.target_images
        assert len(chosen.unique()) == SIZES_OF_ROWS.targets
        assert (batch.image_loss_mask > 0).nonzero()[:, 0].tolist() == [
            i for i in chosen.tolist() if batch.image_loss_mask[i]
        ]
        assert (batch.layout.earlier.images >= 0).sum() <= SIZES_OF_ROWS.conditioning * SIZES_OF_ROWS.samples


def test_too_few_images_for_the_targets_are_an_error(atlas: Atlas, processor: MMInterleavedProcessor) -> None:
    sizes = replace(SIZES_OF_ROWS, targets=10, images=10)
    with pytest.raises(ValueError, match="too few for 10 targets"):
        next(iter(ToyRows(sizes, processor, atlas, 3, {"rest": 0.0, "vqa": 1.0})))


def net() -> nn.Sequential:
    """Matrices of several sizes, a convolution, gains and biases."""
    torch.manual_seed(0)
    last = nn.Conv2d(30, 7, 3, padding=1)
    return nn.Sequential(nn.Linear(48, 100), nn.LayerNorm(100), nn.Linear(100, 30), nn.Unflatten(1, (30, 1, 1)), last)


def test_the_optimizer_is_muon_and_adam() -> None:
    ours, theirs = net(), net()
    settings = OptimizerSettings(rate=1e-2, muon=1.0, decay=0.1, clip=1e9)
    optimizer = CapturableOptimizer(ours, settings)
    optimizer.rate.fill_(1e-2)
    matrices = [p for p in theirs.parameters() if p.dim() > 1]
    plain = [p for p in theirs.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "lr": 1e-2, "weight_decay": 0.1, "momentum": 0.95, "scale": 1.0},
              {"params": plain, "lr": 1e-2, "weight_decay": 0.0}]  # fmt: skip
    reference = Muon(groups, lr=1e-2, betas=(0.9, 0.99), eps=1e-8)
    for _ in range(4):
        x = torch.randn(16, 48)
        optimizer.step(torch.autograd.grad(ours(x).square().sum(), optimizer.weights))
        reference.zero_grad()
        theirs(x).square().sum().backward()
        reference.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_small_updates_of_weights_in_bfloat16_add_up() -> None:
    first = nn.Linear(8, 8, bias=False)
    module = nn.Sequential(first, nn.Linear(8, 8, bias=False)).to(torch.bfloat16)
    weight = first.weight
    before = weight.detach().float().clone()
    optimizer = CapturableOptimizer(module, OptimizerSettings(rules=[Rule("^0", plain=True)], decay=0.0))
    optimizer.rate.fill_(1e-4)  # far below what bfloat16 can add to a weight
    for _ in range(200):
        optimizer.step([torch.ones_like(p) for p in optimizer.weights])
    torch.testing.assert_close(weight.float(), before - 0.02, rtol=0, atol=2e-3)
    optimizer.load_averages()
    assert weight.dtype == torch.bfloat16


def test_a_module_without_matrices_is_refused() -> None:
    with pytest.raises(ValueError, match="no matrix is left"):
        CapturableOptimizer(nn.LayerNorm(4), OptimizerSettings())


def test_an_optimizer_goes_on_from_its_state() -> None:
    ours, theirs = net(), net()
    one = CapturableOptimizer(ours, OptimizerSettings())
    one.rate.fill_(1e-3)
    x = torch.randn(16, 48)
    one.step(torch.autograd.grad(ours(x).square().sum(), one.weights))
    two = CapturableOptimizer(theirs, OptimizerSettings())
    two.rate.fill_(1e-3)
    two.load_state(one.state())
    for module, optimizer in ((ours, one), (theirs, two)):
        optimizer.step(torch.autograd.grad(module(x).square().sum(), optimizer.weights))
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


@pytest.mark.kernels
@pytest.mark.parametrize(("count", "width"), [(37, 16), (5, 128), (300, 192), (700, 10)])
def test_kernels_of_norms_and_sums(count: int, width: int) -> None:
    torch.manual_seed(0)
    x, grad = torch.randn(2, count, width, device=DEVICE)
    weight, bias = torch.randn(2, width, device=DEVICE)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    for own, wanted, used in (
        (fast.layer_norm(x, weight, bias, 1e-6), F.layer_norm(x, (width,), weight, bias, 1e-6), leaves),
        (fast.rms_norm(x, weight, 1e-6), F.rms_norm(x, (width,), weight, 1e-6), leaves[:2]),
    ):
        torch.testing.assert_close(own, wanted, rtol=1e-5, atol=1e-5)
        pairs = zip(torch.autograd.grad(own, used, grad), torch.autograd.grad(wanted, used, grad), strict=True)
        for a, b in pairs:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(fast.sum_rows(grad), grad.sum(0), rtol=1e-4, atol=1e-3)


def quickened(monkeypatch: pytest.MonkeyPatch, on_kernels: bool) -> tuple[list[Tensor], list[Tensor]]:
    """Features and gradients of a tiny visual tokenizer before and after `quicken`."""
    monkeypatch.setattr(fast, "on_triton", lambda device: on_kernels)
    torch.manual_seed(1)
    model = new_model(TINY)
    pixels = torch.rand(1, 3, SIZE, SIZE)
    found = []
    for _ in range(2):
        seen = model.visual_tokenizer(pixels)
        outputs = [seen.tokens, *seen.pyramid]
        weights = [p for p in model.visual_tokenizer.parameters() if p.requires_grad]
        loss = sum((x.square().mean() for x in outputs), start=torch.zeros(()))
        found.append([*outputs, *torch.autograd.grad(loss, weights)])
        fast.quicken(model)
    return found[0], found[1]


def test_a_quickened_model_computes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    for plain, quick in zip(*quickened(monkeypatch, on_kernels=False), strict=True):
        torch.testing.assert_close(plain, quick, rtol=1e-3, atol=1e-5)


def test_map_readers_lose_what_the_detector_loses(atlas: Atlas) -> None:
    scenes = [random_scene(scene_rng(5, "train", i)) for i in range(6)]
    geometry, traits = (torch.stack(x) for x in zip(*(labels(s) for s in scenes), strict=True))
    reader = MapReader(12)
    features = torch.randn(6, 12, MAP, MAP)
    dense = F.conv2d(features, reader.linear.weight[..., None, None], reader.linear.bias)
    wanted = scene_loss(dense.unflatten(1, (len(SIZES), OUTPUTS)), geometry, traits)
    found, right = reader(features, geometry, traits)
    torch.testing.assert_close(found, torch.stack(list(wanted.values())).sum(), rtol=1e-2, atol=0)
    assert 0 <= right["kind"] <= 1


@pytest.fixture(scope="module")
def step(atlas: Atlas, processor: MMInterleavedProcessor) -> tuple[TrainStep, list[RowBatch]]:
    """A step of the tiny model, and batches."""
    torch.manual_seed(0)
    model = new_model(TINY)
    task = DocumentTask(model, Readers(model.config), Weights())
    stream = iter(rows(atlas, processor))
    batches = [next(stream) for _ in range(2)]
    return TrainStep(task, CapturableOptimizer(task, OptimizerSettings()), Composer(atlas, torch.device("cpu")),
                     batches[0]), batches  # fmt: skip


@pytest.mark.slow
def test_steps_learn_a_batch(step: tuple[TrainStep, list[RowBatch]]) -> None:
    train, batches = step
    losses = [float(train(batches[0], 3e-3)["text"]) for _ in range(4)]
    assert losses[-1] < losses[0] - 0.2
    assert {"images", "conditions", "image", "norm", "map1_kind", "token_color", "condition_cell"} <= set(
        train.measures
    )


def test_a_batch_of_other_sizes_is_refused(
    step: tuple[TrainStep, list[RowBatch]], atlas: Atlas, processor: MMInterleavedProcessor
) -> None:
    other = ToyRows(replace(SIZES_OF_ROWS, images=12), processor, atlas, 3, MIX)
    with pytest.raises(ValueError, match="the step was captured for"):
        step[0](next(iter(other)), 1e-3)


@pytest.mark.slow
def test_two_processes_with_half_a_batch_update_as_one_with_all_of_it(tmp_path: Path) -> None:
    well, said = run_together(2, "tests.toyworld.two_ranks", "step", tmp_path, OMP_NUM_THREADS="1")
    assert well, said[-3000:]
    alone = stepped(Ranks(torch.device("cpu")))
    for rank in range(2):
        found = load_file(tmp_path / f"{rank}.safetensors")
        assert found.keys() == alone.keys()
        for name, value in alone.items():
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)


def test_a_batch_that_the_processes_cannot_share_is_refused() -> None:
    with pytest.raises(ValueError, match=r"sizes\.targets: 4 cannot be divided among 3 processes"):
        replace(SIZES_OF_ROWS, rows=3, images=9).shared(Ranks(torch.device("cpu"), 0, 3))


def test_rates_rise_again_only_for_a_new_optimizer() -> None:
    stage = Stage("a", "images", 1000, OptimizerSettings(rate=2.0), warmup=100, cooldown=0.5)
    assert stage.rate(0, 0) == pytest.approx(0.02)
    assert stage.rate(300, 0) == stage.rate(300, 100) == 2.0
    assert stage.rate(300, 300) == pytest.approx(0.02)
    assert stage.rate(750, 0) == pytest.approx(1.0)


def test_the_recipe_is_a_model_of_at_most_15_million_parameters() -> None:
    recipe = load_config(ROOT / "configs/small/recipe.yaml", Recipe)
    with torch.device("meta"):
        model = MMInterleaved(recipe.shape.config())
    assert sum(p.numel() for p in model.parameters()) <= 15_000_000
    assert [stage.name for stage in recipe.stages] == ["autoencoder", "documents", "further"]
    assert recipe.stages[1].phase(0).objects == [1, 1]
    assert recipe.stages[1].phase(recipe.stages[1].steps - 1).objects == [1, 5]


@pytest.mark.parametrize(
    ("arm", "parts"),
    [
        ("both", {"language_model", "image_decoder"}),
        ("llm", {"language_model"}),
        ("unet", {"image_decoder"}),
        ("none", set()),
    ],
)
def test_arms_of_the_ablation_have_mmfs_in_their_parts(arm: Arm, parts: set[str]) -> None:
    found = {name.split(".")[0] for name, _ in new_model(TINY, arm).named_parameters() if "synchronizer" in name}
    assert found == parts


@pytest.mark.slow
@pytest.mark.parametrize("arm", ["llm", "unet"])
def test_an_arm_learns(arm: Arm, atlas: Atlas, processor: MMInterleavedProcessor) -> None:
    model = new_model(TINY, arm)
    task = DocumentTask(model, Readers(model.config), Weights())
    batch = next(iter(rows(atlas, processor)))
    train = TrainStep(task, CapturableOptimizer(task, OptimizerSettings()), Composer(atlas, DEVICE), batch)
    first = float(train(batch, 3e-3)["loss"])
    assert float(train(batch, 3e-3)["loss"]) < first


def test_the_recipe_of_an_arm_is_one_change() -> None:
    recipe = load_config(ROOT / "configs/small/recipe.yaml", Recipe, ["arm=none", "autoencoder=runs/small/autoencoder"])
    assert recipe.arm == "none"
    with pytest.raises(InputError, match="arm"):
        load_config(ROOT / "configs/small/recipe.yaml", Recipe, ["arm=neither"])


@pytest.mark.slow
def test_a_run_with_another_runs_autoencoder_trains_documents_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("toyworld.small.run.HELD_OUT", 1)
    alone = Ranks(torch.device("cpu"))
    assert Run(replace(RECIPE, stages=RECIPE.stages[:1]), tmp_path / "first", 1e6, alone, workers=0).go()
    given = tmp_path / "first/autoencoder"
    shape = replace(TINY, zero_snr=True)
    recipe = replace(RECIPE, arm="none", autoencoder=given)
    assert Run(recipe, tmp_path / "arm", 1e6, alone, workers=0).go()
    later = replace(RECIPE.stages[1], name="further", steps=1)
    assert Run(replace(recipe, shape=shape, stages=[*RECIPE.stages, later]), tmp_path / "arm", 1e6, alone, 0).go()
    state = json.loads((tmp_path / "arm/state.json").read_text())
    assert [(part["stage"], part["to"]) for part in state["parts"]] == [("documents", 3), ("further", 1)]
    assert not (tmp_path / "arm/autoencoder").exists()
    model = MMInterleaved.from_pretrained(tmp_path / "arm/model", dtype=torch.float32)
    wanted = load_file(given / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(model.image_decoder.vae.state_dict()[name], x.float()) for name, x in wanted.items())
    assert model.image_decoder.scheduler.alphas_cumprod[-1] == 0  # the later stage's schedule
    assert model.image_decoder.sampler(ImageSettings(num_inference_steps=4)).timesteps[0] == 999


@pytest.mark.slow
def test_two_processes_train_one_model(tmp_path: Path) -> None:
    well, said = run_together(2, "tests.toyworld.two_ranks", "run", tmp_path, OMP_NUM_THREADS="1")
    assert well, said[-3000:]
    state = json.loads((tmp_path / "state.json").read_text())
    assert [part["to"] for part in state["parts"]] == [2, 3]
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "step" in line] == [2, 3]
    assert all(line["processes_apart"] == 0 for line in lines if "processes_apart" in line)
    one, two = (load_file(tmp_path / f"{rank}.safetensors") for rank in range(2))
    assert all(torch.equal(value, two[name]) for name, value in one.items())
    assert MMInterleaved.from_pretrained(tmp_path / "model") is not None


@pytest.mark.slow
def test_a_run_stops_in_time_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("toyworld.small.run.HELD_OUT", 1)
    document = Stage("documents", "documents", 4, warmup=1, sizes=SIZES_OF_ROWS, asked=0.5, phases=load_config(
        ROOT / "configs/small/recipe.yaml", Recipe, ["stages.1.phases.0.until=0.5"]).stages[1].phases)  # fmt: skip
    recipe = Recipe(TINY, 1, [Stage("autoencoder", "images", 2, images=2), document])

    def call(limit: int) -> bool:
        run = Run(recipe, tmp_path, 1e6, Ranks(torch.device("cpu")), workers=0)
        steps = iter([1.0] * limit)
        monkeypatch.setattr(Run, "left", property(lambda self: 100.0 * next(steps, 0.0)))
        return run.go()

    assert not call(6)  # of each stage one for its start and one for a step
    state = json.loads((tmp_path / "state.json").read_text())
    assert 0 < state["step"] < 4
    assert (tmp_path / "optimizer.safetensors").is_file()
    assert call(100)
    parts = json.loads((tmp_path / "state.json").read_text())["parts"]
    assert [part["stage"] for part in parts] == ["autoencoder", "documents", "documents"]
    assert len({part["seed"] for part in parts}) == 3
    assert parts[1]["to"] == parts[2]["from"]
    assert not (tmp_path / "optimizer.safetensors").exists()
    model = MMInterleaved.from_pretrained(tmp_path / "model", dtype=torch.float32)
    assert model.config.image_decoder.vae["scaling_factor"] != 0.18215
    assert set(load_file(tmp_path / "model" / "readers.safetensors")) == set(Readers(model.config).state_dict())
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert "val_image_with_other_conditions" in lines[-1]
    assert lines[-1]["sha256"] == parts[-1]["sha256"]


def test_losses_of_the_autoencoder_by_hand() -> None:
    flat = torch.zeros(1, 3, 16, 16)
    assert edge_loss(flat + 0.5, flat) == 0.0  # an offset is no edge
    step = flat.clone()
    step[..., 8:] = 1.0
    scales = [1 / 15, 1 / 7, 1 / 3]  # one edge among 15, 7 and 3 differences
    assert edge_loss(step, flat).item() == pytest.approx(sum(scales) / 3)
    assert psnr(flat + 0.2, flat).item() == pytest.approx(20.0, abs=1e-3)  # 0.1 of the range
    noise = torch.Generator().manual_seed(0)
    assert latent_scale(4 * torch.randn(10_000, generator=noise)) == pytest.approx(0.25, 0.03)
    with pytest.raises(ValueError, match="has not learned anything"):
        latent_scale(torch.ones(5))


def test_the_model_that_ships_has_the_shape_of_the_recipe() -> None:
    recipe = load_config(ROOT / "configs/small/recipe.yaml", Recipe)
    wanted, found = recipe.shape.config().to_dict(), load("small").model.config.to_dict()
    for tree in (wanted, found):
        tree["image_decoder"]["vae"].pop("scaling_factor")
        tree["vision_config"].pop("dtype")
    for part in ("vision_config", "adapter", "visual_resampler", "mmfs", "image_decoder", "isolate_documents"):
        assert found[part] == wanted[part], part

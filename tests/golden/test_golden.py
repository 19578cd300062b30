"""Every case of a golden folder, by kind. `case` is the case's name."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mm_interleaved.checkpoints.original import derived_tensors
from mm_interleaved.model.image_decoder import NoiseSamples
from mm_interleaved.model.language_model import image_features
from mm_interleaved.model.layout import visible_images
from mm_interleaved.model.mmfs import MMFS, VisibleImages, mmfs_reference
from mm_interleaved.model.unet import EarlierImages
from mm_interleaved.ops import deformable_attention, deformable_attention_reference
from mm_interleaved.processor import build_labels

from ..conftest import golden_bytes, visible_in_mask
from . import test_golden_generation
from .golden_set import GoldenSet, kind, strided


def test_every_kind_of_case_has_a_test(golden: GoldenSet) -> None:
    tests = {**globals(), **vars(test_golden_generation)}.values()
    here = {test.kind for test in tests if hasattr(test, "kind")}
    assert {case["kind"] for case in golden.cases.values()} <= here


def test_state_dict_is_used_completely(golden: GoldenSet) -> None:
    """Every key of the original is one of our parameters, or derivable and equal to what we derive."""
    derived = derived_tensors(golden.config)
    ours = dict(golden.model.named_parameters())
    used = set()
    for name, tensor in golden.state_dict.items():
        if name in derived:
            assert torch.equal(derived[name]().to(tensor.dtype), tensor), name
            continue
        parameter = golden.names.ours(name)
        assert parameter in ours, f"{name} has no place"
        assert ours[parameter].shape == tensor.shape
        assert golden.names.theirs(parameter) == name
        used.add(parameter)
    assert used == set(ours)


def test_trainable_flags(golden: GoldenSet) -> None:
    flags = golden.description["parameters"]["requires_grad"]
    for name, parameter in golden.model.named_parameters():
        assert parameter.requires_grad == flags[golden.names.theirs(name)], name


# ---- MMFS alone


def _mmfs(golden: GoldenSet, case: str) -> tuple[MMFS, int]:
    """The module of a case, and the base size of its offsets."""
    prefix = golden.cases[case]["params"]["module"] + "."
    weights = {k.removeprefix(prefix): v for k, v in golden.state_dict.items() if k.startswith(prefix)}
    decoder = golden.config.image_decoder
    if golden.cases[case]["params"]["kind"] == "llm":
        config, base = golden.config.mmfs, golden.config.mmfs.base_size
    else:
        config = decoder.mmfs
        block = re.search(r"mmfs_down_blocks\.(\d+)", prefix)
        base = decoder.skip_shapes()[int(block[1]) if block else -1][1]
    config = replace(config, max_images=len(weights["query_relpos.weight"]))
    query_size, feature_size = weights["dynamic_offset_mask.weight"].shape[0], weights["value_proj.weight"].shape[1]
    module = MMFS(config, query_size, feature_size)
    module.load_state_dict(weights)
    return module, base


def _dense_mask(mask: Tensor, length: int) -> Tensor:
    mask = mask[:, None].expand(-1, length, -1) if mask.dim() == 2 else mask
    return mask if mask.shape[1] == length else mask[:, -1:].expand(-1, length, -1)


@pytest.mark.parametrize("form", ["reference", "fast", "derived"])
@kind("mmfs")
def test_mmfs(golden: GoldenSet, case: str, form: str) -> None:
    module, base = _mmfs(golden, case)
    x = golden.tensors(case)
    query, features = x["in.query"].requires_grad_(), x["in.features"].requires_grad_()
    shapes = [tuple(s) for s in x["in.spatial_shapes"].tolist()]
    reference = x["in.reference_points"][:, :, 0]
    batch, length, width = query.shape
    if form == "reference":
        values = module.project(features)
        out, locations, weights = mmfs_reference(module, query, values, x["in.mask"].float(), shapes, reference, base)
        if "out.sampling_locations" in x:
            golden.close(case, "sampling_locations", locations, x["out.sampling_locations"])
            golden.close(case, "attention_weights", weights, x["out.attention_weights"])
    else:
        x.leave("sampling_locations|attention_weights")
        flat = features.flatten(0, 1)
        derived = module.derive_query() if form == "derived" else None
        visible = visible_in_mask(_dense_mask(x["in.mask"], length))
        points = reference.expand(batch, -1, -1).reshape(-1, 1, 2)
        given = module.project(flat), visible, shapes, points, base, derived
        out = module(query.reshape(-1, 1, width), *given).view(query.shape)
    golden.close(case, "output", out, x["out.output"])
    if form == "derived":  # for inference only
        x.leave("grad_.*")
        return
    out.backward(x["in.cotangent"])
    golden.close(case, "grad_query", query.grad, x["out.grad_query"])
    golden.close(case, "grad_features", features.grad, x["out.grad_features"])
    for name, parameter in module.named_parameters():
        golden.close(case, f"grad_param.{name}", parameter.grad, x[f"out.grad_param.{name}"])


@pytest.mark.parametrize("form", [deformable_attention, deformable_attention_reference])
@kind("msda")
def test_deformable_attention(golden: GoldenSet, case: str, form: Callable) -> None:
    x = golden.tensors(case)
    value, locations, weights = (
        x[f"in.{k}"].requires_grad_() for k in ("value", "sampling_locations", "attention_weights")
    )
    out = form(value, [tuple(s) for s in x["in.spatial_shapes"].tolist()], locations, weights)
    golden.close(case, "output", out, x["out.output"])
    out.backward(x["in.cotangent"])
    golden.close(case, "grad_value", value.grad, x["out.grad_value"])
    golden.close(case, "grad_sampling_locations", locations.grad, x["out.grad_sampling_locations"])
    golden.close(case, "grad_attention_weights", weights.grad, x["out.grad_attention_weights"])


# ---- parts of the model


@kind("vt")
def test_visual_tokenizer(golden: GoldenSet, case: str) -> None:
    x = golden.tensors(case)
    model = golden.model.eval()
    with torch.no_grad():
        features = model.encode_images(golden.pixels(x["in.image_idx"]))
    golden.close(case, "vis_embed", features.tokens, x["out.vis_embed"])
    positions = model.visual_tokenizer.grid_positions()
    golden.close(case, "image_embeds", features.last_hidden_state[:, 1:] + positions, x["out.image_embeds"])
    for level, maps in enumerate(features.pyramid):
        if f"out.multiscale_{level}" in x:
            golden.close(case, f"multiscale_{level}", maps, x[f"out.multiscale_{level}"])
        if f"out.multiscale_{level}_image0" in x:
            golden.close(case, f"multiscale_{level}_image0", maps[0], x[f"out.multiscale_{level}_image0"])
        if f"out.multiscale_{level}_strided" in x:
            golden.close(case, f"multiscale_{level}_strided", *strided(maps, x[f"out.multiscale_{level}_strided"]))
        golden.close_stats(case, f"multiscale_{level}_stats", maps, x[f"out.multiscale_{level}_stats"])


@pytest.mark.parametrize("implementation", ["fast", "reference"])
@kind("prefill")
def test_prefill(golden: GoldenSet, case: str, implementation: str) -> None:
    x, model, config = golden.tensors(case), golden.model.eval(), golden.config
    ids, mask = x["in.text_ids"], x["in.attention_mask"]
    real = mask.bool()
    layers, hooks = {}, []
    for index, layer in enumerate(model.language_model.layers):
        hooks.append(layer.register_forward_hook(lambda _m, _i, out, index=index: layers.update({index: out})))
    model.set_mmfs_implementation(implementation)
    try:
        with torch.no_grad():
            pixels = golden.pixels(x["in.image_idx"])
            out = model(ids, mask, x.get("in.position_ids"), pixel_values=pixels)
            features = model.encode_images(pixels)
            embeds = model.embed(ids, features.tokens)
    finally:
        model.set_mmfs_implementation("fast")
        for hook in hooks:
            hook.remove()
    golden.close(case, "mm_embeds", embeds, x["out.mm_embeds"], real)
    golden.close(case, "last_hidden_state", out.last_hidden_state, x["out.last_hidden_state"], real)
    golden.close(case, "text_logits", out.logits, x["out.text_logits"], real)
    for name in x:
        if match := re.fullmatch(r"out\.hidden_state_after_layer_(\d+)", name):
            golden.close(case, name.removeprefix("out."), layers[int(match[1])], x[name], real)

    images = visible_images(ids, torch.ones_like(mask), config.bos_token_id, config.soi_token_id)
    dense = VisibleImages(images.flatten(0, 1), images).mask(len(pixels)).view(*ids.shape, -1)
    per_row = x["in.num_image_per_seq"].tolist()
    rows = [dense[b, :, sum(per_row[:b]) : sum(per_row[: b + 1])] for b in range(len(per_row))]
    expected = x["out.cross_attention_mask"]
    for b, row in enumerate(rows):
        assert torch.equal(row.float()[real[b]], expected[b, :, : per_row[b]][real[b]])
        assert not expected[b, :, per_row[b] :][real[b]].any()
    memory = image_features(model.config, model.encode_images(pixels).pyramid).features
    stored = torch.zeros(len(per_row), max(per_row), *memory.shape[1:])
    for b, n in enumerate(per_row):
        stored[b, :n] = memory[sum(per_row[:b]) : sum(per_row[: b + 1])]
    step = -(-stored.shape[2] // x["out.mmfs_features_mm_strided"].shape[2])
    golden.close(case, "mmfs_features_mm_strided", stored[:, :, ::step], x["out.mmfs_features_mm_strided"])
    golden.close_stats(case, "mmfs_features_mm_stats", stored, x["out.mmfs_features_mm_stats"])


# ---- training


def _labels(golden: GoldenSet, x: dict[str, Tensor], params: dict) -> Tensor:
    config, ids = golden.config, x["in.text_ids"]
    ignored = golden.description["model"]["dataset_to_ignore_noimage_cond_loss"]
    offsets = params.get("ignore_prompt_token_offset", 0)
    offsets = torch.tensor(offsets if isinstance(offsets, list) else [offsets] * len(ids))
    return build_labels(
        ids,
        x["in.attention_mask"],
        bos_token_id=config.bos_token_id,
        soi_token_id=config.soi_token_id,
        image_token_id=config.image_token_id,
        learned=torch.arange(ids.shape[1]) >= offsets[:, None],
        ignore_text_before_image=params["meta"]["dataset_name"] in ignored,
    )


@kind("train")
def test_training(golden: GoldenSet, case: str) -> None:
    x, params = golden.tensors(case), golden.cases[case]["params"]
    model = golden.model.train()
    model.zero_grad()
    labels = _labels(golden, x, params)
    golden.close(case, "gt_text_ids", labels[:, 1:], x["out.gt_text_ids"])
    draws = NoiseSamples(x["in.uncond_rand"].flatten(), x["in.vae_noise"], x["in.noise"], x["in.timesteps"])
    seen: dict[str, Tensor] = {}

    def watch(module: torch.nn.Module, inputs: tuple, output: Tensor) -> None:
        if module is model.image_decoder.resampler:
            seen["context_features"], seen["context_attention_mask"] = inputs
            seen["perceiver_output"] = output
        else:
            seen["unet_in_noisy_latents"], seen["unet_in_timesteps"], seen["unet_in_encoder_hidden_states"] = inputs[:3]
            seen["earlier"], seen["unet_prediction"] = inputs[3], output

    parts = (model.image_decoder.resampler, model.image_decoder.unet)
    hooks = [part.register_forward_hook(watch) for part in parts]
    target = golden.pixels(x["in.image_dec_idx"], "pool_dec")
    before = target.clone()
    out = model(
        x["in.text_ids"],
        x["in.attention_mask"],
        pixel_values=golden.pixels(x["in.image_idx"]),
        document_starts=x.get("in.nearest_bos_idxs"),
        labels=labels,
        target_pixel_values=target,
        image_loss_mask=x.get("in.image_loss_mask"),
        loss_text_weight=params.get("loss_txt_weight"),
        loss_image_weight=params.get("loss_img_weight"),
        noise_samples=draws,
    )
    for hook in hooks:
        hook.remove()
    model.eval()
    assert torch.equal(target, before)  # the caller's images are left alone
    for name in ("loss", "loss_txt", "loss_img"):
        golden.close(case, name, getattr(out, name), x[f"out.{name}"])
    earlier: EarlierImages = seen.pop("earlier")
    for name, value in seen.items():
        golden.close(case, name, value, x[f"out.{name}"])
    dropped = (seen["unet_in_encoder_hidden_states"] != seen["perceiver_output"]).flatten(1).any(1)
    golden.close(case, "uncond_mask", dropped[:, None, None], x["out.uncond_mask"])
    golden.close(case, "latents", model.image_decoder.encode(target, draws.posterior), x["out.latents"])
    _check_earlier(golden, case, x, earlier)
    if params["backward"]:
        out.loss.backward()
        _check_gradients(golden, case, x)
        model.zero_grad()


def _check_earlier(golden: GoldenSet, case: str, x: dict[str, Tensor], earlier: EarlierImages) -> None:
    """The original gives every image one slot of maps: the previous image's, or zeros."""
    images = earlier.visible.images
    images = torch.cat([images, images.new_full((len(images), 1), -1)], dim=1)[:, :1]
    golden.close(case, "mmfs_mask_img", (images >= 0).long(), x["out.mmfs_mask_img"])
    levels = earlier.features.split([h * w for h, w in earlier.shapes], dim=1)
    for level, (maps, shape) in enumerate(zip(levels, earlier.shapes, strict=True)):
        maps = maps.transpose(1, 2).unflatten(2, shape)
        seen = maps[images.clamp(min=0)] * (images >= 0)[..., None, None, None]
        name = f"mmfs_features_img_{level}"
        if f"out.{name}" in x:
            golden.close(case, name, seen, x[f"out.{name}"])
        if f"out.{name}_strided" in x:
            golden.close(case, f"{name}_strided", *strided(seen, x[f"out.{name}_strided"]))
        golden.close_stats(case, f"{name}_stats", seen, x[f"out.{name}_stats"])


def _check_gradients(golden: GoldenSet, case: str, x: dict[str, Tensor]) -> None:
    parameters = dict(golden.model.named_parameters())
    stored = json.loads(golden_bytes(golden.folder / "cases" / f"{case}.grad_norms.json"))
    norms = stored.get("grad_norms") or stored["norms"]
    assert x["out.grad_norms"].tolist() == [norms[name] for name in sorted(norms)]
    ill_conditioned = set(stored["ill_conditioned"])
    worst = 0.0
    for name, expected in norms.items():
        parameter = parameters[golden.names.ours(name)]
        assert parameter.grad is not None, f"{name} has no gradient"
        error = abs(float(parameter.grad.double().norm()) - expected)
        if expected < 1e-6:
            assert error < 1e-5, name
            continue
        allowed = 1e-2 if name in ill_conditioned else 2e-3
        assert error <= allowed * expected, f"{name}: gradient norm off by {error / expected:.1e}"
        worst = max(worst, error / expected)
    golden.record(case, "gradient norms (largest relative error)", worst, 2e-3)
    with_gradient = {golden.names.theirs(n) for n, p in parameters.items() if p.grad is not None}
    assert with_gradient == set(norms)
    for name in x:
        if name.startswith("out.grad."):
            gradient = parameters[golden.names.ours(name.removeprefix("out.grad."))].grad
            golden.close(case, name.removeprefix("out."), gradient, x[name])

"""Every case of a golden folder, by kind. `case` is the case's name."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace

import PIL.Image
import pytest
import torch
from torch import Tensor

from mm_interleaved.document import Document, Image
from mm_interleaved.generation import InterleavedGenerator, SegmentFinished
from mm_interleaved.generation.settings import GenerationSettings, from_original
from mm_interleaved.generation.text import end_tokens, write
from mm_interleaved.model.config import MMFSConfig
from mm_interleaved.model.image_decoder import DiffusionDraws
from mm_interleaved.model.layout import find_images, previous_images, visible_images
from mm_interleaved.model.mmfs import MMFS, PreparedMMFS, VisibleImages, mmfs_reference
from mm_interleaved.model.original import derived_tensors
from mm_interleaved.model.unet import EarlierImages
from mm_interleaved.ops import deformable_attention, deformable_attention_reference
from mm_interleaved.processor import Batch, build_labels
from mm_interleaved.processor.images import center_crop, to_array, to_picture
from mm_interleaved.processor.packing import TokenStream

from .golden_set import GoldenSet


def kind(name: str) -> Callable:
    """Marks the test that runs the cases of a kind."""

    def mark(function: Callable) -> Callable:
        function.kind = name
        return function

    return mark


def test_every_kind_of_case_has_a_test(golden: GoldenSet) -> None:
    here = {f.kind for f in globals().values() if hasattr(f, "kind")}
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
    config = MMFSConfig(config.hidden_size, config.levels, max_images=len(weights["query_relpos.weight"]))
    query_size, feature_size = weights["dynamic_offset_mask.weight"].shape[0], weights["value_proj.weight"].shape[1]
    module = MMFS(config, query_size, feature_size)
    module.load_state_dict(weights)
    return module, base


def _dense_mask(mask: Tensor, length: int) -> Tensor:
    mask = mask[:, None].expand(-1, length, -1) if mask.dim() == 2 else mask
    return mask if mask.shape[1] == length else mask[:, -1:].expand(-1, length, -1)


@pytest.mark.parametrize("form", ["reference", "fast", "folded"])
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
        flat = features.flatten(0, 1)
        prepared = module.prepare(flat) if form == "folded" else PreparedMMFS(module.project(flat))
        visible = VisibleImages.from_mask(_dense_mask(x["in.mask"], length))
        points = reference.expand(batch, -1, -1).reshape(-1, 1, 2)
        out = module(query.reshape(-1, 1, width), prepared, visible, shapes, points, base).view(query.shape)
    golden.close(case, "output", out, x["out.output"])
    if form == "folded":  # for inference only
        return
    out.backward(x["in.cotangent"])
    golden.close(case, "grad_query", query.grad, x["out.grad_query"])
    golden.close(case, "grad_features", features.grad, x["out.grad_features"])
    for name, parameter in module.named_parameters():
        if f"out.grad_param.{name}" in x:
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
            golden.close(case, f"multiscale_{level}_strided", *_strided(maps, x[f"out.multiscale_{level}_strided"]))
        golden.close_stats(case, f"multiscale_{level}_stats", maps, x[f"out.multiscale_{level}_stats"])


def _strided(full: Tensor, expected: Tensor) -> tuple[Tensor, Tensor]:
    """A map at the stride of a stored sub-sample, and that sub-sample."""
    stride = full.shape[-1] // expected.shape[-1]
    return full[..., ::stride, ::stride], expected


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
    for name, expected in x.items():
        if match := re.fullmatch(r"out\.hidden_state_after_layer_(\d+)", name):
            golden.close(case, name.removeprefix("out."), layers[int(match[1])], expected, real)

    images = visible_images(ids, torch.ones_like(mask), config.bos_token_id, config.soi_token_id)
    dense = VisibleImages(images.flatten(0, 1), images).mask(len(pixels)).view(*ids.shape, -1)
    per_row = x["in.num_image_per_seq"].tolist()
    rows = [dense[b, :, sum(per_row[:b]) : sum(per_row[: b + 1])] for b in range(len(per_row))]
    expected = x["out.cross_attention_mask"]
    for b, row in enumerate(rows):
        assert torch.equal(row.float()[real[b]], expected[b, :, : per_row[b]][real[b]])
        assert not expected[b, :, per_row[b] :][real[b]].any()
    memory = model._look(pixels)[1].features
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
    draws = DiffusionDraws(x["in.uncond_rand"].flatten(), x["in.vae_noise"], x["in.noise"], x["in.timesteps"])
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
        draws=draws,
    )
    for hook in hooks:
        hook.remove()
    model.eval()
    assert torch.equal(target, before)  # the caller's pictures are left alone
    for name in ("loss", "loss_txt", "loss_img"):
        golden.close(case, name, getattr(out, name), x[f"out.{name}"])
    earlier: EarlierImages = seen.pop("earlier")
    for name, value in seen.items():
        golden.close(case, name, value, x[f"out.{name}"])
    golden.close(case, "latents", model.image_decoder.encode(target, draws.posterior), x["out.latents"])
    _check_earlier(golden, case, x, earlier)
    if params["backward"]:
        out.loss.backward()
        _check_gradients(golden, case, x)
        model.zero_grad()


def _check_earlier(golden: GoldenSet, case: str, x: dict[str, Tensor], earlier: EarlierImages) -> None:
    """The original gives every picture one slot of maps: the previous picture's, or zeros."""
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
            golden.close(case, f"{name}_strided", *_strided(seen, x[f"out.{name}_strided"]))
        golden.close_stats(case, f"{name}_stats", seen, x[f"out.{name}_stats"])


def _check_gradients(golden: GoldenSet, case: str, x: dict[str, Tensor]) -> None:
    parameters = dict(golden.model.named_parameters())
    stored = json.loads((golden.folder / "cases" / f"{case}.grad_norms.json").read_text())
    norms = stored.get("grad_norms") or stored["norms"]
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
    golden.report.append((case, "gradient norms (largest relative error)", worst, 2e-3, None))
    with_gradient = {golden.names.theirs(n) for n, p in parameters.items() if p.grad is not None}
    assert with_gradient == set(norms)
    for name, expected in x.items():
        if name.startswith("out.grad."):
            gradient = parameters[golden.names.ours(name.removeprefix("out.grad."))].grad
            golden.close(case, name.removeprefix("out."), gradient, expected)


# ---- generation


def _batch(golden: GoldenSet, x: dict[str, Tensor]) -> Batch:
    counts = x["in.num_image_per_seq"]
    mask = x["in.attention_mask"]
    return Batch(
        input_ids=x["in.text_ids"],
        attention_mask=mask,
        position_ids=(mask.cumsum(1) - 1).clamp(min=0),
        pixel_values=golden.pixels(x["in.image_idx"]),
        image_rows=torch.arange(len(counts)).repeat_interleave(counts),
        document_starts=torch.zeros(int(counts.sum()), dtype=torch.long),
    )


@kind("texts")
def test_texts(golden: GoldenSet, case: str) -> None:
    x, model = golden.tensors(case), golden.model.eval()
    settings = from_original(**golden.cases[case]["params"]["kwargs"]).text
    batch, config = _batch(golden, x), golden.config
    texts = [t for row in model.generate_text(batch, settings) for t in row]
    expected = x["out.text_ids"]
    if settings.num_beams > 1:
        every = model.generate_text(batch, replace(settings, num_return_sequences=settings.num_beams))
        closers = x["out.token_that_closed_hypothesis"].tolist()
        for index, (text, row, closer) in enumerate(zip(texts, expected, closers, strict=True)):
            # The original overwrites the closing token with </s>, so the set names it by the text's ids; a text that
            # two beams closed with different tokens stands in it with either.
            beams = every[index // settings.num_return_sequences]
            assert closer in {-1 if b.end is None else b.end for b in beams if b.ids == text.ids}
            ids = [config.bos_token_id, *text.ids, *([config.eos_token_id] if closer >= 0 else [])]
            assert ids == row[: len(ids)].tolist()
            assert (row[len(ids) :] == config.pad_token_id).all()
        logits = model.lm_head(model.read(batch).last).repeat_interleave(settings.num_beams, 0)
        golden.close(case, "first_step_logits", logits, x["out.first_step_logits"])
        return
    for text, row in zip(texts, expected, strict=True):
        ids = [config.bos_token_id, *text.all_ids]
        assert ids == row[: len(ids)].tolist()
        assert (row[len(ids) :] == config.pad_token_id).all()
    steps = list(write(model.read(batch), settings, [torch.Generator()] * len(texts)))
    active = torch.stack([s.active for s in steps], dim=1)
    logits = torch.stack([s.logits for s in steps], dim=1)
    golden.close(case, "step_logits", logits, x["out.step_logits"], active)


@kind("images")
def test_images(golden: GoldenSet, case: str) -> None:
    x, model, config = golden.tensors(case), golden.model.eval(), golden.config
    settings = from_original(**golden.cases[case]["params"]["kwargs"]).image
    settings.seed = golden.description["model"]["image_decoder_config"]["sd_base_seed"]
    batch = _batch(golden, x)
    targets = x["in.target_image_idxs"].tolist() if "in.target_image_idxs" in x else None
    decoder = model.image_decoder
    steps, conditions, raw = [], [], []
    denoise = decoder.denoise

    def watched(given: Tensor, *arguments: object):
        conditions.append(given)
        for step in denoise(given, *arguments):
            steps.append(step)
            yield step

    decoder.denoise = watched  # looks at the steps of the public call
    hook = decoder.vae.decoder.register_forward_hook(lambda _m, _i, out: raw.append(out))
    try:
        images = model.generate_images(batch, settings, targets)
    finally:
        del decoder.denoise
        hook.remove()
    golden.close(case, "perceiver_output", conditions[0], x["out.perceiver_output"])
    per_run = len(steps) // settings.num_candidates
    golden.close(case, "timesteps", torch.tensor([s.timestep for s in steps[:per_run]]), x["out.timesteps"])
    predictions, latents = (torch.stack([getattr(s, k) for s in steps]) for k in ("prediction", "latents"))
    golden.close(case, "guided_noise_pred_per_step", predictions, x["out.guided_noise_pred_per_step"])
    golden.close(case, "latents_per_step", latents, x["out.latents_per_step"])
    golden.close(case, "image_strided", *_strided(images, x["out.image_strided"]))
    golden.close_stats(case, "image_stats", images, x["out.image_stats"])
    name = "vae_decoded_preclamp_strided"
    golden.close(case, name, *_strided(torch.cat(raw), x[f"out.{name}"]))
    if "out.image" in x:
        golden.close(case, "image", images, x["out.image"])
    positions = find_images(batch.input_ids, batch.attention_mask, config.soi_token_id, None)
    slots = previous_images(positions, 1)
    mask = (torch.cat([slots, slots.new_full((len(slots), 1), -1)], 1)[:, :1] >= 0).long()
    golden.close(case, "mmfs_mask_img", mask, x["out.mmfs_mask_img"])


@kind("scores")
def test_scores(golden: GoldenSet, case: str) -> None:
    x, model, config = golden.tensors(case), golden.model.eval(), golden.config
    scores = []
    for sample in range(golden.cases[case]["params"]["n_samples"]):
        ids, mask = x[f"in.text_ids_{sample}"][None], x[f"in.attention_mask_{sample}"][None]
        pixels = golden.pixels(x["in.image_idx"][sample : sample + 1])
        zero = torch.zeros(1, dtype=torch.long)
        batch = Batch(ids, mask, (mask.cumsum(1) - 1).clamp(min=0), pixels, zero, zero)
        options, lengths = x[f"in.options_ids_{sample}"], x[f"in.options_attn_masks_{sample}"].sum(1)
        chosen = [o[:n].tolist() for o, n in zip(options, lengths, strict=True)]
        scores.append(model.score(batch, [chosen]))
    assert int((x["in.text_ids_0"] == config.soi_token_id).sum()) == 1
    golden.close(case, "scores", torch.tensor(scores), x["out.scores"])


class _PixelsOnly:
    """Stands in for a processor where there are ids but no tokenizer."""

    def __init__(self, golden: GoldenSet) -> None:
        self.size = golden.config.vision_config.image_size
        self.pad = golden.config.pad_token_id
        self.first: Batch | None = None

    def pixels(self, pictures: list[PIL.Image.Image]) -> Tensor:
        return torch.stack([torch.from_numpy(to_array(center_crop(p, self.size))) for p in pictures])

    def decode_text(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))

    def collate(self, streams: list[TokenStream], padding_side: str) -> Batch:
        assert len(streams) == 1
        assert padding_side == "left"
        ids = torch.from_numpy(streams[0].ids)[None]
        zero = torch.zeros(1, dtype=torch.long)
        pixels = self.pixels([image.source for image in streams[0].images])
        return Batch(ids, torch.ones_like(ids), torch.arange(ids.shape[1])[None], pixels, zero, zero)


def _pixels_equal(measured: Tensor, expected: Tensor) -> None:
    """8-bit pictures: a float error of 1e-6 may flip a rounding here and there."""
    difference = (measured.int() - expected.int()).abs()
    assert difference.max() <= 3
    assert (difference > 0).float().mean() < 0.01


@kind("inter")
def test_interleaved(golden: GoldenSet, case: str) -> None:
    x, model, config = golden.tensors(case), golden.model.eval(), golden.config
    params = golden.cases[case]["params"]
    given = from_original(**params["kwargs"])
    given.image.seed = golden.description["model"]["image_decoder_config"]["sd_base_seed"]
    settings = GenerationSettings(
        given.text,
        given.image,
        max_turns=params["num_iter"],
        stop_at_eos=False,
        force_image=params["force_gen_image_next"],
    )
    processor = _PixelsOnly(golden)
    ids = x["in.text_ids"][0]
    images = [Image(to_picture(p.numpy())) for p in golden.pixels(x["in.image_idx"])]
    stream = TokenStream(ids.numpy(), (ids >= 0).numpy(), images)
    generator = InterleavedGenerator(model, processor, settings)
    generator.plan = lambda document: generator_plan(stream)
    turn, before = 0, ids.tolist()
    for event in generator.run([Document()]):
        if not isinstance(event, SegmentFinished):
            continue
        assert event.turn == turn
        row = generator.rows[0]
        if f"out.iter{turn}_generated_ids" in x:
            golden.close(case, f"iter{turn}_text_ids_in", torch.tensor([before]), x[f"out.iter{turn}_text_ids_in"])
            generated = x[f"out.iter{turn}_generated_ids"][0].tolist()
            assert [config.bos_token_id, *event.ids] == generated
            draws_next = x[f"out.iter{turn}_gen_image_next_and_stopped"].tolist()[0]
            before = row.ids + ([config.soi_token_id] + [config.image_token_id] * config.num_image_tokens) * draws_next
        else:
            golden.close(case, f"iter{turn}_text_ids_in", torch.tensor([before]), x[f"out.iter{turn}_text_ids_in"])
            picture = event.candidates[0]
            drawn = torch.from_numpy(to_array(center_crop(picture, picture.width)) * 255).round()
            _pixels_equal(drawn, x[f"out.iter{turn}_image_u8"][0])
            _pixels_equal((processor.pixels([picture])[0] * 255).round(), x[f"out.iter{turn}_new_image_tensor_u8"])
            before = list(row.ids)
        turn += 1
    assert turn == params["num_iter"]
    assert generator.rows[0].ids == x["out.final_text_ids"][0].tolist()
    soi = generator.rows[0].ids.count(config.soi_token_id)
    assert [soi] == x["out.final_num_image_per_seq"].tolist()
    assert end_tokens(model) == [config.eos_token_id, config.soi_token_id]


def generator_plan(stream: TokenStream):
    from collections import deque

    return deque([stream])

"""The whole model: losses, masks, precision, and the machinery around it."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mm_interleaved import (
    Batch,
    Document,
    Image,
    ImageSettings,
    MMInterleaved,
    MMInterleavedConfig,
    MMInterleavedProcessor,
    Text,
    TextSettings,
)
from mm_interleaved.model.config import _debug
from mm_interleaved.training.checkpointing import disable_checkpointing, enable_checkpointing

from ..conftest import awaken, make_image


def documents() -> list[Document]:
    return [
        Document([Text("a red house"), Image(make_image(1)), Text("and the same at night"), Image(make_image(2))]),
        Document([Image(make_image(3)), Text("a boat")]),
        Document([Text("no image here")]),
    ]


@pytest.fixture(scope="module")
def batch(processor: MMInterleavedProcessor) -> Batch:
    return processor(documents(), training=True)


def noise(model: MMInterleaved, count: int = 3):
    return model.image_decoder.sample_noise(count, torch.Generator().manual_seed(0))


# ---- losses


@torch.no_grad()
def test_losses_add_up(model: MMInterleaved, batch: Batch) -> None:
    out = model(**batch, noise_samples=noise(model))
    torch.testing.assert_close(out.loss, out.loss_txt + 10 * out.loss_img)
    out = model(**batch, noise_samples=noise(model), loss_text_weight=0.5, loss_image_weight=2.0)
    torch.testing.assert_close(out.loss, 0.5 * out.loss_txt + 2 * out.loss_img)


@torch.no_grad()
def test_a_branch_without_weight_is_not_computed(model: MMInterleaved, batch: Batch) -> None:
    ran: list[str] = []
    hooks = [
        module.register_forward_hook(lambda _m, _i, _o, name=name: ran.append(name))
        for name, module in {"head": model.lm_head, "unet": model.image_decoder.unet}.items()
    ]
    text_only = model(**batch, noise_samples=noise(model), loss_image_weight=0.0)
    assert set(ran) == {"head"}
    ran.clear()
    image_only = model(**batch, noise_samples=noise(model), loss_text_weight=0.0)
    assert set(ran) == {"unet"}
    for hook in hooks:
        hook.remove()
    assert text_only.loss_img is None
    assert image_only.loss_txt is None


@torch.no_grad()
def test_logits_on_request(model: MMInterleaved, batch: Batch) -> None:
    assert model(**batch, noise_samples=noise(model)).logits is None
    logits = model(**batch, noise_samples=noise(model), return_logits=True).logits
    assert logits.shape == (*batch.input_ids.shape, model.config.vocab_size)
    targets = batch.labels[:, 1:]
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets.flatten(), ignore_index=-100)
    torch.testing.assert_close(model(**batch, noise_samples=noise(model)).loss_txt, expected)


def test_nothing_to_learn_gives_zero_with_a_gradient(model: MMInterleaved, batch: Batch) -> None:
    out = model(batch.input_ids, batch.attention_mask, pixel_values=batch.pixel_values,
                labels=torch.full_like(batch.labels, -100))  # fmt: skip
    assert out.loss == 0
    out.loss.backward()
    assert model.lm_head.new.weight.grad is not None
    model.zero_grad()


@torch.no_grad()
def test_zero_images_in_the_batch(model: MMInterleaved, processor: MMInterleavedProcessor) -> None:
    batch = processor(Document([Text("no image at all")]), training=True)
    out = model(**batch)
    assert out.loss_img is None
    assert out.loss == out.loss_txt > 0


@torch.no_grad()
def test_the_caller_keeps_its_images(model: MMInterleaved, batch: Batch) -> None:
    before = batch.pixel_values.clone(), batch.target_pixel_values.clone()
    model(**batch, noise_samples=noise(model))
    assert torch.equal(batch.pixel_values, before[0])
    assert torch.equal(batch.target_pixel_values, before[1])


def test_eight_bit_images_are_the_same_images(model: MMInterleaved, batch: Batch) -> None:
    """Loaders leave them so, to move a quarter of the bytes."""
    raw = {n: (batch[n] * 255).round().to(torch.uint8) for n in ("pixel_values", "target_pixel_values")}
    expected = model(**batch, noise_samples=noise(model))
    found = model(**{**batch, **raw}, noise_samples=noise(model))
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-6, atol=1e-6)


def test_explicit_generator_decides(model: MMInterleaved, batch: Batch) -> None:
    losses = [model(**batch, generator=torch.Generator().manual_seed(s)).loss_img.item() for s in (1, 1, 2)]
    assert losses[0] == losses[1] != losses[2]


# ---- rows do not touch each other


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_equals_its_rows(model: MMInterleaved, processor: MMInterleavedProcessor, side: str) -> None:
    together = processor(documents(), padding_side=side)
    hidden = model(
        together.input_ids, together.attention_mask, together.position_ids, together.pixel_values
    ).last_hidden_state
    assert hidden.isfinite().all()
    for row, document in enumerate(documents()):
        alone = processor(document)
        expected = model(alone.input_ids, pixel_values=alone.pixel_values).last_hidden_state[0]
        torch.testing.assert_close(hidden[row][together.attention_mask[row].bool()], expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_packed_documents_share_attention_but_not_images(
    model: MMInterleaved, processor: MMInterleavedProcessor
) -> None:
    """Self-attention crosses documents, MMFS does not; `isolate_documents` stops the former."""
    pair = [Document([Image(make_image(1)), Text("a")]), Document([Image(make_image(2)), Text("b")])]
    packed = processor(pair, packing=True)
    second = processor(pair[1])
    length = second.input_ids.shape[1]

    def last_document(model: MMInterleaved, positions: Tensor | None = None) -> Tensor:
        out = model(packed.input_ids, packed.attention_mask, positions, packed.pixel_values)
        return out.last_hidden_state[0, -length:]

    alone = model(second.input_ids, pixel_values=second.pixel_values).last_hidden_state[0]
    assert not torch.allclose(last_document(model), alone, atol=1e-3)
    isolated = copy.deepcopy(model)
    isolated.config.isolate_documents = True
    torch.testing.assert_close(last_document(isolated), alone, rtol=1e-4, atol=1e-4)


# ---- other decoders, other sizes


def tree(model_type: str) -> dict:
    config = _debug()
    config["text_config"] |= {"model_type": model_type, "num_key_value_heads": 1, "head_dim": 16, "pad_token_id": None}
    if model_type in ("mistral", "qwen2"):
        config["text_config"] |= {"sliding_window": 64}
    return config


@torch.no_grad()
@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3"])
def test_decoders_through_the_same_code(model_type: str, processor: MMInterleavedProcessor, batch: Batch) -> None:
    torch.manual_seed(0)
    model = awaken(MMInterleaved(MMInterleavedConfig(**tree(model_type)))).eval()
    out = model(**batch, noise_samples=noise(model), return_logits=True)
    assert out.loss.isfinite()
    other = batch.pixel_values.clone()
    other[0] = 1 - other[0]
    changed = model(**{**batch, "pixel_values": other}, noise_samples=noise(model), return_logits=True)
    assert not torch.allclose(out.logits[0], changed.logits[0])
    assert torch.equal(out.logits[2], changed.logits[2])
    assert model.config.text_config.model_type == model_type


@torch.no_grad()
@pytest.mark.parametrize(("patch", "image", "tokens", "layers"), [(8, 48, 3, 8), (14, 28, 5, 4)])
def test_other_images_grids_and_tokens(patch: int, image: int, tokens: int, layers: int, tokenizer) -> None:
    """Nothing is tied to 224 px, a 16 x 16 grid, 24 layers, 512 px or 64 tokens."""
    config = _debug()
    grid = image // patch
    sides = [4 * grid, 2 * grid, grid, grid // 2]
    config["vision_config"] |= {"patch_size": patch, "image_size": image, "num_hidden_layers": layers}
    config["visual_resampler"]["num_queries"] = tokens
    config["mmfs"] |= {"levels": sides[2:], "base_size": None}
    config["image_decoder"]["mmfs"]["levels"] = sides
    config["image_decoder"] |= {"image_size": 64}
    model = MMInterleaved(MMInterleavedConfig(**config)).eval()
    processor = MMInterleavedProcessor.for_model(model.config, tokenizer)
    batch = processor(documents(), training=True)
    assert batch.pixel_values.shape[-1] == image
    assert batch.target_pixel_values.shape[-1] == 64
    assert model(**batch).loss.isfinite()


# ---- training machinery


def test_frozen_by_configuration() -> None:
    config = MMInterleavedConfig(**(_debug() | {"frozen": [r"language_model\.", r".*\.norm\."]}))
    model = MMInterleaved(config)
    for name, parameter in model.named_parameters():
        frozen = name.startswith("language_model.") or ".norm." in name
        assert parameter.requires_grad == (not frozen), name


def gradients(model: MMInterleaved, batch: Batch) -> dict[str, Tensor]:
    model.zero_grad()
    model(**batch, noise_samples=noise(model)).loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_gradient_checkpointing_gives_the_same_gradients(model: MMInterleaved, batch: Batch) -> None:
    """And it works: every kind of checkpointed layer runs a second time in the backward pass."""
    model = copy.deepcopy(model).train()
    plain = gradients(model, batch)
    model.gradient_checkpointing_enable()
    runs: dict[str, int] = {}
    parts = {
        "decoder layer": model.language_model.layers[0].self_attn.q_proj,
        "CLIP layer": model.visual_tokenizer.encoder.layers[0].mlp.fc1,
        "injector": model.visual_tokenizer.encoder.interactions[0].injector.query_norm,
        "extractor": model.visual_tokenizer.encoder.interactions[0].extractor.mlp_norm,
        "resampler": model.visual_tokenizer.resampler.layers[0].fc1,
        "UNet": model.image_decoder.unet.down_blocks[0].resnets[0].conv1,
        "UNet synchronizer": model.image_decoder.unet.synchronizers[0].mmfs.output_proj,
    }
    for name, module in parts.items():
        module.register_forward_hook(lambda _m, _i, _o, name=name: runs.update({name: runs.get(name, 0) + 1}))
    saved = gradients(model, batch)
    assert runs == dict.fromkeys(parts, 2)
    assert plain.keys() == saved.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(saved[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_selective_checkpointing_computes_less_anew_for_the_same_gradients(model: MMInterleaved, batch: Batch) -> None:
    """The kept matrix products and attention are not repeated."""
    model = copy.deepcopy(model).train()
    found, work = {}, {}
    for kind in ("none", "full", "selective"):
        if kind != "none":
            enable_checkpointing(model, kind == "selective")
        with FlopCounterMode(display=False) as counter:
            found[kind] = gradients(model, batch)
        work[kind] = counter.get_total_flops()
    disable_checkpointing(model)
    assert work["none"] < work["selective"] < work["full"]
    assert gradients(model, batch).keys() == found["none"].keys()
    for kind in ("full", "selective"):
        assert found[kind].keys() == found["none"].keys()
        for name, gradient in found["none"].items():
            torch.testing.assert_close(found[kind][name], gradient, rtol=1e-4, atol=1e-6, msg=f"{kind}, {name}")


def test_a_few_steps_of_training_learn(processor: MMInterleavedProcessor, debug_config: MMInterleavedConfig) -> None:
    torch.manual_seed(0)
    model = MMInterleaved(debug_config).train()
    batch = processor(documents(), training=True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for _ in range(30):
        out = model(**batch, noise_samples=noise(model))
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        losses.append((out.loss_txt.item(), out.loss_img.item()))
    assert losses[-1][0] < 0.7 * losses[0][0]
    assert losses[-1][1] < 0.9 * losses[0][1]


# ---- precision and places


@torch.no_grad()
@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 0.06), (torch.float16, 0.01)])
def test_half_precision(model: MMInterleaved, batch: Batch, tmp_path: Path, dtype: torch.dtype, bound: float) -> None:
    """Relative error of the hidden states against float32: about 8 roundings deep, eps is 0.008 and 0.001."""
    model.save_pretrained(tmp_path)
    half = MMInterleaved.from_pretrained(tmp_path, dtype=dtype)
    assert half.image_decoder.vae.dtype == torch.float32
    assert half.language_model.dtype == dtype
    exact = MMInterleaved.from_pretrained(tmp_path, dtype=torch.float32)
    exact.load_state_dict({k: v.float() for k, v in half.state_dict().items()})
    outs = [m(**batch, noise_samples=noise(m)) for m in (half, exact)]
    real = batch.attention_mask.bool()
    a, b = (o.last_hidden_state.float()[real] for o in outs)
    assert (a - b).norm() / b.norm() < bound
    assert outs[0].loss.dtype == torch.float32
    torch.testing.assert_close(outs[0].loss, outs[1].loss, rtol=bound, atol=0)


@torch.no_grad()
@pytest.mark.slow
def test_compile(model: MMInterleaved, batch: Batch) -> None:
    compiled = torch.compile(copy.deepcopy(model), backend="aot_eager", dynamic=False)
    expected = model(**batch, noise_samples=noise(model), return_logits=True)
    out = compiled(**batch, noise_samples=noise(model), return_logits=True)
    torch.testing.assert_close(out.logits, expected.logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(out.loss, expected.loss, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.slow
def test_offloading_to_disk(
    model: MMInterleaved, processor: MMInterleavedProcessor, batch: Batch, tmp_path: Path
) -> None:
    """Through `device_map`: most weights stay on disk and come in when they are called."""
    model.save_pretrained(tmp_path / "model")
    places = {name: "disk" for name, _ in model.named_children()} | {"context_positions": "cpu", "lm_head": "cpu"}
    offloaded = MMInterleaved.from_pretrained(
        tmp_path / "model", device_map=places, offload_folder=tmp_path / "offloaded", dtype=torch.float32
    )
    assert offloaded.language_model.layers[0].mlp.up_proj.weight.is_meta
    expected = model(**batch, noise_samples=noise(model))
    torch.testing.assert_close(offloaded(**batch, noise_samples=noise(model)).loss, expected.loss, rtol=1e-5, atol=1e-5)
    prompts = processor(documents()[:2], padding_side="left")
    greedy = TextSettings(num_beams=1, max_new_tokens=4)
    assert offloaded.generate_text(prompts, greedy) == model.generate_text(prompts, greedy)
    images = [m.generate_images(prompts, ImageSettings(num_inference_steps=2)) for m in (offloaded, model)]
    torch.testing.assert_close(*images, rtol=1e-4, atol=1e-4)


def test_lora_on_the_decoder(model: MMInterleaved, batch: Batch) -> None:
    base = copy.deepcopy(model)
    config = LoraConfig(
        r=2, target_modules=r"language_model\.layers\.\d+\.self_attn\.(q_proj|v_proj)", init_lora_weights=False
    )
    adapted = get_peft_model(base, config)
    trainable = [n for n, p in adapted.named_parameters() if p.requires_grad]
    assert len(trainable) == 4 * 2 * 2
    assert all("lora" in n for n in trainable)
    out = adapted(**batch, noise_samples=noise(model))
    assert not torch.allclose(out.loss_txt, model(**batch, noise_samples=noise(model)).loss_txt)
    out.loss.backward()
    assert all(p.grad is not None for p in adapted.parameters() if p.requires_grad)


# ---- checked at the edge


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"pixel_values": torch.zeros(2, 3, 56, 56)}, "3 begin-of-image tokens, but there are 2 images"),
        ({"pixel_values": None}, "3 begin-of-image tokens, but there are 0 images"),
        ({"document_starts": torch.zeros(2, dtype=torch.long)}, "2 entries for 3 images"),
    ],
)
def test_counts_that_do_not_match(model: MMInterleaved, batch: Batch, change: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        model(**{**batch, **change})


def test_stray_image_tokens(model: MMInterleaved, batch: Batch) -> None:
    ids = batch.input_ids.clone()
    ids[2, 1] = model.config.image_token_id
    with pytest.raises(ValueError, match="13 image tokens, but 3 images need 12"):
        model(**{**batch, "input_ids": ids})


def test_context_longer_than_the_table(model: MMInterleaved, processor: MMInterleavedProcessor) -> None:
    batch = processor(Document([Text("a " * 520), Image(make_image())]), training=True, max_length=600)
    with pytest.raises(ValueError, match=r"an image has 52\d tokens, but the model has 512 positions"):
        model(**batch)


@torch.no_grad()
def test_the_next_step_takes_the_tokens_that_the_cache_lacks(model: MMInterleaved) -> None:
    cache = model(torch.tensor([[1, 5, 6]]), use_cache=True).past_key_values
    for new in (0, 1, 2):
        ids = torch.arange(1, 4 + new)[None]
        step = model.prepare_inputs_for_generation(ids, cache, torch.ones_like(ids))
        assert torch.equal(step["input_ids"], ids[:, 3:])
        assert torch.equal(step["position_ids"], torch.arange(3, 3 + new)[None])

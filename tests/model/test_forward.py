"""Arguments of `forward`: what other libraries pass is supported or refused in words; KV caches; counts of a step."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Cache, DynamicCache, GenerationMixin, StaticCache

from mm_interleaved import Batch, Document, Image, MMInterleaved, MMInterleavedProcessor, Text, TextSettings
from mm_interleaved.model import MMInterleavedModel

from ..conftest import make_image
from ..generation.test_text import prompts as ragged_prompts


def documents() -> list[Document]:
    return [
        Document(
            [Text("a red house"), Image(make_image(1)), Text("and the same"), Image(make_image(2)), Text("at night")]
        ),
        Document([Image(make_image(3)), Text("a boat")]),
        Document([Text("no image here")]),
    ]


@pytest.fixture
def prompts(processor: MMInterleavedProcessor) -> Batch:
    return processor(documents(), padding_side="left")


# ---- what other libraries pass


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"input_ids": None}, "input_ids is missing"),
        ({"inputs_embeds": torch.zeros(1, 2, 32)}, "inputs_embeds is not supported.*pass input_ids"),
        ({"output_attentions": True}, "output_attentions is not supported; leave it out"),
        ({"output_hidden_states": True}, "output_hidden_states is not supported.*take last_hidden_state"),
        ({"return_dict": False}, r"return_dict=False is not supported.*to_tuple\(\)"),
        ({"attention_mask": torch.zeros(3, 1, 9, 9)}, r"attention_mask must be \[batch, length\], not of shape"),
        ({"attention_mask": torch.ones(3, 4)}, r"attention_mask, after the columns of the cache, is \[3, 4\], but"),
        ({"labels": torch.ones(3, 4)}, r"labels is \[3, 4\], but input_ids is"),
        ({"target_pixel_values": torch.zeros(2, 3, 32, 32)}, "target_pixel_values has 2 entries for 3 images"),
        ({"image_loss_mask": torch.ones(1)}, "image_loss_mask has 1 entries for 3 images"),
        (
            {"image_rows": torch.tensor([0, 1, 1])},
            r"image_rows is \[0, 1, 1\], but input_ids has images in rows",
        ),
    ],
)
def test_refused_in_words(model: MMInterleaved, prompts: Batch, arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        model(**{**prompts, **arguments})


@torch.no_grad()
def test_what_changes_nothing_is_accepted(model: MMInterleaved, prompts: Batch) -> None:
    expected = model(**prompts).logits
    nothing = ("inputs_embeds", "output_attentions", "output_hidden_states", "return_dict", "past_key_values", "labels")
    out = model(**prompts, **dict.fromkeys(nothing), use_cache=False)
    assert torch.equal(out.logits, expected)
    assert out.past_key_values is None
    assert torch.equal(model(**prompts, return_dict=True, output_attentions=False).logits, expected)
    with pytest.raises(TypeError, match="unexpected keyword argument 'token_type_ids'"):
        model(**prompts, token_type_ids=prompts.input_ids)


@torch.no_grad()
def test_logits_of_some_tokens(model: MMInterleaved, prompts: Batch) -> None:
    whole = model(**prompts).logits
    torch.testing.assert_close(model(**prompts, logits_to_keep=2).logits, whole[:, -2:])
    torch.testing.assert_close(model(**prompts, logits_to_keep=torch.tensor([1, 4])).logits, whole[:, [1, 4]])


@torch.no_grad()
def test_conditions_are_what_the_image_decoder_gets(model: MMInterleaved, processor: MMInterleavedProcessor) -> None:
    batch = processor(documents(), training=True)
    got: list[Tensor] = []
    hook = model.image_decoder.resampler.register_forward_hook(lambda _m, _i, output: got.append(output))
    conditions = model(**batch, return_conditions=True).conditions
    hook.remove()
    assert len(conditions) == 3
    assert torch.equal(conditions, got[0])
    assert model(**batch).conditions is None


# ---- KV caches of transformers


def cache_of(kind: str, model: MMInterleaved, rows: int) -> Cache | None:
    config = model.config.text_config
    return {
        "none given": lambda: None,
        "dynamic": lambda: DynamicCache(config=config),
        "static": lambda: StaticCache(config=config, max_cache_len=64),
    }[kind]()


@torch.no_grad()
@pytest.mark.parametrize("kind", ["none given", "dynamic", "static"])
def test_a_cache_continues_rows_with_several_images(model: MMInterleaved, prompts: Batch, kind: str) -> None:
    words = torch.tensor([[40, 41, 42], [43, 44, 45], [46, 47, 48]])
    whole = {**prompts, "input_ids": torch.cat([prompts.input_ids, words], 1)}
    whole["attention_mask"] = torch.cat([prompts.attention_mask, torch.ones_like(words)], 1)
    whole["position_ids"] = (whole["attention_mask"].cumsum(1) - 1).clamp(min=0)
    expected = model(**whole).logits[:, -3:]

    out = model(**prompts, past_key_values=cache_of(kind, model, len(words)), use_cache=True)
    found, length = [], prompts.input_ids.shape[1]
    for step in range(3):
        out = model(
            words[:, step : step + 1],
            whole["attention_mask"][:, : length + step + 1],
            whole["position_ids"][:, length + step : length + step + 1],
            past_key_values=out.past_key_values,
        )
        found.append(out.logits)
    torch.testing.assert_close(torch.cat(found, 1), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_cache_of_transformers_writes_what_ours_does(
    model: MMInterleaved, processor: MMInterleavedProcessor, kind: str, side: str
) -> None:
    """Token by token, ragged rows with no, one and two images."""
    batch, config = ragged_prompts(processor, side), model.config
    settings = TextSettings(num_beams=1, max_new_tokens=5, min_new_tokens=5)
    expected = [row[0].ids for row in model.generate_text(batch, settings)]
    mask, found = batch.attention_mask, []
    out = model(**batch, past_key_values=cache_of(kind, model, len(mask)), use_cache=True)
    last = mask.shape[1] - 1 - mask.flip(1).argmax(1)
    logits = out.logits[torch.arange(len(mask)), last]
    for step in range(5):
        logits[:, [config.eos_token_id, config.soi_token_id]] = -torch.inf
        found.append(logits.argmax(-1, keepdim=True))
        positions = mask.sum(1, keepdim=True)
        mask = torch.cat([mask, torch.ones_like(found[-1])], 1)
        if step < 4:
            logits = model(found[-1], mask, positions, past_key_values=out.past_key_values).logits[:, -1]
    assert torch.cat(found, 1).tolist() == expected


@torch.no_grad()
def test_a_cache_keeps_which_images_its_rows_have_seen(model: MMInterleaved, prompts: Batch) -> None:
    cache = model(**prompts, use_cache=True).past_key_values
    assert cache.cached_images.visible.tolist() == [[1, 0], [2, -1], [-1, -1]]
    copied = copy.deepcopy(cache)
    bos = torch.full((3, 1), model.config.bos_token_id)
    model(bos, past_key_values=copied)
    assert copied.cached_images.visible.tolist() == [[-1, -1]] * 3  # another document begins
    with pytest.raises(ValueError, match="pixel_values has 3 images, but only the call that fills past_key_values"):
        model(**{**prompts, "attention_mask": None}, past_key_values=cache)
    with pytest.raises(ValueError, match="past_key_values has 3 rows, but input_ids has 1"):
        model(bos[:1], past_key_values=cache)
    isolated = copy.deepcopy(model)
    isolated.config.isolate_documents = True
    with pytest.raises(ValueError, match="one document a row"):
        isolated(bos, past_key_values=cache)


class Loop(MMInterleavedModel, GenerationMixin):
    """The model in transformers' own generation loop."""


@torch.no_grad()
def test_transformers_own_loop_writes_the_same(model: MMInterleaved, prompts: Batch) -> None:
    loop = Loop(model.config)
    loop.load_state_dict(model.state_dict())
    loop.eval()
    config = model.config
    found = loop.generate(
        **prompts, max_new_tokens=5, do_sample=False, use_cache=True, pad_token_id=config.pad_token_id, eos_token_id=[]
    )
    new = found[:, prompts.input_ids.shape[1] :].tolist()
    written = model.generate_text(prompts, TextSettings(num_beams=1, max_new_tokens=5, min_new_tokens=0))
    for row, texts in zip(new, written, strict=True):
        assert row[: len(texts[0].ids)] == texts[0].ids
        assert texts[0].ids


# ---- counts of an optimizer step


@torch.no_grad()
def test_micro_batches_add_up(model: MMInterleaved, processor: MMInterleavedProcessor) -> None:
    """Text by the count of labels, images by their own, whatever a micro-batch holds."""
    whole = processor(documents(), training=True)
    noise = model.image_decoder.sample_noise(3, torch.Generator().manual_seed(0))
    expected = model(**whole, noise_samples=noise)
    items, images = int((whole.labels != -100).sum()), len(whole.pixel_values)
    shares = [(documents()[:1], slice(0, 2)), (documents()[1:], slice(2, 3))]
    text = image = 0.0
    for part, which in shares:
        batch = processor(part, training=True)
        own = type(noise)(**{name: value[which] for name, value in vars(noise).items()})
        out = model(**batch, noise_samples=own, num_items_in_batch=torch.tensor(items), num_images_in_batch=images)
        text, image = text + out.loss_txt, image + out.loss_img
    torch.testing.assert_close(text, expected.loss_txt, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(image, expected.loss_img, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_without_a_count_of_images_labels_weigh_them(model: MMInterleaved, processor: MMInterleavedProcessor) -> None:
    batch = processor(documents()[:1], training=True)
    noise = model.image_decoder.sample_noise(2, torch.Generator().manual_seed(0))
    alone, items = model(**batch, noise_samples=noise), int((batch.labels != -100).sum())
    counted = model(**batch, noise_samples=noise, num_items_in_batch=items)
    torch.testing.assert_close(counted.loss, alone.loss)
    quarter = model(**batch, noise_samples=noise, num_items_in_batch=4 * items)
    torch.testing.assert_close(quarter.loss, alone.loss / 4)
    batch["labels"] = torch.full_like(batch.labels, -100)
    with pytest.raises(ValueError, match=r"images to learn but no label\. Pass num_images"):
        model(**batch, num_items_in_batch=items)
    assert model(**batch, num_items_in_batch=0, num_images_in_batch=2).loss.isfinite()

"""`model.generate` as users of transformers call it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import DynamicCache, GenerationConfig, StaticCache

from mm_interleaved import (
    Batch,
    Document,
    GenerationSettings,
    Image,
    ImageSettings,
    MMInterleaved,
    MMInterleavedConfig,
    MMInterleavedProcessor,
    Text,
    TextSettings,
)
from mm_interleaved.generation.arguments import settings_from_arguments

from ..conftest import make_image

GREEDY = {"num_beams": 1, "max_new_tokens": 4, "min_new_tokens": 4}


@pytest.fixture(scope="module")
def batch(processor: MMInterleavedProcessor) -> Batch:
    """Prompts of two lengths, padded on the left."""
    return processor(
        [Document([Text("A cat."), Image(make_image(0)), Text("asleep on a")]), Document([Image(make_image(1))])],
        padding_side="left",
    )


def written(model: MMInterleaved, batch: Batch, **settings: object) -> list[list[int]]:
    return [text.all_ids for texts in model.generate_text(batch, TextSettings(**settings)) for text in texts]


# ---- text


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("sample", [False, True])
def test_caches_of_transformers(model: MMInterleaved, processor, side: str, sample: bool) -> None:
    """Rows with no, one and two images, of which some end early."""
    prompts = processor(
        [Document([Text("A cat."), Image(make_image(0)), Text("asleep on a")]), Document([Text("hello")]),
         Document([Image(make_image(1)), Image(make_image(2))])], padding_side=side,
    )  # fmt: skip
    chosen = {"num_beams": 1, "max_new_tokens": 6, "min_new_tokens": 1, "do_sample": sample, "seed": 3}
    expected = model.generate(**prompts, **chosen)
    capacity = prompts["input_ids"].shape[1] + 6
    for cache in (DynamicCache(), StaticCache(config=model.config.text_config, max_cache_len=capacity)):
        assert torch.equal(model.generate(**prompts, **chosen, past_key_values=cache), expected)
    with pytest.raises(ValueError, match="past_key_values is not empty"):
        model.generate(**prompts, **chosen, past_key_values=cache)
    with pytest.raises(ValueError, match="past_key_values takes num_beams=1"):
        model.generate(**prompts, num_beams=2, past_key_values=DynamicCache())


def test_text_gives_the_prompt_and_the_new_tokens(model: MMInterleaved, batch: Batch) -> None:
    """As transformers does for decoder-only models: callers cut the prompt off."""
    ids = model.generate(**batch, **GREEDY)
    prompt = batch["input_ids"]
    assert ids.dtype == torch.long
    assert torch.equal(ids[:, : prompt.shape[1]], prompt)
    assert ids[:, prompt.shape[1] :].tolist() == written(model, batch, **GREEDY)


def test_new_tokens_of_different_lengths_are_padded(model: MMInterleaved, batch: Batch) -> None:
    """Rows that end early are filled with the pad token, behind their end token."""
    settings = {"num_beams": 1, "max_new_tokens": 12, "min_new_tokens": 0}
    new = model.generate(**batch, **settings)[:, batch["input_ids"].shape[1] :]
    for row, ids in zip(new.tolist(), written(model, batch, **settings), strict=True):
        assert row == ids + [model.config.pad_token_id] * (len(row) - len(ids))


def test_several_sequences_follow_each_other(model: MMInterleaved, batch: Batch) -> None:
    settings = {"num_beams": 3, "max_new_tokens": 4, "num_return_sequences": 2}
    ids = model.generate(**batch, **settings)
    length = batch["input_ids"].shape[1]
    assert torch.equal(ids[:, :length], batch["input_ids"].repeat_interleave(2, dim=0))
    new = ids[:, length:].tolist()
    for row, expected in zip(new, written(model, batch, **settings), strict=True):
        assert row[: len(expected)] == expected


def test_decoding_what_was_generated(model: MMInterleaved, processor: MMInterleavedProcessor, batch: Batch) -> None:
    ids = model.generate(**batch, **GREEDY)
    texts = processor.batch_decode(ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    assert [t.strip() for t in texts] == [processor.decode_text(row) for row in written(model, batch, **GREEDY)]


def test_a_chat(model: MMInterleaved, processor: MMInterleavedProcessor) -> None:
    messages = [
        {"role": "user", "content": [{"type": "image", "image": make_image()}, {"type": "text", "text": "Who is it?"}]}
    ]
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    ids = model.generate(**inputs, **GREEDY)
    assert ids.shape == (1, inputs["input_ids"].shape[1] + 4)


def test_sampling_repeats_with_its_seed(model: MMInterleaved, batch: Batch) -> None:
    settings = {"do_sample": True, "num_beams": 1, "temperature": 2.0, "top_p": 0.9, "top_k": 0, "max_new_tokens": 6}
    first, again, other = (model.generate(**batch, **settings, seed=seed) for seed in (1, np.int64(1), 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_generation_config(model: MMInterleaved, batch: Batch) -> None:
    config = GenerationConfig(num_beams=1, max_new_tokens=9, min_new_tokens=4, use_cache=True)
    ids = model.generate(**batch, generation_config=config, max_new_tokens=4)
    assert torch.equal(ids, model.generate(**batch, **GREEDY))


# ---- other modes


def test_images(model: MMInterleaved, batch: Batch) -> None:
    images = model.generate(**batch, generation_mode="image", num_inference_steps=2, guidance_scale=2.0)
    settings = ImageSettings(num_inference_steps=2, guidance_scale=2.0)
    assert torch.equal(images, model.generate_images(batch, settings))


def test_interleaved(model: MMInterleaved, processor: MMInterleavedProcessor) -> None:
    document = Document([Text("A cat."), Image(), Text()])
    (finished,) = model.generate(
        [document], generation_mode="interleaved", processor=processor, num_inference_steps=2, **GREEDY
    )
    assert [type(s) for s in finished.segments] == [Text, Image, Text]
    assert not any(s.is_open for s in finished.segments)


# ---- refusals


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"max_new_token": 3}, r"max_new_token'.*Did you mean 'max_new_tokens'"),
        ({"generation_mode": "video"}, "generation_mode must be .* not 'video'"),
        ({"max_new_tokens": 2.5}, r"max_new_tokens must be a whole number, not 2\.5"),
        ({"use_cache": False}, "use_cache=False is not supported"),
        ({"max_length": 20}, "max_length is not supported: .*max_new_tokens"),
        ({"streamer": object()}, "streamer is not supported: use generate_interleaved"),
        ({"eos_token_id": 5}, "eos_token_id=5 is not supported: the model's is 2"),
        ({"generation_config": {"num_beams": 1}}, "generation_config must be a GenerationConfig"),
    ],
)
def test_what_is_not_taken_is_refused_in_words(model: MMInterleaved, batch: Batch, arguments: dict, words: str) -> None:
    with pytest.raises((ValueError, TypeError), match=words):
        model.generate(**batch, **arguments)


def test_a_batch_without_ids_is_refused(model: MMInterleaved) -> None:
    with pytest.raises((ValueError, TypeError), match="input_ids"):
        model.generate(pixel_values=torch.zeros(1, 3, 56, 56))


# ---- arguments become settings


def applied(debug_config: MMInterleavedConfig, config: GenerationConfig | None = None, **given: object) -> TextSettings:
    return settings_from_arguments(GenerationSettings(), debug_config, config, **given).text


def test_arguments_win_over_the_generation_config(debug_config: MMInterleavedConfig) -> None:
    config = GenerationConfig(num_beams=1, do_sample=True, temperature=0.5, max_new_tokens=9, eos_token_id=2)
    settings = applied(debug_config, config, max_new_tokens=3, top_p=None, output_scores=False, streamer=None)
    assert settings == TextSettings(num_beams=1, do_sample=True, temperature=0.5, max_new_tokens=3)
    assert applied(debug_config, GenerationConfig(), use_cache=True, pad_token_id=3) == TextSettings()


@pytest.mark.parametrize(
    ("config", "given", "words"),
    [
        (GenerationConfig(max_length=30), {}, "max_length is not supported"),
        (GenerationConfig(num_beams=2), {"do_sample": True}, "do_sample needs num_beams=1"),
        (GenerationConfig(eos_token_id=[2, 7]), {}, r"eos_token_id=\[2, 7\] is not supported"),
        (GenerationConfig(no_repeat_ngram_size=3), {}, "unknown setting 'no_repeat_ngram_size'"),
        (None, {"logits_processor": [1]}, "logits_processor is not supported"),
        (None, {"temperature": "hot"}, "temperature must be a number, not 'hot'"),
        (None, {"beams": 2}, "unknown setting 'beams'. Did you mean 'num_beams'"),
    ],
)
def test_arguments_that_have_no_setting(
    debug_config: MMInterleavedConfig, config: GenerationConfig | None, given: dict, words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        applied(debug_config, config, **given)

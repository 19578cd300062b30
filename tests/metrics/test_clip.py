"""CLIP similarities and re-ranking with a tiny model from a folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

from mm_interleaved.metrics.clip import CLIP, ImageSimilarity, TextSimilarity
from tests.conftest import make_image


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> CLIP:
    folder = tmp_path_factory.mktemp("clip")
    letters = "abcdefghijklmnopqrstuvwxyz"
    vocabulary = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    CLIPTokenizer.from_pretrained(folder, local_files_only=True).save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32).save_pretrained(folder)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    ends = {"bos_token_id": 52, "eos_token_id": 53, "pad_token_id": 53}
    config = CLIPConfig(
        text_config=sizes | ends | {"vocab_size": 54, "max_position_embeddings": 77},
        vision_config=sizes | {"image_size": 32, "patch_size": 8},
        projection_dim=8,
    )
    torch.manual_seed(0)
    CLIPModel(config).save_pretrained(folder)
    return CLIP(folder, batch=2)


def test_a_image_is_most_like_itself(clip: CLIP) -> None:
    images = {i: make_image(i) for i in range(5)}
    same = ImageSimilarity(clip)(images, images)
    assert same.values == pytest.approx({"clip_image_image": 1})
    turned = ImageSimilarity(clip)({i: make_image(i + 1) for i in images}, images)
    assert turned.values["clip_image_image"] < 0.9999
    assert turned.values["clip_image_image"] == pytest.approx(sum(turned.per_sample["clip_image_image"].values()) / 5)


def test_vectors_have_length_one_and_do_not_depend_on_the_batch(clip: CLIP) -> None:
    texts = ["a cat", "dog", "a very red fox"]
    whole = clip.embed_texts(texts)
    assert whole.norm(dim=1).tolist() == pytest.approx([1] * 3)
    torch.testing.assert_close(whole, CLIP(clip.folder, batch=1).embed_texts(texts))


def test_vectors_are_those_of_the_model(clip: CLIP) -> None:
    model = CLIPModel.from_pretrained(clip.folder)
    tokens = CLIPTokenizer.from_pretrained(clip.folder)("a cat", padding="max_length", max_length=77)["input_ids"]
    pixels = CLIPImageProcessor.from_pretrained(clip.folder)(make_image(), return_tensors="pt").pixel_values
    with torch.inference_mode():
        outputs = model(input_ids=torch.tensor([tokens]), pixel_values=pixels)
        cosine = float(outputs.logits_per_image[0, 0] / model.logit_scale.exp())
    result = TextSimilarity(clip)({1: make_image()}, {1: "a cat"})
    assert result.values["clip_text_image"] == pytest.approx(cosine, abs=1e-5)


def test_the_best_candidate_is_the_one_with_the_highest_cosine(clip: CLIP) -> None:
    candidates = [make_image(i) for i in range(5)]
    best, cosines = clip.rerank(candidates, "a cat")
    each = [TextSimilarity(clip)({1: one}, {1: "a cat"}).values["clip_text_image"] for one in candidates]
    assert cosines == pytest.approx(each, abs=1e-6)
    assert best == max(range(5), key=each.__getitem__)
    with pytest.raises(ValueError, match="at least one candidate"):
        clip.rerank([], "dog")


def test_long_texts_are_cut(clip: CLIP) -> None:
    long = "dog " * 200
    torch.testing.assert_close(clip.embed_texts([long]), clip.embed_texts([long + "cat"]))


@pytest.mark.parametrize("name", [None, "nowhere"])
def test_no_model_is_said(name: str | None, tmp_path: Path) -> None:
    result = ImageSimilarity(CLIP(tmp_path / name if name else None))({1: make_image()}, {1: make_image()})
    assert result.skipped.startswith("no CLIP model")
    assert "clip-vit-large-patch14" in result.fix

"""A new model out of base components, made here at a tiny size and saved as the libraries save them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, PNDMScheduler, UNet2DConditionModel
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionModel,
    PreTrainedTokenizerFast,
)

from mm_interleaved import MMInterleaved, MMInterleavedConfig, MMInterleavedProcessor, MMInterleavedTokenizer
from mm_interleaved.checkpoints.checkpoint import CheckpointError
from mm_interleaved.checkpoints.components import config_from_components, from_components
from mm_interleaved.cli import main
from mm_interleaved.pretrained import TOKENIZER

CHANGES = {  # the new parts at a size for tests
    "adapter": {"stem_channels": 4, "num_heads": 2},
    "visual_resampler": {"num_queries": 3, "hidden_size": 16, "num_layers": 1, "num_heads": 2, "intermediate_size": 8},
    "mmfs_every": 2,
}


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders `llama`, `qwen2`, `clip` and `diffusion`."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("components")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 2}
    llama = AutoConfig.for_model("llama", vocab_size=2048, max_position_embeddings=256, **sizes)
    AutoModelForCausalLM.from_config(llama).save_pretrained(root / "llama")
    MMInterleavedTokenizer.from_vocab(TOKENIZER).save_vocabulary(str(root / "llama"))
    qwen = AutoConfig.for_model(
        "qwen2", vocab_size=400, max_position_embeddings=256, num_key_value_heads=1, tie_word_embeddings=True, **sizes
    )
    AutoModelForCausalLM.from_config(qwen).save_pretrained(root / "qwen2")
    _byte_level_tokenizer().save_pretrained(root / "qwen2")
    vision = sizes | {"image_size": 28, "patch_size": 7, "hidden_size": 16}
    clip = CLIPConfig(text_config=sizes | {"vocab_size": 99}, vision_config=vision, projection_dim=8)
    CLIPModel(clip).save_pretrained(root / "clip")
    _save_diffusion(root / "diffusion")
    return {name: root / name for name in ("llama", "qwen2", "clip", "diffusion")}


def _byte_level_tokenizer() -> PreTrainedTokenizerFast:
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    raw.train_from_iterator(["a red house"], trainers.BpeTrainer(vocab_size=270, initial_alphabet=alphabet))
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|end|>")


def _save_diffusion(folder: Path) -> None:
    UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 16, 16, 16),
        cross_attention_dim=16,
        attention_head_dim=2,
        norm_num_groups=4,
    ).save_pretrained(folder / "unet")
    AutoencoderKL(
        block_out_channels=(8, 8), norm_num_groups=4, scaling_factor=0.5, sample_size=16,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    ).save_pretrained(folder / "vae")  # fmt: skip
    PNDMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, steps_offset=1,
                  skip_prk_steps=True).save_pretrained(folder / "scheduler")  # fmt: skip
    text = CLIPTextConfig(vocab_size=4, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                          num_attention_heads=2, max_position_embeddings=7, eos_token_id=1, bos_token_id=0)  # fmt: skip
    CLIPTextModel(text).save_pretrained(folder / "text_encoder")
    words = folder / "tokenizer"
    words.mkdir()
    (words / "vocab.json").write_text(json.dumps({"<|startoftext|>": 0, "<|endoftext|>": 1, "a</w>": 2, "a": 3}))
    (words / "merges.txt").write_text("#version: 0.2\n")
    CLIPTokenizer(str(words / "vocab.json"), str(words / "merges.txt")).save_pretrained(words)


def configuration(
    parts: dict[str, Path], llm: str = "llama", vocab: int = 2050, **changes: object
) -> MMInterleavedConfig:
    ids = {"pad_token_id": 3} if llm == "llama" else {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
    config = config_from_components(parts[llm], parts["clip"], parts["diffusion"], vocab, **CHANGES, **ids, **changes)
    tree = config.to_dict()
    tree["image_decoder"]["resampler"] |= {"num_queries": 7, "num_heads": 2, "intermediate_size": 8}
    for mmfs in (tree["mmfs"], tree["image_decoder"]["mmfs"]):
        mmfs |= {"num_heads": 2, "num_points": 2, "hidden_size": 16}
    return MMInterleavedConfig(**tree)


def assemble(parts: dict[str, Path], config: MMInterleavedConfig, llm: str = "llama") -> MMInterleaved:
    return from_components(config, parts[llm], parts["clip"], parts["diffusion"], model_class=MMInterleaved)


def test_sizes_follow_from_the_components(parts: dict[str, Path]) -> None:
    config = configuration(parts)
    assert config.pyramid_sides == [16, 8, 4, 2]
    assert config.mmfs.levels == [8, 4, 2]
    assert config.image_decoder.image_size == 16
    assert config.image_decoder.scheduler["steps_offset"] == 1
    assert (config.soi_token_id, config.image_token_id) == (2048, 2049)


@torch.no_grad()
def test_weights_are_the_components(parts: dict[str, Path]) -> None:
    model = assemble(parts, configuration(parts))
    llm = AutoModelForCausalLM.from_pretrained(parts["llama"])
    ids = torch.tensor([[1, 5, 9, 12]])
    plain = llm.model(ids).last_hidden_state
    torch.testing.assert_close(model(ids).last_hidden_state, plain)  # gates are closed
    logits = model(ids).logits
    torch.testing.assert_close(logits[..., :2048], llm(ids).logits)
    torch.testing.assert_close(logits[..., 2048:], torch.full((1, 4, 2), -5.0))

    clip = CLIPVisionModel.from_pretrained(parts["clip"])
    pixels = torch.randn(1, 3, 28, 28)
    hidden, _ = model.visual_tokenizer.encoder(pixels)
    tower = getattr(clip, "vision_model", clip)
    expected = tower.encoder(tower.pre_layrnorm(tower.embeddings(pixels))).last_hidden_state
    torch.testing.assert_close(hidden, expected)  # injectors are closed

    unet = UNet2DConditionModel.from_pretrained(parts["diffusion"], subfolder="unet")
    arguments = torch.randn(1, 4, 8, 8), torch.tensor([5]), torch.randn(1, 7, 16)
    torch.testing.assert_close(model.image_decoder.unet(*arguments, None), unet(*arguments).sample)

    encoder = CLIPTextModel.from_pretrained(parts["diffusion"], subfolder="text_encoder")
    empty = torch.tensor([[0, *[1] * 6]])
    torch.testing.assert_close(model.image_decoder.negative_prompt(), encoder(empty).last_hidden_state)


@torch.no_grad()
def test_another_language_model_with_tied_and_surplus_embeddings(parts: dict[str, Path]) -> None:
    config = configuration(parts, "qwen2", vocab=273)  # the tokenizer has fewer tokens than the table has rows
    model = assemble(parts, config, "qwen2")
    llm = AutoModelForCausalLM.from_pretrained(parts["qwen2"])
    ids = torch.tensor([[3, 4, 5]])
    torch.testing.assert_close(model(ids).logits[..., :271], llm(ids).logits[..., :271])


def test_the_result_can_be_saved_and_trained(parts: dict[str, Path], tmp_path: Path) -> None:
    model = assemble(parts, configuration(parts))
    model.save_pretrained(tmp_path)
    again = MMInterleaved.from_pretrained(tmp_path)
    for a, b in zip(again.parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b)
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
    assert "language_model.embed_tokens.weight" in frozen
    assert "language_model.layers.0.synchronizer.gate" not in frozen


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("text_config.intermediate_size", 64, "text_config.intermediate_size is 64, but the component says 48"),
        ("vision_config.layer_norm_eps", 1e-6, "vision_config.layer_norm_eps is 1e-06, but the component says 1e-05"),
        (
            "image_decoder.vae.scaling_factor",
            0.18,
            "image_decoder.vae.scaling_factor is 0.18, but the component says 0.5",
        ),
        ("image_decoder.scheduler.steps_offset", 0, "image_decoder.scheduler.steps_offset is 0"),
    ],
)
def test_components_must_agree_with_the_configuration(
    parts: dict[str, Path], path: str, value: object, words: str
) -> None:
    tree = configuration(parts).to_dict()
    *parents, last = path.split(".")
    branch = tree
    for key in parents:
        branch = branch[key]
    branch[last] = value
    with pytest.raises(CheckpointError) as caught:
        assemble(parts, MMInterleavedConfig(**tree))
    assert words in str(caught.value)


@pytest.mark.parametrize("llm", ["llama", "qwen2"])
def test_assemble_command(parts: dict[str, Path], tmp_path: Path, llm: str) -> None:
    vocab = 2050
    config = tmp_path / "config.json"
    wanted = configuration(parts, llm, vocab if llm == "llama" else 273)
    if llm == "qwen2":
        tokenizer = AutoTokenizer.from_pretrained(parts[llm])
        end = tokenizer.eos_token_id
        tree = wanted.to_dict() | {"bos_token_id": end, "eos_token_id": end, "pad_token_id": end}
        vocab = len(tokenizer) + 2
        tree["text_config"]["vocab_size"] = vocab
        wanted = MMInterleavedConfig(**(tree | {"soi_token_id": vocab - 2, "image_token_id": vocab - 1}))
    wanted.save_pretrained(tmp_path)
    arguments = ["--llm", parts[llm], "--clip", parts["clip"], "--diffusion", parts["diffusion"], "--config", config]
    with pytest.raises(SystemExit) as caught:
        main(["assemble", str(tmp_path / "new"), *map(str, arguments)])
    assert caught.value.code == 0
    model = MMInterleaved.from_pretrained(tmp_path / "new")
    processor = MMInterleavedProcessor.from_pretrained(tmp_path / "new")
    assert processor.soi_token_id == model.config.soi_token_id == vocab - 2

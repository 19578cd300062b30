"""Nothing is tied to the golden set at hand: a set of other widths, depths, levels, sizes and ids loads and runs."""

from __future__ import annotations

import copy
import json
import lzma
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mm_interleaved import MMInterleaved
from mm_interleaved.checkpoints.checkpoint import convert_from_original, convert_to_original, read_weights
from mm_interleaved.checkpoints.original import config_from_original
from mm_interleaved.document import Document, Image, Text
from mm_interleaved.generation import SegmentFinished

from ..conftest import awaken, golden_bytes
from .golden_set import CaseTensors, GoldenSet, from_original
from .test_golden import test_state_dict_is_used_completely as check_state_dict
from .test_golden_generation import _generator

BOS, EOS, PAD, IMAGE, SOI = 5, 7, 0, 60, 61  # neither the ids nor their order of the set at hand
TOKENS = 5  # of an image
SIDE = 64  # of a drawn image
DESCRIPTION = {
    "llama": {
        "hidden_size": 40, "intermediate_size": 56, "num_hidden_layers": 6, "num_attention_heads": 2, "vocab_size": 60,
        "max_position_embeddings": 160, "rms_norm_eps": 1e-6, "bos_token_id": 1, "eos_token_id": 2,
        "tie_word_embeddings": False,
    },
    "clip_vision": {
        "hidden_size": 48, "intermediate_size": 40, "num_hidden_layers": 24, "num_attention_heads": 6,
        "image_size": 224, "patch_size": 14, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5,
    },
    "unet": {
        "sample_size": 8, "in_channels": 4, "out_channels": 4, "block_out_channels": [8, 16, 16, 24],
        "layers_per_block": 2, "attention_head_dim": [2, 2, 4, 2], "cross_attention_dim": 24,
        "use_linear_projection": True, "norm_num_groups": 4,
    },
    "vae": {
        "in_channels": 3, "out_channels": 3, "block_out_channels": [4, 8, 8, 12], "layers_per_block": 1,
        "latent_channels": 4, "norm_num_groups": 4, "sample_size": SIDE, "scaling_factor": 0.2,
    },
    "scheduler": {
        "_class_name": "PNDMScheduler", "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
        "num_train_timesteps": 1000, "clip_sample": False, "steps_offset": 1, "prediction_type": "epsilon",
    },
    "model": {
        "seq_len": 160, "txt_vocab_size": 62, "loss_img_weight": 4.0, "loss_txt_weight": 0.5,
        "special_token_dict": {
            "bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD, "soi_token_id": SOI,
            "image_token_id": IMAGE,
        },
        "num_img_token": TOKENS, "image_embed_dim": 48, "cross_attention_frequency": 3, "spatial_shapes": [16, 8],
        "dataset_to_ignore_noimage_cond_loss": ["laion_en"],
        "visual_tokenizer_config": {
            "clip_normalize": True, "grid_size": 16,
            "perceiver_config": {
                "num_queries": TOKENS, "hidden_size": 36, "encoder_hidden_size": 48, "cross_attention_frequency": 2,
                "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 20, "qk_normalization": True,
                "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
            },
        },
        "image_decoder_config": {
            "uncond_prob": 0.2, "seq_len": 9, "embed_dim": 24, "image_size": SIDE, "mmfs_feat_levels": 4,
            "vae_encode_mini_bs": 2, "sd_base_seed": 7,
            "perceiver_config": {
                "num_queries": 9, "hidden_size": 24, "encoder_hidden_size": 40, "cross_attention_frequency": 1,
                "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 28,
                "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
            },
        },
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[GoldenSet, MMInterleaved]:
    """A folder in the golden format with random weights under the original's names, and the model they are from."""
    folder = tmp_path_factory.mktemp("another_set")
    torch.manual_seed(1)
    model = awaken(MMInterleaved(config_from_original(copy.deepcopy(DESCRIPTION)))).eval()
    model.save_pretrained(folder / "ours")
    convert_to_original(folder / "ours", folder / "theirs")
    save_file(read_weights(folder / "theirs" / "pytorch_model.bin"), folder / "state_dict.safetensors")
    (folder / "config.json").write_text(json.dumps(DESCRIPTION))
    (folder / "cases.json").write_text("{}")
    (folder / "cases").mkdir()
    pools = {"pool224": 224, "pool_dec": SIDE}
    pools = {name: torch.randint(0, 256, (6, 3, side, side), dtype=torch.uint8) for name, side in pools.items()}
    save_file(pools, folder / "cases" / "image_pool.safetensors")
    return GoldenSet(folder), model


def _row(*parts: int | str) -> list[int]:
    """Token ids; "i" is an image."""
    return [token for p in parts for token in ([SOI, *[IMAGE] * TOKENS] if p == "i" else [p])]


def _case(rows: list[list[int]], counts: list[int], left: bool = False) -> dict[str, torch.Tensor]:
    """Inputs as golden cases have them."""
    length = max(map(len, rows))
    padded = [[PAD] * (length - len(r)) + r if left else r + [PAD] * (length - len(r)) for r in rows]
    masks = [[0] * (length - len(r)) + [1] * len(r) if left else [1] * len(r) + [0] * (length - len(r)) for r in rows]
    return {
        "in.text_ids": torch.tensor(padded),
        "in.attention_mask": torch.tensor(masks),
        "in.num_image_per_seq": torch.tensor(counts),
        "in.image_idx": torch.arange(sum(counts)),
    }


ROWS = [_row(BOS, 20, 21, "i", 22), _row(BOS, 11, "i", 12, 13, "i", 14, EOS)]
COUNTS = [1, 2]


def test_every_weight_is_used(written: tuple[GoldenSet, MMInterleaved], tmp_path: Path) -> None:
    golden, model = written
    check_state_dict(golden)
    for name, parameter in model.named_parameters():
        assert torch.equal(golden.model.get_parameter(name), parameter), name
    convert_from_original(golden.folder / "state_dict.safetensors", tmp_path / "again", golden.config)
    again = MMInterleaved.from_pretrained(tmp_path / "again")
    for name, parameter in model.named_parameters():
        assert torch.equal(again.get_parameter(name), parameter), name


def test_losses_and_gradients(written: tuple[GoldenSet, MMInterleaved]) -> None:
    golden, _ = written
    x, model = _case(ROWS, COUNTS), golden.model.train()
    ids = x["in.text_ids"]
    labels = torch.where((x["in.attention_mask"] == 0) | (ids == IMAGE) | (ids == BOS), -100, ids)
    model.zero_grad()
    out = model(
        ids, x["in.attention_mask"], pixel_values=golden.pixels(x["in.image_idx"]), labels=labels,
        target_pixel_values=golden.pixels(x["in.image_idx"], "pool_dec"),
        noise_samples=model.image_decoder.sample_noise(sum(COUNTS), torch.Generator().manual_seed(3)),
    )  # fmt: skip
    out.loss.backward()
    model.eval()
    assert torch.isfinite(out.loss)
    torch.testing.assert_close(out.loss, 0.5 * out.loss_txt + 4.0 * out.loss_img)  # the description's weights
    without = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not without
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_the_published_formula_and_the_fast_form(written: tuple[GoldenSet, MMInterleaved]) -> None:
    golden, _ = written
    x, model, logits = _case(ROWS, COUNTS), golden.model.eval(), {}
    for implementation in ("reference", "fast"):
        model.set_mmfs_implementation(implementation)
        with torch.no_grad():
            out = model(x["in.text_ids"], x["in.attention_mask"], pixel_values=golden.pixels(x["in.image_idx"]))
        logits[implementation] = out.logits[x["in.attention_mask"].bool()]
    torch.testing.assert_close(logits["fast"], logits["reference"], rtol=1e-4, atol=1e-4)


def test_texts_images_and_both(written: tuple[GoldenSet, MMInterleaved]) -> None:
    golden, _ = written
    model = golden.model.eval()
    batch = golden.batch(_case(ROWS, COUNTS, left=True))
    for beams in (1, 3):
        settings = from_original(max_length=5, min_length=2, num_beams=beams)
        texts = [text for row in model.generate_text(batch, settings.text) for text in row]
        assert len(texts) == len(ROWS)
        assert all(text.end in (None, EOS, SOI) for text in texts)
    image = from_original(num_inference_steps=2, guidance_scale=3.0, num_validation_images=2).image
    images = model.generate_images(batch, image, targets=[0, 2])
    assert images.shape == (2 * 2, 3, SIDE, SIDE)
    assert torch.isfinite(images).all()

    kwargs = {"max_length": 4, "min_length": 3, "num_beams": 1, "num_inference_steps": 1, "num_validation_images": 1}
    params = {"kwargs": kwargs, "num_iter": 3, "force_gen_image_next": True}
    generator = _generator(golden, _case(ROWS[:1], COUNTS[:1]), params)
    made = [e for e in generator.run([Document()]) if isinstance(e, SegmentFinished)]
    assert [type(e.segment) for e in made] == [Text, Image, Text]
    assert made[1].segment.source.size == (SIDE, SIDE)
    assert generator.rows[0].ids.count(SOI) == COUNTS[0] + 1


def test_a_tensor_that_nothing_compares_is_named(written: tuple[GoldenSet, MMInterleaved]) -> None:
    golden = GoldenSet(written[0].folder)
    x = CaseTensors({name: torch.zeros(1) for name in ("in.a", "out.b", "out.c", "out.grad_d")})
    golden.opened["1_case"] = x
    x.leave("grad_.*")
    assert x["out.b"] == 0
    with pytest.raises(AssertionError, match=r"1_case: nothing compares out\.c"):
        golden.check_nothing_was_left_out()
    assert x["out.c"] == 0
    golden.check_nothing_was_left_out()


def test_errors_are_held_against_the_committed_ones_of_their_own_set(written: tuple[GoldenSet, MMInterleaved]) -> None:
    golden = GoldenSet(written[0].folder)
    assert golden.committed is None
    golden.record("1_case", "a", 1.0, allowed=1.0)  # tolerances only
    golden.committed, golden.noise = {"1_case": {"a": 1e-4, "b": 0.0}}, {"1_case": {"b": 3e-5}}
    golden.record("1_case", "a", 1.9e-4, allowed=1e-2)
    golden.record("1_case", "b", 2e-5, allowed=1e-2)  # the original's own noise
    golden.record("1_case", "b", 1e-4, allowed=1e-2, scale=1e3)  # one rounding of the largest value
    for name, error in (("a", 2.1e-4), ("b", 4e-5)):
        with pytest.raises(AssertionError, match=f"error of {name} was .* and is now"):
            golden.record("1_case", name, error, allowed=1e-2)
    with pytest.raises(AssertionError, match=r"1_case: c is not in errors\.json"):
        golden.record("1_case", "c", 0.0, allowed=1e-2)


def test_a_set_may_be_compressed(written: tuple[GoldenSet, MMInterleaved], tmp_path: Path) -> None:
    plain = (written[0].folder / "state_dict.safetensors").read_bytes()
    (tmp_path / "state_dict.safetensors.xz").write_bytes(lzma.compress(plain, preset=0))
    assert golden_bytes(tmp_path / "state_dict.safetensors") == plain

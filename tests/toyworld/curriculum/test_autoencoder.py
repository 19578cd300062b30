"""The image autoencoder: its losses by hand, its run, and the VAE it hands over to a model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL

from mm_interleaved.configuration import load_config
from mm_interleaved.pretrained import TOKENIZER, load
from mm_interleaved.training.config import TrainConfig
from mm_interleaved.training.run import train
from toyworld.curriculum.autoencoder import edge_loss, latent_scale, psnr, ssim
from toyworld.curriculum.config import AutoencoderRunConfig, ImagesConfig
from toyworld.curriculum.images import ImageLoader, images_of
from toyworld.curriculum.run import train_autoencoder

from ...conftest import make_image
from ...training.stand_in import Colors
from .conftest import ROOT, logged

TINY = [
    "precision=float32", "compile=none", "tensorboard=false", "steps=6", "save_every=3", "log_every=1", "eval_every=6",
    "eval_batches=1", "autoencoder={image_size: 32, block_out_channels: [8, 16], latent_channels: 8, "
    "norm_num_groups: 8, layers_per_block: 1}",
    "schedule.warmup_steps=0", "optimizer.lr=2e-3", "data={batch_size: 4, num_workers: 0}",
    "eval_data={folder: null, batch_size: 8, num_workers: 0}",
]  # fmt: skip


@pytest.fixture
def settings(tmp_path: Path):
    folder = tmp_path / "images"
    folder.mkdir()
    for seed in range(9):
        make_image(seed).save(folder / f"{seed}.png")

    def make(*changes: str, run: str = "vae") -> AutoencoderRunConfig:
        own = [f"output={tmp_path / run}", f"data.folder={folder}", f"eval_data.folder={folder}"]
        return load_config(ROOT / "configs/small/vae.yaml", AutoencoderRunConfig, [*TINY, *own, *changes])

    return make


def test_a_trained_autoencoder_becomes_the_models_own(settings, tmp_path: Path) -> None:
    """8 channels and two sizes of latents: the UNet follows."""
    assert train_autoencoder(settings(), "cpu") is None
    run = tmp_path / "vae"
    assert logged(run, "loss_l1")[6] < logged(run, "loss_l1")[1]
    assert set(logged(run, "eval_psnr")) == {6}
    quality = json.loads((run / "final/quality.json").read_text())
    vae = AutoencoderKL.from_pretrained(run / "final")
    assert vae.config.scaling_factor == pytest.approx(quality["scaling_factor"])
    config = load_config(
        ROOT / "configs/debug.yaml",
        TrainConfig,
        [f"output={tmp_path / 'model'}", "tensorboard=false", "steps=1", "save_every=0", "sample_every=0",
         "eval_every=0", "eval_data=null", f"model.weights=[{{from: {run / 'final'}}}]"],
    )  # fmt: skip
    train(config, TOKENIZER, "cpu", Colors)
    decoder = load(tmp_path / "model/final").model.image_decoder
    assert decoder.latent_shape(1) == (1, 8, 16, 16)
    assert torch.equal(decoder.vae.decoder.conv_in.weight, vae.decoder.conv_in.weight)
    assert decoder.vae.config.scaling_factor == pytest.approx(quality["scaling_factor"])


def test_an_interrupted_autoencoder_run_goes_on_exactly(settings, tmp_path: Path) -> None:
    train_autoencoder(settings(run="whole"), "cpu")
    train_autoencoder(settings("steps=6", run="halves"), "cpu")
    halves = tmp_path / "halves"
    for folder in ("checkpoint-6", "final"):
        (halves / folder).rename(halves / f"old-{folder}")
    train_autoencoder(settings(run="halves"), "cpu")
    new, old = (AutoencoderKL.from_pretrained(halves / f).state_dict() for f in ("final", "old-final"))
    whole = AutoencoderKL.from_pretrained(tmp_path / "whole/final").state_dict()
    assert all(torch.equal(new[n], t) and torch.equal(old[n], t) for n, t in whole.items())
    assert logged(halves) == logged(tmp_path / "whole")


def test_losses_against_values_by_hand() -> None:
    flat = torch.zeros(1, 3, 16, 16)
    assert edge_loss(flat + 0.5, flat) == 0.0  # an offset is no edge
    step = flat.clone()
    step[..., 8:] = 1.0
    scales = [1 / 15, 1 / 7, 1 / 3]  # one edge among 15, 7 and 3 differences
    assert edge_loss(step, flat).item() == pytest.approx(sum(scales) / 3)
    assert psnr(flat + 0.2, flat).item() == pytest.approx(20.0, abs=1e-3)  # 0.1 of the range
    noise = torch.Generator().manual_seed(0)
    noisy = 0.6 * torch.rand(flat.shape, generator=noise)
    assert ssim(noisy, noisy).item() == pytest.approx(1.0)
    assert ssim(noisy, flat).item() < 0.6
    assert latent_scale(4 * torch.randn(10_000, generator=torch.Generator().manual_seed(0))) == pytest.approx(
        0.25, 0.03
    )
    with pytest.raises(ValueError, match="has not learned anything"):
        latent_scale(torch.ones(5))


def test_images_come_once_an_epoch_and_go_on_anywhere() -> None:
    config = ImagesConfig(count=10, batch_size=2, seed=3)
    loader = ImageLoader(config, images_of(config, 44))
    first = [b["images"] for b in loader]
    assert len(first) == 5
    assert len({p.numpy().tobytes() for b in first for p in b}) == 10
    half = ImageLoader(config, images_of(config, 44))
    stream = iter(half)
    next(stream), next(stream)
    resumed = ImageLoader(config, images_of(config, 44))
    resumed.load_state_dict(half.state_dict())
    assert all(torch.equal(b["images"], w) for b, w in zip(resumed, first[2:], strict=True))
    ranks = [
        [p.numpy().tobytes() for b in ImageLoader(config, images_of(config, 44), r, 2) for p in b["images"]]
        for r in range(2)
    ]
    assert len(set(ranks[0]) & set(ranks[1])) == 0
    with pytest.raises(ValueError, match="10 images are fewer than a batch of 20"):
        ImageLoader(few := ImagesConfig(count=10, batch_size=20), images_of(few, 44))

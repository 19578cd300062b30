"""Our blocks in the UNet and the VAE against diffusers' own with the same weights."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.activations import GEGLU
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn

from mm_interleaved import MMInterleaved
from mm_interleaved.model import MMInterleavedConfig
from mm_interleaved.model.diffusion_blocks import VAE, ResnetBlock, Transformer2D, norm_and_activation
from mm_interleaved.model.image_decoder import ImageDecoder
from mm_interleaved.model.unet import MMFSUNet
from mm_interleaved.model.weights import is_intercepted
from mm_interleaved.ops import GroupNorm

RESAMPLING = {
    "down_block_types": ["ResnetDownsampleBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "ResnetUpsampleBlock2D"],
    "block_out_channels": [16, 32],
    "attention_head_dim": [2, 4],
}
UNETS = {
    "as it is": {},
    "with convolutions around attention": {"use_linear_projection": False},
    "other activation": {"act_fn": "gelu"},
    "scaled by time": {"resnet_time_scale_shift": "scale_shift"},
    "residual blocks resample": RESAMPLING,
    "some skip the activation": RESAMPLING | {"resnet_skip_time_act": True},
}


def unet_of(config: MMInterleavedConfig, changes: dict) -> tuple[MMFSUNet, UNet2DConditionModel]:
    """A UNet of ours without synchronizers, and diffusers' own with its weights."""
    decoder = copy.deepcopy(config.image_decoder)
    decoder.mmfs.enabled = False
    decoder.unet |= changes
    ours = ImageDecoder(decoder, 32, config.vision_config.hidden_size).train().unet
    for parameter in ours.parameters():
        nn.init.normal_(parameter, std=0.1)
    theirs = UNet2DConditionModel(**decoder.unet)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def vae_of(decoder: ImageDecoder) -> AutoencoderKL:
    """diffusers' own VAE with the weights of `decoder`'s."""
    theirs = AutoencoderKL(**decoder.config.vae)
    theirs.load_state_dict(decoder.vae.state_dict())
    return theirs.to(decoder.vae.device).eval()


@pytest.mark.parametrize("changes", UNETS.values(), ids=UNETS)
def test_the_unet_is_the_librarys(debug_config: MMInterleavedConfig, changes: dict) -> None:
    """Bit by bit, with its gradients; the same parameters in the same order."""
    ours, theirs = unet_of(debug_config, changes)
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    assert list(ours.state_dict()) == list(theirs.state_dict())
    sample, time, conditions = torch.randn(2, 4, 8, 8), torch.tensor([3, 700]), torch.randn(2, 6, 32)
    found, expected = ours(sample, time, conditions, None), theirs(sample, time, conditions).sample
    assert torch.equal(found, expected)
    for y in (found, expected):
        y.square().sum().backward()
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-5 * float(b.grad.abs().max()), msg=name)


@torch.no_grad()
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_the_vae_is_the_librarys(model: MMInterleaved, training: bool) -> None:
    decoder = copy.deepcopy(model.image_decoder).train(training)
    theirs = vae_of(decoder)
    assert list(decoder.vae.state_dict()) == list(theirs.state_dict())
    images, latents = torch.rand(2, 3, 32, 32), torch.randn(decoder.latent_shape(2))
    posterior = theirs.encode(2 * images - 1).latent_dist
    scale = decoder.vae.config.scaling_factor
    noise = torch.randn_like(latents)
    assert torch.equal(decoder.encode(images, noise), (posterior.mean + posterior.std * noise) * scale)
    expected = (theirs.decode(latents / scale).sample / 2 + 0.5).clamp(0, 1)
    assert torch.equal(decoder.decode(latents), expected)


def test_every_block_is_ours(model: MMInterleaved) -> None:
    for part in (model.image_decoder.unet, model.image_decoder.vae):
        kinds = Counter(type(m) for m in part.modules())
        assert kinds[GroupNorm]
        assert kinds[ResnetBlock]
        assert not any(kinds[theirs] for theirs in (nn.GroupNorm, ResnetBlock2D, Transformer2DModel, GEGLU))
        assert not any(is_intercepted(m) for m in part.modules())


def test_the_time_goes_through_silu_once_if_all_blocks_want_that(debug_config: MMInterleavedConfig) -> None:
    for changes, once in zip(UNETS.values(), (True, True, False, True, True, False), strict=True):
        assert unet_of(debug_config, changes)[0].silu_before_blocks == once


@pytest.mark.parametrize("which", ["norm1", "norm2", "nonlinearity"])
def test_hooks_on_a_norm_or_an_activation_see_what_they_see_in_the_library(
    debug_config: MMInterleavedConfig, which: str
) -> None:
    """And what they return counts."""
    both = unet_of(debug_config, {})
    sample, time, conditions = torch.randn(2, 4, 8, 8), torch.tensor([3, 700]), torch.randn(2, 6, 32)
    before = both[0](sample, time, conditions, None)
    seen: list[list[Tensor]] = []
    for unet in both:
        outputs: list[Tensor] = []

        def change(_module: nn.Module, _given: tuple, y: Tensor, outputs: list[Tensor] = outputs) -> Tensor:
            if y.dim() == 4:  # the time is activated once for all blocks
                outputs.append(y.detach())
            return 2 * y if y.dim() == 4 else y

        getattr(unet.up_blocks[0].resnets[0], which).register_forward_hook(change)
        seen.append(outputs)
    found, expected = both[0](sample, time, conditions, None), both[1](sample, time, conditions).sample
    assert torch.equal(found, expected)
    assert not torch.equal(found, before)
    assert len(seen[0]) == len(seen[1]) == (2 if which == "nonlinearity" else 1)
    assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))


def test_a_norm_without_hooks_takes_silu_along(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[bool] = []
    monkeypatch.setattr(GroupNorm, "forward", lambda _self, x, silu=False: given.append(silu) or x)
    norm, x = GroupNorm(2, 4), torch.randn(1, 4, 2, 2)
    for activation in (nn.SiLU(), nn.GELU()):
        norm_and_activation(norm, activation, x)
    norm.register_forward_hook(lambda *_: None)
    norm_and_activation(norm, nn.SiLU(), x)
    assert given == [True, False, False]


def test_residual_blocks_do_not_copy_maps_in_training(model: MMInterleaved) -> None:
    """diffusers copies them to channels first."""
    decoder = copy.deepcopy(model.image_decoder).train()
    block = next(m for m in decoder.modules() if isinstance(m, ResnetBlock) and m.conv_shortcut is not None)
    seen: list[Tensor] = []
    block.conv_shortcut.register_forward_pre_hook(lambda _m, given: seen.append(given[0]))
    x = torch.randn(2, block.in_channels, 4, 4).contiguous(memory_format=torch.channels_last)
    time = None if block.time_emb_proj is None else torch.randn(2, block.time_emb_proj.in_features)
    block(x, time)
    assert block.training
    assert seen[0] is x


@pytest.mark.parametrize("part", ["unet", "vae"])
def test_checkpointing_gives_the_same_gradients(model: MMInterleaved, part: str) -> None:
    decoder = copy.deepcopy(model.image_decoder).train()
    network = getattr(decoder, part).requires_grad_(True)
    sample, time, conditions = torch.randn(2, 4, 8, 8), torch.tensor([3, 700]), torch.randn(2, 6, 32)
    images, gradients = torch.randn(1, 3, 16, 16), []
    for checkpointed in (False, True):
        calls: list[str] = []
        (network.enable_gradient_checkpointing if checkpointed else network.disable_gradient_checkpointing)()
        for module in network.modules():
            if checkpointed and hasattr(module, "_gradient_checkpointing_func"):
                inner = module._gradient_checkpointing_func

                def counted(block: nn.Module, *args: object, inner=inner, calls=calls) -> object:
                    calls.append(type(block).__name__)
                    return inner(block, *args)

                module._gradient_checkpointing_func = counted
        network.zero_grad()
        out = network(sample, time, conditions, None) if part == "unet" else network(images).sample
        out.square().sum().backward()
        gradients.append([p.grad for p in network.parameters() if p.grad is not None])
        assert bool(calls) == checkpointed
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_the_transformer_refuses_a_form_that_it_does_not_return(model: MMInterleaved) -> None:
    block = next(m for m in model.image_decoder.unet.modules() if isinstance(m, Transformer2D))
    with pytest.raises(ValueError, match="return_dict=False"):
        block(torch.randn(1, block.in_channels, 2, 2), return_dict=True)


@pytest.fixture
def _exact_products() -> Iterator[None]:
    """Float32 convolutions in full precision."""
    before, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    yield
    torch.backends.cudnn.allow_tf32 = before


def watch(part: nn.Module) -> list[Tensor]:
    """What comes out of convolutions and residual blocks of `part` from now on."""
    seen: list[Tensor] = []
    for module in part.modules():
        if isinstance(module, (nn.Conv2d, ResnetBlock2D)):
            module.register_forward_hook(lambda _m, _a, y: seen.append(y))
    return seen


@pytest.mark.gpu
@torch.no_grad()
@pytest.mark.parametrize("tf32", [False, True])
@pytest.mark.usefixtures("_exact_products")
def test_the_vae_on_a_gpu_is_the_librarys(tf32: bool) -> None:
    """At the release's widths, as near to float64 as the library's own is, or nearer than the bound that is stated."""
    torch.backends.cudnn.allow_tf32 = tf32
    with torch.device("cuda"):
        vae, theirs = (
            v(**MMInterleavedConfig.preset("release").image_decoder.vae).eval() for v in (VAE, AutoencoderKL)
        )
    theirs.load_state_dict(vae.state_dict())
    exact = copy.deepcopy(theirs).double()
    images = torch.randn(2, 3, 256, 256, device="cuda")
    last = images.contiguous(memory_format=torch.channels_last)
    seen = watch(vae)
    latents = vae.encode(last).latent_dist.mean
    pixels = vae.decode(latents.contiguous(memory_format=torch.channels_last)).sample
    assert all(y.is_contiguous(memory_format=torch.channels_last) for y in seen)
    for found, given, way in ((latents, images, "encode"), (pixels, latents, "decode")):
        expected, truth = (
            v.encode(x).latent_dist.mean if way == "encode" else v.decode(x).sample
            for v, x in ((theirs, given), (exact, given.double()))
        )
        ours, library = (float((y.double() - truth).norm() / truth.norm()) for y in (found, expected))
        assert ours < max(2 * library, 1e-3 if tf32 else 1e-5), (ours, library)


@pytest.mark.gpu
def test_maps_of_the_unet_lie_channels_last_on_a_gpu(debug_config: MMInterleavedConfig) -> None:
    """In training, too; its result and gradients are the library's."""
    ours, theirs = (unet.cuda() for unet in unet_of(debug_config, {}))
    inputs = torch.randn(2, 4, 8, 8).cuda(), torch.tensor([3, 700]).cuda(), torch.randn(2, 6, 32).cuda()
    seen = watch(ours)
    found, expected = ours(*inputs, None), theirs(*inputs).sample
    assert all(y.is_contiguous(memory_format=torch.channels_last) for y in seen)
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2 * float(expected.abs().max()))
    for y in (found, expected):
        y.square().mean().backward()
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=3e-2, atol=3e-2 * float(b.grad.abs().max()), msg=name)

"""The UNet with synchronizers."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from mm_interleaved.model import MMInterleavedConfig
from mm_interleaved.model.unet import EarlierImages, MMFSUNet

from ..conftest import awaken


@pytest.fixture(scope="module")
def unet(debug_config: MMInterleavedConfig) -> MMFSUNet:
    torch.manual_seed(0)
    return awaken(MMFSUNet(debug_config.image_decoder, debug_config.vision_config.hidden_size)).eval()


def plain(unet: MMFSUNet) -> UNet2DConditionModel:
    """diffusers' own UNet with the same weights."""
    library = UNet2DConditionModel(**{k: v for k, v in unet.config.items() if not k.startswith("_")})
    library.load_state_dict({k: v for k, v in unet.state_dict().items() if not k.startswith("synchronizers.")})
    return library.eval()


def inputs(config: MMInterleavedConfig, images: list[list[int]]) -> tuple[Tensor, Tensor, Tensor, EarlierImages]:
    drawings = len(images)
    pyramid = [torch.randn(2, config.vision_config.hidden_size, s, s) for s in config.pyramid_sides]
    earlier = EarlierImages.build(pyramid, torch.tensor(images))
    return torch.randn(drawings, 4, 8, 8), torch.arange(drawings) * 7, torch.randn(drawings, 6, 32), earlier


@torch.no_grad()
def test_without_synchronizers_it_is_the_library_unet(unet: MMFSUNet, debug_config: MMInterleavedConfig) -> None:
    sample, time, conditions, _ = inputs(debug_config, [[0], [1]])
    expected = plain(unet)(sample, time, conditions).sample
    torch.testing.assert_close(unet(sample, time, conditions, None), expected, rtol=0, atol=1e-6)


@torch.no_grad()
def test_zero_convolutions_give_the_library_unet(unet: MMFSUNet, debug_config: MMInterleavedConfig) -> None:
    closed = copy.deepcopy(unet)
    for synchronizer in closed.synchronizers:
        torch.nn.init.zeros_(synchronizer.conv.weight)
        torch.nn.init.zeros_(synchronizer.conv.bias)
    sample, time, conditions, earlier = inputs(debug_config, [[0], [1]])
    expected = plain(unet)(sample, time, conditions).sample
    torch.testing.assert_close(closed(sample, time, conditions, earlier), expected, rtol=0, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("images", [[[-1], [-1]], [[], []]])
def test_without_earlier_images_constants_are_added(
    unet: MMFSUNet, debug_config: MMInterleavedConfig, images: list
) -> None:
    """Masked or absent, a synchronizer adds the same vector to every cell."""
    sample, time, conditions, _ = inputs(debug_config, [[0], [1]])
    pyramid = [torch.randn(2, debug_config.vision_config.hidden_size, s, s) for s in debug_config.pyramid_sides]
    earlier = EarlierImages.build(pyramid, torch.tensor(images, dtype=torch.long).view(2, -1))
    library = plain(unet)
    constants = []
    for synchronizer in unet.synchronizers:
        vector = synchronizer.mmfs.output_proj(synchronizer.mmfs.ignore_token.view(-1))
        constants.append(synchronizer.conv(vector[None, :, None, None]))
    residuals = [c.expand(2, -1, s.side, s.side) for c, s in zip(constants, unet.synchronizers, strict=True)]
    expected = library(
        sample,
        time,
        conditions,
        down_block_additional_residuals=residuals[:-1],
        mid_block_additional_residual=residuals[-1],
    ).sample
    torch.testing.assert_close(unet(sample, time, conditions, earlier), expected, rtol=0, atol=2e-6)


@torch.no_grad()
def test_the_down_path_and_the_middle_see_no_image(unet: MMFSUNet, debug_config: MMInterleavedConfig) -> None:
    """Synchronizers come after the middle, so what enters them is the plain UNet's."""
    seen: list[Tensor] = []
    hooks = [s.register_forward_pre_hook(lambda _m, a: seen.append(a[0])) for s in unet.synchronizers]
    sample, time, conditions, earlier = inputs(debug_config, [[0], [1]])
    unet(sample, time, conditions, earlier)
    first, other = list(seen), [[1], [-1]]
    seen.clear()
    unet(
        sample,
        time,
        conditions,
        replace(earlier, visible=earlier.visible.build(torch.tensor(other), 2)),
    )
    for hook in hooks:
        hook.remove()
    assert len(seen) == len(unet.synchronizers)
    for a, b in zip(first, seen, strict=True):
        assert torch.equal(a, b)


@torch.no_grad()
def test_prepared_values_change_nothing(unet: MMFSUNet, debug_config: MMInterleavedConfig) -> None:
    sample, time, conditions, earlier = inputs(debug_config, [[0], [-1], [1]])
    torch.testing.assert_close(
        unet(sample, time, conditions, unet.prepare(earlier), derived=unet.derive()),
        unet(sample, time, conditions, earlier),
        rtol=0,
        atol=3e-6,
    )


@torch.no_grad()
def test_each_drawing_sees_its_own_image(unet: MMFSUNet, debug_config: MMInterleavedConfig) -> None:
    """A batch equals its drawings one by one."""
    sample, time, conditions, earlier = inputs(debug_config, [[1], [-1], [0]])
    together = unet(sample, time, conditions, earlier)
    for i, images in enumerate([[1], [-1], [0]]):
        alone = replace(earlier, visible=earlier.visible.build(torch.tensor([images]), 2))
        part = unet(sample[i : i + 1], time[i : i + 1], conditions[i : i + 1], alone)
        torch.testing.assert_close(together[i : i + 1], part, rtol=0, atol=2e-6)


def test_unsupported_unets_are_refused(debug_config: MMInterleavedConfig) -> None:
    config = copy.deepcopy(debug_config.image_decoder)
    config.unet["class_embed_type"] = "timestep"
    with pytest.raises(ValueError, match="class_embed_type='timestep' is not supported"):
        MMFSUNet(config, 16)

"""The cost of a model: parameters, memory and arithmetic, measured on the real modules without allocating them.

PyTorch's counter counts multiply-accumulates while the modules run on the meta device, so the figures cannot differ
from the code. Matrix products, convolutions, attention and bilinear samples are counted; other elementwise work is not.

Axes: B batch, L tokens, I images, C channels, h and w height and width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from .config import MMInterleavedConfig
from .language_model import image_features, synchronizers
from .mm_interleaved import MMInterleavedModel
from .mmfs import VisibleImages
from .synchronizer import DerivedSynchronizer
from .unet import EarlierImages


@dataclass
class Part:
    """Parameters of one part of the model."""

    name: str
    total: int
    trainable: int


@dataclass
class Cost:
    """Multiply-accumulates and bytes of one model.

    Attributes:
        parts: parameters by part, nested parts indented.
        token: MACs of one decoded token without images, text head included.
        token_with_images: the same with `images` visible images, whose values are cached.
        images: number of images of `token_with_images`.
        encode_image: MACs to encode one image and to project its values for all decoder layers.
        draw_step: MACs of one denoising step with guidance and one earlier image.
        draw_image: MACs of a whole image with `steps` steps: conditions, values, denoising, VAE.
        steps: number of steps of `draw_image`.
        cache_per_token: cached keys and values of a token, in elements.
        cache_per_image: cached MMFS values of an image, in elements.
        encode_latents: MACs of the VAE's encoder for one target image.
    """

    parts: list[Part]
    token: int
    token_with_images: int
    images: int
    encode_image: int
    draw_step: int
    draw_image: int
    steps: int
    cache_per_token: int
    cache_per_image: int
    encode_latents: int


def count_parts(model: MMInterleavedModel) -> list[Part]:
    """Parameters of the model, its children, and the image decoder's children."""

    def part(name: str, module: torch.nn.Module) -> Part:
        parameters = list(module.parameters())
        trainable = sum(p.numel() for p in parameters if p.requires_grad)
        return Part(name, sum(p.numel() for p in parameters), trainable)

    parts = [part("model", model)]
    for name, child in model.named_children():
        if any(True for _ in child.parameters()):
            parts.append(part(f"  {name}", child))
        if name == "image_decoder":
            parts += [part(f"    {inner}", module) for inner, module in child.named_children()]
    return parts


def _sampling_flops(image: torch.Size, grid: torch.Size, *_: object, out_shape: torch.Size, **__: object) -> int:
    """Operations of bilinear sampling: a sample weights four neighbours, and is weighted itself."""
    return 2 * (4 + 1) * out_shape.numel()


def _macs(work: Callable[[], object]) -> int:
    counted = {torch.ops.aten.grid_sampler_2d: _sampling_flops}
    with FlopCounterMode(display=False, custom_mapping=counted) as counter, torch.no_grad():
        work()
    return counter.get_total_flops() // 2


def measure(config: MMInterleavedConfig, images: int = 5, steps: int = 30) -> Cost:
    """The cost of a model of this configuration. Takes seconds and no memory at any size."""
    with torch.device("meta"):
        model = MMInterleavedModel(config).eval()
        parts = count_parts(model)
        model.requires_grad_(False)
        decoder, width = model.image_decoder, config.text_config.hidden_size
        pixels = torch.empty(1, 3, config.vision_config.image_size, config.vision_config.image_size)
        pyramid = model.encode_images(pixels).pyramid
        with torch.no_grad():
            projection = _macs(
                lambda: [s.mmfs.project(image_features(config, pyramid).features) for s in _layers(model)]
            )
        context = torch.empty(1, config.max_context_length, width)
        conditions = torch.empty(
            2, config.image_decoder.resampler.num_queries, config.image_decoder.resampler.hidden_size
        )
        seen = VisibleImages(torch.empty(2, 1, dtype=torch.long), torch.empty(1, 2, dtype=torch.long))
        earlier = EarlierImages.of(pyramid, seen)
        latents, time = torch.empty(decoder.latent_shape(2)), torch.empty(2, dtype=torch.long)
        with torch.no_grad():
            prepared, derived = decoder.unet.prepare(earlier), [s.empty() for s in decoder.unet.synchronizers]
            values = _macs(lambda: [s.mmfs.project(s.feature_norm(earlier.normed)) for s in decoder.unet.synchronizers])
            step = _macs(lambda: decoder.unet(latents, time, conditions, prepared, derived=derived))
        around = _macs(lambda: decoder.vae.decode(latents[:1])) + _macs(lambda: decoder.resampler(context))
        encode = _macs(lambda: model.encode_images(pixels)) + projection
        side = decoder.config.image_size
        latent_macs = _macs(lambda: decoder.vae.encode(torch.empty(1, 3, side, side)))
        token, with_images = _token(model, pyramid, 0), _token(model, pyramid, images)
    cells = sum(side * side for side in config.mmfs.levels)
    return Cost(
        parts=parts,
        token=token,
        token_with_images=with_images,
        images=images,
        encode_image=encode,
        draw_step=step,
        draw_image=around + values + steps * step,
        steps=steps,
        cache_per_token=cache_per_token(model),
        cache_per_image=len(_layers(model)) * cells * config.mmfs.hidden_size,
        encode_latents=latent_macs,
    )


def cache_per_token(model: MMInterleavedModel) -> int:
    """Cached keys and values of a token, in elements."""
    text = model.config.text_config
    return 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim


def row_bytes(model: MMInterleavedModel, tokens: int, images: int) -> int:
    """Memory of a row of generation: keys, values and hidden states of its tokens, and MMFS values of its images.

    Args:
        model: the model.
        tokens: most tokens of the row.
        images: most images of the row.
    """
    config = model.config
    cells = sum(side * side for side in config.mmfs.levels)
    of_a_token = cache_per_token(model) + config.text_config.hidden_size
    of_an_image = len(_layers(model)) * cells * config.mmfs.hidden_size
    size = model.language_model.norm.weight.element_size()
    return size * (tokens * of_a_token + images * of_an_image)


def _layers(model: MMInterleavedModel) -> list:
    return synchronizers(model.language_model)


def _token(model: MMInterleavedModel, pyramid: list[Tensor], images: int) -> int:
    """The cost of one token with `images` visible images, whose values are cached."""
    seen = image_features(model.config, [m.expand(images, -1, -1, -1) for m in pyramid])
    with torch.no_grad():
        seen.values = [s.project(seen.features) for s in _layers(model)]
        seen.derived = [
            DerivedSynchronizer(s.mmfs.empty_query(), s.mmfs.empty_output(s.mmfs.output_proj.weight))
            for s in _layers(model)
        ]
    slots = torch.empty(1, images, dtype=torch.long)
    visible = VisibleImages(slots, torch.empty(images, 1, dtype=torch.long))
    embeds = torch.empty(1, 1, model.config.text_config.hidden_size)

    def run() -> Tensor:
        return model.lm_head(model.language_model(inputs_embeds=embeds, images=seen, visible=visible).last_hidden_state)

    return _macs(run)

"""Blocks of diffusers' UNet and VAE with forward passes that fuse the operators between convolutions.

Axes: B batch, C channels, h and w height and width, L tokens, D width.

Each class is a subclass of the block that it replaces, with the same parameters under the same names. It computes the
same, on a CPU bit by bit. On CUDA devices maps stay in channels-last memory format (`ops/group_norm.py`). A diffusers
model replaces its blocks at the end of its constructor, by `use_own_blocks`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Self, TypeVar, cast

import torch
from diffusers import AutoencoderKL
from diffusers.models.activations import GEGLU
from diffusers.models.autoencoders.vae import Decoder, DecoderOutput, Encoder
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn

from ..ops import GroupNorm, channels_last, gelu_gate
from .weights import is_intercepted

M = TypeVar("M", bound=nn.Module)


def norm_and_activation(norm: nn.Module, activation: nn.Module, x: Tensor) -> Tensor:
    """`activation(norm(x))` of a map [B, C, h, w], by one kernel for group norm and SiLU without hooks."""
    if type(norm) is GroupNorm and type(activation) is nn.SiLU and not is_intercepted(norm, activation):
        return norm(x, silu=True)
    return activation(norm(x))


def _checkpointed(owner: Encoder | Decoder, block: nn.Module, *args: Tensor | None) -> Tensor:
    """`block(*args)`; activations are recomputed in the backward pass if `owner` has gradient checkpointing on."""
    if torch.is_grad_enabled() and owner.gradient_checkpointing:
        return cast("Callable[..., Tensor]", owner._gradient_checkpointing_func)(block, *args)
    return block(*args)


class ResnetBlock(ResnetBlock2D):
    """A residual block: two convolutions, each after group norm and activation; the time embedding is added in between.

    With `skip_time_act` the given time embedding is already activated.
    """

    def forward(self, input_tensor: Tensor, temb: Tensor | None = None) -> Tensor:
        """[B, C, h, w] to [B, C', h', w']; `temb` [B, time width], or None in a VAE."""
        x = norm_and_activation(self.norm1, self.nonlinearity, input_tensor)
        resample = self.upsample if self.upsample is not None else self.downsample
        if resample is not None:
            input_tensor, x = resample(input_tensor), resample(x)
        x = self.conv1(x)
        if self.time_emb_proj is not None:
            temb = temb if self.skip_time_act else self.nonlinearity(temb)
            temb = self.time_emb_proj(temb)[:, :, None, None]
        if self.time_embedding_norm == "scale_shift":
            assert temb is not None  # a block that is scaled has a time embedding
            scale, shift = temb.chunk(2, dim=1)
            x = self.nonlinearity(self.norm2(x) * (1 + scale) + shift)
        else:
            x = x if self.time_emb_proj is None else x + temb
            x = norm_and_activation(self.norm2, self.nonlinearity, x)
        x = self.conv2(self.dropout(x))
        if self.conv_shortcut is not None:
            # diffusers copies the map to channels first in training, to avoid DDP's warning about gradient strides.
            input_tensor = self.conv_shortcut(input_tensor)
        return (input_tensor + x) / self.output_scale_factor

    @property
    def activates_time(self) -> bool:
        """Whether the block itself applies SiLU to the time embedding."""
        return self.time_emb_proj is not None and not self.skip_time_act and type(self.nonlinearity) is nn.SiLU


class Transformer2D(Transformer2DModel):
    """Transformer blocks over the cells of a map; the result is channels last."""

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]  # no timestep or classes, and always a tuple
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        *,
        cross_attention_kwargs: dict[str, Any] | None = None,
        attention_mask: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        return_dict: bool = False,
    ) -> tuple[Tensor]:
        """`hidden_states` [B, C, h, w] attend to themselves and to `encoder_hidden_states` [B, L, D].

        Raises:
            ValueError: `return_dict` is set, which diffusers' blocks never do.
        """
        if return_dict:
            raise ValueError("Transformer2D returns a tuple; call it with return_dict=False")
        (output,) = super().forward(
            hidden_states,
            encoder_hidden_states,
            cross_attention_kwargs=cross_attention_kwargs,  # pyright: ignore[reportArgumentType]  # its default is None
            attention_mask=attention_mask,
            encoder_attention_mask=encoder_attention_mask,
            return_dict=False,
        )
        return (channels_last(output),)


class GatedGELU(GEGLU):
    """GEGLU whose activation and product are one kernel."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[..., width] to [..., inner width]."""
        return gelu_gate(self.proj(hidden_states))


class VAEEncoder(Encoder):
    """The VAE's encoder."""

    def forward(self, sample: Tensor) -> Tensor:
        """Images [B, 3, h, w] to moments of the latents [B, 2 C, h / 8, w / 8]."""
        sample = self.conv_in(sample)
        for block in (*self.down_blocks, self.mid_block):
            sample = _checkpointed(self, block, sample)
        return self.conv_out(norm_and_activation(self.conv_norm_out, self.conv_act, sample))


class VAEDecoder(Decoder):
    """The VAE's decoder."""

    def forward(self, sample: Tensor, latent_embeds: Tensor | None = None) -> Tensor:
        """Latents [B, C, h, w] to images [B, 3, 8 h, 8 w]; `latent_embeds` is not used by this decoder's norms."""
        sample = self.conv_in(sample)
        for block in (self.mid_block, *self.up_blocks):
            sample = _checkpointed(self, block, sample, latent_embeds)
        return self.conv_out(norm_and_activation(self.conv_norm_out, self.conv_act, sample))


_OWN: dict[type[nn.Module], type[nn.Module]] = {
    nn.GroupNorm: GroupNorm,
    ResnetBlock2D: ResnetBlock,
    Transformer2DModel: Transformer2D,
    GEGLU: GatedGELU,
    Encoder: VAEEncoder,
    Decoder: VAEDecoder,
}


def use_own_blocks(model: nn.Module) -> None:
    """Replace diffusers' blocks in `model` by ours, with their weights. Called at the end of a constructor."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            own = _OWN.get(type(child))
            if own is not None:
                setattr(module, name, _with_parts_of(child, own))


def _with_parts_of(module: nn.Module, cls: type[M]) -> M:
    """An instance of `cls`, a subclass of `module`'s class, that takes over its attributes, parameters and children."""
    ours = cls.__new__(cls)
    ours.__dict__.update(module.__dict__)
    return ours


class VAE(AutoencoderKL):
    """diffusers' AutoencoderKL with our blocks."""

    def __init__(self, **config: Any) -> None:
        super().__init__(**config)
        use_own_blocks(self)

    if TYPE_CHECKING:  # diffusers' annotations name tensor classes and tuples that do not occur here

        def to(self, *args: Any, **kwargs: Any) -> Self: ...  # pyright: ignore[reportIncompatibleVariableOverride]
        def encode(self, x: Tensor) -> AutoencoderKLOutput: ...  # pyright: ignore[reportIncompatibleMethodOverride]
        def decode(self, z: Tensor) -> DecoderOutput: ...  # pyright: ignore[reportIncompatibleMethodOverride]

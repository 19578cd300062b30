"""Parameters that several processes hold together (FSDP2), for a model whose batches do not all use all of them.

Every process gathers the weights of a block, and adds up its gradients with the others', when it comes to that block.
So all processes must come to the same blocks in the same order (`MMInterleavedModel.keep_together`), and must have
gradients for the same weights (`take_part`), whatever is in their batches.
"""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from rich.console import Console
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, StateDictType
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback
from transformers.models.clip.modeling_clip import CLIPEncoderLayer

from ..model import MMInterleavedModel
from ..model.language_model import MMFSDecoderLayer
from ..model.resampler import ResamplerLayer

BLOCKS = (BasicTransformerBlock, ResnetBlock2D, CLIPEncoderLayer, MMFSDecoderLayer, ResamplerLayer)  # those that repeat
TYPES = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}  # by accelerate's name of a precision


def configure(accelerator: Accelerator, model: MMInterleavedModel) -> None:
    """Say what is gathered at a time, and in which types.

    Weights are gathered in the type that the run computes in, their gradients added up in float32. The VAE, frozen and
    with a type of its own, is whole on every process.

    Args:
        accelerator: that will shard the model. Blocks that the run's settings name are left as they are.
        model: not sharded yet.

    Raises:
        ValueError: it would not shard, or keep parts of weights.
    """
    if not accelerator.is_fsdp2:
        raise ValueError(
            f"'fsdp' shards parameters over accelerators, by FSDP2. Here are {accelerator.device.type} devices, or "
            "fsdp_version is not 2, and every process would hold all parameters; leave 'fsdp' out"
        )
    plugin = accelerator.state.fsdp_plugin
    if plugin.state_dict_type != StateDictType.FULL_STATE_DICT:
        raise ValueError("fsdp.state_dict_type must be FULL_STATE_DICT, as it is by itself: checkpoints are whole")
    computing = TYPES[accelerator.mixed_precision]
    plugin.mixed_precision_policy = MixedPrecisionPolicy(computing, torch.float32, cast_forward_inputs=False)
    plugin.ignored_modules = [model.image_decoder.vae.to(accelerator.device)]
    if plugin.transformer_cls_names_to_wrap is None:
        found = {type(module).__name__ for module in model.modules() if isinstance(module, BLOCKS)}
        plugin.transformer_cls_names_to_wrap = sorted(found)


class Sharded(TrainerCallback):
    """Lets all parameters take part in every step, as soon as they are sharded, and says how they are."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def on_train_begin(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        """Before the first step."""
        for module in model.modules():
            if isinstance(module, FSDPModule):
                take_part(module)
        held = sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in model.parameters())
        total = sum(p.numel() for p in model.parameters())
        self.console.print(f"sharded: the first process holds {held:,} of all {total:,} parameters")


def take_part(module: FSDPModule) -> None:
    """Let a backward pass through a sharded module give all its trainable parameters a gradient, if need be of 0."""
    own = _own_parameters(module)

    def hook(module: nn.Module, inputs: Any, output: Any) -> Any:
        if not own or not torch.is_grad_enabled():
            return output
        weights = [getattr(owner, name) for owner, name in own]
        return _replace_first(output, lambda tensor: _TakePart.apply(tensor, *weights))

    module.register_forward_hook(hook, prepend=True)  # before FSDP's, which takes the weights away


def _own_parameters(module: nn.Module) -> list[tuple[nn.Module, str]]:
    """Where the trainable parameters are that are gathered with `module`; they are others after each gathering."""
    own = [(module, name) for name, p in module.named_parameters(recurse=False) if p.requires_grad]
    for child in module.children():
        own += [] if isinstance(child, FSDPModule) else _own_parameters(child)
    return own


def _replace_first(output: Any, change: Any) -> Any:
    """`output` with its first tensor changed: of a module one or several tensors, of a model its loss."""
    if isinstance(output, Tensor):
        return change(output)
    if isinstance(output, tuple) and not hasattr(output, "_fields"):
        return (change(output[0]), *output[1:])
    output["loss"] = change(output["loss"])
    return output


class _TakePart(torch.autograd.Function):
    """A tensor as it is, as if it depended on parameters."""

    @staticmethod
    def forward(ctx: FunctionCtx, tensor: Tensor, *parameters: Tensor) -> Tensor:
        ctx.parameters = [(p.shape, p.dtype, p.device) for p in parameters]
        return tensor.clone()  # no view, which FSDP warns of

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor, ...]:
        zeros = (torch.zeros((), dtype=dtype, device=device).expand(shape) for shape, dtype, device in ctx.parameters)
        return gradient, *zeros

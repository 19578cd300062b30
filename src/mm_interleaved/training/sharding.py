"""Sharded parameters (FSDP2) for a model whose batches do not all use all parameters.

Every process gathers the weights of a block, and reduces its gradients with the others, when it reaches that block. So
all processes must reach the same blocks in the same order (`ForceAllBranches`) and have gradients of the same weights
(`take_part`), whatever their batches contain.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from accelerate import Accelerator
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from rich.console import Console
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, StateDictType
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback
from transformers.models.clip.modeling_clip import CLIPEncoderLayer

from ..model import MMInterleavedConfig, MMInterleavedModel
from ..model.language_model import MMFSDecoderLayer
from ..model.layout import ImagePositions, Layout
from ..model.mmfs import VisibleImages
from ..model.resampler import ResamplerLayer

BLOCKS = (BasicTransformerBlock, ResnetBlock2D, CLIPEncoderLayer, MMFSDecoderLayer, ResamplerLayer)  # repeated blocks
TYPES = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}  # by accelerate's name of a precision


def configure(accelerator: Accelerator, model: MMInterleavedModel) -> None:
    """Configure the blocks that are gathered together, and the types of gathering and reduction.

    Weights are gathered in the type of the run's computation, gradients are reduced in float32. The VAE, which is
    frozen and has a type of its own, is not sharded.

    Args:
        accelerator: accelerator of the run. If the run's settings name blocks, they are not changed.
        model: the model before sharding.

    Raises:
        ValueError: these settings would not shard, or checkpoints would be incomplete.
    """
    if not accelerator.is_fsdp2:
        raise ValueError(
            f"'fsdp' shards parameters over accelerators, by FSDP2. Here are {accelerator.device.type} devices, or "
            "fsdp_version is not 2, and every process would hold all parameters; leave 'fsdp' out"
        )
    plugin = accelerator.state.fsdp_plugin
    assert plugin is not None  # because it shards
    if plugin.state_dict_type != StateDictType.FULL_STATE_DICT:
        raise ValueError("fsdp.state_dict_type must be FULL_STATE_DICT, as it is by itself: 'final' is a whole model, "
                         "and checkpoints are sharded anyway")  # fmt: skip
    computing = TYPES[accelerator.mixed_precision]
    plugin.mixed_precision_policy = MixedPrecisionPolicy(computing, torch.float32, cast_forward_inputs=False)
    plugin.ignored_modules = [model.image_decoder.vae.to(accelerator.device)]
    if plugin.transformer_cls_names_to_wrap is None:
        found = {type(module).__name__ for module in model.modules() if isinstance(module, BLOCKS)}
        plugin.transformer_cls_names_to_wrap = sorted(found)


def check_gathering() -> None:
    """Check that PyTorch can gather all weights between two steps, see `gathered`.

    Raises:
        ValueError: it is too old.
    """
    if not hasattr(FSDPModule, "reset_iter_state"):
        raise ValueError(f"'sample_every' and 'evaluate_every' with 'fsdp' need PyTorch 2.13, and this is "
                         f"{torch.__version__}; set them to 0")  # fmt: skip


@contextmanager
def gathered(accelerator: Accelerator, model: nn.Module) -> Iterator[None]:
    """A context in which every process has all weights of a sharded model, in the type of the run's computation.

    Every process must enter and leave it; in between each may run what it wants. The weights must not change.
    """
    plugin = accelerator.state.fsdp_plugin
    assert plugin is not None
    assert isinstance(model, nn.Module)
    freed = {*(plugin.transformer_cls_names_to_wrap or ()), nn.Embedding.__name__}  # modules that free their weights
    sharded = [module for module in model.modules() if isinstance(module, FSDPModule)]
    # accelerate gathers the last layers together and the rest with the root, and keeps both until the backward pass
    changed = [module for module in sharded if freed & {kind.__name__ for kind in type(module).__mro__}]
    for module in changed:
        module.set_reshard_after_forward(False, recurse=False)
    for module in sharded:
        module.unshard()
    try:
        yield
    finally:
        # Frees the weights, and forgets the order in which this process called the blocks. The next backward pass would
        # gather weights in that order, which other processes do not have, and all would wait for each other.
        cast(Any, model).reset_iter_state()
        for module in changed:
            module.set_reshard_after_forward(bool(plugin.reshard_after_forward), recurse=False)


def reshard(model: nn.Module) -> None:
    """Free all gathered weights of a sharded model, so that its parameters are the parts of this process.

    FSDP keeps those of the root until a backward pass. After a forward pass without one, the model would have neither
    the parameters that the optimizer knows nor weights that change with them.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@dataclass
class ForceAllBranches:
    """Completes batches so that the model runs every branch that any batch of the run needs, with the same results.

    The additions have no weight: a black image that is visible to no token, an ignored label, and a target image whose
    context is a single token, which the image loss does not count.

    Attributes:
        text: whether any batch of any process has a text loss.
        image: whether any batch has an image loss.
        conditions: whether any batch needs conditioning tokens (see `distillation`).
    """

    text: bool = True
    image: bool = True
    conditions: bool = False

    def complete(self, model: MMInterleavedModel, inputs: dict[str, Any]) -> tuple[dict[str, Any], frozenset[str]]:
        """A batch that needs all branches, and the names of the losses that were added by that.

        Args:
            model: the model.
            inputs: arguments of `model.forward`; without a `layout` one is computed here.
        """
        inputs = dict(inputs)
        layout = inputs.get("layout")
        if layout is None:
            mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))
            planned = (inputs["input_ids"], mask, inputs.get("document_starts"), inputs.get("labels"))
            layout = model.plan(*planned, sample_ids=inputs.get("sample_ids"))
        config, idle = model.config, set()
        if not _count(inputs, "pixel_values"):
            inputs["pixel_values"] = _black(config.vision_config.image_size, inputs)
        if self.text and (layout.label_ids is None or not _weight(inputs, "loss_text_weight", config)):
            first = layout.target_images.new_zeros(1)
            layout = replace(layout, label_positions=first, label_ids=torch.full_like(first, -100))
            inputs["loss_text_weight"] = 1.0
            idle.add("loss_txt")
        has_targets = len(layout.target_images) > 0
        if (self.image or self.conditions) and not has_targets:
            layout = _with_idle_target(layout)
            idle.add("loss_distillation")
        needs_image = has_targets and _count(inputs, "target_pixel_values")
        if self.image and not (needs_image and _weight(inputs, "loss_image_weight", config)):
            layout = layout if self.conditions else _with_idle_target(layout)
            count = int(layout.target_images.max()) + 1
            targets = _black(config.image_decoder.image_size, inputs)
            inputs["target_pixel_values"] = targets.expand(count, -1, -1, -1)
            inputs["image_loss_mask"] = torch.zeros(count, device=targets.device)
            inputs["noise_samples"] = model.image_decoder.sample_noise(len(layout.earlier.images), torch.Generator())
            inputs["loss_image_weight"] = 1.0
            idle.add("loss_img")
        return {**inputs, "layout": layout}, frozenset(idle)


def _count(inputs: dict[str, Any], name: str) -> int:
    return 0 if inputs.get(name) is None else len(inputs[name])


def _weight(inputs: dict[str, Any], name: str, config: MMInterleavedConfig) -> float:
    given = inputs.get(name)
    return getattr(config, name) if given is None else given


def _black(side: int, inputs: dict[str, Any]) -> Tensor:
    """One black image, [1, 3, side, side]."""
    return torch.zeros(1, 3, side, side, dtype=torch.uint8, device=inputs["input_ids"].device)


def _with_idle_target(layout: Layout) -> Layout:
    """`layout` with a single target image, whose context is the first token, without earlier images."""
    first = layout.target_images.new_zeros(1)
    nothing = first.new_zeros(1, 0)
    return replace(
        layout, target_images=first, target_positions=ImagePositions(first, first, first),
        conditioning_images=nothing[0], earlier=VisibleImages(nothing, nothing.view(0, 0)), context_length=1,
    )  # fmt: skip


class ShardingCallback(TrainerCallback):
    """Lets all sharded parameters have gradients in every step, and logs how they are sharded."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def on_train_begin(  # pyright: ignore[reportIncompatibleMethodOverride]  # the Trainer gives the model
        self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any
    ) -> None:
        """Before the first step."""
        for module in model.modules():
            if isinstance(module, FSDPModule):
                take_part(module)
        held = sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in model.parameters())
        total = sum(p.numel() for p in model.parameters())
        self.console.print(f"sharded: the first process holds {held:,} of all {total:,} parameters")


def take_part(module: FSDPModule) -> None:
    """Let a backward pass through a sharded module give all its trainable parameters a gradient, possibly of 0."""
    assert isinstance(module, nn.Module)
    own = _own_parameters(module)

    def hook(module: nn.Module, inputs: Any, output: Any) -> Any:
        if not own or not torch.is_grad_enabled():
            return output
        weights = [getattr(owner, name) for owner, name in own]
        return _replace_first(output, lambda tensor: _TakePart.apply(tensor, *weights))

    module.register_forward_hook(hook, prepend=True)  # before FSDP's hook, which frees the gathered weights


def always_have_a_loss(model: nn.Module) -> None:
    """Let the loss of every training batch depend on a trained weight; it is 0 for a batch without a loss.

    The backward pass of such a batch would fail, and other processes would wait for its gradients, if it has nothing to
    learn, or nothing that a trained weight has a part in (a text where only the image decoder is trained).
    """
    model.register_forward_hook(_with_a_loss)


def _with_a_loss(module: nn.Module, inputs: Any, output: Any) -> Any:
    if not (isinstance(output, dict) and module.training and torch.is_grad_enabled()):
        return output
    loss: Tensor | None = output.get("loss")
    if loss is None or not loss.requires_grad:
        trained = min((p for p in module.parameters() if p.requires_grad), key=Tensor.numel)
        loss = torch.zeros((), device=trained.device) if loss is None else loss
        output["loss"] = _TakePart.apply(loss, trained)
    return output


def _own_parameters(module: nn.Module) -> list[tuple[nn.Module, str]]:
    """Owners and names of the trainable parameters that are gathered with `module`; they change at each gathering."""
    own = [(module, name) for name, p in module.named_parameters(recurse=False) if p.requires_grad]
    for child in module.children():
        own += [] if isinstance(child, FSDPModule) else _own_parameters(child)
    return own


def _replace_first(output: Any, change: Any) -> Any:
    """`output` with its first tensor changed: the output of a module, or the loss of a model."""
    if isinstance(output, Tensor):
        return change(output)
    if isinstance(output, tuple) and not hasattr(output, "_fields"):
        return (change(output[0]), *output[1:])
    output = cast("dict[str, Any]", output)  # a `ModelOutput` serves as one
    output["loss"] = change(output["loss"])
    return output


class _TakePart(torch.autograd.Function):
    """The identity, which adds a dependency on parameters to the graph."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, *parameters: Tensor) -> Tensor:
        ctx.parameters = [(p.shape, p.dtype, p.device) for p in parameters]
        return tensor.clone()  # FSDP warns of views

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  # of one result
        ctx: Any, gradient: Tensor
    ) -> tuple[Tensor, ...]:
        zeros = (torch.zeros((), dtype=dtype, device=device).expand(shape) for shape, dtype, device in ctx.parameters)
        return gradient, *zeros

"""Weight-only quantization of the language model through torchao: less memory, fewer bytes a token, not lossless.

A decode step reads every weight once, so 8-bit weights take half the time of 16-bit weights at best. The matrices of
attention and MLP in the decoder layers are quantized, by far the largest part of a large model. MMFS, embeddings, head,
visual tokenizer and image decoder are not.

`quantize_frozen` is for training an adapter: it stores the frozen linear layers of chosen parts in 8 or 4 bits.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Collection
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..model.mm_interleaved import MMInterleavedModel
from ..model.weights import is_quantized

Quantization = Literal["int8", "fp8"]
QUANTIZATIONS = get_args(Quantization)
FrozenQuantization = Literal["none", "int8", "int4", "nf4"]
NF4_BLOCK = 64  # weights that share a scale
EXTRA = "pip install 'mm-interleaved[quantization]'"


def quantize(model: MMInterleavedModel, kind: Quantization) -> None:
    """Quantize the decoder layers' linear layers in place, with one scale for each output.

    The model can be moved and used afterwards, but not saved: keep the checkpoint, and quantize after loading it.

    Args:
        model: on any device; the CPU if the weights are to fit the device only afterwards.
        kind: "int8", whole numbers from -127 to 127; "fp8", 8-bit floats (e4m3). The decoding kernels read both.

    Raises:
        ValueError: there is no such kind, torchao is not installed, or the model is quantized already.
    """
    if kind not in QUANTIZATIONS:
        raise ValueError(f"quantization must be one of {', '.join(QUANTIZATIONS)}, not '{kind}'")
    if importlib.util.find_spec("torchao") is None:
        raise ValueError(f"quantization='{kind}' needs torchao, which is not installed: {EXTRA}")
    if is_quantized(model):
        raise ValueError("the model is quantized already; load it anew")
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_

    wanted = {id(m) for layer in model.language_model.layers for part in (layer.self_attn, layer.mlp)
              for m in part.modules() if type(m) is nn.Linear}  # fmt: skip
    config = {"int8": Int8WeightOnlyConfig, "fp8": Float8WeightOnlyConfig}[kind]()
    quantize_(model.language_model, config, filter_fn=lambda module, name: id(module) in wanted)


class QuantizedLinear(nn.Linear):
    """A frozen linear layer whose weight is stored in 8 or 4 bits.

    The weight is computed from them in each forward and each backward pass, so activations alone are kept in between.
    """

    @classmethod
    def of(cls, linear: nn.Linear, kind: FrozenQuantization) -> QuantizedLinear:
        """The layer with the weight of `linear`, which keeps its own bias.

        Args:
            linear: a linear layer.
            kind: "int8", whole numbers with a scale for each output; "nf4", 4-bit floats with a scale for each block of
                64 weights (Dettmers et al., arXiv 2305.14314).
        """
        with torch.device("meta"):
            layer = cls(linear.in_features, linear.out_features, bias=False)
        weight = linear.weight.detach()
        layer.weight = nn.Parameter(_to_int8(weight) if kind == "int8" else _to_nf4(weight), requires_grad=False)
        layer.bias = linear.bias
        return layer.train(linear.training)

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer to `input` [..., in_features]."""
        kind = input.device.type
        if torch.is_autocast_enabled(kind):
            input = input.to(torch.get_autocast_dtype(kind))
        product = cast(Tensor, _FrozenProduct.apply(input, self.weight))
        return product if self.bias is None else product + self.bias.to(product.dtype)


class _FrozenProduct(torch.autograd.Function):
    """`F.linear` with a weight that has no gradient, and that is kept in its stored form for the backward pass."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor) -> Tensor:
        ctx.weight = weight  # a constant, which no hook of saved tensors must copy
        with torch.autocast(input.device.type, enabled=False):
            return F.linear(input, _dequantized(weight, input.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (grad,) = grads
        return grad @ _dequantized(ctx.weight, grad.dtype), None


def _to_int8(weight: Tensor) -> Tensor:
    from torchao.quantization import Int8Tensor, PerRow

    return Int8Tensor.from_hp(weight, PerRow())


def _to_nf4(weight: Tensor) -> Tensor:
    from torchao.quantization import NF4Tensor

    blocks = weight.numel() // NF4_BLOCK
    together = next(size for size in (256, 128, 64, 32, 16, 8, 4, 2, 1) if blocks % size == 0)
    return NF4Tensor.from_tensor(weight, NF4_BLOCK, together)


def _dequantized(weight: Tensor, dtype: torch.dtype) -> Tensor:
    from torchao.quantization import NF4Tensor

    whole = weight.get_original_weight() if isinstance(weight, NF4Tensor) else weight.dequantize()
    return whole.to(dtype)


def frozen_linears(model: nn.Module, names: Collection[str]) -> dict[str, nn.Linear]:
    """The frozen linear layers among the modules of these names that can be stored in fewer bits."""
    return {
        name: module for name, module in model.named_modules()
        if type(module) is nn.Linear and name.removesuffix(".base_layer") in names
        and not module.weight.requires_grad and module.weight.numel() % NF4_BLOCK == 0
    }  # fmt: skip


def quantize_frozen(model: nn.Module, kind: FrozenQuantization, names: Collection[str]) -> int:
    """Quantize frozen linear layers in place, for the training of an adapter.

    Args:
        model: the model with its adapter, in the types of the run.
        kind: see `QuantizedLinear.of`.
        names: names of the modules whose linear layers are quantized; layers that are trained are not.

    Returns:
        The number of layers.

    Raises:
        ValueError: this kind cannot be trained with, torchao is not installed, or there is no such layer.
    """
    if kind == "int4":
        raise ValueError("model.quantize: torchao's int4 layers have no backward pass, so no adapter can be trained on "
                         "them; take nf4, which has 4 bits too, or int8")  # fmt: skip
    if importlib.util.find_spec("torchao") is None:
        raise ValueError(f"model.quantize: {kind} needs torchao, which is not installed: {EXTRA}")
    chosen = frozen_linears(model, names)
    if not chosen:
        raise ValueError("model.quantize finds no frozen linear layer in model.quantize_parts")
    for name, linear in chosen.items():
        owner, _, last = name.rpartition(".")
        setattr(model.get_submodule(owner), last, QuantizedLinear.of(linear, kind))
    # Every process has the same ones, and data parallelism cannot broadcast them.
    cast(Any, model)._ddp_params_and_buffers_to_ignore = [f"{name}.weight" for name in chosen]
    return len(chosen)

"""Weight-only quantization through torchao: less memory, fewer bytes a token, not lossless.

`quantize` is for generation. The matrices of attention and MLP in the decoder layers are quantized, by far the largest
part of a large model. MMFS, embeddings, head, visual tokenizer and image decoder are not. A decode step reads every
weight once, so fewer bytes can take less time; the decoding kernels read int8 and fp8.

`quantize_frozen` is for training an adapter: it stores the frozen linear layers of chosen parts in 8 or 4 bits. Both
store a weight by `store`.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import re
from collections.abc import Collection
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..model.mm_interleaved import MMInterleavedModel
from ..model.weights import is_quantized

Quantization = Literal["int8", "fp8", "int4", "nf4"]
QUANTIZATIONS = get_args(Quantization)
FrozenQuantization = Literal["none", "int8", "int4", "nf4", "bnb-nf4"]
NF4_BLOCK = 64  # weights that share a scale
INT4_GROUPS = (128, 64, 32)  # weights of an output that share a scale and a zero point; the first that fits is taken
INT4_COLUMNS = 1024  # torchao fills the inputs up to a multiple of it on a GPU
BITSANDBYTES = "bnb-nf4"  # nf4 by another library, whose kernels are for GPUs
EXTRA = "pip install 'mm-interleaved[quantization]'"
_QUANTIZED = re.compile(r"language_model\.layers\.\d+\.(self_attn|mlp)\.\w+(\.base_layer)?")


def quantize(model: MMInterleavedModel, kind: Quantization, device: torch.device | str | None = None) -> None:
    """Quantize the decoder layers' linear layers in place.

    The model can be used afterwards, but not saved: keep the checkpoint, and quantize after loading it. With int4 it
    cannot be moved between the CPU and a GPU either, because each packs the numbers in its own order.

    Args:
        model: on any device; the CPU if the weights are to fit the device only afterwards.
        kind: how weights are stored, see `store`.
        device: where each layer is quantized, and left; None: where it is.

    Raises:
        ValueError: there is no such kind, torchao is not installed, the model is quantized already, or int4 cannot be
            used with its sizes, its type or this device.
    """
    if kind not in QUANTIZATIONS:
        raise ValueError(f"quantization must be one of {', '.join(QUANTIZATIONS)}, not '{kind}'")
    if importlib.util.find_spec("torchao") is None:
        raise ValueError(f"quantization='{kind}' needs torchao, which is not installed: {EXTRA}")
    if is_quantized(model):
        raise ValueError("the model is quantized already; load it anew")
    linears = quantizable(model)
    if kind == "int4":
        for name, linear in linears.items():
            _check_int4(name, linear.weight, torch.device(device or linear.weight.device))
    for linear in linears.values():
        weight = linear.weight.detach()
        linear.weight = nn.Parameter(store(weight.to(device or weight.device), kind), requires_grad=False)


def quantizable(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers that `quantize` changes, by name; the matrices of adapters are not among them."""
    return {
        name: module for name, module in model.named_modules()
        if type(module) is nn.Linear and _QUANTIZED.fullmatch(name)
    }  # fmt: skip


def store(weight: Tensor, kind: Quantization) -> Tensor:
    """A tensor of torchao that holds `weight` [outputs, inputs] in fewer bits.

    Args:
        weight: on the device where it is used.
        kind: "int8", whole numbers from -127 to 127, and "fp8", 8-bit floats (e4m3), with a scale for each output;
            "int4", whole numbers from 0 to 15 with a scale and a zero point for each group of weights; "nf4", 4-bit
            floats with a scale for each block of 64 weights (Dettmers et al., arXiv 2305.14314).
    """
    from torchao.quantization import Float8Tensor, Int8Tensor, NF4Tensor, PerRow

    if kind == "int8":
        return Int8Tensor.from_hp(weight, PerRow())
    if kind == "fp8":
        return Float8Tensor.from_hp(weight, granularity=PerRow())
    if kind == "nf4":
        return NF4Tensor.from_tensor(weight.contiguous(), NF4_BLOCK, _nf4_scales(weight.numel()))
    group = [1, _int4_group(weight.shape[1])]
    if weight.device.type == "cuda":
        from torchao.quantization import Int4TilePackedTo4dTensor

        return Int4TilePackedTo4dTensor.from_hp(weight, group)
    from torchao.prototype.quantization.int4 import Int4OpaqueTensor

    return Int4OpaqueTensor.from_hp(weight, group)


def stored_bytes(outputs: int, inputs: int, itemsize: int, kind: Quantization | FrozenQuantization) -> int:
    """Bytes of a weight [outputs, inputs] that `store` makes on a GPU from numbers of `itemsize` bytes."""
    if kind == "int4":
        inputs = -(-inputs // INT4_COLUMNS) * INT4_COLUMNS
        return outputs * inputs // 2 + outputs * inputs // _int4_group(inputs) * 2 * itemsize
    count = outputs * inputs
    if kind in ("nf4", BITSANDBYTES):
        blocks = count // NF4_BLOCK
        return count // 2 + blocks + itemsize * (blocks // _nf4_scales(count) + 17)  # 17: 16 levels and a mean
    return count + outputs * (5 if kind == "int8" else 4)  # a scale in float32, and the zero point of int8


def weight_bytes(model: nn.Module, itemsize: int, kind: Quantization | None = None) -> int | None:
    """Bytes of all weights on a GPU, if numbers have `itemsize` bytes and the model is quantized.

    Args:
        model: a model that is not quantized, on any device, also "meta".
        itemsize: bytes of a number.
        kind: as in `quantize`; None: no quantization.

    Returns:
        The bytes; None: the sizes of the layers do not allow this kind.
    """
    total = sum(p.numel() for p in model.parameters()) * itemsize
    if kind is None:
        return total
    for linear in quantizable(model).values():
        outputs, inputs = linear.weight.shape
        if kind == "int4" and not _fits_int4(outputs, inputs):
            return None
        total += stored_bytes(outputs, inputs, itemsize, kind) - linear.weight.numel() * itemsize
    return total


def _fits_int4(outputs: int, inputs: int) -> bool:
    return bool(_int4_group(inputs)) and outputs % 16 == 0


def _nf4_scales(count: int) -> int:
    """Number of scales, of so many weights, that share a scale of their own."""
    return math.gcd(count // NF4_BLOCK, 256)


def _int4_group(inputs: int) -> int:
    return next((group for group in INT4_GROUPS if inputs % group == 0), 0)


def _check_int4(name: str, weight: Tensor, device: torch.device) -> None:
    outputs, inputs = weight.shape
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"quantization='int4' runs on a CPU or a CUDA device, not on '{device.type}'; take nf4")
    if device.type == "cuda" and weight.dtype != torch.bfloat16:
        raise ValueError(f"quantization='int4' computes in bfloat16 on a GPU, and the weights are "
                         f"{str(weight.dtype).removeprefix('torch.')}; add --dtype bfloat16 (dtype=torch.bfloat16; in "
                         "training precision: bfloat16)")  # fmt: skip
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        raise ValueError("quantization='int4' needs a GPU of compute capability 8.0 or later; take nf4 or int8")
    if not _fits_int4(outputs, inputs):
        raise ValueError(f"quantization='int4' needs inputs in multiples of 32 and outputs in multiples of 16, and "
                         f"{name} is {outputs} x {inputs}; take nf4 or int8")  # fmt: skip


class QuantizedLinear(nn.Linear):
    """A frozen linear layer whose weight is stored in 8 or 4 bits.

    The weight is computed from them in each forward and each backward pass, so activations alone are kept in between.
    With int4 the forward pass uses the kernel for generation.
    """

    @classmethod
    def of(
        cls, linear: nn.Linear, kind: FrozenQuantization, device: torch.device | str | None = None
    ) -> QuantizedLinear:
        """The layer with the weight of `linear`, which keeps its own bias.

        Args:
            linear: a linear layer.
            kind: "int8", "int4" or "nf4", see `store`; "bnb-nf4", which is nf4 by bitsandbytes.
            device: where the weight is quantized, and left; None: where it is.
        """
        with torch.device("meta"):
            layer = cls(linear.in_features, linear.out_features, bias=False)
        weight = linear.weight.detach()
        weight = weight.to(device or weight.device)
        if kind == BITSANDBYTES:
            layer.weight = _store_bitsandbytes(weight)
        else:
            layer.weight = nn.Parameter(store(weight, cast(Quantization, kind)), requires_grad=False)
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
            return F.linear(input, weight if _is_int4(weight) else _dequantized(weight, input.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (grad,) = grads
        return grad @ _dequantized(ctx.weight, grad.dtype), None


def _is_int4(weight: Tensor) -> bool:
    return type(weight).__name__.startswith("Int4")


def _dequantized(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight [outputs, inputs] as numbers of `dtype`."""
    if type(weight).__name__ == "Params4bit":
        library = importlib.import_module("bitsandbytes.functional")
        return library.dequantize_4bit(weight.data, cast(Any, weight).quant_state).to(dtype)
    if _is_int4(weight):  # torchao can only multiply by it
        return F.linear(torch.eye(weight.shape[1], dtype=dtype, device=weight.device), weight).t()
    from torchao.quantization import NF4Tensor

    whole = weight.get_original_weight() if isinstance(weight, NF4Tensor) else weight.dequantize()
    return whole.to(dtype)


def _store_bitsandbytes(weight: Tensor) -> nn.Parameter:
    """A parameter of bitsandbytes that holds `weight` [outputs, inputs] as nf4 with quantized scales.

    Raises:
        ValueError: this version of bitsandbytes cannot quantize on the device.
    """
    library = importlib.import_module("bitsandbytes")
    made = library.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", blocksize=NF4_BLOCK)
    try:
        made = made.to(weight.device)
    except (RuntimeError, NotImplementedError) as error:
        raise ValueError(f"model.quantize: this bitsandbytes cannot store weights on '{weight.device.type}': {error}; "
                         "take nf4, which needs torchao") from None  # fmt: skip
    if made.quant_state is None:
        raise ValueError(f"model.quantize: this bitsandbytes does not quantize on '{weight.device.type}'; take nf4, "
                         "which needs torchao")  # fmt: skip
    return made


def frozen_linears(model: nn.Module, names: Collection[str]) -> dict[str, nn.Linear]:
    """The frozen linear layers among the modules of these names that can be stored in fewer bits."""
    return {
        name: module for name, module in model.named_modules()
        if type(module) is nn.Linear and name.removesuffix(".base_layer") in names
        and not module.weight.requires_grad and module.weight.numel() % NF4_BLOCK == 0
    }  # fmt: skip


def quantize_frozen(
    model: nn.Module, kind: FrozenQuantization, names: Collection[str], device: torch.device | str | None = None
) -> int:
    """Quantize frozen linear layers in place, for the training of an adapter.

    Args:
        model: the model with its adapter, in the types of the run.
        kind: see `QuantizedLinear.of`.
        names: names of the modules whose linear layers are quantized; layers that are trained are not.
        device: where the model is trained: their weights are quantized and left there; None: where they are.

    Returns:
        The number of layers.

    Raises:
        ValueError: the library is not installed, there is no such layer, or int4 cannot have its sizes or type.
    """
    if kind == "none":
        return 0
    library, install = ("bitsandbytes", "pip install bitsandbytes") if kind == BITSANDBYTES else ("torchao", EXTRA)
    if importlib.util.find_spec(library) is None:
        raise ValueError(f"model.quantize: {kind} needs {library}, which is not installed: {install}")
    chosen = frozen_linears(model, names)
    if not chosen:
        raise ValueError("model.quantize finds no frozen linear layer in model.quantize_parts")
    if kind == "int4":
        for name, linear in chosen.items():
            _check_int4(name, linear.weight, torch.device(device or linear.weight.device))
    for name, linear in chosen.items():
        owner, _, last = name.rpartition(".")
        setattr(model.get_submodule(owner), last, QuantizedLinear.of(linear, kind, device))
    # Every process has the same ones, and data parallelism cannot broadcast them.
    cast(Any, model)._ddp_params_and_buffers_to_ignore = [f"{name}.weight" for name in chosen]
    return len(chosen)

"""What holds a weight: itself, or the numbers and scales of a quantized one."""

from __future__ import annotations

from torch import Tensor, nn

from ..ops.int8 import Int8Rows


def is_quantized(module: nn.Module) -> bool:
    """Whether any weight is."""
    return any(len(stored(p)) > 1 for p in module.parameters())


def stored(tensor: Tensor) -> list[Tensor]:
    """The plain tensors that hold `tensor`: itself, a quantized one's numbers and scales, a sharded one's part."""
    flatten = getattr(tensor, "__tensor_flatten__", None)  # PyTorch's protocol for tensors that wrap others
    inner = [] if flatten is None else [getattr(tensor, name) for name in flatten()[0]]
    return [tensor] if flatten is None else [part for x in inner if isinstance(x, Tensor) for part in stored(x)]


def readable(linear: nn.Module) -> Tensor | Int8Rows | None:
    """The weights of a linear layer as the decoding kernels read them.

    None: only the module itself knows what to do (LoRA, other kinds of quantization).
    """
    if type(linear) is not nn.Linear:
        return None
    weight = linear.weight
    if type(weight) in (nn.Parameter, Tensor):
        return weight
    from torchao.quantization import Int8Tensor

    if isinstance(weight, Int8Tensor) and weight.scale.shape == (len(weight), 1) and weight.act_quant_kwargs is None:
        return Int8Rows(weight.qdata, weight.scale[:, 0])
    return None

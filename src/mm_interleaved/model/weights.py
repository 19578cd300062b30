"""What holds a weight: itself, or the numbers and scales of a quantized one."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..ops.scaled_rows import ScaledRows


def is_quantized(module: nn.Module) -> bool:
    """Whether any weight is."""
    return any(len(stored(p)) > 1 for p in module.parameters())


def stored(tensor: Tensor) -> list[Tensor]:
    """The plain tensors that hold `tensor`: itself, a quantized one's numbers and scales, a sharded one's part."""
    flatten = getattr(tensor, "__tensor_flatten__", None)  # PyTorch's protocol for tensors that wrap others
    inner = [] if flatten is None else [getattr(tensor, name) for name in flatten()[0]]
    return [tensor] if flatten is None else [part for x in inner if isinstance(x, Tensor) for part in stored(x)]


def readable(linear: nn.Module) -> Tensor | ScaledRows | None:
    """The weights of a linear layer as the decoding kernels read them.

    None: only the module itself knows what to do (LoRA, other kinds of quantization).
    """
    if type(linear) is not nn.Linear:
        return None
    weight = linear.weight
    if type(weight) in (nn.Parameter, Tensor):
        return weight
    from torchao.quantization import Float8Tensor, Int8Tensor

    if not isinstance(weight, (Int8Tensor, Float8Tensor)) or weight.act_quant_kwargs is not None:
        return None
    if weight.scale.shape == (len(weight), 1) and weight.qdata.dtype in (torch.int8, torch.float8_e4m3fn):
        return ScaledRows(weight.qdata, weight.scale[:, 0])
    return None

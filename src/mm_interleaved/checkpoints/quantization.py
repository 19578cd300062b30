"""Weight-only quantization of the language model through torchao: less memory, fewer bytes a token, not lossless.

A token costs reading every weight once, so weights of one byte instead of two take half the time at best. Quantized are
the attention's and the MLP's matrices of the decoder layers, by far the most of a large model; MMFS, embeddings, the
head, and what sees and draws stay as they are.
"""

from __future__ import annotations

import importlib.util
from typing import Literal, get_args

from torch import nn

from ..model.mm_interleaved import MMInterleavedModel
from ..model.weights import is_quantized

Quantization = Literal["int8", "fp8"]
QUANTIZATIONS = get_args(Quantization)
EXTRA = "pip install 'mm-interleaved[quantization]'"


def quantize(model: MMInterleavedModel, kind: Quantization) -> None:
    """Quantize the decoder layers' linear maps in place, each output with its own scale.

    The model can be moved and used afterwards, not saved: keep the checkpoint, and quantize after loading it.

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

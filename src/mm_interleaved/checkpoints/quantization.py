"""Weight-only quantization of the language model through torchao: less memory, fewer bytes a token, not lossless.

A decode step reads every weight once, so 8-bit weights take half the time of 16-bit weights at best. The matrices of
attention and MLP in the decoder layers are quantized, by far the largest part of a large model. MMFS, embeddings, head,
visual tokenizer and image decoder are not.
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

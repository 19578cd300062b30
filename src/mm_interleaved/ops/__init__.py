"""Custom operators. Each has a reference implementation in plain PyTorch and a test that compares the two."""

from .around import deformable_attention_around
from .decoding import attend, project, project_gated, rms_norm, why_not_kernels
from .deformable import deformable_attention, deformable_attention_reference, promote
from .group_norm import GroupNorm, channels_last, why_not_group_norm
from .mmfs_attention import (
    HAS_TRITON,
    MMFSInputs,
    SamplingPoints,
    image_routes,
    mmfs_attention,
    mmfs_attention_reference,
    sampling_points,
    softmax_plus_one,
    why_not_triton,
)
from .pointwise import gelu_gate, rotary, silu_gate, why_not_pointwise

__all__ = [
    "HAS_TRITON",
    "GroupNorm",
    "MMFSInputs",
    "SamplingPoints",
    "attend",
    "channels_last",
    "deformable_attention",
    "deformable_attention_around",
    "deformable_attention_reference",
    "gelu_gate",
    "image_routes",
    "mmfs_attention",
    "mmfs_attention_reference",
    "project",
    "project_gated",
    "promote",
    "rms_norm",
    "rotary",
    "sampling_points",
    "silu_gate",
    "softmax_plus_one",
    "why_not_group_norm",
    "why_not_kernels",
    "why_not_pointwise",
    "why_not_triton",
]

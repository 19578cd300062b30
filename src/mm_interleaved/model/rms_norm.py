"""RMSNorm, the norm of all supported decoders. Axes: D width."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.mistral.modeling_mistral import MistralRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from ..ops.devices import chooses_kernels
from .weights import plain_class

LibraryNorm = LlamaRMSNorm | MistralRMSNorm | Qwen2RMSNorm | Qwen3RMSNorm


@plain_class
class RMSNorm(LlamaRMSNorm):
    """RMSNorm (arXiv 1910.07467), in one kernel forward and backward on CUDA devices.

    In half precision the kernel rounds once, at the end; transformers' norm also rounds before the gain.
    """

    @classmethod
    def of(cls, norm: LibraryNorm) -> RMSNorm:
        """An `RMSNorm` that takes over the weight of a library's norm."""
        ours = cls(0, norm.variance_epsilon)
        ours.weight = norm.weight
        return ours.train(norm.training)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[..., D], normalised."""
        if not chooses_kernels(hidden_states.device) or hidden_states.dtype != self.weight.dtype:
            return super().forward(hidden_states)  # under autocast the result is float32, as in transformers
        return F.rms_norm(hidden_states, self.weight.shape, self.weight, self.variance_epsilon)

"""The norm of all supported decoders."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from .weights import plain_class


@plain_class
class RMSNorm(LlamaRMSNorm):
    """RMSNorm (arXiv 1910.07467) in one kernel, forward and backward, on CUDA devices.

    In half precision it rounds once, at the end; the library's rounds before the gain as well.
    """

    @classmethod
    def of(cls, norm: nn.Module) -> RMSNorm:
        """One with the weight of a norm of the library, whichever decoder's."""
        ours = cls(0, norm.variance_epsilon)
        ours.weight = norm.weight
        return ours.train(norm.training)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[..., D], normalised."""
        if hidden_states.device.type != "cuda" or hidden_states.dtype != self.weight.dtype:
            return super().forward(hidden_states)  # under autocast the result is float32, as the library's
        return F.rms_norm(hidden_states, self.weight.shape, self.weight, self.variance_epsilon)

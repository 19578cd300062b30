"""Adding tokens to an existing model: `tokenizer.add_tokens(...)`, then `model.resize_token_embeddings(...)`.

The ids of added tokens follow those of the begin-of-image and the image token, so all earlier ids keep their meaning.
Added tokens count as new tokens (`num_new_tokens`): like those two, they have rows in the trainable part of the head.
"""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from .config import MMInterleavedConfig
    from .language_model import LanguageModel
    from .text_head import TextHead

INITIAL_RANGE = 0.02  # standard deviation of new rows without `mean_resizing`, as in `TextHead`


class ResizableVocabulary:
    """`resize_token_embeddings` for a model with `language_model`, a `TextHead` as `lm_head`, and `config`."""

    if TYPE_CHECKING:  # transformers evaluates the annotations of a model
        config: MMInterleavedConfig
        language_model: LanguageModel
        lm_head: TextHead

        def get_input_embeddings(self) -> nn.Module: ...

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Embedding:
        """Extend embeddings, head and configuration for tokens that were added to the tokenizer.

        Added rows of `embed_tokens` and `lm_head.head` are trained if the other rows there are (`config.frozen`); added
        rows of `lm_head.new` start at zero.

        Args:
            new_num_tokens: new size of the vocabulary, `len(tokenizer)`; None: the present size.
            pad_to_multiple_of: must not add rows, because a row without a token could be generated.
            mean_resizing: initialise added rows with the mean of the others; otherwise at random.

        Returns:
            The embeddings.

        Raises:
            ValueError: the model cannot be resized to that size. It is unchanged then.
        """
        embeddings = cast(nn.Embedding, self.get_input_embeddings())
        old = self.config.vocab_size
        new = self._checked_size(new_num_tokens, pad_to_multiple_of)
        if new == old:
            return embeddings
        head = self.lm_head
        for module in (embeddings, head.head, head.new):
            if type(module) not in (nn.Embedding, nn.Linear):
                raise ValueError(f"the vocabulary cannot be resized while a {type(module).__name__} wraps it; resize "
                                 "before adapters and quantization are added")  # fmt: skip
            if any(p.is_meta for p in module.parameters()):
                raise ValueError("the vocabulary cannot be resized while its weights are offloaded; resize before")
        first_new, count = old - head.num_new, new - old
        for owner, name in ((embeddings, "weight"), (head.head, "weight"), (head.head, "bias")):
            _extend(owner, name, _fresh(getattr(owner, name), first_new, count, mean_resizing))
        for name in ("weight", "bias"):
            parameter = getattr(head.new, name)
            _extend(head.new, name, parameter.new_zeros(count, *parameter.shape[1:]))
        embeddings.num_embeddings = head.head.out_features = new
        head.num_new = head.new.out_features = head.num_new + count
        self.config.text_config.vocab_size = self.language_model.config.vocab_size = new
        self.language_model.vocab_size = new
        self.config.num_new_tokens = head.num_new
        return embeddings

    def _checked_size(self, new_num_tokens: int | None, multiple: int | None) -> int:
        """The new size of the vocabulary.

        Raises:
            ValueError: it is not an integer, smaller than the present size, or not the requested multiple.
        """
        old = self.config.vocab_size
        try:
            new = old if new_num_tokens is None else operator.index(new_num_tokens)
            over = 0 if multiple is None else new % operator.index(multiple)
        except (TypeError, ZeroDivisionError):
            raise ValueError(f"new_num_tokens and pad_to_multiple_of must be whole numbers from 1 on, not "
                             f"{new_num_tokens!r} and {multiple!r}") from None  # fmt: skip
        if new < old:
            raise ValueError(f"the vocabulary of {old} tokens cannot shrink to {new}: its last rows are those of the "
                             "begin-of-image and the image token")  # fmt: skip
        if over:
            raise ValueError(f"{new} tokens are no multiple of {multiple}; a row without a token could be generated. "
                             "Leave pad_to_multiple_of out, or add tokens")  # fmt: skip
        return new


@torch.no_grad()
def _fresh(rows: Tensor, count_old: int, count: int, mean: bool) -> Tensor:
    """`count` new rows for `rows`, initialised from its first `count_old` rows; a row of a bias is a number."""
    average = rows[:count_old].float().mean(0)
    if mean or rows.ndim == 1:
        return average.expand(count, *rows.shape[1:]).to(rows)
    return torch.randn(count, *rows.shape[1:], device=rows.device).mul(INITIAL_RANGE).to(rows)


def _extend(owner: nn.Module, name: str, rows: Tensor) -> None:
    """Append `rows` to the parameter of that name."""
    before = getattr(owner, name)
    extended = torch.cat([before.detach(), rows.to(before)])
    setattr(owner, name, nn.Parameter(extended, requires_grad=before.requires_grad))

"""The text of tokens that come one by one, at a cost that does not grow with the text."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

MOST_UNKNOWN = 8  # tokens that may be part of one character; it has at most 4 bytes


class IncrementalText:
    """Decodes a text token by token: the texts of the tokens joined are the text of all of them.

    A tokenizer decodes a token by those before it, so each step decodes the last few tokens with and without the new
    one. A token that ends inside a character has no text; the token that ends the character has all of it.

    Args:
        tokenizer: decodes.
        skip_special_tokens: whether special tokens have no text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, skip_special_tokens: bool = False) -> None:
        self._tokenizer, self._skip = tokenizer, skip_special_tokens
        self._window: list[int] = []  # tokens of the last text, then those without text
        self._shown = 0  # number of the former

    def _decode(self, ids: list[int]) -> str:
        text = self._tokenizer.decode(ids, skip_special_tokens=self._skip)
        assert isinstance(text, str)  # of one list of ids
        return text

    def add(self, token: int) -> str:
        """The text that the next token adds."""
        self._window.append(token)
        before, text = self._decode(self._window[: self._shown]), self._decode(self._window)
        unknown = len(self._window) - self._shown
        if len(text) <= len(before) or (text.endswith("\ufffd") and unknown < MOST_UNKNOWN):
            return ""
        del self._window[: self._shown]
        self._shown = unknown
        return text[len(before) :]

"""Tokens as pieces of text, and as words."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

WORD_START = "\u2581"  # SentencePiece's mark at the beginning of a word


def token_pieces(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """What each token adds to the text; special tokens are themselves."""
    special, pieces, before = set(tokenizer.all_special_ids), [], ""
    for count, token in enumerate(ids, 1):
        text = str(tokenizer.decode(list(ids[:count]), skip_special_tokens=True))
        if token in special:
            pieces.append(str(tokenizer.convert_ids_to_tokens([token])[0]))
        elif text.endswith("\ufffd"):  # inside a multi-byte character: its last token gets the character
            pieces.append("")
            continue
        else:
            pieces.append(text[len(before) :])
        before = text
    return pieces


def group_words(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], pieces: Sequence[str]) -> list[tuple[int, int]]:
    """(begin, end) tokens of each word; punctuation and special tokens are words of their own."""
    special, starts = set(tokenizer.all_special_ids), []
    names = tokenizer.convert_ids_to_tokens(list(ids))
    alone = False  # whether the last word takes no further token
    for position, (token, name, piece) in enumerate(zip(ids, names, pieces, strict=True)):
        mark = bool(piece.strip()) and not any(c.isalnum() for c in piece)
        if token in special or mark or alone or not starts or str(name).startswith(WORD_START):
            starts.append(position)
        alone = token in special or mark
    return list(zip(starts, [*starts[1:], len(ids)], strict=True))

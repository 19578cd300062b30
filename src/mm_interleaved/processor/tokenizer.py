"""A SentencePiece tokenizer with the two image tokens, and the segment-wise rule of the release.

The released weights were trained with a tokenizer that encodes every stretch of text between special tokens separately,
so that the first word after an image always has the word-boundary mark (docs/model.md, "Tokens and tokenization").
Present tokenizers do not; `encode_text` implements the rule for any of them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

from tokenizers import AddedToken
from transformers import PreTrainedTokenizerBase
from transformers.tokenization_utils_sentencepiece import SentencePieceBackend

SOI_TOKEN = "<|beginofimage|>"  # starts an image
IMAGE_TOKEN = "<|image|>"  # one visual token of an image
GUARD = "\udfff"  # breaks up what would be a token; it stands in no text, because lone surrogates are refused


class MMInterleavedTokenizer(SentencePieceBackend):
    """A SentencePiece model plus `<|beginofimage|>` and `<|image|>` as its last two ids.

    Args:
        vocab_file: the SentencePiece model.
        pad_token: the padding piece; None: the model's own pad piece or, if it has none, its last piece, as in the
            release (31999 with Vicuna).
    """

    def __init__(self, vocab_file: str, pad_token: str | None = None, **kwargs: Any) -> None:
        kwargs.setdefault("bos_token", "<s>")
        kwargs.setdefault("eos_token", "</s>")
        kwargs.setdefault("unk_token", "<unk>")
        kwargs["special_tokens_pattern"] = "bos"
        super().__init__(vocab_file=vocab_file, pad_token=pad_token, **kwargs)
        if self.pad_token is None:
            own = self.sp_model.pad_id()
            self.pad_token = self.sp_model.id_to_piece(own if own >= 0 else self.sp_model.get_piece_size() - 1)
        add_image_tokens(self)

    @classmethod
    def from_vocab(cls, path: str | Path) -> MMInterleavedTokenizer:
        """A tokenizer from a SentencePiece file, or from a folder with a `tokenizer.model`, such as Vicuna's.

        Raises:
            FileNotFoundError: there is no such file.
        """
        path = Path(path)
        path = path / "tokenizer.model" if path.is_dir() else path
        if not path.is_file():
            raise FileNotFoundError(f"no SentencePiece model at '{path}'")
        return cls(str(path))

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """The text of pieces. Byte pieces are joined into characters; special tokens keep their spelling."""
        own = cast("tuple[str | None, ...]", (self.bos_token, self.eos_token, self.pad_token))
        special = {*own, SOI_TOKEN, IMAGE_TOKEN}  # added ones are pieces
        text, run = "", []
        for token in tokens:
            if token not in special:
                run.append(token)
                continue
            text, run = text + self.sp_model.decode_pieces(run) + token, []
        return text + self.sp_model.decode_pieces(run)


def add_image_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[int, int]:
    """Add the two image tokens if `tokenizer` lacks them (they strip white space around them), and return their ids."""
    tokens: list[Any] = [
        AddedToken(t, lstrip=True, rstrip=True, normalized=False, special=True) for t in (SOI_TOKEN, IMAGE_TOKEN)
    ]
    tokenizer.add_tokens(tokens, special_tokens=True)
    soi, image = cast("list[int]", tokenizer.convert_tokens_to_ids([SOI_TOKEN, IMAGE_TOKEN]))
    return soi, image


def guard_text(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """`text` of a user or of data, in which `encode_text` finds no special token, also not across its ends."""
    if not text:
        return text
    starts = "|".join(map(re.escape, sorted(_special_tokens(tokenizer))))
    return GUARD + re.sub(f"(?s)(?={starts})(.)", rf"\1{GUARD}", text) + GUARD


def encode_plain(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The ids of a text of a user or of data."""
    return encode_text(tokenizer, guard_text(tokenizer, text))


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    added = cast("Iterable[AddedToken]", tokenizer.added_tokens_decoder.values())
    return {*tokenizer.all_special_tokens, *(t.content for t in added if t.special), SOI_TOKEN, IMAGE_TOKEN}


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The ids of `text`, without a leading `<s>`. Stretches between special and added tokens are encoded separately.

    Special tokens in the text become control tokens, except in what `guard_text` returned.

    White space next to the image tokens is dropped; next to `<s>`, `</s>` and `<unk>` it is kept. Next to tokens that a
    user has added their `AddedToken` decides, and one space after them becomes the word-boundary mark.
    """
    special = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token)
    own = [t for t in cast("tuple[str | None, ...]", special) if t]
    tokens = {t: AddedToken(t) for t in own} | _added_tokens(tokenizer, own)
    longest_first = sorted(tokens.values(), key=lambda token: -len(token.content))
    pieces = re.split(f"({'|'.join(_pattern(t) for t in longest_first)})", text)  # text, token, text, token, ..., text
    is_sentencepiece = isinstance(tokenizer, SentencePieceBackend)
    ids: list[int] = []
    for index, piece in enumerate(pieces):
        if index % 2:
            ids.append(cast(int, tokenizer.convert_tokens_to_ids(piece)))
            continue
        piece = piece.replace(GUARD, "")
        if index > 0 and tokens[pieces[index - 1]].rstrip:
            piece = piece.lstrip()
        elif index > 0 and is_sentencepiece and pieces[index - 1] not in own and piece.strip():
            piece = piece.removeprefix(" ")  # SentencePiece adds the word-boundary mark
        if index + 1 < len(pieces) and tokens[pieces[index + 1]].lstrip:
            piece = piece.rstrip()
        ids += _encode_stretch(tokenizer, piece)
    return ids


def _added_tokens(tokenizer: PreTrainedTokenizerBase, own: list[str]) -> dict[str, AddedToken]:
    """The image tokens and added tokens. Tokenizers other than SentencePiece's find those that are not special."""
    every = isinstance(tokenizer, SentencePieceBackend)
    added = cast("Iterable[AddedToken]", tokenizer.added_tokens_decoder.values())
    tokens = {t.content: t for t in added if (every or t.special) and t.content not in own}
    return tokens | {t: AddedToken(t, lstrip=True, rstrip=True) for t in (SOI_TOKEN, IMAGE_TOKEN)}


def _pattern(token: AddedToken) -> str:
    written = re.escape(token.content)
    return rf"(?<!\w){written}(?!\w)" if token.single_word else written


def _encode_stretch(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    if not text:
        return []
    if isinstance(tokenizer, SentencePieceBackend):
        return tokenizer.sp_model.encode(text)
    return tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)

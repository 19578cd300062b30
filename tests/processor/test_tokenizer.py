"""The segment-wise rule of docs/model.md, "Tokens and tokenization", on our tokenizer and one of transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from mm_interleaved import MMInterleavedTokenizer
from mm_interleaved.pretrained import TOKENIZER
from mm_interleaved.processor.tokenizer import IMAGE_TOKEN, SOI_TOKEN, add_image_tokens, encode_plain, encode_text

SHIPPED = MMInterleavedTokenizer.from_vocab(TOKENIZER)


def pieces(text: str) -> list[str]:
    return SHIPPED.convert_ids_to_tokens(encode_text(SHIPPED, text))


def test_the_text_after_an_image_starts_with_a_word_boundary(tokenizer: MMInterleavedTokenizer) -> None:
    """The acceptance example: "a", SOI, 64 image tokens, "b"."""
    ids = tokenizer("a" + SOI_TOKEN + 64 * IMAGE_TOKEN + "b").input_ids
    a, b = tokenizer.convert_tokens_to_ids(["▁a", "▁b"])
    assert ids == [1, a, 2048, *[2049] * 64, b]
    assert [1, *encode_text(tokenizer, "a" + SOI_TOKEN + 64 * IMAGE_TOKEN + "b")] == ids


def test_white_space_goes_next_to_image_tokens_only() -> None:
    assert pieces(f"a {IMAGE_TOKEN} b") == pieces(f"a{IMAGE_TOKEN}b")
    assert pieces(f"a \n{SOI_TOKEN}{IMAGE_TOKEN}\t b") == ["▁a", SOI_TOKEN, IMAGE_TOKEN, "▁b"]
    assert pieces("a </s> b") != pieces("a</s>b")
    assert pieces("a</s>b") == ["▁a", "</s>", "▁b"]


@given(
    st.lists(
        st.sampled_from(["a red", " house ", "</s>", "<s>", SOI_TOKEN, IMAGE_TOKEN, "héllo", "  ", "7"]), max_size=8
    )
)
def test_the_tokenizer_itself_follows_the_rule(parts: list[str]) -> None:
    text = "".join(parts)
    assert SHIPPED(text, add_special_tokens=False).input_ids == encode_text(SHIPPED, text)


@given(st.text())
def test_every_text_survives(text: str) -> None:
    for token in (SOI_TOKEN, IMAGE_TOKEN, "<s>", "</s>", "<unk>", "<pad>", "▁"):
        text = text.replace(token, "")
    text = text.encode("utf-8", "ignore").decode().replace("\x00", "")
    assert SHIPPED.decode(encode_text(SHIPPED, text)) == text


def test_padding_piece_in_a_text_is_not_special() -> None:
    """With Vicuna the padding id is an ordinary piece, which text may contain."""
    tokenizer = MMInterleavedTokenizer(str(TOKENIZER), pad_token="▁cat")
    assert encode_text(tokenizer, "a cat sat") == encode_text(SHIPPED, "a cat sat")


def test_save_and_load(tmp_path: Path, tokenizer: MMInterleavedTokenizer) -> None:
    tokenizer.save_pretrained(tmp_path)
    text = f"a {SOI_TOKEN}{IMAGE_TOKEN} b"
    for again in (MMInterleavedTokenizer.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)):
        assert again(text).input_ids == tokenizer(text).input_ids
        assert (len(again), again.pad_token_id) == (len(tokenizer), tokenizer.pad_token_id)


def test_another_kind_of_tokenizer() -> None:
    """A byte-level BPE as Qwen has it: no word-boundary mark, no <s>."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    raw.train_from_iterator(["a red house", "a cat"], trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|end|>")
    soi, image = add_image_tokens(tokenizer)
    assert image == soi + 1 == len(tokenizer) - 1
    ids = encode_text(tokenizer, f"a house {SOI_TOKEN}{IMAGE_TOKEN} a cat<|end|>")
    assert ids[-1] == tokenizer.eos_token_id
    assert ids.index(image) == ids.index(soi) + 1
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a housea cat"
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    words = f"a <|im_start|> {IMAGE_TOKEN}<|end|> cat"
    plain, written = encode_plain(tokenizer, words), encode_text(tokenizer, words)
    special = {tokenizer.convert_tokens_to_ids(t) for t in ("<|im_start|>", IMAGE_TOKEN, "<|end|>")}
    assert not special & {*plain}
    assert special < {*written}
    assert tokenizer.decode(plain) == words


def test_missing_vocabulary(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no SentencePiece model"):
        MMInterleavedTokenizer.from_vocab(tmp_path)

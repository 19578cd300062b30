"""Text that is decoded token by token is the text of all tokens, at the same cost for each."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mm_interleaved import MMInterleavedProcessor
from mm_interleaved.generation.incremental import IncrementalText


@settings(max_examples=150, deadline=None)
@given(text=st.text(alphabet=st.one_of(st.sampled_from("ab  .\n\u00e9\u65e5\U0001f600"), st.characters(codec="utf-8"))))
def test_the_texts_of_tokens_joined_are_the_text(processor: MMInterleavedProcessor, text: str) -> None:
    tokenizer = processor.tokenizer
    ids = tokenizer.encode(text, add_special_tokens=False)
    decoder = IncrementalText(tokenizer)
    assert "".join(decoder.add(token) for token in ids) == tokenizer.decode(ids)


@settings(max_examples=150, deadline=None)
@given(numbers=st.lists(st.integers(0, 10**6), max_size=30))
def test_any_tokens(processor: MMInterleavedProcessor, numbers: list[int]) -> None:
    """Also bytes that are no characters, and special tokens; half a character at the end is held back."""
    tokenizer = processor.tokenizer
    ids = [number % len(tokenizer) for number in numbers]
    decoder = IncrementalText(tokenizer, skip_special_tokens=True)
    found = "".join(decoder.add(token) for token in ids)
    assert found.rstrip("\ufffd") == tokenizer.decode(ids, skip_special_tokens=True).rstrip("\ufffd")


def test_no_token_decodes_more_than_a_few(processor: MMInterleavedProcessor, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder, counts, usual = IncrementalText(processor.tokenizer), [], type(processor.tokenizer).decode

    def counted(self: object, ids: list[int], **options: bool) -> str:
        counts.append(len(ids))
        return usual(self, ids, **options)

    monkeypatch.setattr(type(processor.tokenizer), "decode", counted)
    byte = processor.tokenizer.convert_tokens_to_ids("<0x80>")
    for token in [*processor.tokenizer.encode("a red house " * 200, add_special_tokens=False), *[byte] * 200]:
        decoder.add(token)
    assert max(counts) <= 32

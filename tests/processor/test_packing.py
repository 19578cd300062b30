"""Packing (docs/model.md, "Rows, documents and packing"): no image is ever cut, nothing is lost.

Its rule for a single pair longer than a row is kept before packing, where it is known what a pair is: see
`test_long_pairs_lose_words_but_not_their_image` in tests/data/test_sources.py.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mm_interleaved.document import Image
from mm_interleaved.processor.packing import TokenStream, pack

BOS, SOI, IMG, WORD = 1, 2, 3, 9
N = 4  # image tokens


def stream(text: str, name: str = "d") -> TokenStream:
    """`s` is <s>, `i` a whole image, everything else a word."""
    ids: list[int] = []
    for letter in text:
        ids += [SOI, *[IMG] * N] if letter == "i" else [BOS if letter == "s" else WORD]
    count = text.count("i")
    return TokenStream(np.array(ids, np.int64), np.ones(len(ids), bool), [Image(f"{name}{k}") for k in range(count)])


def show(row: TokenStream) -> str:
    names = {BOS: "s", WORD: "w", SOI: "i", IMG: ""}
    return "".join(names[i] for i in row.ids.tolist())


def packed(documents: list[str], length: int, **options: object) -> list[str]:
    rows = pack(
        [stream(d, f"{k}-") for k, d in enumerate(documents)],
        length=length, num_image_tokens=N, bos_token_id=BOS, soi_token_id=SOI, **options,
    )  # fmt: skip
    return [show(row) for row in rows]


def test_rows_are_filled_across_documents() -> None:
    assert packed(["siw", "siw"], 7) == ["siw", "siw"]
    assert packed(["siwww", "swi"], 12) == ["siwwwsw", "i"]  # the second image would be cut


def test_a_row_ends_before_the_document_of_a_cut_image() -> None:
    assert packed(["siwww", "swi"], 12, cut="document") == ["siwww", "swi"]


def test_a_document_that_fills_the_row_is_cut_before_the_image() -> None:
    assert packed(["siwwwwi"], 12, cut="document") == ["siwwww", "i"]


def test_continued_documents_have_no_start() -> None:
    assert packed(["siwwwiww"], 9) == ["siwww", "iww"]


@pytest.mark.parametrize("offset", range(N + 2))
def test_every_way_to_cut_an_image(offset: int) -> None:
    words = "w" * offset
    rows = packed(["si" + words + "i"], 1 + 5 + 3)
    assert "".join(rows).replace("s", "") == "i" + words + "i"
    for row in rows:
        assert row.count("i") * (N + 1) + len(row) - row.count("i") <= 9


def test_image_limit_cuts_after_the_image_or_before_the_document() -> None:
    assert packed(["siw", "siw", "siw"], 21, max_images=2) == ["siwsi", "wsiw"]
    assert packed(["siw", "siw", "siw"], 21, max_images=2, cut="document") == ["siwsiw", "siw"]
    assert packed(["siiiw"], 17, max_images=2, cut="document") == ["sii", "iw"]  # no <s> between the images


def test_rows_without_images_are_dropped() -> None:
    assert packed(["swwwww", "si"], 6) == ["si"]
    assert packed(["swww"], 100) == []


def test_the_end_of_the_stream() -> None:
    assert packed(["siw"], 100) == ["siw"]
    assert packed(["siw"], 100, keep_last=False) == []
    assert packed(["siw"], 7, keep_last=False) == ["siw"]


def test_a_row_too_short_for_an_image() -> None:
    with pytest.raises(ValueError, match="does not fit"):
        packed(["siw"], 4)


@given(
    st.lists(st.text("iwww", max_size=12).map(lambda t: "s" + t), min_size=1, max_size=12),
    st.integers(N + 2, 40),
    st.one_of(st.none(), st.integers(1, 3)),
    st.sampled_from(["image", "document"]),
)
def test_nothing_is_cut_or_lost(documents: list[str], length: int, limit: int | None, cut: str) -> None:
    streams = [stream(d, f"{k}-") for k, d in enumerate(documents)]
    rows = list(
        pack(
            streams, length=length, num_image_tokens=N, bos_token_id=BOS, soi_token_id=SOI, max_images=limit, cut=cut
        )
    )  # fmt: skip
    for row in rows:
        soi = np.flatnonzero(row.ids == SOI)
        assert len(row) <= length
        assert 0 < len(row.images) == len(soi) <= (limit or len(soi))
        assert (row.ids == IMG).sum() == N * len(soi)
        assert all((row.ids[s + 1 : s + 1 + N] == IMG).all() for s in soi)
    # Images in order, none lost; and the rows are stretches of the stream, in order.
    assert [i.source for row in rows for i in row.images] == [i.source for s in streams for i in s.images]
    whole, position = "".join(documents), 0
    for row in rows:
        position = whole.index(show(row), position) + len(show(row))

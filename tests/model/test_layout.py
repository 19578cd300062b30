"""Which images are visible to which token, and the context of each image (docs/model.md, "Visible images")."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mm_interleaved.model.layout import (
    block_mask,
    find_images,
    previous_images,
    reversed_context,
    visible_images,
)

BOS, SOI, IMG = 1, 2, 3
IDS = {"s": BOS, "b": SOI, "i": IMG, ".": 0}


def ids(*rows: str) -> tuple[Tensor, Tensor]:
    """One letter a token: s <s>, b begin-of-image, i image token, . padding, others words."""
    longest = max(map(len, rows))
    rows = [r.ljust(longest, ".") for r in rows]
    tokens = torch.tensor([[IDS.get(c, 9) for c in r] for r in rows])
    return tokens, torch.tensor([[int(c != ".") for c in r] for r in rows])


def seen(*rows: str) -> list[list[list[int]]]:
    tokens, mask = ids(*rows)
    return [[[i for i in t if i >= 0] for t in row] for row in visible_images(tokens, mask, BOS, SOI).tolist()]


def test_a_image_sees_itself_but_its_announcement_does_not() -> None:
    """docs/model.md, "SOI does not see its own image"."""
    assert seen("sxbiiy") == [[[], [], [], [0], [0], [0]]]


def test_most_recent_first_and_only_of_the_own_document() -> None:
    assert seen("sbixbiysz") == [[[], [], [0], [0], [0], [1, 0], [1, 0], [], []]]


def test_images_are_numbered_through_the_batch() -> None:
    assert seen("sbix", "sx..", "sbi.") == [
        [[], [], [0], [0]],
        [[], [], [], []],
        [[], [], [1], []],
    ]


@given(st.lists(st.text("sbix", min_size=1, max_size=14), min_size=1, max_size=3))
def test_visibility_agrees_with_the_definition(rows: list[str]) -> None:
    """Token t sees image j iff its SOI s_j fulfils b_t < s_j + 1 <= t, b_t the last <s> up to t."""
    result = seen(*rows)
    offset = 0
    for row, text in enumerate(rows):
        starts = [k for k, c in enumerate(text) if c == "b"]
        for t in range(len(text)):
            b = text[: t + 1].rfind("s")
            expected = [offset + j for j, s in enumerate(starts) if b < s + 1 <= t]
            assert result[row][t] == expected[::-1]
        offset += len(starts)


def example() -> tuple[Tensor, Tensor, Tensor]:
    """Two documents in one row, three images."""
    tokens, mask = ids("saabiibisbi")
    return tokens, mask, torch.tensor([0, 0, 8])


def test_context_by_hand() -> None:
    """Last token first, counted from the begin-of-image token, with the start of the document."""
    tokens, mask, starts = example()
    positions = find_images(tokens, mask, SOI, starts)
    assert positions.columns.tolist() == [3, 6, 9]
    hidden = torch.arange(11.0).view(1, 11, 1)
    context, context_mask = reversed_context(hidden, positions)
    assert context_mask.sum(1).tolist() == [4, 7, 2]
    for row, expected in enumerate([[3, 2, 1, 0], [6, 5, 4, 3, 2, 1, 0], [9, 8]]):
        assert context[row, : len(expected), 0].tolist() == expected


def test_previous_images_by_hand() -> None:
    """Only the one just before, and only of the same document."""
    tokens, mask, starts = example()
    positions = find_images(tokens, mask, SOI, starts)
    assert previous_images(positions, 1).tolist() == [[-1], [0], [-1]]
    assert previous_images(positions, 2).tolist() == [[-1], [0], [-1]]


def test_previous_images_of_a_wider_band() -> None:
    tokens, mask = ids("sbibibibi", "sbi......")
    positions = find_images(tokens, mask, SOI, None)
    assert previous_images(positions, 1).tolist() == [[-1], [0], [1], [2], [-1]]
    assert previous_images(positions, 3).tolist() == [[-1, -1, -1], [0, -1, -1], [1, 0, -1], [2, 1, 0], [-1, -1, -1]]


def test_without_starts_the_row_is_the_document() -> None:
    """At inference the release counts from the row's start; here padding on the left does not count."""
    tokens, mask = ids("sxbi", "..sbi"[::1])
    tokens[1, :2], mask[1, :2] = 0, 0
    positions = find_images(tokens, mask, SOI, None)
    assert positions.starts.tolist() == [0, 2]


def test_no_images() -> None:
    tokens, mask = ids("sxx")
    assert visible_images(tokens, mask, BOS, SOI).shape == (1, 3, 0)
    positions = find_images(tokens, mask, SOI, None)
    assert previous_images(positions, 1).shape == (0, 0)
    assert reversed_context(torch.zeros(1, 3, 5), positions)[0].shape == (0, 0, 5)


@given(st.text("sbx", min_size=1, max_size=12))
def test_documents_can_be_kept_apart(text: str) -> None:
    """`isolate_documents`, which is off by default."""
    tokens, mask = ids(text)
    allowed = block_mask(tokens == BOS, mask, torch.float32)[0, 0] == 0
    documents = [text[: t + 1].count("s") for t in range(len(text))]
    for t in range(len(text)):
        for u in range(len(text)):
            assert bool(allowed[t, u]) == (u <= t and documents[t] == documents[u])

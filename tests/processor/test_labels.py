"""Which tokens are learned (docs/model.md, "Text labels")."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from mm_interleaved.processor import build_labels

BOS, EOS, SOI, IMG, PAD = 1, 2, 7, 8, 0
IDS = {"s": BOS, "/": EOS, "b": SOI, "i": IMG, ".": PAD}


def labels(text: str, **options: object) -> str:
    """One letter a token: s <s>, / </s>, b begin-of-image, i image token, . padding, others words; _: not learned."""
    row = torch.tensor([[IDS.get(c, 10 + ord(c)) for c in text]])
    mask = torch.tensor([[int(c != ".") for c in text]])
    out = build_labels(row, mask, bos_token_id=BOS, soi_token_id=SOI, image_token_id=IMG, **options)[0]
    return "".join(c if learned != -100 else "_" for c, learned in zip(text, out.tolist(), strict=True))


def test_image_first() -> None:
    assert labels("sbiixyz/") == "____xyz/"


def test_text_first() -> None:
    assert labels("sxyzbii/") == "_xyzb__/"


def test_text_first_where_text_before_the_image_is_ignored() -> None:
    assert labels("sxyzbii/", ignore_text_before_image=True) == "____b__/"
    assert labels("sbiixyz/", ignore_text_before_image=True) == "____xyz/"


def test_packed_documents_are_judged_one_by_one() -> None:
    assert labels("sxbii/sybii/", ignore_text_before_image=True) == "__b__/__b__/"
    assert labels("sbiix/sybii/", ignore_text_before_image=True) == "____x/__b__/"


def test_chunk_that_starts_in_the_middle_of_a_document() -> None:
    assert labels("xybii/sz", ignore_text_before_image=True) == "__b__/__"
    assert labels("xybii/sz") == "xyb__/_z"
    assert labels("biix/") == "b__x/"  # not right after <s>: the image is announced


def test_chunk_cut_at_its_end() -> None:
    assert labels("sxyb") == "_xyb"


def test_padding_is_recognised_by_the_mask_not_by_its_id() -> None:
    row = torch.tensor([[BOS, 50, PAD, 51, PAD]])
    mask = torch.tensor([[1, 1, 1, 1, 0]])
    out = build_labels(row, mask, bos_token_id=BOS, soi_token_id=SOI, image_token_id=IMG)
    assert out.tolist() == [[-100, 50, PAD, 51, -100]]  # a real occurrence of the padding piece keeps its label


def test_prompt_is_not_learned() -> None:
    learned = torch.tensor([[False] * 5 + [True] * 3])
    assert labels("sbiiqaa/", learned=learned) == "_____aa/"


@given(st.text("s/bixy.", min_size=1, max_size=20), st.booleans())
def test_agrees_with_the_rules_one_by_one(text: str, ignore: bool) -> None:
    expected = []
    for t, y in enumerate(text):
        document = text[: t + 1].rfind("s")
        image_so_far = text[: t + 1].rfind("b")
        skip = y in ".is" or (y == "b" and t > 0 and text[t - 1] == "s")
        skip |= ignore and (image_so_far < 0 or image_so_far < document)
        expected.append("_" if skip else y)
    assert labels(text, ignore_text_before_image=ignore) == "".join(expected)

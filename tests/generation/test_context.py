"""What reading costs: what the host can know it does not ask the device, and nothing is copied that may stay."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.cache_utils import DynamicLayer

from mm_interleaved import MMInterleaved
from mm_interleaved.generation import static_pictures
from mm_interleaved.generation.context import Context, FirstAsItIs
from mm_interleaved.generation.static_pictures import StaticEyes, see
from mm_interleaved.model.mmfs import VisibleImages

WAITING = {
    torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default, torch.ops.aten.equal.default,
    torch.ops.aten.is_nonzero.default, torch.ops.aten.masked_select.default, torch.ops.aten.bincount.default,
}  # fmt: skip


class Waits(TorchDispatchMode):
    """Notes the operators that a device would have to finish before the host goes on."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.watching = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if self.watching and func in WAITING:
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))

    @contextmanager
    def paused(self) -> Iterator[None]:
        before, self.watching = self.watching, False
        yield
        self.watching = before


def tokens(model: MMInterleaved, pictures: int, batch: int = 1) -> tuple[Tensor, Tensor]:
    """Rows of text with pictures in them, and the pictures."""
    config = model.config
    picture = [config.soi_token_id] + [config.image_token_id] * config.num_image_tokens
    ids = [config.bos_token_id, 5, 6]
    for number in range(pictures):
        ids += [*picture, 10 + number]
    side = config.vision_config.image_size
    pixels = torch.rand(batch * pictures, 3, side, side, generator=torch.Generator().manual_seed(0))
    return torch.tensor([ids] * batch), pixels


def test_nothing_waits_once_pictures_are_being_encoded(model: MMInterleaved, monkeypatch: pytest.MonkeyPatch) -> None:
    waits, encode, build = Waits(), model.encode_images, VisibleImages.build

    def encoding(pixels: Tensor) -> object:
        waits.watching = True
        return encode(pixels)

    def building(images: Tensor, count: int) -> VisibleImages:  # which kernels do not need
        with waits.paused():
            return build(images, count)

    monkeypatch.setattr(model, "encode_images", encoding)
    monkeypatch.setattr(VisibleImages, "build", building)
    ids, pixels = tokens(model, 2)
    context = Context.empty(model, 1)
    with waits:
        context.append(ids, torch.ones_like(ids), pixels)
    assert waits.watching
    assert waits.found == []


def test_rows_without_gaps_need_no_mask(model: MMInterleaved) -> None:
    ids, pixels = tokens(model, 1, batch=2)
    contexts = [Context.empty(model, 2) for _ in range(2)]
    contexts[1].gapless = False  # as if it were not known
    found = []
    for context in contexts:
        context.append(ids, torch.ones_like(ids), pixels)
        more = context.append(ids[:, 1:3], torch.ones(2, 2, dtype=torch.long))
        found.append([*context.hidden, more, context.last])
    assert [c.gapless for c in contexts] == [True, False]
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_gaps_are_noticed_and_never_forgotten(model: MMInterleaved) -> None:
    ids, pixels = tokens(model, 1, batch=2)
    mask = torch.ones_like(ids)
    context = Context.empty(model, 2)
    context.append(ids, mask, pixels)
    assert context.select(torch.tensor([1])).gapless
    shorter = torch.tensor([[1, 1], [1, 0]])
    context.append(ids[:, 1:3], shorter)
    assert not context.gapless
    context.append(ids[:, 1:2], mask[:, :1])
    assert not context.gapless
    assert not context.select(torch.tensor([0])).gapless
    alone = Context.empty(model, 1)  # the second row, which had one token less
    alone.append(ids[:1], mask[:1], pixels[1:])
    alone.append(ids[:1, 1:2], mask[:1, :1])
    alone.append(ids[:1, 1:2], mask[:1, :1])
    torch.testing.assert_close(context.last[1], alone.last[0], rtol=1e-4, atol=1e-5)


def test_text_and_waiting_pictures_may_leave_gaps(model: MMInterleaved) -> None:
    config = model.config
    ids = torch.tensor([[config.bos_token_id, 5, config.soi_token_id]] * 2)
    _, pixels = tokens(model, 1)
    for rows, gapless in (([0], False), ([0, 1], True)):
        context = Context.empty(model, 2)
        context.append(ids, torch.ones_like(ids))
        context.append_images(rows, pixels.expand(len(rows), -1, -1, -1))
        assert context.gapless is gapless
        context.append_text(ids[:, 1:2], torch.tensor([[1], [0]]))
        assert not context.gapless
    context = Context.empty(model, 1)
    context.append(ids[:1], torch.ones(1, 3, dtype=torch.long))
    context.forget(0, 2)
    assert not context.gapless


def test_other_eyes(model: MMInterleaved) -> None:
    """Pictures encoded by a recording, which here is only called, are read as always."""
    ids, pixels = tokens(model, 2)
    usual, other = (Context.empty(model, 1) for _ in range(2))
    other.eyes = StaticEyes(model, 2, pixels, captured=False)
    found = [context.append(ids, torch.ones_like(ids), pixels) for context in (usual, other)]
    assert torch.equal(*found)
    assert other.select(torch.tensor([0])).eyes is other.eyes


def test_a_wrong_number_of_image_tokens_is_an_error(model: MMInterleaved) -> None:
    ids, pixels = tokens(model, 2)
    context = Context.empty(model, 1)
    with pytest.raises(ValueError, match="image tokens, but 1 pictures need"):
        context.append(ids, torch.ones_like(ids), pixels[:1])
    assert context.images_read == context.mask.shape[1] == 0


def test_the_first_keys_and_values_are_not_copied() -> None:
    parts = [[torch.randn(1, n, 2, 4).transpose(1, 2) for _ in range(2)] for n in (5, 1, 2)]
    ours, theirs = FirstAsItIs(), DynamicLayer()
    for key, value in parts:
        found, expected = ours.update(key, value), theirs.update(key, value)
        for a, b in zip(found, expected, strict=True):
            assert torch.equal(a, b)
        assert ours.get_seq_length() == theirs.get_seq_length()
        assert ours.get_mask_sizes(1) == theirs.get_mask_sizes(1)
        if key is parts[0][0]:
            assert found[0].data_ptr() == key.data_ptr()
            assert ours.is_initialized
    ours.reorder_cache(torch.tensor([0, 0]))
    assert ours.keys.shape[0] == 2
    larger = torch.zeros(1, 2, 9, 4)
    part = FirstAsItIs().update(larger[:, :, :3], larger[:, :, :3])
    larger += 1
    assert not part[0].any()


def test_pictures_are_seen_in_parts(model: MMInterleaved) -> None:
    """Eleven of them as 8 and 3, for which there are 4 places."""
    side = model.config.vision_config.image_size
    pixels = torch.rand(11, 3, side, side, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found, expected = see(model, pixels), model.encode_images(pixels)
    for a, b in zip((found.tokens, *found.pyramid), (expected.tokens, *expected.pyramid), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("count", "places"), [(1, 1), (2, 2), (3, 4), (5, 4), (6, 8), (7, 8), (9, 8), (13, 8), (15, 16), (40, 16)]
)
def test_recordings_have_few_places_to_spare(count: int, places: int) -> None:
    assert static_pictures._places(count) == places


def test_a_selection_of_all_rows_shares_what_was_read(model: MMInterleaved) -> None:
    """And reads on without touching where it came from."""
    ids, pixels = tokens(model, 2)
    context = Context.empty(model, 1)
    context.append(ids, torch.ones_like(ids), pixels)
    branch = context.select(torch.tensor([0]))
    before = [layer.keys for layer in context.cache.layers]
    assert all(a.keys is b for a, b in zip(branch.cache.layers, before, strict=True))
    branch.append_text(torch.tensor([[20]]), torch.ones(1, 1, dtype=torch.long))
    assert all(layer.keys is b for layer, b in zip(context.cache.layers, before, strict=True))
    assert branch.mask.shape[1] == context.mask.shape[1] + 1

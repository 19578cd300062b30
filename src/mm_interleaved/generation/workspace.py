"""Workspaces: fixed memory for rows that are generated together, and the CUDA graphs captured over it.

A workspace holds everything that a decode step reads or writes: the KV cache, hidden states, the MMFS values of the
images, derived weights. Its tensors have fixed addresses, so a step is captured once in a CUDA graph and replayed for
every token of every session that leases the workspace. Without a capture the same functions are called directly.

Axes: R rows, C columns, D width, I images, S spatial positions, N heads, H width of a head, V vocabulary, L tokens.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import cast

import torch

from ..model import MMInterleavedModel
from ..model.fused import kernels_in_use
from ..model.image_settings import CacheImplementation
from ..model.kv_cache import KVCache
from ..model.language_model import synchronizers
from ..model.mmfs import VisibleImages, why_mmfs_waits
from ..model.static import capture
from ..model.synchronizer import DerivedSynchronizer, ImageFeatures
from ..model.weights import state_of, why_not_captured
from ..ops import promote

log = logging.getLogger(__name__)

KEPT = 3  # idle workspaces kept for a model
# Columns grow in units, so that a captured step serves several turns of a session; in smaller units if there are many
# rows (at the release's size a column of a row takes 0.8 MB).
COLUMNS = {"cuda": 1024, "cpu": 64}
FEWEST_COLUMNS, MOST_CELLS = 64, 16384  # columns, and rows times columns
SPARE = 8  # extra columns, of which one is needed; so a full context does not need another unit
SLOTS = {"cuda": 8, "cpu": 1}  # least capacity for images once there is one, for the same reason


def why_not_graphs(model: MMInterleavedModel) -> str | None:
    """Why decode steps of `model` cannot be captured in CUDA graphs; None: they can."""
    text = model.config.text_config
    rope = (getattr(text, "rope_parameters", None) or {}).get("rope_type", "default")
    if model.compute_device.type != "cuda":
        return "CUDA graphs need a CUDA device"
    if rope in ("dynamic", "longrope"):
        return f"its rotary positions ('{rope}') depend on the length of the text"
    waits = why_mmfs_waits((s.mmfs for s in synchronizers(model.language_model)), model.dtype)
    return waits or why_not_captured(model.language_model, model.lm_head, model.soi_token)


@cache
def _warn_once(message: str) -> None:
    log.warning(message)


def uses_graphs(model: MMInterleavedModel, implementation: CacheImplementation) -> bool:
    """Whether decode steps are captured in CUDA graphs.

    Raises:
        ValueError: "static" was asked for on a CUDA device, but the model cannot be captured.
    """
    if implementation == "dynamic" or model.compute_device.type != "cuda":
        return False
    reason = why_not_graphs(model)
    if reason is not None and implementation == "static":
        raise ValueError(f"cache_implementation='static' is not possible for this model: {reason}; take 'dynamic'")
    if reason is not None:
        _warn_once(f"decoding without CUDA graphs, which is slower: {reason}")
    return reason is None


@dataclass(frozen=True)
class Capacity:
    """The capacity of a workspace.

    Attributes:
        rows: number of rows.
        columns: columns of the KV cache, of which at least one is spare.
        slots: most visible images of a row.
        images: most images of all rows.
        shared: whether rows share columns (beams).
    """

    rows: int
    columns: int
    slots: int = 0
    images: int = 0
    shared: bool = False

    def holds(self, need: Capacity) -> bool:
        """Whether this capacity is enough for `need`."""
        same = (self.rows, self.shared) == (need.rows, need.shared)
        return same and self.columns >= need.columns and self.slots >= need.slots and self.images >= need.images

    def rounded(self, device: torch.device, most_images: int) -> Capacity:
        """At least this capacity, rounded up to sizes that several sessions share."""
        unit = COLUMNS.get(device.type, COLUMNS["cpu"])
        fewest = SLOTS.get(device.type, SLOTS["cpu"])
        unit = max(min(unit, MOST_CELLS // _power_of_two(self.rows)), FEWEST_COLUMNS)
        columns = -(-(self.columns - 1) // unit) * unit + SPARE
        slots = min(_power_of_two(self.slots, fewest), most_images)
        return Capacity(self.rows, columns, slots, _power_of_two(self.images, fewest), self.shared)


def _power_of_two(count: int, fewest: int = 1) -> int:
    """The next power of two from `count` on, at least `fewest`; 0 for 0."""
    return 1 << (max(count, fewest) - 1).bit_length() if count else 0


class Workspace:
    """Memory for the rows of one generation state, and the captured steps over it.

    Args:
        model: the model, of which only a weak reference is kept.
        capacity: its capacity.
        captured: whether decode steps are captured in CUDA graphs, each on first use.
        state: the state of the modules that the captured steps fit (`state_of`), and which kernels are in use.

    Attributes:
        cache: the KV cache of R rows.
        hidden: [R, C, D] final hidden states of all tokens.
        last: [R, D] the final hidden state of each row's last token.
        logits: [R, V] logits after each row's last token, float32 or better.
        tokens, reading: [R] inputs of a decode step: the new tokens, and which rows get one.
        visible: [R, slots] visible images of each row's next token, most recent first, -1 = none.
        images: MMFS values and derived weights of every synchronizer.
    """

    def __init__(self, model: MMInterleavedModel, capacity: Capacity, captured: bool, state: Hashable = None) -> None:
        # the caller of a workspace keeps the model alive
        self._model = cast("Callable[[], MMInterleavedModel]", weakref.ref(model))
        self.capacity, self.captured, self.state = capacity, captured, state
        config, device = model.config, model.compute_device
        width, dtype = config.text_config.hidden_size, model.language_model.norm.weight.dtype
        rows, columns = capacity.rows, capacity.columns
        self.cache = KVCache(len(model.language_model.layers), rows, columns, device, capacity.shared)
        self.hidden = torch.zeros(rows, columns, width, dtype=dtype, device=device)
        self.last = torch.zeros(rows, width, dtype=dtype, device=device)
        self.logits = torch.zeros(rows, config.vocab_size, dtype=promote(dtype), device=device)
        self.tokens = torch.zeros(rows, dtype=torch.long, device=device)
        self.reading = torch.zeros(rows, dtype=torch.bool, device=device)
        self.visible = torch.full((rows, capacity.slots), -1, device=device)
        self.block = torch.zeros(rows, config.num_image_tokens, width, dtype=dtype, device=device) if captured else None
        self.images = self._room_for_images(model, dtype)
        self._graphs: dict[str, Callable[[], object]] = {}

    def _room_for_images(self, model: MMInterleavedModel, dtype: torch.dtype) -> ImageFeatures:
        mmfs, layers = model.config.mmfs, synchronizers(model.language_model)
        cells = sum(side * side for side in mmfs.levels)
        shape = (self.capacity.images, cells, mmfs.num_heads, mmfs.hidden_size // mmfs.num_heads)
        values = [torch.zeros(shape, dtype=dtype, device=self.last.device) for _ in layers]
        nothing = torch.zeros(0, cells, model.config.vision_config.hidden_size, dtype=dtype, device=self.last.device)
        derived: list[DerivedSynchronizer | None] = [None] * len(layers)
        return ImageFeatures(nothing, [(side, side) for side in mmfs.levels], values, derived)

    def derive(self) -> None:
        """Compute derived weights from the current weights, into the tensors that captured graphs read."""
        with torch.inference_mode(False):  # tensors of inference mode cannot be written to outside of it
            if self.captured and "derive" in self._graphs:
                self._graphs["derive"]()
                return
            self._derive()
            if self.captured and any(self.images.derived or ()):  # launching hundreds of kernels takes longer
                self._graphs["derive"] = capture(self._derive, self.last.device)

    def _derive(self) -> None:
        derived = self.images.derived
        assert derived is not None
        for index, synchronizer in enumerate(synchronizers(self._model().language_model)):
            derived[index] = synchronizer.derive(derived[index])

    def clear(self) -> None:
        """Remove the data of the last session."""
        self.cache.clear()
        self.visible.fill_(-1)
        self.last.zero_()  # an empty row must not continue another session's text

    def take_over(self, other: Workspace, rows: Sequence[int], width: int, images: int) -> None:
        """Take `width` copies of each of `rows` of another workspace, with its first `images` images."""
        places = [i * width for i in range(len(rows))]
        self.cache.copy_rows(other.cache, rows, places)
        if width > 1:
            self.cache.share(width)
        theirs = torch.tensor([r for r in rows for _ in range(width)], device=self.last.device)
        longest = max((other.cache.lengths[r] for r in rows), default=0)
        self.hidden[:, :longest] = other.hidden[theirs, :longest]
        self.last.copy_(other.last[theirs])
        assert self.images.values is not None
        assert other.images.values is not None
        for mine, given in zip(self.images.values, other.images.values, strict=True):
            mine[:images] = given[:images]

    def images_of(self, count: int) -> ImageFeatures:
        """The features of the first `count` images."""
        assert self.images.values is not None
        values = [v[:count] for v in self.images.values]
        return ImageFeatures(self.images.features, self.images.shapes, values, self.images.derived)

    def step(self, count: int, slots: int) -> None:
        """Run a decode step: process `tokens` in the rows of `reading` and update `logits`.

        Args:
            count: number of images in use.
            slots: most visible images of a row. A captured step uses the whole capacity instead of both.
        """
        if self.captured:
            self._replay("step", lambda: self._step(self.images, VisibleImages(self.visible)))
        else:
            images = self.visible[:, :slots]
            self._step(self.images_of(count), VisibleImages.build(images, count), known=True)

    def step_block(self) -> None:
        """Process `block` [R, L, D], the tokens of an image, in the rows of `reading`; only captured."""
        self._replay("block", self._block_step)

    def _replay(self, name: str, step: Callable[[], object]) -> None:
        if name not in self._graphs:
            reading = self.reading.clone()
            self.reading.zero_()  # capturing runs the step a few times; rows outside of `reading` do not change
            with torch.inference_mode(False):
                self._graphs[name] = capture(step, self.last.device)
            self.reading.copy_(reading)
        self._graphs[name]()

    @torch.no_grad()
    def _step(self, images: ImageFeatures, visible: VisibleImages, known: bool = False) -> None:
        """The computation of one token a row; on a device it needs no value on the host."""
        model = self._model()
        place = self.cache.place_step(self.reading, known=known)
        embeds = model.embed(self.tokens[:, None], None)
        hidden = model.decode(embeds, images, visible, None, place.positions, self.cache)[:, 0]
        self.hidden[self.cache.own, place.columns[:, 0]] = hidden.to(self.hidden.dtype)
        self.last.copy_(torch.where(self.reading[:, None], hidden, self.last))
        self.logits.copy_(model.compute_logits(self.last))

    @torch.no_grad()
    def _block_step(self) -> None:
        """The computation of the tokens of an image."""
        assert self.block is not None
        model, count = self._model(), self.block.shape[1]
        place = self.cache.place_step(self.reading, count)
        visible = VisibleImages(self.visible.repeat_interleave(count, 0, output_size=len(self.visible) * count))
        hidden = model.decode(self.block, self.images, visible, None, place.positions, self.cache)
        self.hidden[self.cache.own[:, None], place.columns] = hidden.to(self.hidden.dtype)
        self.last.copy_(torch.where(self.reading[:, None], hidden[:, -1], self.last))
        self.logits.copy_(model.compute_logits(self.last))


class WorkspacePool:
    """The idle workspaces of each model. A step that is captured once serves all later sessions of its size."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._idle: weakref.WeakKeyDictionary[MMInterleavedModel, list[Workspace]] = weakref.WeakKeyDictionary()
        self._lock = threading.RLock()  # garbage collection may give a workspace back while this thread leases one

    def lease(self, model: MMInterleavedModel, need: Capacity, captured: bool) -> Workspace:
        """Lease an empty workspace with at least the capacity `need`, with current derived weights, until `give_back`.

        Workspaces whose captured graphs no longer fit the modules (`state_of`) are dropped.
        """
        state = (state_of(model.language_model, model.lm_head, model.soi_token), kernels_in_use())
        with self._lock:
            idle = [w for w in self._idle.pop(model, []) if w.state == state]
            fitting = [w for w in idle if w.captured == captured and w.capacity.holds(need)]
            found = min(fitting, key=lambda w: (w.capacity.columns, w.capacity.images), default=None)
            rest = [w for w in idle if w is not found]
            self._idle[model] = (rest + self._idle.get(model, []))[-self.size :]
        if found is None:
            rounded = need.rounded(model.compute_device, model.config.mmfs.max_images - 1)
            with torch.inference_mode(False):  # tensors of inference mode cannot be written to outside of it
                found = self._make(lambda: Workspace(model, rounded, captured, state))
        else:
            found.clear()
        found.derive()
        return found

    def give_back(self, model: weakref.ref[MMInterleavedModel], workspace: Workspace) -> None:
        """Return a workspace to the pool."""
        owner = model()
        if owner is None:
            return
        with self._lock:
            idle = self._idle.setdefault(owner, [])
            idle.append(workspace)
            del idle[: -self.size]

    def _make(self, make: Callable[[], Workspace]) -> Workspace:
        """A new workspace; if there is not enough memory, the idle ones are freed first."""
        try:
            return make()
        except torch.OutOfMemoryError:
            if not any(self._idle.values()):
                raise
        self.clear()
        torch.cuda.empty_cache()
        return make()

    def clear(self) -> None:
        """Drop all idle workspaces."""
        with self._lock:
            self._idle.clear()


POOL = WorkspacePool(KEPT)

"""What training reads: sources, how their documents become rows, and how rows are mixed. Settings only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

TYPES = ("mmc4", "pairs", "webdataset", "documents", "toyworld")
PAIR_TYPES = ("pairs", "webdataset")
CUTS = ("image", "document")
SAMPLINGS = ("longest", "sum", "shortest", "forever")
SOURCE_COMPAT = ("BUG-1", "BUG-2", "BUG-3", "ODD-3")
MIXTURE_COMPAT = ("BUG-4", "BUG-6")


def _choice(key: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"'{key}' must be one of {', '.join(choices)}, not '{value}'")


def _share(key: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"'{key}' must lie in [0, 1], not {value}")


def _at_least(key: str, value: int | None, least: int) -> None:
    if value is not None and value < least:
        raise ValueError(f"'{key}' must be at least {least}, not {value}")


@dataclass
class SourceConfig:
    """One source of documents (spec/data_eval 2).

    Attributes:
        type: `mmc4`, `pairs`, `webdataset`, `documents` or `toyworld`.
        name: how batches and reports call it; "": the type.
        shards: files of the source: names or patterns (`docs_{0..99}.jsonl`, `*.tar`), relative to `root`. A shard may
            be plain, `.gz` or `.zip`; MMC4's `NAME` is also found as `NAME.zip`.
        root: folder of the shards.
        image_root: folder of the images, which no path may leave; None: `root`.
        batch_size: rows of a batch.
        max_length: longest row in tokens; None: the model's.
        cut: where a row ends whose last image does not fit: before that `image`, or before the `document` that holds
            it; None: `document` for pairs, `image` for the rest.
        max_images_per_sequence: most images in a row; None: no limit.
        keep_remainder: whether what is left at the end of a pass makes a (short) row.
        keep_text_only: whether rows without an image are kept.
        min_images: documents with fewer images are rejected.
        max_images: most images of a document, chosen at random; None: 6 for mmc4, no limit for the rest.
        single_image_prob: share of documents with exactly one image that is rejected; None: 0.5 for mmc4, else 0.
        sim_threshold: images of mmc4 that match their sentence less than this are dropped.
        image_first_prob: how often an image stands before its sentence (mmc4) or caption (pairs).
        lowercase: whether captions are lower-cased.
        min_caption_length: captions with fewer characters are rejected.
        few_shot_merge_prob: share of rows in which pairs are merged into contexts of several.
        few_shot_merge_sizes: how many pairs, drawn for each row.
        shuffle: documents among which the order is drawn; 0: as they stand in the files.
        shuffle_shards: whether the order of shards is drawn.
        num_samples: rows of an epoch over all ranks and workers, repeated or cut as needed; None: what is there.
        floor: whether its share for each rank and worker is rounded down instead of up.
        ignore_text_before_image: whether text of a document before its first image is not learned.
        loss_image_weight: of this source's batches; None: as the trainer says.
        loss_text_weight: likewise.
        probe_images: whether the header of an image is read before the document is used. If not, images that
            cannot be read are noticed later, and the row around them becomes shorter.
        draft_jpeg: decode large JPEGs at a fraction of their size; faster, other pixels.
        split: of the toy world.
        documents: of the toy world in a pass.
        options: of the toy world: `size` of the images, `mix` (weights of the forms of documents by name, `rest`
            for those not named).
        compat: behaviour of the original to reproduce: `BUG-1` (strict JSON), `BUG-2` (merging changes nothing),
            `BUG-3` (images of one sentence stand as listed), `ODD-3` (the order of documents is drawn anew each run).
    """

    type: str
    name: str = ""
    shards: list[str] = field(default_factory=list)
    root: str = "."
    image_root: str | None = None
    batch_size: int = 4
    max_length: int | None = None
    cut: str | None = None
    max_images_per_sequence: int | None = None
    keep_remainder: bool = False
    keep_text_only: bool = False
    min_images: int = 1
    max_images: int | None = None
    single_image_prob: float | None = None
    sim_threshold: float = 0.24
    image_first_prob: float = 0.5
    lowercase: bool = True
    min_caption_length: int = 0
    few_shot_merge_prob: float = 0.0
    few_shot_merge_sizes: list[int] = field(default_factory=lambda: [2, 3, 4, 5, 6, 7, 8])
    shuffle: int = 5000
    shuffle_shards: bool = True
    num_samples: int | None = None
    floor: bool = False
    ignore_text_before_image: bool = False
    loss_image_weight: float | None = None
    loss_text_weight: float | None = None
    probe_images: bool = True
    draft_jpeg: bool = False
    split: str = "train"
    documents: int = 100_000
    options: dict[str, Any] = field(default_factory=dict)
    compat: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        _choice("type", self.type, TYPES)
        self.name = self.name or self.type
        if self.cut is not None:
            _choice("cut", self.cut, CUTS)
        for item in self.compat:
            _choice("compat", item, SOURCE_COMPAT)
        if (self.type == "toyworld") == bool(self.shards):
            wanted = "draws its documents and takes no" if self.shards else "needs"
            raise ValueError(f"source '{self.name}' of type '{self.type}' {wanted} 'shards'")
        for key, least in (("batch_size", 1), ("max_length", 2), ("max_images_per_sequence", 1), ("min_images", 0),
                           ("max_images", 1), ("shuffle", 0), ("num_samples", 1), ("documents", 1)):  # fmt: skip
            _at_least(key, getattr(self, key), least)
        for key in ("image_first_prob", "few_shot_merge_prob", "single_image_prob"):
            if getattr(self, key) is not None:
                _share(key, getattr(self, key))
        if self.few_shot_merge_prob and (not self.few_shot_merge_sizes or min(self.few_shot_merge_sizes) < 2):
            raise ValueError(f"'few_shot_merge_sizes' must be numbers from 2, not {self.few_shot_merge_sizes}")

    @property
    def is_pairs(self) -> bool:
        """Whether each record is one image with its caption."""
        return self.type in PAIR_TYPES


@dataclass
class DataConfig:
    """Sources and their mixture.

    Attributes:
        sources: what is read.
        probabilities: how often each source is drawn, in proportion; empty: all alike.
        sampling: an epoch ends when every source was read once and exhausted ones start again (`longest`), when all
            are exhausted (`sum`), when the first is (`shortest`), or never (`forever`; best with several ranks, whose
            epochs end at different times).
        mix: what is drawn: a source for each whole `batch`, or for each `row`.
        batch_size: rows of a batch with `mix: row`.
        fix_sampling_ratio: all ranks and workers draw alike, and each rank takes the source that many places on,
            so that every step has the same mixture. Needs equal probabilities.
        seed: of every draw.
        num_workers: processes that load; 0: the training process itself.
        prefetch_factor: batches that each worker loads ahead.
        pin_memory: whether batches lie in page-locked memory; None: if there is a CUDA device.
        pad_to_max_length: whether all rows have the full length, for fixed shapes.
        start_method: of the workers: fork, spawn or forkserver; None: the platform's.
        compat: behaviour of the original to reproduce: `BUG-4` (after a source is exhausted with `sum`, others bear its
            name), `BUG-6` (every epoch is like the first).
    """

    sources: list[SourceConfig] = field(default_factory=list)
    probabilities: list[float] = field(default_factory=list)
    sampling: str = "longest"
    mix: str = "batch"
    batch_size: int = 4
    fix_sampling_ratio: bool = False
    seed: int = 0
    num_workers: int = 0
    prefetch_factor: int = 2
    pin_memory: bool | None = None
    pad_to_max_length: bool = False
    start_method: str | None = None
    compat: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        _choice("sampling", self.sampling, SAMPLINGS)
        _choice("mix", self.mix, ("batch", "row"))
        if self.start_method is not None:
            _choice("start_method", self.start_method, ("fork", "spawn", "forkserver"))
        for item in self.compat:
            _choice("compat", item, MIXTURE_COMPAT)
        for key, least in (("num_workers", 0), ("prefetch_factor", 1), ("batch_size", 1), ("seed", 0)):
            _at_least(key, getattr(self, key), least)
        if not self.sources:
            raise ValueError("'sources' needs at least one source")
        names = [s.name for s in self.sources]
        if twice := sorted({n for n in names if names.count(n) > 1}):
            raise ValueError(f"two sources are called '{twice[0]}'; give each a 'name'")
        self._check_mixture()

    def _check_mixture(self) -> None:
        shares = self.probabilities
        if shares and len(shares) != len(self.sources):
            raise ValueError(f"{len(shares)} 'probabilities' are given for {len(self.sources)} sources")
        if shares and (min(shares) < 0 or sum(shares) <= 0):
            raise ValueError(f"'probabilities' must not be negative, nor all 0, not {shares}")
        if self.fix_sampling_ratio and len(set(shares)) > 1:
            raise ValueError("'fix_sampling_ratio' needs equal 'probabilities'")
        weights = {(s.loss_image_weight, s.loss_text_weight) for s in self.sources}
        if self.mix == "row" and len(weights) > 1:
            raise ValueError(
                "with 'mix: row' all sources need the same loss weights, since one batch has rows of several"
            )

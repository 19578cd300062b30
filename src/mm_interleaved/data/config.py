"""Settings of training data: sources, how their documents become rows, and how rows are mixed."""

from __future__ import annotations

import dataclasses
from dataclasses import field
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from ..processor.packing import Packing
from ..validation import Count, Positive, PositiveFloat, Seed, Share, settings
from .augmentation import AugmentConfig
from .sources import SOURCES
from .stores import is_url

PAIR_TYPES = ("pairs", "webdataset")
SourceCompat = Literal["strict_json", "merge_without_effect", "listed_image_order", "unseeded_order"]
MixtureCompat = Literal["shifted_names", "repeated_epochs"]


@settings
class StoreConfig:
    """How files are fetched from a store (`root: s3://bucket/folder`, `gs://`, `https://` ..., docs/guides/data.md).

    Attributes:
        cache: folder of fetched files, which the processes of a machine share; None: `mm_interleaved/data` in
            `$XDG_CACHE_HOME`, or in `~/.cache`.
        cache_gib: size of the cache; files that were not used for the longest time are removed.
        tries: how often a file is asked for until the run ends with an error.
        wait: seconds before the second try; twice as many before each further one, at most 30.
        options: settings of fsspec's file system, such as `endpoint_url` or `anon`. Credentials do not belong here,
            since the settings are written beside the results; stores take them from their environment.
    """

    cache: str | None = None
    cache_gib: PositiveFloat = 50.0
    tries: Positive = 6
    wait: PositiveFloat = 1.0
    options: dict[str, Any] = field(default_factory=dict)


@settings
class SourceConfig:
    """One source of documents (docs/data_formats.md, "Training sources").

    Attributes:
        type: `mmc4`, `pairs`, `webdataset`, `documents`, `task`, or a plug-in's.
        name: name of the source in batches and reports; "": the type.
        shards: files of the source: names or patterns (`docs_{0..99}.jsonl`, `*.tar`), relative to `root`. A shard may
            be plain, `.gz` or `.zip`; MMC4's `NAME` is also found as `NAME.zip`.
        root: folder of the shards, or its URL in a store.
        image_root: folder of the images, or its URL, which no path may leave; None: `root`.
        store: how files of URLs are fetched; None: as `store` of the data.
        batch_size: rows of a batch.
        max_length: longest row in tokens; None: the model's.
        packing: how documents become rows: `stream` (joined, and cut anywhere between images), `samples` (whole
            documents are joined as long as they fit), `single` (one document a row); None: `samples` for samples for
            fine-tuning, otherwise `stream`.
        attention: whether the documents of a row attend to the whole `row` before them, or to their own `sample` only;
            None: `sample` for packing `samples`, otherwise `row`.
        too_long: whether a document that is longer than a row is counted and left out (`drop`), or an `error`. A
            `stream` cuts it instead.
        cut: where a row of a `stream` ends whose last image does not fit: before that `image`, or before its
            `document`; None: `document` for pairs, otherwise `image`.
        max_images_per_sequence: most images in a row; None: no limit.
        keep_remainder: whether the rest at the end of a pass becomes a (short) row, and an incomplete batch is used;
            None: for samples for fine-tuning.
            Whole documents always become rows.
        keep_text_only: whether rows of a `stream` without an image are kept; None: for samples for fine-tuning.
        min_images: documents with fewer images are rejected; None: 0 for samples for fine-tuning, otherwise 1.
        max_images: most images of a document, chosen at random; None: 6 for mmc4, otherwise no limit.
        single_image_prob: probability that a document with exactly one image is rejected; None: 0.5 for mmc4, else 0.
        sim_threshold: least similarity of an mmc4 image to its sentence; others are dropped.
        image_first_prob: probability that an image precedes its sentence (mmc4) or caption (pairs).
        lowercase: whether captions are lower-cased.
        min_caption_length: least number of characters of a caption; others are rejected.
        few_shot_merge_prob: probability that the pairs of a row are merged into contexts of several pairs.
        few_shot_merge_sizes: numbers of pairs of a context, of which one is chosen for each row.
        shuffle: size of the window in which documents are shuffled; 0: the order of the files.
        shuffle_shards: whether shards are shuffled.
        num_samples: rows of an epoch over all ranks and workers, repeated or cut as needed; None: one pass.
        floor: whether the share of each rank and worker is rounded down instead of up.
        ignore_text_before_image: whether text of a document before its first image is not learned.
        loss_image_weight: weight of the image loss in batches of this source; None: the trainer's.
        loss_text_weight: weight of the text loss in batches of this source; None: the trainer's.
        probe_images: whether the header of an image is read before its document is used. Otherwise unreadable images
            are found later, and their row becomes shorter.
        draft_jpeg: whether to decode large JPEGs at a fraction of their size; faster, but with other pixels.
        replay: whether the source repeats earlier training: it starts again as often as needed, does not decide when an
            epoch ends, and gets `replay_share` of the mixture.
        augment: random changes of the images, which boxes and the words "left" and "right" follow.
        options: settings of this type of source.
        compat: mistakes of the original to reproduce: `strict_json` (pairs must be strict JSON), `merge_without_effect`
            (merging pairs changes nothing), `listed_image_order` (images of one sentence keep their listed order),
            `unseeded_order` (the order of documents differs in each run).
    """

    type: str
    name: str = ""
    shards: list[str] = field(default_factory=list)
    root: str = "."
    image_root: str | None = None
    store: StoreConfig | None = None
    batch_size: Positive = 4
    max_length: Annotated[int, Field(ge=2)] | None = None
    packing: Packing | None = None
    attention: Literal["sample", "row"] | None = None
    too_long: Literal["drop", "error"] = "drop"
    cut: Literal["image", "document"] | None = None
    max_images_per_sequence: Positive | None = None
    keep_remainder: bool | None = None
    keep_text_only: bool | None = None
    min_images: Count | None = None
    max_images: Positive | None = None
    single_image_prob: Share | None = None
    sim_threshold: float = 0.24
    image_first_prob: Share = 0.5
    lowercase: bool = True
    min_caption_length: int = 0
    few_shot_merge_prob: Share = 0.0
    few_shot_merge_sizes: list[Annotated[int, Field(ge=2)]] = field(default_factory=lambda: [2, 3, 4, 5, 6, 7, 8])
    shuffle: Count = 5000
    shuffle_shards: bool = True
    num_samples: Positive | None = None
    floor: bool = False
    ignore_text_before_image: bool = False
    loss_image_weight: float | None = None
    loss_text_weight: float | None = None
    probe_images: bool = True
    draft_jpeg: bool = False
    replay: bool = False
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    options: dict[str, Any] = field(default_factory=dict)
    compat: list[SourceCompat] = field(default_factory=list)

    RENAMED: ClassVar[dict[str, str]] = {
        "BUG-1": "It is now 'strict_json'",
        "BUG-2": "It is now 'merge_without_effect'",
        "BUG-3": "It is now 'listed_image_order'",
        "ODD-3": "It is now 'unseeded_order'",
        "probe_pictures": "It is now 'probe_images'",
        **{name: f"It is now 'options.{name}', of the toy world" for name in ("split", "documents")},
    }

    def __post_init__(self) -> None:
        if self.type not in SOURCES:
            raise SOURCES.unknown(self.type)
        object.__setattr__(self, "name", self.name or self.type)
        defaults = {"keep_text_only": self.samples, "keep_remainder": self.samples,
                    "min_images": 0 if self.samples else 1}  # fmt: skip
        for field_name, value in defaults.items():
            if getattr(self, field_name) is None:
                object.__setattr__(self, field_name, value)
        if SOURCES[self.type].has_files != bool(self.shards):
            wanted = "has no files and takes no" if self.shards else "needs"
            raise ValueError(f"source '{self.name}' of type '{self.type}' {wanted} 'shards'")
        self._set_packing()
        if self.few_shot_merge_prob and not self.few_shot_merge_sizes:
            raise ValueError("few_shot_merge_prob needs few_shot_merge_sizes")

    def _set_packing(self) -> None:
        """Replace None by the defaults, and check the settings that only a stream has."""
        object.__setattr__(self, "packing", self.packing or ("samples" if self.samples else "stream"))
        by_default = "sample" if self.packing == "samples" else "row"
        object.__setattr__(self, "attention", self.attention or by_default)
        streams = {"cut": self.cut, "few_shot_merge_prob": self.few_shot_merge_prob}
        if self.packing != "stream" and (given := next((name for name, value in streams.items() if value), None)):
            raise ValueError(f"'{given}' of source '{self.name}' is for rows of 'packing: stream', and 'packing' is "
                             f"{self.packing}; leave it out")  # fmt: skip
        if self.packing == "stream" and self.too_long == "error":
            raise ValueError(f"'too_long: error' of source '{self.name}' has no effect, because 'packing: stream' cuts "
                             "long documents; take 'packing: samples' or leave it out")  # fmt: skip

    @property
    def samples(self) -> bool:
        """Whether its documents are samples for fine-tuning, which are used whole and may lack images."""
        return SOURCES[self.type].samples

    @property
    def is_pairs(self) -> bool:
        """Whether each record is an image with its caption."""
        return self.type in PAIR_TYPES


@settings
class ReplayConfig:
    """Sources of earlier training that are mixed into a fine-tuning.

    Attributes:
        sources: the sources, all equally probable.
        share: their share of the batches (or rows, with `mix: row`).
    """

    sources: Annotated[list[SourceConfig], Field(min_length=1)]
    share: Annotated[float, Field(gt=0, lt=1)] = 0.2


@settings
class DataConfig:
    """Sources and their mixture.

    Attributes:
        sources: the sources.
        root: folder where relative paths of the sources start, or its URL in a store.
        max_length: longest row in tokens, of sources without a `max_length` of their own; None: the model's.
        store: how files of URLs are fetched, for sources without a `store` of their own.
        probabilities: relative probability of each source without `replay`; `sqrt_size`: the square root of its number
            of documents, for sources that know it (`task`, `messages`, `imagefolder`); empty: all equal.
        sampling: when an epoch ends: when every source was exhausted once, where exhausted ones start again
            (`longest`); when all are exhausted (`sum`); when the first is exhausted (`shortest`); never (`forever`, for
            several ranks, whose epochs would end at different times).
        mix: whether a source is chosen for each whole `batch` or for each `row`.
        batch_size: rows of a batch with `mix: row`.
        replay_share: share of the sources with `replay`.
        fix_sampling_ratio: whether all ranks and workers draw the same number, and each rank takes the source that many
            places further, so that every step has the same mixture. Needs equal probabilities.
        seed: seed of all random numbers.
        num_workers: number of loading processes; 0: the training process loads.
        prefetch_factor: batches that each worker loads ahead.
        pin_memory: whether batches are in page-locked memory; None: if there is a CUDA device.
        pad_to_max_length: whether all rows have the full length, for fixed shapes.
        group_by_length: whether batches have rows of similar lengths, for less padding; all rows stay the same.
        start_method: start method of the workers: fork, spawn or forkserver; None: the platform's default.
        compat: mistakes of the original to reproduce: `shifted_names` (after a source is exhausted with `sum`, others
            get its name), `repeated_epochs` (every epoch has the order of the first).
    """

    sources: list[SourceConfig] = field(default_factory=list)
    root: str = "."
    max_length: Annotated[int, Field(ge=2)] | None = None
    store: StoreConfig = field(default_factory=StoreConfig)
    probabilities: list[float] | Literal["sqrt_size"] = field(default_factory=list)
    sampling: Literal["longest", "sum", "shortest", "forever"] = "longest"
    mix: Literal["batch", "row"] = "batch"
    batch_size: Positive = 4
    replay_share: Annotated[float, Field(ge=0, lt=1)] = 0.0
    fix_sampling_ratio: bool = False
    seed: Seed = 0
    num_workers: Count = 0
    prefetch_factor: Positive = 2
    pin_memory: bool | None = None
    pad_to_max_length: bool = False
    group_by_length: bool = False
    start_method: Literal["fork", "spawn", "forkserver"] | None = None
    compat: list[MixtureCompat] = field(default_factory=list)

    RENAMED: ClassVar[dict[str, str]] = {
        "BUG-4": "It is now 'shifted_names'",
        "BUG-6": "It is now 'repeated_epochs'",
    }

    def __post_init__(self) -> None:
        if not self.sources:
            raise ValueError("sources needs at least one source")
        names = [s.name for s in self.sources]
        if twice := sorted({n for n in names if names.count(n) > 1}):
            raise ValueError(f"two sources are called '{twice[0]}'; give each a name")
        shared = [(s, s.max_length or self.max_length, s.store or self.store) for s in self.sources]
        sources = [dataclasses.replace(s, max_length=length, store=store) for s, length, store in shared]
        if is_url(self.root):
            sources = [self._inside_root(source) for source in sources]
            object.__setattr__(self, "root", ".")
        object.__setattr__(self, "sources", sources)
        self._check_mixture()

    def _inside_root(self, source: SourceConfig) -> SourceConfig:
        """A source whose relative folders are in the store that `root` names."""
        names = {"root": source.root, "image_root": source.image_root}
        inside = {
            key: f"{self.root.rstrip('/')}/{name}".removesuffix("/.")
            for key, name in names.items()
            if name is not None and not is_url(name) and not name.startswith("/")
        }
        return dataclasses.replace(source, **inside)

    @property
    def own_sources(self) -> list[SourceConfig]:
        """The sources without `replay`."""
        return [source for source in self.sources if not source.replay]

    def with_replay(self, replay: ReplayConfig) -> DataConfig:
        """These data with the sources of a replay.

        Raises:
            ConfigError: two sources have the same name.
        """
        sources = [dataclasses.replace(source, replay=True) for source in replay.sources]
        return dataclasses.replace(self, sources=[*self.sources, *sources], replay_share=replay.share)

    def _check_mixture(self) -> None:
        by_size = isinstance(self.probabilities, str)
        shares = [] if isinstance(self.probabilities, str) else self.probabilities
        number = len(self.own_sources)
        if not number:
            raise ValueError("all sources are marked as 'replay'; at least one must decide when an epoch ends")
        if (number < len(self.sources)) != bool(self.replay_share):
            raise ValueError("'replay_share' is the share of sources with 'replay'; give both or none")
        if shares and len(shares) != number:
            raise ValueError(f"{len(shares)} 'probabilities' are given for {number} sources")
        if shares and (min(shares) < 0 or sum(shares) <= 0):
            raise ValueError(f"'probabilities' must not be negative, nor all 0, not {shares}")
        if self.group_by_length and (self.pad_to_max_length or self.fix_sampling_ratio):
            other = "pad_to_max_length" if self.pad_to_max_length else "fix_sampling_ratio"
            raise ValueError(
                f"'group_by_length' changes the order of batches to save padding; leave it or '{other}' out"
            )
        if self.fix_sampling_ratio and (by_size or len(set(shares)) > 1):
            raise ValueError("'fix_sampling_ratio' needs equal 'probabilities'")
        weights = {(s.loss_image_weight, s.loss_text_weight) for s in self.sources}
        if self.mix == "row" and len(weights) > 1:
            raise ValueError(
                "with 'mix: row' all sources need the same loss weights, since one batch has rows of several"
            )

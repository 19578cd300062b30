"""Records become documents by the rules of docs/data_formats.md, "Training sources". No image is decoded here."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np

from ..configuration import ConfigError, make_config
from ..document import Document, Folder, Image, Segment, Text, interleave
from ..io import FileSlice, InputError, check_strings, decode_text, find_file, parse_json
from ..io.images import open_image
from .config import SourceConfig, StoreConfig
from .report import DataError, Rejected
from .shards import LineShards, Record, Shards, TarSample, TarShards, expand
from .sources import SOURCES, SourceType
from .stores import Store, StoredFolder, find_stored, is_url

IMAGES = ("jpg", "jpeg", "png", "webp", "gif", "avif", "bmp", "tif", "tiff")  # extensions in tar shards
LITERAL = "Python literal instead of JSON"  # read, but counted

Note = Callable[[str, str], None]  # (reason, example): something was left out, or is odd


class Reader(Protocol):
    """Reads the records of a source and turns them into documents."""

    @property
    def shards(self) -> Shards:
        """The shards of the source."""
        ...

    def document(self, record: Record, rng: np.random.Generator, note: Note) -> Document:
        """The document of a record.

        Args:
            record: a record of `shards`.
            rng: random numbers of this record.
            note: called for each part that is left out.

        Raises:
            Rejected: the record is left out.
        """
        ...


def make_reader(config: SourceConfig, folder: Path) -> Reader:
    """The reader of a source; its relative paths start at `folder`.

    Raises:
        DataError: the folder of the shards or images does not exist, no shard matches, or an option cannot be used.
        PluginError: the plug-in that adds the type of the source cannot be used.
    """
    kind, options = SOURCES[config.type], None
    if kind.options is not None:
        try:
            options = make_config(config.options, kind.options, where=f"source '{config.name}', options")
        except ConfigError as error:
            raise DataError(str(error)) from None
    elif config.options:
        raise DataError(f"source '{config.name}': sources of type '{config.type}' have no options")
    return kind.reader(config, options, folder)


# ---- pieces


@dataclass(frozen=True)
class ImageFolder:
    """The images of a source.

    Attributes:
        root: their folder, resolved.
        probe: whether the headers of images are read.
    """

    root: Path
    probe: bool

    @property
    def folder(self) -> Folder:
        """The folder for the images of documents."""
        return Folder(self.root)

    def locate(self, name: Any) -> Path | FileSlice:
        """The file that a record names.

        Raises:
            InputError: it is no name, leads out of the folder, or does not exist.
        """
        return find_file(self.root, name)

    def within(self, name: str) -> ImageFolder | None:
        """The folder of this name in this one; None: there is none."""
        path = self.root / name
        return ImageFolder(path, self.probe) if path.is_dir() else None

    def find(self, name: Any, where: str) -> Path | FileSlice:
        """The image that a record names.

        Raises:
            Rejected: it is no name, leads out of the folder, does not exist, or is no image.
        """
        try:
            found = self.locate(name)
        except InputError as error:
            raise Rejected(f"image {error.kind}", f"{where}: {error.problem}") from None
        self.check(found, f"{where}: {name}")
        return found

    def check_all(self, document: Document, where: str) -> None:
        """Refuse a document with a file that is no image, as far as its header tells."""
        for image in document.images:
            for source in (image.source, image.target):
                if isinstance(source, Path | FileSlice):
                    self.check(source, f"{where}: {source}")

    def check(self, source: Path | FileSlice, example: str) -> None:
        """Refuse what is no image, as far as its header tells."""
        size = source.length if isinstance(source, FileSlice) else source.stat().st_size
        if size == 0:
            raise Rejected("image empty", example)
        if self.probe:
            try:
                open_image(source).close()
            except InputError as error:
                raise Rejected(f"image {error.kind}", f"{example}: {error.problem}") from None


@dataclass(frozen=True, kw_only=True)
class StoredImages(ImageFolder):
    """The images of a source in a store.

    Attributes:
        store: their folder.
    """

    store: Store

    @property
    def folder(self) -> Folder:
        """The folder for the images of documents."""
        return StoredFolder(store=self.store)

    def locate(self, name: Any) -> Path | FileSlice:
        """The file that a record names; see `ImageFolder.locate`."""
        return find_stored(self.store, name)

    def within(self, name: str) -> ImageFolder | None:
        """The folder of this name in this one; None: there is none."""
        return replace(self, store=self.store.within(name)) if self.store.has_folder(name) else None


def decode(payload: bytes, where: str, note: Note | None = None) -> dict[str, Any]:
    """A line of JSON, or with `note` of a Python literal, which must be an object.

    Raises:
        Rejected: it is neither, or holds a lone surrogate.
    """
    try:
        data = parse_json(payload)
    except InputError as error:
        if note is None or error.kind != "not JSON":
            raise Rejected(f"line {error.kind}", f"{where}: {error.problem}") from None
        data = _decode_literal(decode_text(payload), where)
        note(LITERAL, where)
    if not isinstance(data, dict):
        raise Rejected("line not an object", f"{where}: {str(data)[:80]}")
    return data


def _decode_literal(text: str, where: str) -> Any:
    try:
        data = ast.literal_eval(text.strip())
        check_strings(data)
    except InputError as error:
        raise Rejected(f"line {error.kind}", f"{where}: {error.problem}") from None
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        raise Rejected("line neither JSON nor a Python literal", f"{where}: {text.strip()[:80]}") from None
    return data


def list_of(data: dict[str, Any], key: str, kind: type, where: str) -> list[Any]:
    """A list under `key`, whose items are of `kind`."""
    value = data.get(key)
    if not isinstance(value, list) or not all(isinstance(item, kind) for item in value):
        problem = "missing" if value is None else "malformed"
        raise Rejected(f"'{key}' {problem}", where)
    return value


# ---- readers


@dataclass(frozen=True)
class MMC4:
    """Sentences with images matched to them (docs/data_formats.md, "MMC4")."""

    config: SourceConfig
    shards: Shards
    images: ImageFolder
    _folders: dict[int, list[ImageFolder]] = field(default_factory=dict, repr=False)

    def document(self, record: Record, rng: np.random.Generator, note: Note) -> Document:
        """The steps listed there; what needs no image is decided before images are read."""
        where = self.shards.place(record)
        data = decode(record.payload, where)
        sentences = list_of(data, "text_list", str, where)
        kept = self._kept(data, len(sentences), record.shard, where, note)
        if not kept:
            raise Rejected("no image left", where)
        chosen = [kept[i] for i in rng.permutation(len(kept))[: self.config.max_images or 6]]
        chosen.sort(key=lambda item: item[0])
        first = rng.random(len(chosen)) < self.config.image_first_prob
        if len(chosen) < (self.config.min_images or 0):
            raise Rejected("too few images", where)
        drop = 0.5 if self.config.single_image_prob is None else self.config.single_image_prob
        if len(chosen) == 1 and rng.random() < drop:
            raise Rejected("only one image", where)
        spots = [(place, not before) for (place, _), before in zip(chosen, first.tolist(), strict=True)]
        paths = [path for _, path in chosen]
        if "listed_image_order" not in self.config.compat:
            order = sorted(range(len(spots)), key=spots.__getitem__)  # stable
            paths = [paths[i] for i in order]
        placed = [(spot, Image(path)) for spot, path in zip(sorted(spots), paths, strict=True)]
        return Document(interleave(sentences, placed), place=where)

    def _kept(
        self, data: dict[str, Any], sentences: int, shard: int, where: str, note: Note
    ) -> list[tuple[int, Path | FileSlice]]:
        """(sentence, file) of every image that may be used, in the order of the file."""
        infos = list_of(data, "image_info", dict, where)
        matrix = data.get("similarity_matrix")
        if not isinstance(matrix, list):
            raise Rejected("'similarity_matrix' missing", where)
        kept = []
        for info in infos[: len(matrix)]:
            similarity, place = info.get("matched_sim"), info.get("matched_text_index")
            example = f"{where}: {info.get('image_name')}"
            try:
                if not _is_number(similarity):
                    raise Rejected("'matched_sim' missing", example)
                if not similarity >= self.config.sim_threshold:  # also drops NaN
                    raise Rejected("similarity too low", example)
                if not isinstance(place, int) or isinstance(place, bool) or not 0 <= place < sentences:
                    raise Rejected("sentence index out of range", f"{example}: {place} of {sentences}")
                kept.append((place, self._find(info.get("image_name"), shard, where)))
            except Rejected as rejected:
                note(rejected.reason, rejected.example)
        return kept

    def _find(self, name: Any, shard: int, where: str) -> Path | FileSlice:
        """The file of an image, which lies in the folder of images or in the one of its shard there.

        Raises:
            Rejected: it is in neither, or as `ImageFolder.find`.
        """
        if shard not in self._folders:
            stem = Path(self.shards.names[shard]).name.partition(".jsonl")[0]
            number = re.search(r"shard_(\d+)", stem)
            names = [stem, f"{stem}_images", *([number[1]] if number else [])]
            within = (self.images.within(name) for name in names)
            self._folders[shard] = [folder for folder in within if folder is not None]
        for folder in self._folders[shard]:
            try:
                found = folder.locate(name)
            except InputError:
                continue
            self.images.check(found, f"{where}: {found}")
            return found
        return self.images.find(name, where)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def pair(config: SourceConfig, caption: str, image: Path | FileSlice, rng: np.random.Generator, where: str) -> Document:
    """An image with its caption, in random order (docs/data_formats.md, "Pairs")."""
    caption = caption.lower() if config.lowercase else caption
    if len(caption.strip()) < max(config.min_caption_length, 1):
        raise Rejected("caption too short", f"{where}: {caption!r}")
    segments: list[Segment] = [Image(image), Text(caption)]
    return Document(segments if rng.random() < config.image_first_prob else segments[::-1], place=where)


def caption_of(value: Any, where: str) -> str:
    """A string, or a list of strings joined by spaces."""
    if isinstance(value, list) and value and all(isinstance(v, str) for v in value):
        return " ".join(value)
    if not isinstance(value, str):
        raise Rejected("'caption' missing" if value is None else "'caption' malformed", where)
    return value


@dataclass(frozen=True)
class Pairs:
    """Lines with `image` and `caption`."""

    config: SourceConfig
    shards: Shards
    images: ImageFolder

    def document(self, record: Record, rng: np.random.Generator, note: Note) -> Document:
        """One image, one caption."""
        where = self.shards.place(record)
        data = decode(record.payload, where, None if "strict_json" in self.config.compat else note)
        caption = caption_of(data.get("caption"), where)
        return pair(self.config, caption, self.images.find(data.get("image"), where), rng, where)


@dataclass(frozen=True)
class WebDataset:
    """Tar archives of images with `.txt`, or `.json` with a `caption`."""

    config: SourceConfig
    shards: Shards
    images: ImageFolder

    def document(self, record: Record, rng: np.random.Generator, note: Note) -> Document:
        """One image, one caption."""
        where = self.shards.place(record)
        files, skipped, twice = cast(TarSample, record.payload)
        for name in skipped:
            note("file that belongs to no sample", f"{where}: {name}")
        if twice:
            raise Rejected("sample with two files of one name", f"{where}: {twice}")
        image = next((files[e] for e in IMAGES if e in files), None)
        if image is None:
            raise Rejected("sample without an image", f"{where}: {', '.join(files)}")
        self.images.check(image, where)
        if "txt" in files:
            try:
                caption = decode_text(files["txt"].read())
            except InputError as error:
                raise Rejected(f"caption {error.kind}", f"{where}: {error.problem}") from None
        elif "json" in files:
            caption = caption_of(decode(files["json"].read(), where).get("caption"), where)
        else:
            raise Rejected("'caption' missing", where)
        return pair(self.config, caption.strip(), image, rng, where)


@dataclass(frozen=True)
class Documents:
    """Lines with a document in any of its JSON forms, or with lists `texts` and `images` of one length."""

    config: SourceConfig
    shards: Shards
    images: ImageFolder

    def document(self, record: Record, rng: np.random.Generator, note: Note) -> Document:
        """The document, with at most `max_images` of its images."""
        where = self.shards.place(record)
        data = decode(record.payload, where)
        if "texts" in data and "images" in data:
            document = Document(self._parallel(data, where, note), place=where)
        else:
            document = self._own(data, where)
        self._choose(document, rng)
        count = len(document.images)
        if count < (self.config.min_images or 0):
            raise Rejected("too few images", where)
        if count == 1 and rng.random() < (self.config.single_image_prob or 0):
            raise Rejected("only one image", where)
        return document

    def _own(self, data: dict[str, Any], where: str) -> Document:
        try:
            document = Document.from_dict(data, self.images.folder)
        except InputError as error:
            raise Rejected(kind_of(error.problem), f"{where}: {error}") from None
        document.place = where
        self.images.check_all(document, where)
        return document

    def _parallel(self, data: dict[str, Any], where: str, note: Note) -> list[Segment]:
        texts, images = data["texts"], data["images"]
        if not isinstance(texts, list) or not isinstance(images, list) or len(texts) != len(images):
            raise Rejected("'texts' and 'images' must be lists of one length", where)
        segments: list[Segment] = []
        for text, image in zip(texts, images, strict=True):
            if image is not None:
                try:
                    segments.append(Image(self.images.find(image, where)))
                except Rejected as rejected:
                    if self.config.packing != "stream":  # a whole document or none
                        raise
                    note(rejected.reason, rejected.example)
            if isinstance(text, str):
                segments += [Text(text)] if text else []
            elif text is not None:
                note("text malformed", f"{where}: {text!r}"[:200])
        if not segments:
            raise Rejected("nothing left", where)
        return segments

    def _choose(self, document: Document, rng: np.random.Generator) -> None:
        places = [i for i, s in enumerate(document.segments) if isinstance(s, Image)]
        limit = self.config.max_images
        if limit is not None and len(places) > limit:
            dropped = {places[i] for i in rng.permutation(len(places))[limit:]}
            document.segments = [s for i, s in enumerate(document.segments) if i not in dropped]


def kind_of(problem: str) -> str:
    """A message without the parts that differ from record to record."""
    return re.sub(r"\d+", "N", re.sub(r"'[^']*'", "'…'", problem))


# ---- types


def folders(config: SourceConfig, folder: Path) -> tuple[Path, ImageFolder]:
    """The folder of the files of a source, and that of its images.

    Raises:
        DataError: one of them does not exist, or is in a store.
    """
    root, images = _root(config, config.root, folder), _images(config, folder)
    if isinstance(root, Store) or isinstance(images, StoredImages):
        raise DataError(f"source '{config.name}' of type '{config.type}' reads local folders only, not '{root}'",
                        fix="Copy the files here, or write them as webdataset or documents")  # fmt: skip
    return root, images


def _images(config: SourceConfig, folder: Path) -> ImageFolder:
    root = _root(config, config.root if config.image_root is None else config.image_root, folder)
    if isinstance(root, Store):
        return StoredImages(Path(), config.probe_images, store=root)
    return ImageFolder(root.resolve(), config.probe_images)


def _root(config: SourceConfig, name: str, folder: Path) -> Path | Store:
    """A folder that the settings name, here or in a store."""
    if is_url(name):
        try:
            return Store(name, config.store or StoreConfig())
        except DataError as error:
            raise error.at(f"source '{config.name}'") from None
    path = folder / name
    if not path.is_dir():
        why = f"{path} is a file, and a folder is needed" if path.is_file() else f"there is no folder {path}"
        raise DataError(f"source '{config.name}': {why}")
    return path


def of_files(
    reader: Callable[[SourceConfig, Any, ImageFolder], Reader],
    shards: Callable[[Path | Store, Sequence[str]], Any] = LineShards,
    samples: bool = False,
) -> SourceType:
    """The type of sources whose records and images lie in files, here or in a store."""

    def make(config: SourceConfig, options: None, folder: Path) -> Reader:
        root, images = _root(config, config.root, folder), _images(config, folder)
        names = [name for pattern in config.shards for name in expand(pattern, root)]
        return reader(config, shards(root, names), images)

    return SourceType(make, samples=samples)


MMC4_TYPE, PAIRS_TYPE, DOCUMENTS_TYPE = of_files(MMC4), of_files(Pairs), of_files(Documents)
WEBDATASET_TYPE = of_files(WebDataset, TarShards)

"""The parts of a task: a reader of the official files, a prompt, settings, post-processing and metrics."""

from __future__ import annotations

import logging
import string
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np

from ..document import Box, Document, Image, Segment, Text
from ..generation.settings import GenerationSettings, override
from ..io import FileSlice, InputError, check_strings, nearest_name
from ..validation import Count, Positive, Seed, settings
from .files import Entry, ImageFolder, Source, checked, get, read_json

NO_IMAGES = "no folder of images"  # the kind of an error
T = TypeVar("T")
logger = logging.getLogger(__name__)
Makes = Literal["text", "image", "scores"]
Value = str | Box | Segment | Sequence[Segment]
TRAIN_PHASES = ("train", "training")  # the names of phases for training


@dataclass(frozen=True)
class Item:
    """One record that a reader yields.

    Attributes:
        id: unique in its task.
        fields: values for the prompt template, by name: a text, a box, an image, or several segments.
        reference: the reference for metrics; plain data.
        answer: the training targets of the open slots, in order.
        options: the candidate answers to rank, for tasks that rank them.
        meta: other values for metrics and galleries.
        problem: why it cannot be evaluated (its image is missing, its record is malformed); "": it can.
        place: its file and line or record.
        vary: returns the item with random choices, such as another caption or frame, for a training document; may
            raise `InputError`. None: there is nothing to choose.
    """

    id: str
    fields: Mapping[str, Value]
    reference: Any = None
    answer: Sequence[Segment] = ()
    options: tuple[str, ...] = ()
    meta: Mapping[str, Any] = field(default_factory=dict)
    problem: str = ""
    place: str = ""
    vary: Callable[[np.random.Generator], Item] | None = field(default=None, compare=False, repr=False)

    @classmethod
    def unusable(cls, place: str, problem: str) -> Item:
        """An item for a record that cannot be used. Its id is its place, without the folder."""
        return cls(place.rpartition("/")[2], {}, problem=problem, place=place)


def choose_answer(item: Item, answers: Sequence[Sequence[Segment]]) -> Item:
    """The item with one of several answers, each equally likely: another one in each epoch of training."""
    if len(answers) < 2:
        return item
    return replace(item, vary=lambda rng: replace(item, answer=answers[int(rng.integers(len(answers)))]))


def each(entries: Iterable[Entry], make: Callable[[str, Any, int], Iterable[Item]]) -> Iterator[Item]:
    """The items of records. A record that cannot be used gives an item with a `problem`.

    Args:
        entries: records, such as those of `files.entries`.
        make: returns the items of a record from its place, the record, and its number.
    """
    for index, (where, read) in enumerate(entries):
        try:
            found = list(make(where, read(), index))
        except InputError as error:
            found = [Item.unusable(where, str(error))]
        yield from found


def usable(entries: Iterable[Entry], parse: Callable[[str, Any], T]) -> tuple[list[T], list[Item]]:
    """The results of `parse(place, record)`, and an item for each record that cannot be used."""
    found, odd = [], []
    for where, read in entries:
        try:
            found.append(parse(where, read()))
        except InputError as error:
            odd.append(Item.unusable(where, str(error)))
    return found, odd


Grouped = Mapping[T, Sequence[tuple[str, dict[str, Any]]]]
"""Records and their places, by the value of a key."""


def grouped(entries: Iterable[Entry], key: str, kind: type[T]) -> tuple[Grouped[T], list[Item]]:
    """Group records by the value of `key`, in the order of the file. Also returns an item for each without that key."""
    found, odd = usable(entries, lambda where, record: (get(record, key, kind, where), where, record))
    groups: dict[T, list[tuple[str, dict[str, Any]]]] = {}
    for value, where, record in found:
        groups.setdefault(value, []).append((where, record))
    return groups, odd


def only(groups: Grouped[T], value: T, where: str, problem: str) -> tuple[str, dict[str, Any]]:
    """The only record of a group, with its place.

    Args:
        groups: the records by the value of their key.
        value: the value of the key.
        where: the place of the record that refers to it, for messages.
        problem: the message if there is none.

    Raises:
        InputError: there is none, or more than one.
    """
    found = groups.get(value, ())
    if not found:
        raise InputError(problem, where, "Take both files from one release")
    if len(found) > 1:
        raise InputError(f"{value} stands in {found[1][0]} as well", found[0][0], "Remove one of the two")
    return found[0]


@dataclass(frozen=True)
class Sample:
    """An item with its rendered prompt.

    Attributes:
        document: the prompt, with an open slot for each text or image to generate.
        id, reference, answer, options, meta, problem: as in `Item`.
    """

    id: str
    document: Document
    reference: Any = None
    meta: Mapping[str, Any] = field(default_factory=dict)
    answer: Sequence[Segment] = ()
    options: tuple[str, ...] = ()
    problem: str = ""


@dataclass(frozen=True)
class TaskType:
    """The description of a task.

    Attributes:
        name: its name in configurations.
        description: one line about it.
        read: yields the items of a phase in a fixed order.
        makes: what is generated: a text, images, or scores of options.
        prompt: template with `{field}`s of the items; an open slot is added to its end if it has none, or one less than
            the item has answers.
        metrics: names of its metrics.
        settings: its settings of generation.
        post: post-processing of a generated text before metrics.
        phases: parts of the data set, the default first.
        options: the task's own settings and their values, the default first; no values: any text.
        example: template of a few-shot example; "": the task has no few-shot examples.
        crop: how images become square: boxes need "squash".
        select: which of several generated images is evaluated: the first, or the most similar one by CLIP.
        images, annotations: paths of the files in the documented tree.
        folders: paths of the images of phases that have others.
        blind: phases without published answers, and the path of their images in the tree ("": `images`).
        submission: the entry of a sample in the official file of results, from its id, meta and text.
        obtain: where to get the files, for messages.
    """

    name: str
    description: str
    read: Callable[[Source], Iterator[Item]]
    makes: Makes
    prompt: str
    metrics: tuple[str, ...]
    settings: GenerationSettings = field(default_factory=GenerationSettings)
    post: Callable[[str], str] = str.strip
    phases: tuple[str, ...] = ("val",)
    options: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    example: str = ""
    crop: Literal["center", "squash"] = "center"
    select: Literal["first", "clip"] = "first"
    images: str = ""
    annotations: str = ""
    folders: Mapping[str, str] = field(default_factory=dict)
    blind: Mapping[str, str] = field(default_factory=dict)
    submission: Callable[[str, Mapping[str, Any], str], dict[str, Any]] | None = None
    obtain: str = ""

    def folder(self, phase: str) -> str:
        """The path of the images of a phase in the tree."""
        return self.blind.get(phase) or self.folders.get(phase) or self.images

    @property
    def train(self) -> str:
        """The name of its phase for training; "": it has none."""
        return next((phase for phase in self.phases if phase in TRAIN_PHASES), "")


@settings
class TaskConfig:
    """Settings of a task, for configurations.

    Attributes:
        task: name of a task type.
        name: its name in results; "": the type's name.
        root: folder of the documented tree.
        images: folder of the images; None: the type's folder in the tree.
        annotations: folder of the annotation files, or the only such file; None: the type's folder in the tree.
        phase: part of the data set; "": the type's default.
        limit: number of samples, from the start; None: all.
        prompt: template that replaces the type's own; of several, the first is for evaluation, and each training
            document has one at random.
        generation: settings that differ, by the names of `GenerationSettings`, `TextSettings` and `ImageSettings`.
        options: the type's own settings.
        shots: number of few-shot examples. They replace `{examples}` in the prompt, or precede a prompt without it.
        shot_template: template of an example; None: the type's. Examples have images if it has `{image}`.
        shot_phase: part of the data set that examples come from.
        shot_images, shot_annotations: paths of that part; None: as above.
        neighbours: JSON file {sample's id: [examples' ids, the most similar first]}; None: examples are sampled.
        seed: seed of random choices.
        compat: restore the original's quirks (docs/data_formats.md, "Quirks of the original's tasks").
    """

    task: str
    name: str = ""
    root: str = "."
    images: str | None = None
    annotations: str | None = None
    phase: str = ""
    limit: Positive | None = None
    prompt: str | list[str] | None = None
    generation: dict[str, Any] = field(default_factory=dict)
    options: dict[str, str] = field(default_factory=dict)
    shots: Count = 0
    shot_template: str | None = None
    shot_phase: str = "train"
    shot_images: str | None = None
    shot_annotations: str | None = None
    neighbours: str | None = None
    seed: Seed = 0
    compat: bool = False

    def __post_init__(self) -> None:
        from . import TASKS  # which imports this module

        if self.task not in TASKS:
            raise TASKS.unknown(self.task)
        if self.prompt == []:
            raise ValueError("'prompt' is an empty list; write one template or several, or null for the task's own")


class Task:
    """A task with its settings.

    Args:
        kind: the description of the task.
        config: its settings.

    Raises:
        InputError: a setting is unknown or invalid.
    """

    def __init__(self, kind: TaskType, config: TaskConfig) -> None:
        _check(kind, config)
        self.kind, self.config = kind, config
        self.name = config.name or kind.name
        given_prompts = [config.prompt] if isinstance(config.prompt, str) else config.prompt
        self.prompts = given_prompts or [kind.prompt]
        self.makes, self.metrics, self.crop, self.select = kind.makes, kind.metrics, kind.crop, kind.select
        try:
            self.settings = override(kind.settings, **config.generation)
        except (ValueError, TypeError) as error:
            raise InputError(str(error), f"task '{self.name}', 'generation'", "Correct the setting") from None

    def post(self, text: str) -> str:
        """The post-processed text that metrics use."""
        return self.kind.post(text)

    @property
    def prompt(self) -> str:
        """The prompt template of evaluation."""
        return self.prompts[0]

    def samples(self) -> Iterator[Sample]:
        """The samples, in a fixed order. Those that cannot be evaluated have a `problem`.

        Raises:
            InputError: a file is missing or malformed, or none of its records can be used.
        """
        for index, item in enumerate(self.items()):
            segments = self._prompted(item, self.prompt, self._shots and self._shots.before(item, index))
            document = Document(segments, id=item.id, place=item.place or None)
            yield Sample(item.id, document, item.reference, item.meta, item.answer, item.options, item.problem)

    def document(self, item: Item, rng: np.random.Generator | None = None) -> Document:
        """The training document of an item: a prompt, and the answers in its slots, which alone are supervised.

        Args:
            item: an item without a problem.
            rng: makes the random choices: of the prompt, of examples, and those of the item; None: the prompt of
                evaluation and the item as it is.

        Raises:
            InputError: the item has no answer for a slot, a part of it cannot be read, or the prompt does not fit.
        """
        prompt, examples = self.prompt, None
        if rng is not None:
            prompt = self.prompts[int(rng.integers(len(self.prompts)))] if len(self.prompts) > 1 else prompt
            examples = self._shots and self._shots.draw(item, rng)
            item = item if item.vary is None else item.vary(rng)
        segments = self._prompted(item, prompt, examples)
        return Document(_answered(segments, item), id=item.id, place=item.place or None)

    def documents(self) -> Iterator[Document]:
        """The samples as training documents without random choices.

        Samples with a problem are left out, with a warning that states their number.

        Raises:
            InputError: as `samples`, or a sample has no answer.
        """
        problems = []
        for item in self.items():
            if item.problem:
                problems.append(item.problem)
            else:
                yield self.document(item)
        if problems:
            logger.warning("task '%s': %d samples are left out; the first: %s", self.name, len(problems), problems[0])

    def _prompted(self, item: Item, template: str, examples: Sequence[Segment] | None) -> list[Segment]:
        """The prompt of an item, with an open slot for each answer."""
        slot = Image() if self.makes == "image" else Text()
        if not item.fields:
            return [slot]
        fields = dict(item.fields)
        if examples is not None:
            fields["examples"] = examples
            template = template if "{examples}" in template else "{examples} " + template
        segments = render(template, fields, item.place or self.name)
        slots = sum(segment.is_open for segment in segments)
        return [*segments, slot] if slots in (0, len(item.answer) - 1) else segments

    @cached_property
    def _shots(self) -> Shots | None:
        return Shots(self.config, self.kind, self.examples()) if self.config.shots else None

    def _read(self, source: Source) -> Iterator[Item]:
        """The items of the files; one whose strings hold a lone surrogate cannot be used."""
        for number, item in enumerate(self.kind.read(source)):
            try:
                check_strings([item.id, item.fields, item.reference, item.options, item.meta])
            except InputError as error:
                item = Item.unusable(item.place or f"{self.name}, item {number}", error.problem)
            yield item

    def examples(self) -> list[Item]:
        """The items that few-shot examples are chosen from.

        Raises:
            InputError: a file is missing or malformed.
        """
        return [item for item in self._read(self._shot_source()) if not item.problem]

    def items(self, training: bool = False) -> Iterator[Item]:
        """The items of the phase. An item with the id of an earlier one cannot be used.

        Args:
            training: whether they become training documents; only then may they lack what their `vary` makes.

        Raises:
            InputError: a file is missing or malformed, or none of its records can be used.
        """
        places: dict[str, str] = {}
        odd: list[Item] = []  # yielded after the first usable item: if there is none, the files have another layout
        good, source = 0, replace(self.source(), training=training)
        for number, item in enumerate(islice(self._read(source), self.config.limit)):
            if item.id in places:
                problem = f"id {item.id} stands in {places[item.id] or 'it'} as well"
                item = Item.unusable(f"{item.place or self.name}, item {number}", problem)
            places[item.id] = item.place
            if not item.fields:
                odd.append(item)
                continue
            yield from odd
            odd.clear()
            good += 1
            yield item
        if not good:
            first = f"; none of {len(odd)} records can be used, the first is {odd[0].problem}" if odd else ""
            raise InputError(f"task '{self.name}' has no samples here{first}", str(source.annotations),
                            "Check the files and the phase")  # fmt: skip
        yield from odd

    def source(self, need_images: bool = True) -> Source:
        """The files of the task's phase.

        Args:
            need_images: whether the folder of images must exist.

        Raises:
            InputError: the folder of images does not exist, or is a file.
        """
        config, kind = self.config, self.kind
        root = Path(config.root)
        phase = config.phase or kind.phases[0]
        images = Path(config.images) if config.images is not None else root / kind.folder(phase)
        annotations = Path(config.annotations) if config.annotations is not None else root / kind.annotations
        if need_images and not images.is_dir():
            why = "and this is a file" if images.is_file() else "which does not exist"
            raise InputError(f"task '{self.name}' has its images in this folder, {why}", str(images), kind.obtain,
                             NO_IMAGES)  # fmt: skip
        options = {name: values[0] if values else "" for name, values in kind.options.items()} | config.options
        return Source(self.name, ImageFolder(images), annotations, phase, kind.obtain, options, config.limit,
                      config.seed, config.compat, phase in kind.blind)  # fmt: skip

    def _shot_source(self) -> Source:
        config, source = self.config, self.source()
        images = source.images if config.shot_images is None else ImageFolder(Path(config.shot_images))
        if config.images is None and config.shot_images is None:
            images = ImageFolder(Path(config.root) / self.kind.folder(config.shot_phase))
        annotations = source.annotations if config.shot_annotations is None else Path(config.shot_annotations)
        return replace(source, images=images, annotations=annotations, phase=config.shot_phase, limit=None,
                       blind=config.shot_phase in self.kind.blind)  # fmt: skip


class Shots:
    """Few-shot examples: sampled at random, or the nearest ones of a list with the most similar last.

    Args:
        config, kind: settings and description of the task.
        items: the items to choose examples from.

    Raises:
        InputError: there are too few, or the list cannot be used.
    """

    def __init__(self, config: TaskConfig, kind: TaskType, items: Sequence[Item]) -> None:
        self.config, self.items = config, items
        self.template = config.shot_template or kind.example
        self.by_id = {item.id: item for item in items}
        if len(items) <= config.shots:
            raise InputError(f"{config.shots} examples are wanted, but there are only {len(items)} to choose from",
                             f"task '{kind.name}', phase '{config.shot_phase}'", "Use fewer")  # fmt: skip
        self.neighbours = None
        if config.neighbours is not None:
            self.neighbours = checked(read_json(Path(config.neighbours)), dict, config.neighbours)

    def before(self, item: Item, index: int) -> list[Segment]:
        """The segments of the examples for an item of an evaluation, by its number."""
        return self.draw(item, np.random.default_rng([self.config.seed, index]))

    def draw(self, item: Item, rng: np.random.Generator) -> list[Segment]:
        """The segments of random examples for an item, or of its neighbours."""
        separator = "" if self.config.compat else " "
        chosen = self._chosen(item, rng)
        template = separator.join(f"{{{i}}}" for i in range(len(chosen)))
        parts = {str(i): render(self.template, _with_answer(one), one.place) for i, one in enumerate(chosen)}
        return render(template, parts, item.place)

    def _chosen(self, item: Item, rng: np.random.Generator) -> list[Item]:
        if self.neighbours is None:
            chosen = rng.permutation(len(self.items))[: self.config.shots + 1].tolist()
            apart = self.config.shot_phase in TRAIN_PHASES and self.config.phase != self.config.shot_phase
            others = [self.items[i] for i in chosen if apart or self.items[i].id != item.id]
            return others[: self.config.shots]
        where = f"{self.config.neighbours}, '{item.id}'"
        names = checked(self.neighbours.get(item.id), list, where)[: self.config.shots]
        unknown = [name for name in names if str(name) not in self.by_id]
        if unknown or len(names) < self.config.shots:
            problem = f"there is no example '{unknown[0]}'" if unknown else f"only {len(names)} neighbours are listed"
            raise InputError(problem, where, "Make the list for the same examples, with at least as many as are used")
        return [self.by_id[str(name)] for name in reversed(names)]


def render(template: str, fields: Mapping[str, Value], where: str = "") -> list[Segment]:
    """Fill the `{field}`s of a template. Returns segments, without white space next to images.

    Raises:
        InputError: the template has an unknown field, or is malformed.
    """
    segments: list[Segment] = []
    run: list[str | Box] = []  # of the next text

    def close(before_image: bool) -> None:
        if not segments or isinstance(segments[-1], Image):
            _strip(run, str.lstrip, 0)
        if before_image:
            _strip(run, str.rstrip, -1)
        if any(str(part) for part in run):
            joined = bool(segments) and isinstance(segments[-1], Text)
            segments.append(Text.of(*run, supervise=False, attached=joined))
        run.clear()

    for literal, name in _parts(template, where):
        run.append(literal)
        if name is None:
            continue
        if name not in fields:
            raise InputError(f"the prompt '{template}' has a field {{{name}}}; there is {', '.join(fields)}", where,
                             "Correct the prompt")  # fmt: skip
        value = fields[name]
        if isinstance(value, (str, Box)):
            run.append(value)
            continue
        for segment in [value] if isinstance(value, (Text, Image)) else value:
            close(before_image=isinstance(segment, Image))
            segments.append(segment)
    close(before_image=True)  # nor white space at the end
    return segments


def _strip(run: list[str | Box], strip: Callable[[str], str], end: Literal[0, -1]) -> None:
    """Remove white space at one end of a run, and strings that are then empty."""
    while run and isinstance(part := run[end], str):
        run[end] = strip(part)
        if run[end]:
            return
        run.pop(end)


def _parts(template: str, where: str) -> list[tuple[str, str | None]]:
    try:
        return [(literal, name) for literal, name, _, _ in string.Formatter().parse(template)]
    except ValueError as error:
        raise InputError(f"the prompt '{template}' is no template: {error}", where, "Write {{ for a brace") from None


def _with_answer(item: Item) -> dict[str, Value]:
    answer = " ".join(s.text or "" for s in item.answer if isinstance(s, Text))
    return {"answer": answer, "caption": answer, **item.fields}


def _answered(segments: Sequence[Segment], item: Item) -> list[Segment]:
    """The segments with the slots filled by the answer of the item."""
    slots = sum(segment.is_open for segment in segments)
    if slots != len(item.answer):
        raise InputError(f"{slots} slots, but {len(item.answer)} answers to learn", item.place or f"sample {item.id}",
                         "Use a phase that has answers, or a prompt without slots of its own")  # fmt: skip
    answers = iter(item.answer)
    return [next(answers) if segment.is_open else segment for segment in segments]


def _check(kind: TaskType, config: TaskConfig) -> None:
    where = f"task '{config.name or kind.name}'"
    if config.phase and config.phase not in kind.phases:
        raise InputError(f"there is no phase '{config.phase}'", where, f"Phases are {', '.join(kind.phases)}")
    for name, value in config.options.items():
        if name not in kind.options:
            raise InputError(f"there is no option '{name}'", where, nearest_name(name, kind.options))
        if kind.options[name] and value not in kind.options[name]:
            values = ", ".join(kind.options[name])
            raise InputError(f"option '{name}' cannot be '{value}'", where, f"Values are {values}")
    if config.shots and not (config.shot_template or kind.example):
        raise InputError("the task has no few-shot examples", where, "Remove 'shots', or give a 'shot_template'")


def given(source: Path | str | FileSlice) -> Image:
    """An image of a prompt."""
    return Image(source, supervise=False)

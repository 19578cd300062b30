"""`inspect`: generate a document and collect where MMFS looks meanwhile.

`InspectedGenerator` is the generator of documents with a recorder: it generates the same tokens and images.

Axes: B rows of a batch, L new tokens, D width, S slots for visible images, T tokens of a text, Y decoder layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import numpy as np
import PIL.Image
import torch
from torch import Tensor

from ..document import Document, Image, Text
from ..generation import DocumentFinished, Event, ImageProgress, InterleavedGenerator, SegmentFinished
from ..generation.rows import PreparedDocument
from ..generation.settings import GenerationSettings, override
from ..generation.state import GenerationState
from ..io import InputError
from ..io.images import load_image
from ..model import MMInterleavedModel
from ..pipeline import Input, MMInterleavedPipeline, as_documents
from ..processor import MMInterleavedProcessor
from ..processor.images import transformed
from .recorder import ImagePass, Recorder
from .records import ImageRecord, Inspection, MapRecord, Points, TextRecord
from .settings import InspectionSettings, chosen_cells, shown_steps
from .words import group_words, token_pieces

VIEW_SIDE = 384  # most pixels of a side of `Inspection.views`
Source = MMInterleavedPipeline | InterleavedGenerator


@dataclass
class _Node:
    """A token of a row, and what its query saw; `None` points: no image.

    Beams share the nodes of their common beginning.
    """

    points: Points | None
    children: dict[int, _Node] = field(default_factory=dict)


class RecordedState(GenerationState):
    """A generation state that collects the points of every row's last token.

    Attributes:
        roots: for each row the token before the text that is being generated.
        nodes: for each row its last token.
    """

    def __init__(
        self, model: MMInterleavedModel, rows: int, graphs: bool = False, *, recorder: Recorder, tokens: int = 0,
        slots: int = 0, images: int = 0, shared: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(model, rows, graphs, tokens=tokens, slots=slots, images=images, shared=shared)
        self.recorder = recorder
        self.roots = [_Node(None) for _ in range(rows)]
        self.nodes = list(self.roots)

    def _another(self, rows: int, *, tokens: int, slots: int, images: int, shared: bool) -> RecordedState:
        return RecordedState(self.model, rows, self.graphs, recorder=self.recorder, tokens=tokens, slots=slots,
                             images=images, shared=shared)  # fmt: skip

    def branch(self, rows: Sequence[int], width: int = 1, tokens: int = 0) -> GenerationState:
        """As in `GenerationState`; copies go on from the tokens of their rows."""
        state = super().branch(rows, width, tokens)
        assert isinstance(state, RecordedState)  # from `_another`
        state.nodes = [self.nodes[row] for row in rows for _ in range(width)]
        return state

    def reorder(self, rows: Tensor) -> None:
        """As in `GenerationState`."""
        super().reorder(rows)
        self.nodes = [self.nodes[row] for row in rows.tolist()]

    def _forward(self, embeds: Tensor, mask: Tensor, images: Tensor, rows: Sequence[int] | None) -> Tensor:
        """As in `GenerationState`; the last token of each row becomes its root."""
        chosen = list(range(self.rows)) if rows is None else list(rows)
        length = mask.shape[1]
        last = (length - 1 - mask.flip(1).argmax(1)).tolist()
        present = [place for place, tokens in enumerate(mask.any(1).tolist()) if tokens]
        with self.recorder.tokens([place * length + last[place] for place in present]) as found:
            hidden = super()._forward(embeds, mask, images, rows)
        for place, points in zip(present, found or [None] * len(present), strict=True):
            self.roots[chosen[place]] = self.nodes[chosen[place]] = _Node(points)
        return hidden

    def decode_step(self, tokens: Tensor, reading: Tensor, count: bool = False) -> Tensor:
        """As in `GenerationState`."""
        rows = reading.nonzero()[:, 0].tolist()
        with self.recorder.tokens(rows) as found:
            logits = super().decode_step(tokens, reading, count)
        for row, points in zip(rows, found or [None] * len(rows), strict=True):
            before, token = self.nodes[row], int(tokens[row])
            self.nodes[row] = before.children.setdefault(token, _Node(points))
        return logits

    def path(self, row: int, ids: Sequence[int]) -> list[Points | None]:
        """For each token of a text that was generated in a row, the points of the query that it was chosen from."""
        node, found = self.roots[row], []
        for position, token in enumerate(ids):
            found.append(node.points)
            if position + 1 < len(ids):
                node = node.children[token]
        return found


class InspectedGenerator(InterleavedGenerator):
    """Generates documents and collects where MMFS looks. Steps are not captured in CUDA graphs.

    Args:
        model: the model.
        processor: turns documents into tokens and images into pixels.
        settings: settings of generation.
        inspection: what to collect.

    Attributes:
        records: for each document the records of its texts and images, by turn.

    Raises:
        InputError: the model has no such layer, head, place or step.
    """

    def __init__(
        self, model: MMInterleavedModel, processor: MMInterleavedProcessor, settings: GenerationSettings,
        inspection: InspectionSettings | None = None,
    ) -> None:  # fmt: skip
        settings = override(settings, cache_implementation="dynamic")
        super().__init__(model, processor, settings)
        self.inspection = inspection or InspectionSettings()
        self.recorder = Recorder(model, self.inspection)
        total = len(model.image_decoder.sampler(self.settings.image).timesteps)
        self.steps = shown_steps(self.inspection.steps, total)
        self.make_state = partial(RecordedState, recorder=self.recorder)
        self.records: list[dict[int, TextRecord | ImageRecord]] = []

    def run(
        self, documents: Sequence[Document | PreparedDocument], seeds: Sequence[int] | None = None
    ) -> Iterator[Event]:
        """As in `InterleavedGenerator`."""
        self.records = [{} for _ in documents]
        self.recorder.used = self.recorder.pending = 0
        events = super().run(documents, seeds)
        while True:
            with self.recorder.attached():  # what the caller does with the model between two events is not collected
                event = next(events, None)
            if event is None:
                return
            yield event

    def inspections(self, documents: Sequence[Document | PreparedDocument]) -> list[Inspection]:
        """Generate documents, and give each with its records."""
        ends = {e.document: e for e in self.run(documents) if isinstance(e, DocumentFinished)}
        return [self.inspection_of(index, ends[index]) for index in range(len(documents))]

    def inspection_of(self, index: int, end: DocumentFinished) -> Inspection:
        """The inspection of a document that has ended."""
        segments = end.result.segments
        records = self.records[index]
        for place, segment in enumerate(segments):
            if segment.generated is not None and segment.generated.turn in records:
                records[segment.generated.turn].segment = place
        run = {"settings": asdict(self.settings), "inspection": asdict(self.inspection)}
        return Inspection(
            end.result, end.reason, [r for r in records.values() if isinstance(r, TextRecord)],
            [r for r in records.values() if isinstance(r, ImageRecord)],
            [view(image, self.processor) for image in end.result.images if not image.is_open], run,
        )  # fmt: skip

    # ---- texts

    def _write(self, chosen: list[int]) -> Iterator[Event]:
        for event in super()._write(chosen):
            if isinstance(event, SegmentFinished) and self.recorder.layers:
                self._keep(event, self._text_record(event.document, event.segment))
            yield event
        self.recorder.pending = 0

    def _text_record(self, index: int, segment: Text | Image) -> TextRecord:
        assert segment.generated is not None  # it was just generated
        assert isinstance(self.state, RecordedState)  # from `make_state`
        ids, config, recorder = list(segment.generated.ids), self.model.config, self.recorder
        path = self.state.path(index, ids)
        shape, mmfs = (len(ids), len(recorder.layers)), config.mmfs
        seen = self.state.visible[index]
        if ids and seen and path[0] is not None:
            points = Points.stack([p.of_images(len(seen)) for p in path if p is not None])
        else:
            points = Points.nothing(shape, len(recorder.heads), len(mmfs.levels), mmfs.num_points)
        count = len(self.state.row_images[index])
        pieces = token_pieces(self.processor.tokenizer, ids)
        return TextRecord(
            -1, ids, pieces, group_words(self.processor.tokenizer, ids, pieces),
            [count - 1 - slot for slot in range(points.weights.shape[-3])], recorder.layers, recorder.heads,
            list(mmfs.levels), mmfs.base_size or config.grid_size, points,
        )  # fmt: skip

    # ---- images

    def _generate_images(self, chosen: list[int]) -> Iterator[Event]:
        keep = self.model.config.image_decoder.previous_images
        earlier = [self.state.row_images[row][-keep:] if keep else [] for row in chosen]
        with self.recorder.images(len(chosen), max(map(len, earlier)), self.steps) as taken:
            for event in super()._generate_images(chosen):
                if isinstance(event, ImageProgress):
                    last = event.step == event.total
                    taken.candidate, taken.step = event.candidate + last, 1 if last else event.step + 1
                elif isinstance(event, SegmentFinished) and self.recorder.places:
                    place = chosen.index(event.document)
                    self._keep(event, self._image_record(event.document, taken, place, len(earlier[place])))
                yield event
        self.recorder.pending = 0

    def _image_record(self, index: int, taken: ImagePass, place: int, slots: int) -> ImageRecord:
        decoder, recorder = self.model.image_decoder, self.recorder
        mmfs, count = decoder.config.mmfs, len(self.state.row_images[index])
        times = decoder.sampler(self.settings.image).timesteps
        maps = []
        for number in recorder.places:
            side = decoder.unet.synchronizers[number].side
            rows = chosen_cells(side, self.inspection.cells)
            if slots and number in taken.taken:
                found = taken.taken[number]
                points = Points.stack([found[step][place].of_images(slots) for step in taken.steps])
            else:
                shape = (len(taken.steps), len(rows) ** 2)
                points = Points.nothing(shape, len(recorder.heads), len(mmfs.levels), mmfs.num_points)
            name = "middle" if number == len(decoder.unet.synchronizers) - 1 else f"skip {number}"
            maps.append(MapRecord(number, name, side, rows, mmfs.base_size or side, points))
        return ImageRecord(
            -1, count, [count - 1 - slot for slot in range(slots)], list(taken.steps),
            [int(times[step - 1]) for step in taken.steps], len(times), recorder.heads, list(mmfs.levels), maps,
        )  # fmt: skip

    def _keep(self, event: SegmentFinished, record: TextRecord | ImageRecord) -> None:
        assert event.segment.generated is not None  # it was just generated
        self.records[event.document][event.segment.generated.turn] = record
        self.recorder.used += record.nbytes


def view(image: Image, processor: MMInterleavedProcessor) -> PIL.Image.Image:
    """An image as the model reads it, square, with at most `VIEW_SIDE` pixels a side."""
    assert not isinstance(image.source, (np.ndarray, Tensor))  # they became PIL images
    assert image.source is not None
    opened = load_image(image.source)
    side = min(max(min(opened.size), processor.image_size), VIEW_SIDE)
    return PIL.Image.fromarray(transformed(opened, [side], processor.crop, image.transform)[0])


def inspect_documents(
    source: Source, documents: Sequence[Document], inspection: InspectionSettings | None = None, **settings: Any
) -> list[Inspection]:
    """Fill and continue documents together, and collect where MMFS looks; see `inspect`."""
    generator = InspectedGenerator(source.model, source.processor, override(source.settings, **settings), inspection)
    with torch.no_grad():
        return generator.inspections(list(documents))


def inspect(source: Source, inputs: Input, inspection: InspectionSettings | None = None, **settings: Any) -> Inspection:
    """Fill and continue a document, and collect where MMFS looks for every token and every part of an image.

    Args:
        source: a pipeline or a generator, with model, processor and settings.
        inputs: a document, or the parts of one: strings, PIL images and segments.
        inspection: what to collect; None: everything, at the first, the middle and the last denoising step.
        **settings: settings of generation, by the names of `GenerationSettings`, `TextSettings` and `ImageSettings`.

    Raises:
        InputError: the document cannot be used, there is no such layer, head, place or step, or the arrays take more
            memory than allowed.
        ValueError: there is no such setting, or images cannot be generated with these settings.
    """
    documents = as_documents(inputs)
    if len(documents) != 1:
        raise InputError(f"inspect takes one document, not {len(documents)}", fix="Use inspect_documents")
    return inspect_documents(source, documents, inspection, **settings)[0]

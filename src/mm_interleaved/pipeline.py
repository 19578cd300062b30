"""`MMInterleavedPipeline`: a model and its processor behind one call, in the manner of transformers and diffusers.

pipe = MMInterleavedPipeline.from_pretrained("small")
output = pipe(["A red ball on a", Image()], num_inference_steps=20, seed=7)
output.images[0].save("ball.png")
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import PIL.Image
import torch

from .checkpoints.quantization import Quantization
from .document import Document, Image, Segment, Text
from .generation import DocumentFinished, Event, GenerationSettings, ImageProgress, InterleavedGenerator, MMInterleaved
from .generation.settings import TEXT_PRESETS, override
from .io import InputError
from .pretrained import load
from .processor import MMInterleavedProcessor

Part = str | PIL.Image.Image | Segment
Input = Document | Part | Sequence[Part]
StepCallback = Callable[["MMInterleavedPipeline", int, int, dict[str, Any]], object]


@dataclass
class PipelineOutput:
    """What a call gave.

    Attributes:
        documents: for each input the document with its slots filled, and its continuation.
        reasons: why each ended, see `DocumentFinished`.
    """

    documents: list[Document]
    reasons: list[str]

    @property
    def generated(self) -> list[list[str | PIL.Image.Image]]:
        """For each input its generated texts and images, in their order."""
        return [[_plain(segment) for segment in document.generated] for document in self.documents]

    @property
    def images(self) -> list[PIL.Image.Image]:
        """All generated images."""
        return [part for parts in self.generated for part in parts if isinstance(part, PIL.Image.Image)]

    @property
    def texts(self) -> list[str]:
        """All generated texts."""
        return [part for parts in self.generated for part in parts if isinstance(part, str)]


def _plain(segment: Segment) -> str | PIL.Image.Image:
    if isinstance(segment, Text):
        return segment.text or ""
    assert isinstance(segment.source, PIL.Image.Image)  # generated images are in memory
    return segment.source


class MMInterleavedPipeline:
    """Generates for documents.

    Args:
        model: the model, in evaluation mode.
        processor: its processor.
        settings: settings of all calls; None: texts are sampled as in the original's interleaved generation.

    Attributes:
        interrupt: set it to True in a callback to stop the running call; finished segments are kept.
    """

    def __init__(
        self, model: MMInterleaved, processor: MMInterleavedProcessor, settings: GenerationSettings | None = None
    ) -> None:
        self.model, self.processor = model, processor
        self.settings = settings or GenerationSettings(TEXT_PRESETS["interleaved"])
        self.interrupt = False

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        dtype: torch.dtype | None = None,
        device: str | torch.device | None = None,
        quantization: Quantization | None = None,
        offload: bool = False,
    ) -> MMInterleavedPipeline:
        """A pipeline of a model by its name or folder; the arguments are those of `pretrained.load`.

        Raises:
            ValueError: as `load`.
        """
        loaded = load(name, dtype, device, quantization, offload=offload)
        return cls(loaded.model, loaded.processor)

    def to(self, device: str | torch.device) -> MMInterleavedPipeline:
        """Move the model to a device."""
        self.model.to(device)
        return self

    def __call__(
        self,
        inputs: Input | Sequence[Document],
        *,
        callback_on_step_end: StepCallback | None = None,
        **settings: Any,
    ) -> PipelineOutput:
        """Fill the open slots of documents and continue them.

        Args:
            inputs: a document, several documents, or the parts of one: strings, PIL images and segments.
            callback_on_step_end: called after each denoising step as `callback(pipe, step, total, values)`, where
                `values` has `document` (number), `candidate` and `preview` (a PIL image, or None).
            **settings: single settings, by the names of `GenerationSettings`, `TextSettings` and `ImageSettings`.

        Raises:
            InputError: a document cannot be used, or is longer than the model's context.
            ValueError: there is no such setting, or images cannot be generated with these settings.
        """
        documents = as_documents(inputs)
        ends: list[DocumentFinished] = []
        generator = self._generator(settings)
        self.interrupt = False
        for event in generator.run(documents):
            if isinstance(event, DocumentFinished):
                ends.append(event)
            elif isinstance(event, ImageProgress) and callback_on_step_end is not None:
                values = {"document": event.document, "candidate": event.candidate, "preview": event.preview}
                callback_on_step_end(self, event.step, event.total, values)
            if self.interrupt:
                break
        finished = {end.document: end for end in ends}
        results = [finished[i].result if i in finished else row.result() for i, row in enumerate(generator.rows)]
        reasons = [finished[i].reason if i in finished else "interrupted" for i in range(len(documents))]
        return PipelineOutput(results, reasons)

    def stream(self, inputs: Input | Sequence[Document], **settings: Any) -> Iterator[Event]:
        """The events of generation as they happen; arguments and errors are those of a call."""
        yield from self._generator(settings).run(as_documents(inputs))

    def _generator(self, settings: dict[str, Any]) -> InterleavedGenerator:
        return InterleavedGenerator(self.model, self.processor, override(self.settings, **settings))


def as_documents(inputs: Input | Sequence[Document]) -> list[Document]:
    """The documents of any form of input.

    Raises:
        InputError: a part is neither a string, an image nor a segment.
    """
    if isinstance(inputs, Document):
        return [inputs]
    parts = [inputs] if isinstance(inputs, (str, PIL.Image.Image, Text, Image)) else list(inputs)
    documents = [part for part in parts if isinstance(part, Document)]
    if documents and len(documents) == len(parts):
        return documents
    segments: list[Segment] = []
    for number, part in enumerate(parts):
        if isinstance(part, str):
            segments.append(Text(part))
        elif isinstance(part, PIL.Image.Image):
            segments.append(Image(part))
        elif isinstance(part, (Text, Image)):
            segments.append(part)
        else:
            raise InputError(f"a part must be a string, a PIL image, a Text or an Image, not {type(part).__name__}",
                             f"inputs[{number}]", "Give several documents as a list of Document")  # fmt: skip
    return [Document(segments)]

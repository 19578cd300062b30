"""`MMInterleaved`: the model with everything it can generate."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from ..document import Document
from ..model import MMInterleavedModel
from ..model.layout import ImagePositions, find_images, previous_images, visible_images
from ..model.unet import EarlierImages
from ..processor import Batch, MMInterleavedProcessor
from .interleaved import DocumentFinished, Event, InterleavedGenerator
from .rules import WrittenText
from .settings import CacheImplementation, GenerationSettings, ImageSettings, TextSettings, override
from .state import GenerationState
from .text import score_options, write_beams, write_greedy
from .workspace import uses_graphs


class MMInterleaved(MMInterleavedModel):
    """Reads and writes documents in which text and pictures alternate.

    model = MMInterleaved.from_pretrained(folder)
    processor = MMInterleavedProcessor.from_pretrained(folder)
    for event in model.generate_interleaved(document, processor):
        ...
    """

    @torch.no_grad()
    def prefill(
        self, batch: Batch, cache_implementation: CacheImplementation = "auto", max_new_tokens: int = 0
    ) -> GenerationState:
        """The state of generation after reading a batch; one generation call, see `GenerationState`.

        Args:
            batch: rows of text and images, padded on any side.
            cache_implementation: as of `TextSettings`.
            max_new_tokens: that there is room for at once.

        Raises:
            ValueError: a row is longer than the model reads, or "static" is not possible.
        """
        rows, length = batch.input_ids.shape
        images = 0 if batch.pixel_values is None else len(batch.pixel_values)
        state = GenerationState(self, rows, uses_graphs(self, cache_implementation), tokens=length + max_new_tokens,
                                slots=min(images, 1), images=images)  # fmt: skip
        state.prefill(batch.input_ids, batch.attention_mask, batch.pixel_values)
        return state

    def generate_text(
        self, batch: Batch, settings: TextSettings | None = None, generator: torch.Generator | None = None
    ) -> list[list[WrittenText]]:
        """Continue every row with text.

        Args:
            batch: prompts, padded on any side.
            settings: how; None: the original's defaults.
            generator: for sampling; every row draws from its own copy. None: seed 0.

        Returns:
            For each row its `num_return_sequences` texts, best first.
        """
        settings = settings or TextSettings()
        more = settings.max_new_tokens if settings.num_beams == 1 else 0
        state = self.prefill(batch, settings.cache_implementation, more)
        if settings.num_beams > 1:
            return write_beams(state, settings)
        start = torch.Generator().manual_seed(0) if generator is None else generator
        generators = [torch.Generator() for _ in range(state.rows)]
        for own in generators:
            own.set_state(start.get_state())
        return write_greedy(state, settings, generators)

    @torch.no_grad()
    def generate_images(
        self, batch: Batch, settings: ImageSettings | None = None, targets: Sequence[int] | None = None
    ) -> Tensor:
        """Draw pictures of a batch anew, each from what stands before it in its row.

        The pictures that are drawn have pixels in the batch too (any will do for the last one of a row: nothing that is
        drawn depends on its own pixels). One generator a candidate draws the noise of all pictures.

        Args:
            batch: rows of text and pictures.
            settings: how; None: the original's defaults.
            targets: numbers of the pictures to draw, counted through the batch; None: all.

        Returns:
            [candidates * pictures, 3, image_size, image_size] in [0, 1], all pictures of the first candidate first.

        Raises:
            ValueError: the batch has no picture, there is no such target, or the settings do not fit the model.
        """
        settings = settings or ImageSettings()
        self.image_decoder.sampler(settings)
        device = self.compute_device
        input_ids, mask = batch.input_ids.to(device), batch.attention_mask.to(device)
        positions = find_images(input_ids, mask, self.config.soi_token_id, None)
        count = len(positions.rows)
        targets = list(range(count)) if targets is None else list(targets)
        if not targets or not all(0 <= t < count for t in targets):
            raise ValueError(f"targets {targets} are not among the {count} pictures of the batch")
        features, memory = self._encode(batch.pixel_values)
        if len(memory) != count:
            raise ValueError(f"input_ids holds {count} begin-of-image tokens, but there are {len(memory)} pictures")
        images = visible_images(input_ids, mask, self.config.bos_token_id, self.config.soi_token_id)
        hidden = self.decode(
            self.embed(input_ids, features.tokens), memory, images, mask, batch.position_ids.to(device)
        )
        earlier = previous_images(positions, self.config.image_decoder.previous_images)[targets]
        chosen = ImagePositions(positions.rows[targets], positions.columns[targets], positions.starts[targets])
        context, context_mask = self.image_context(hidden, chosen)
        conditions = self.image_decoder.resampler(context, context_mask)
        pictures = []
        for candidate in range(settings.num_candidates):
            generator = torch.Generator().manual_seed(settings.seed + candidate)
            for begin in range(0, len(targets), settings.batch_size):
                part = slice(begin, begin + settings.batch_size)
                seen = EarlierImages.build(features.pyramid, earlier[part])
                *_, last = self.image_decoder.denoise(conditions[part], seen, settings, generator)
                pictures.append(self.image_decoder.decode(last.latents, settings.decode_dtype == "bfloat16"))
        return torch.cat(pictures)

    @torch.no_grad()
    def score(self, batch: Batch, options: Sequence[Sequence[Sequence[int]]], batch_size: int = 4) -> list[list[float]]:
        """Log-probability of each option as the continuation of its row; prompts and pictures are read once.

        Args:
            batch: prompts, padded on any side.
            options: for each row the ids of its options.
            batch_size: options read at a time.

        Returns:
            For each row the sum of log p over each option's tokens.

        Raises:
            ValueError: an option has no tokens.
        """
        return score_options(self.prefill(batch), options, batch_size)

    def generate_interleaved(
        self,
        documents: Document | Sequence[Document],
        processor: MMInterleavedProcessor,
        settings: GenerationSettings | None = None,
        progress: bool = True,
        **changes: Any,
    ) -> Iterator[Event]:
        """Fill the open slots of documents and let them go on, as a stream of events.

        Args:
            documents: one or several; several take their turns together.
            processor: turns documents into tokens and pictures into pixels.
            settings: how; None: the original's defaults.
            progress: whether to give an event for every denoising step.
            **changes: single settings, by the names of `GenerationSettings`, `TextSettings` and `ImageSettings`.

        Raises:
            DocumentError: a document cannot be used, or is longer than the model's context.
            ValueError: there is no such setting, or pictures cannot be drawn with these settings.
        """
        documents = [documents] if isinstance(documents, Document) else list(documents)
        settings = override(settings or GenerationSettings(), **changes)
        return InterleavedGenerator(self, processor, settings, progress).run(documents)

    def generate(
        self,
        inputs: Batch | Document | Sequence[Document],
        generation_mode: Literal["text", "image", "interleaved"] = "text",
        processor: MMInterleavedProcessor | None = None,
        settings: GenerationSettings | None = None,
        targets: Sequence[int] | None = None,
        **changes: Any,
    ) -> Tensor | list[Document]:
        """All kinds of generation behind one name.

        Args:
            inputs: a batch for "text" and "image"; documents for "interleaved".
            generation_mode: "text" gives token ids [rows * sequences, length], padded, with their end tokens; "image"
                gives pictures as `generate_images` does; "interleaved" gives finished documents.
            processor: needed for "interleaved".
            settings: how; None: the original's defaults.
            targets: for "image", which pictures of the batch to draw; None: all.
            **changes: single settings, by the names of `GenerationSettings`, `TextSettings` and `ImageSettings`.

        Raises:
            ValueError: an unknown mode or setting, or no processor.
        """
        settings = override(settings or GenerationSettings(), **changes)
        if generation_mode == "text":
            texts = self.generate_text(inputs, settings.text, torch.Generator().manual_seed(settings.seed))
            rows = [torch.tensor(text.all_ids, dtype=torch.long) for row in texts for text in row]
            return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=self.config.pad_token_id)
        if generation_mode == "image":
            return self.generate_images(inputs, settings.image, targets)
        if generation_mode != "interleaved":
            raise ValueError(f"generation_mode must be 'text', 'image' or 'interleaved', not '{generation_mode}'")
        if processor is None:
            raise ValueError("generation_mode='interleaved' needs the processor")
        events = self.generate_interleaved(inputs, processor, settings, progress=False)
        finished = [e for e in events if isinstance(e, DocumentFinished)]
        return [e.result for e in sorted(finished, key=lambda e: e.document)]

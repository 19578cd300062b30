"""`MMInterleaved`: the model with generation of text, images, scores and documents.

Axes: B rows of the batch, L tokens, I images, h and w height and width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor
from transformers import Cache, GenerationConfig
from transformers.utils.loading_report import LoadStateDictInfo

from ..adapters.folder import read_adapter
from ..adapters.loading import NAME, load_adapter
from ..document import Document
from ..model import MMInterleavedModel
from ..model.layout import ImagePositions, find_images, previous_images, visible_images
from ..model.unet import EarlierImages
from ..processor import Batch, MMInterleavedProcessor
from .arguments import settings_from_arguments
from .foreign_cache import ForeignCacheState
from .interleaved import DocumentFinished, Event, InterleavedGenerator
from .rules import WrittenText
from .settings import CacheImplementation, GenerationSettings, ImageSettings, TextSettings, override
from .state import GenerationState
from .text import score_options, write_beams, write_greedy
from .workspace import uses_graphs


class MMInterleaved(MMInterleavedModel):
    """A model that reads and writes documents in which text and images alternate.

    model = MMInterleaved.from_pretrained(folder)
    processor = MMInterleavedProcessor.from_pretrained(folder)
    for event in model.generate_interleaved(document, processor):
        ...
    """

    @torch.no_grad()
    def prefill(
        self, batch: Batch, cache_implementation: CacheImplementation = "auto", max_new_tokens: int = 0
    ) -> GenerationState:
        """The state of generation after a batch; one state is one generation call, see `GenerationState`.

        Args:
            batch: rows of text and images, padded on any side.
            cache_implementation: as in `TextSettings`.
            max_new_tokens: initial capacity for new tokens.

        Raises:
            ValueError: a row is longer than the model's context, or "static" is not possible.
        """
        rows, length = batch["input_ids"].shape
        pixels = batch.get("pixel_values")
        images = 0 if pixels is None else len(pixels)
        of_a_row = int((batch["input_ids"] == self.config.soi_token_id).sum(1).max()) if images else 0
        state = GenerationState(self, rows, uses_graphs(self, cache_implementation), tokens=length + max_new_tokens,
                                slots=min(of_a_row, self.config.mmfs.max_images - 1), images=images)  # fmt: skip
        state.prefill(batch["input_ids"], batch["attention_mask"], pixels)
        return state

    def load_adapter(  # pyright: ignore[reportIncompatibleMethodOverride]  # nothing is loaded without being checked
        self,
        peft_model_id: str | Path,
        adapter_name: str | None = None,
        *,
        is_trainable: bool = False,
        allow_other_base: bool = False,
        load_config: object = None,
        adapter_kwargs: object = None,
    ) -> LoadStateDictInfo:
        """Load a LoRA adapter, in place, and make it the active one, as in transformers.

        `set_adapter`, `disable_adapters`, `delete_adapter` and `save_pretrained` are those of transformers.

        Args:
            peft_model_id: the folder of the adapter.
            adapter_name: its name in the model; None: "default".
            is_trainable: whether its weights are trained further.
            allow_other_base: accept an adapter that was trained on another model with the same layers.
            load_config, adapter_kwargs: passed by `from_pretrained`; a folder needs neither.

        Returns:
            That no weight is missing or unexpected.

        Raises:
            InputError: it cannot be used, or was trained on another model; this one is unchanged then.
        """
        load_adapter(self, read_adapter(Path(peft_model_id)), adapter_name or NAME, trainable=is_trainable,
                     allow_other_base=allow_other_base)  # fmt: skip
        return LoadStateDictInfo(missing_keys=set(), unexpected_keys=set(), mismatched_keys=set(), error_msgs=[],
                                 conversion_errors={}, skipped_pp_keys=set())  # fmt: skip

    def generate_text(
        self, batch: Batch, settings: TextSettings | None = None, generator: torch.Generator | None = None
    ) -> list[list[WrittenText]]:
        """Continue every row with text.

        Args:
            batch: prompts, padded on any side.
            settings: text settings; None: the original's defaults.
            generator: random numbers for sampling; every row uses a copy of its own. None: seed 0.

        Returns:
            For each row its `num_return_sequences` texts, best first.
        """
        settings = settings or TextSettings()
        more = settings.max_new_tokens if settings.num_beams == 1 else 0
        state = self.prefill(batch, settings.cache_implementation, more)
        if settings.num_beams > 1:
            return write_beams(state, settings)
        start = torch.Generator().manual_seed(0) if generator is None else generator
        return write_greedy(state, settings, _copies(start, state.rows))

    @torch.no_grad()
    def generate_images(
        self, batch: Batch, settings: ImageSettings | None = None, targets: Sequence[int] | None = None
    ) -> Tensor:
        """Generate images of a batch anew, each from its context in its row.

        The batch has pixels for the targets too. The pixels of a target do not influence its result, only those of
        later images of its row. One generator for each candidate samples the noise of all images.

        Args:
            batch: rows of text and images.
            settings: image settings; None: the original's defaults.
            targets: numbers of the images to generate, counted through the batch; None: all.

        Returns:
            [candidates * images, 3, image_size, image_size] in [0, 1], all images of the first candidate first.

        Raises:
            ValueError: the batch has no image, there is no such target, or the settings do not fit the model.
        """
        settings = settings or ImageSettings()
        self.image_decoder.sampler(settings)
        device = self.compute_device
        input_ids, mask = batch.input_ids.to(device), batch.attention_mask.to(device)
        positions = find_images(input_ids, mask, self.config.soi_token_id, None)
        count = len(positions.rows)
        targets = list(range(count)) if targets is None else list(targets)
        if not targets or not all(0 <= t < count for t in targets):
            raise ValueError(f"targets {targets} are not among the {count} images of the batch")
        features, memory = self._encode(batch.get("pixel_values"))
        if len(memory) != count:
            raise ValueError(f"input_ids holds {count} begin-of-image tokens, but there are {len(memory)} images")
        assert features is not None  # there is a target, and so an image
        images = visible_images(input_ids, mask, self.config.bos_token_id, self.config.soi_token_id)
        hidden = self.decode(
            self.embed(input_ids, features.tokens), memory, images, mask, batch.position_ids.to(device)
        )
        earlier = previous_images(positions, self.config.image_decoder.previous_images)[targets]
        chosen = ImagePositions(positions.rows[targets], positions.columns[targets], positions.starts[targets])
        context, context_mask = self.image_context(hidden, chosen)
        conditions = self.image_decoder.resampler(context, context_mask)
        decoded = []
        for candidate in range(settings.num_candidates):
            generator = torch.Generator().manual_seed(settings.seed + candidate)
            for begin in range(0, len(targets), settings.batch_size):
                part = slice(begin, begin + settings.batch_size)
                seen = EarlierImages.build(features.pyramid, earlier[part])
                *_, last = self.image_decoder.denoise(conditions[part], seen, settings, generator)
                decoded.append(self.image_decoder.decode(last.latents, settings.decode_dtype == "bfloat16"))
        return torch.cat(decoded)

    @torch.no_grad()
    def score(self, batch: Batch, options: Sequence[Sequence[Sequence[int]]], batch_size: int = 4) -> list[list[float]]:
        """Log-probability of each option as the continuation of its row. Prompts and images are processed once.

        Args:
            batch: prompts, padded on any side.
            options: for each row the ids of its options.
            batch_size: number of options processed together.

        Returns:
            For each row the sum of log p over each option's tokens.

        Raises:
            ValueError: an option has no tokens, or an id outside the vocabulary.
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
        """Fill the open slots of documents and continue them, as a stream of events.

        Args:
            documents: one or several; several take their turns together.
            processor: turns documents into tokens and images into pixels.
            settings: generation settings; None: the original's defaults.
            progress: whether to yield an event for every denoising step.
            **changes: single settings, by the names of `GenerationSettings`, `TextSettings` and `ImageSettings`.

        Raises:
            InputError: a document cannot be used, or is longer than the model's context.
            ValueError: there is no such setting, or images cannot be generated with these settings.
        """
        documents = [documents] if isinstance(documents, Document) else list(documents)
        settings = override(settings or GenerationSettings(), **changes)
        return InterleavedGenerator(self, processor, settings, progress).run(documents)

    def generate(
        self,
        inputs: Batch | Tensor | Document | Sequence[Document] | None = None,
        generation_mode: Literal["text", "image", "interleaved"] = "text",
        processor: MMInterleavedProcessor | None = None,
        settings: GenerationSettings | None = None,
        targets: Sequence[int] | None = None,
        generation_config: GenerationConfig | None = None,
        past_key_values: Cache | None = None,
        *,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_rows: Tensor | None = None,
        document_starts: Tensor | None = None,
        **arguments: Any,
    ) -> Tensor | list[Document]:
        """All kinds of generation in one method, with the arguments of `generate` in transformers.

        Args:
            inputs: a batch, or its input_ids, for "text" and "image"; documents for "interleaved".
            generation_mode: "text" returns token ids [B * sequences, L + new]: the prompt, padded as it was given, and
                the new tokens with their end tokens, padded on the right. "image" returns images as `generate_images`
                does. "interleaved" returns finished documents.
            processor: needed for "interleaved".
            settings: generation settings; None: the original's defaults.
            targets: for "image", which images of the batch to generate; None: all.
            generation_config: settings in the form of transformers; `arguments` override it.
            past_key_values: for "text", an empty cache of transformers to use instead of our own KV cache; with
                num_beams 1 and one sequence a row.
            input_ids, attention_mask, position_ids, pixel_values, image_rows, document_starts: a batch by its items,
                as in `generate(**batch)`; see `Batch`.
            **arguments: single settings, by the names of `GenerationSettings`, `TextSettings`, `ImageSettings` and
                transformers.

        Raises:
            ValueError: an unknown mode or setting, no inputs or no processor, or a cache that cannot be used.
        """
        settings = settings_from_arguments(
            settings or GenerationSettings(), self.config, generation_config, **arguments
        )
        if generation_mode not in ("text", "image", "interleaved"):
            raise ValueError(f"generation_mode must be 'text', 'image' or 'interleaved', not '{generation_mode}'")
        if generation_mode == "interleaved":
            return self._generate_documents(inputs, processor, settings)
        if isinstance(inputs, Tensor):
            inputs, input_ids = None, inputs
        if inputs is None:
            items = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids,
                     "pixel_values": pixel_values, "image_rows": image_rows,
                     "document_starts": document_starts}  # fmt: skip
            inputs = prompt_batch(items)
        batch = cast(Batch, inputs)
        if generation_mode == "image":
            return self.generate_images(batch, settings.image, targets)
        return self._generate_ids(batch, settings, past_key_values)

    def _generate_documents(
        self, inputs: object, processor: MMInterleavedProcessor | None, settings: GenerationSettings
    ) -> list[Document]:
        """Finished documents, in their order."""
        if processor is None:
            raise ValueError("generation_mode='interleaved' needs the processor")
        if not isinstance(inputs, (Document, Sequence)):
            raise ValueError("generation_mode='interleaved' takes a document or a list of documents, "
                             f"not {type(inputs).__name__}")  # fmt: skip
        events = self.generate_interleaved(inputs, processor, settings, progress=False)
        finished = [e for e in events if isinstance(e, DocumentFinished)]
        return [e.result for e in sorted(finished, key=lambda e: e.document)]

    def _generate_ids(self, batch: Batch, settings: GenerationSettings, cache: Cache | None) -> Tensor:
        """Prompts and new tokens [B * sequences, L + new], padded after the new tokens."""
        text, generator = settings.text, torch.Generator().manual_seed(settings.seed)
        if cache is None:
            texts = self.generate_text(batch, text, generator)
        elif text.num_beams > 1 or text.num_return_sequences > 1:
            raise ValueError("past_key_values takes num_beams=1 and num_return_sequences=1; leave it out for others")
        else:
            state = ForeignCacheState(self, batch, cache)
            # it implements what `write_greedy` uses for one sequence a row
            texts = write_greedy(cast(GenerationState, state), text, _copies(generator, state.rows))
        rows = [torch.tensor(t.all_ids, dtype=torch.long) for row in texts for t in row]
        new = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=self.config.pad_token_id)
        prompt = batch["input_ids"].repeat_interleave(text.num_return_sequences, dim=0)
        return torch.cat([prompt, new.to(prompt)], dim=1)


def _copies(generator: torch.Generator, count: int) -> list[torch.Generator]:
    """`count` generators in the state of `generator`."""
    copies = [torch.Generator() for _ in range(count)]
    for copy in copies:
        copy.set_state(generator.get_state())
    return copies


def prompt_batch(items: Mapping[str, Tensor | None]) -> Batch:
    """A batch of prompts from the items that are not None; the mask and the positions may be missing.

    Raises:
        ValueError: there are no input_ids [B, L].
    """
    given = {name: value for name, value in items.items() if value is not None}
    ids = given.get("input_ids")
    if ids is None or ids.dim() != 2:
        raise ValueError("generate needs input_ids [rows, length]; make a batch with the processor")
    mask = given.setdefault("attention_mask", torch.ones_like(ids))
    given.setdefault("position_ids", (mask.long().cumsum(1) - 1).clamp(min=0))
    return Batch(given)

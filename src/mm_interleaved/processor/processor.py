"""`MMInterleavedProcessor`: documents to tensors and back.

Axes: B rows of the batch, L tokens of a row, I images, h and w height and width of an image.
"""

from __future__ import annotations

import inspect
import itertools
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import PIL.Image
import torch
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from ..document import Document, Image, Segment, Text, place_boxes
from ..document.arrays import is_array
from ..document.transform import WHOLE, Transform
from ..io import FileSlice, InputError, check_strings, nearest_name
from ..io.images import ImageSource, load_image
from ..model.config import MMInterleavedConfig
from ..model.layout import sample_positions
from .batch import Batch, build_labels
from .images import CROPS, transformed
from .packing import Cut, PackingRules, TokenStream, pack
from .tokenizer import IMAGE_TOKEN, SOI_TOKEN, add_image_tokens, encode_text, guard_text

# Vicuna's conversation format. A template prints one <|image|> for an image.
CHAT_TEMPLATE = """
{%- macro show(content) -%}
{%- if content is string -%}{{ content }}{%- else -%}
{%- for part in content -%}{{ '<|image|>' if part.type == 'image' else part.text }}{%- endfor -%}
{%- endif -%}{%- endmacro -%}
{%- for message in messages -%}
{%- if message.role == 'system' -%}{{ show(message.content) + ' ' }}
{%- elif message.role == 'user' -%}{{ 'USER: ' + show(message.content) + ' ' }}
{%- else -%}{{ 'ASSISTANT: ' + show(message.content) + '</s>' }}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ 'ASSISTANT:' }}{%- endif -%}
"""


_OPEN, _CLOSE = "\udffd", "\udffe"  # around texts of messages in a template; no text holds a lone surrogate


class ImageViews(NamedTuple):
    """One image in both sizes.

    Attributes:
        input: uint8 [image_size, image_size, 3] for the visual tokenizer.
        target: uint8 [target_size, target_size, 3] for the image decoder; None: not needed.
    """

    input: np.ndarray
    target: np.ndarray | None


class MMInterleavedProcessor(ProcessorMixin):
    """Turns documents into a `Batch`, and ids and images back into documents.

    Args:
        tokenizer: any transformers tokenizer; the two image tokens are added if it lacks them.
        num_image_tokens: image tokens of an image.
        image_size: side of the input images in pixels.
        target_size: side of the generated images in pixels.
        max_length: longest row in tokens.
        crop: how images become square: "center" crops the centre, "squash" stretches (for boxes).
        chat_template: Jinja template for conversations; None: Vicuna's format.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        num_image_tokens: int = 64,
        image_size: int = 224,
        target_size: int = 512,
        max_length: int = 2048,
        crop: Literal["center", "squash"] = "center",
        chat_template: str | None = None,
    ) -> None:
        if crop not in CROPS:
            raise ValueError(f"crop must be one of {', '.join(CROPS)}, not '{crop}'")
        self.num_image_tokens, self.image_size, self.target_size = num_image_tokens, image_size, target_size
        self.max_length, self.crop = max_length, crop
        super().__init__(tokenizer, chat_template=chat_template or CHAT_TEMPLATE)
        self.soi_token_id, self.image_token_id = add_image_tokens(tokenizer)

    @classmethod
    def for_model(cls, config: MMInterleavedConfig, tokenizer: PreTrainedTokenizerBase) -> MMInterleavedProcessor:
        """The processor that fits a model.

        Raises:
            ValueError: the tokenizer's ids are not the model's, or it has more of them.
        """
        processor = cls(
            tokenizer,
            config.num_image_tokens,
            config.vision_config.image_size,
            config.image_decoder.image_size,
            min(config.text_config.max_position_embeddings, config.max_context_length),
        )
        pairs = {
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "soi_token_id": processor.soi_token_id,
            "image_token_id": processor.image_token_id,
        }
        for name, found in pairs.items():
            if found != getattr(config, name):
                raise ValueError(f"the tokenizer's {name} is {found}, but the model's is {getattr(config, name)}")
        if len(tokenizer) > config.vocab_size:
            raise ValueError(f"the tokenizer has {len(tokenizer)} tokens, but the model has {config.vocab_size}; call "
                             "model.resize_token_embeddings(len(tokenizer)) after add_tokens")  # fmt: skip
        return processor

    # ---- documents to token streams

    def encode(
        self, segments: Sequence[Segment], *, start: bool = True, close: bool = False, after_image: bool = False
    ) -> TokenStream:
        """Segments as tokens.

        Args:
            segments: texts and images without open slots and roles.
            start: whether to prepend `<s>`.
            close: whether to append `</s>`, unless a chat template has written it after the last message.
            after_image: whether an image precedes these segments.

        Raises:
            InputError: there is an open slot, or a text that contains a reserved image token.
        """
        stream = self._token(self.tokenizer.bos_token_id, learned=False) if start else TokenStream.empty()
        run: list[Text] = []
        for index, segment in enumerate(segments):
            _check_segment(segment, index)
            if isinstance(segment, Text):
                run.append(segment)
                continue
            stream = stream + self._encode_run(run, after_image, before_image=True) + self._encode_image(segment)
            run, after_image = [], True
        stream = stream + self._encode_run(run, after_image, before_image=False)
        if close and not (len(stream) and stream.ids[-1] == self.tokenizer.eos_token_id):
            stream = stream + self._token(self.tokenizer.eos_token_id, bool(segments) and segments[-1].supervise)
        if start:
            stream.starts[0] = True
        return stream

    def _token(self, token_id: int, learned: bool) -> TokenStream:
        return TokenStream(np.array([token_id], np.int64), np.array([learned]), [])

    def _encode_run(self, run: list[Text], after_image: bool, before_image: bool) -> TokenStream:
        """Neighbouring texts, joined and encoded as one. Lengths of prefixes decide which tokens are learned."""
        if not run:
            return TokenStream.empty()

        def ids_of(texts: list[Text], end: str = "") -> list[int]:
            ids = encode_text(self.tokenizer, (IMAGE_TOKEN if after_image else "") + self._join(texts) + end)
            return ids[int(after_image) : len(ids) - bool(end)]

        ids = ids_of(run, SOI_TOKEN if before_image else "")
        learned = np.zeros(len(ids), bool)
        done = 0
        for index, text in enumerate(run):
            last = index == len(run) - 1
            if last or run[index + 1].supervise != text.supervise:
                end = len(ids) if last else min(len(ids_of(run[: index + 1])), len(ids))
                learned[done:end] = text.supervise
                done = end
        return TokenStream(np.array(ids, np.int64), learned, [])

    def _join(self, texts: Sequence[Text]) -> str:
        """The texts as one string, joined by a space unless there is white space already or a text is attached."""
        joined, last = "", ""
        for text in texts:
            words = text.text or ""
            gap = last and words and not (text.attached or last.isspace() or words[0].isspace())
            joined += " " if gap else ""
            joined += words if text.control_tokens else guard_text(self.tokenizer, words)
            last = words[-1:] or last
        return joined

    def _encode_image(self, image: Image) -> TokenStream:
        ids = np.full(1 + self.num_image_tokens, self.image_token_id, np.int64)
        ids[0] = self.soi_token_id
        return TokenStream(ids, np.full(len(ids), image.supervise), [image])

    # ---- conversations

    def render(self, document: Document) -> list[Segment]:
        """The segments of a document; a conversation is rendered by the chat template.

        Images that boxes are in are stretched to squares, and never cropped.

        Only the messages of the assistant are learned, without the segments that are not supervised. A conversation
        that ends with the user, or with open slots of the assistant, gets the generation prompt of the template.

        Raises:
            InputError: only some segments have roles, an open slot is not at the end, or an image that a box is in
                would be cropped.
        """
        segments = place_boxes(document.segments)
        roles = [s.role is not None for s in segments]
        if not any(roles):
            return segments
        if not all(roles):
            raise InputError("this segment has no role, but others have", f"segments[{roles.index(False)}]")
        slots: list[Segment] = []
        while segments and segments[-1].is_open:
            slots.insert(0, replace(segments.pop(), role=None))
        for index, segment in enumerate(segments):
            _check_segment(segment, index)
        images = iter([s for s in segments if isinstance(s, Image)])
        # The template gets the positions of images, not their content.
        unnamed: list[Segment] = [Image("", role=s.role) if isinstance(s, Image) else s for s in segments]
        messages = _mark_texts(Document(unnamed).to_messages())
        spoken = [list(group) for _, group in itertools.groupby(segments, key=lambda segment: segment.role)]
        written: list[Segment] = []
        said = ""
        for index, (message, parts) in enumerate(zip(messages, spoken, strict=True)):
            now = self._write(messages[: index + 1])
            if not now.startswith(said):
                raise InputError("the chat template rewrites earlier messages; it must only add to them")
            added, header = now[len(said) :], ""
            speaks = message["role"] == "assistant"
            if speaks and index:
                header = self._write(messages[:index], prompt=True)[len(said) :]
                header = header if added.startswith(header) else ""
            elif speaks:  # many templates cannot write the prompt of no messages
                header = re.split(f"{_OPEN}|{re.escape(IMAGE_TOKEN)}", added, maxsplit=1)[0].rstrip()
            written += _with_images(header, images, supervise=False)
            shown = [part for part in parts if isinstance(part, Image) or (part.text or "").strip()]
            learned = [speaks and part.supervise for part in shown]
            written += _with_images(added[len(header) :], images, supervise=learned or [speaks])
            said = now
        if slots or not messages or messages[-1]["role"] != "assistant":
            prompt = self._write(messages, prompt=True) if messages else ""
            written += _with_images(prompt[len(said) :], images, supervise=False)
        return written + slots

    def apply_chat_template(  # pyright: ignore[reportIncompatibleMethodOverride]  # no audio, no video
        self,
        conversation: Sequence[dict[str, Any]] | Sequence[Sequence[dict[str, Any]]],
        chat_template: str | None = None,
        *,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        tokenize: bool = False,
        return_dict: bool = False,
        return_tensors: str | None = "pt",
        return_assistant_tokens_mask: bool = False,
        processor_kwargs: dict[str, Any] | None = None,
        **variables: Any,
    ) -> str | list[str] | torch.Tensor | Batch:
        """Conversations rendered by the chat template, as strings or as a batch.

        Args:
            conversation: messages with a `role` and a `content`, or a list of conversations.
            chat_template: a Jinja template instead of the processor's.
            add_generation_prompt: whether to append the generation prompt, which starts the assistant's message.
            continue_final_message: whether to leave the last message open.
            tokenize: whether to return token ids instead of strings.
            return_dict: with `tokenize`, return the whole batch, for `model.generate(**batch)`.
            return_tensors: as in `__call__`.
            return_assistant_tokens_mask: not supported; `processor(documents, training=True)` returns labels.
            processor_kwargs: arguments of `__call__`, such as `padding_side`.
            **variables: further variables of the template; arguments of `__call__` are removed from them.

        Raises:
            InputError: a message or an image cannot be used; names conversation and part.
        """
        if return_assistant_tokens_mask:
            raise ValueError("return_assistant_tokens_mask is not supported; processor(documents, training=True) "
                             "returns labels for the assistant's messages")  # fmt: skip
        names = ("padding", "padding_side", "truncation", "max_length")
        options = {name: variables.pop(name) for name in names if name in variables} | (processor_kwargs or {})
        single = bool(conversation) and isinstance(conversation[0], dict)
        several = [conversation] if single else conversation
        conversations = cast("list[Sequence[dict[str, Any]]]", list(several))
        images = []
        for index, messages in enumerate(conversations):
            try:
                images.append([image.source for image in Document.from_messages(list(messages)).images])
            except InputError as error:
                raise (error if single else error.at(f"conversation {index}")) from None
        written = super().apply_chat_template(
            [_mark_texts(_with_image_parts(messages)) for messages in conversations], chat_template, tokenize=False,
            add_generation_prompt=add_generation_prompt, continue_final_message=continue_final_message, **variables,
        )  # fmt: skip
        if not tokenize:
            written = [re.sub(f"[{_OPEN}{_CLOSE}]", "", text) for text in written]
            return written[0] if single else written
        batch = self(_from_strings(written, images), return_tensors=return_tensors, **options)
        return batch if return_dict else batch.input_ids

    def _write(self, messages: list[dict[str, Any]], prompt: bool = False) -> str:
        return super().apply_chat_template(messages, add_generation_prompt=prompt)

    # ---- batches

    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]  # documents first; no audio, no video
        self,
        documents: Document | Sequence[Document] | None = None,
        *,
        text: str | Sequence[str] | None = None,
        images: Any = None,
        training: bool = False,
        padding_side: Literal["left", "right"] = "right",
        packing: bool | Literal["samples"] = False,
        cut: Cut = "image",
        max_images: int | None = None,
        max_length: int | None = None,
        truncation: bool = False,
        ignore_text_before_image: bool | Sequence[bool] = False,
        padding: bool | str = True,
        return_tensors: str | None = "pt",
        **kwargs: Any,
    ) -> Batch:
        """Documents as one batch.

        Args:
            documents: one or several.
            text: instead of documents, strings with one `<|image|>` for each image ...
            images: ... and the images, in order: a list for one string, a list of lists for several.
            training: whether to append `</s>` to documents and to add labels, targets and the image-loss mask.
            padding_side: where shorter rows are padded; left for text generation.
            packing: whether to pack documents into rows of `max_length` tokens instead of one row each: True joins
                them and cuts rows between images; "samples" joins whole documents, which attend to themselves only.
            cut: with `packing=True`, where rows end; see `packing.pack`.
            max_images: with packing, most images in a row.
            max_length: longest row; None: the model's.
            truncation: whether to cut longer rows (before an image that does not fit) instead of an error.
            ignore_text_before_image: whether text before the first image is not learned, for all documents or for each
                (docs/model.md, "Text labels"; with packing one value for all).
            padding: True or "longest", the names of transformers for what is always done to shorter rows.
            return_tensors: must be "pt"; the processor returns PyTorch tensors only.
            **kwargs: arguments that transformers passes for other modalities; must be None.

        Raises:
            InputError: a document cannot be used; names document and segment.
            ValueError: two arguments do not fit together.
        """
        _check_arguments(kwargs, padding, return_tensors)
        if (documents is None) == (text is None):
            raise ValueError("give either documents, or text (with images)")
        if text is not None:
            check_strings(text, "text")
            documents = _from_strings(text, images)
        documents = _listed(documents)
        limit = max_length or self.max_length
        streams: list[TokenStream] = []
        places: dict[int, str] = {}  # of images by identity, because rows are packed and shortened
        for index, document in enumerate(documents):
            try:
                streams.append(self.encode(self.render(document), close=training))
            except InputError as error:
                raise error.at(_name(index, document)) from None
            numbers = (i for i, segment in enumerate(document.segments) if isinstance(segment, Image))
            for number, image in zip(numbers, streams[-1].images, strict=True):
                places.setdefault(id(image), f"{_name(index, document)}, segments[{number}]")
        if packing == "samples":
            streams = self._join_samples(streams, documents, limit, max_images)
        elif packing:
            streams = self._pack(streams, limit, cut, max_images)
        else:
            streams = [self._fit(s, i, documents[i], limit, truncation) for i, s in enumerate(streams)]
        views = [self.views(image, training, where=places[id(image)]) for stream in streams for image in stream.images]
        apart = packing == "samples"
        return self.collate(streams, training, padding_side, ignore_text_before_image, views, separate_samples=apart)

    def _join_samples(
        self, streams: list[TokenStream], documents: Sequence[Document], limit: int, max_images: int | None
    ) -> list[TokenStream]:
        ids = (self.num_image_tokens, self.tokenizer.bos_token_id, self.soi_token_id)
        rules = PackingRules(limit, *ids, max_images, packing="samples")
        for index, stream in enumerate(streams):
            if (excess := rules.excess(stream)) is not None:
                raise InputError(f"the document has {excess}", _name(index, documents[index]), "Shorten it")
        return list(rules.rows(streams))

    def _pack(self, streams: list[TokenStream], limit: int, cut: Cut, max_images: int | None) -> list[TokenStream]:
        rows = list(
            pack(
                streams,
                length=limit,
                num_image_tokens=self.num_image_tokens,
                bos_token_id=self.tokenizer.bos_token_id,
                soi_token_id=self.soi_token_id,
                max_images=max_images,
                cut=cut,
            )
        )
        if not rows:
            raise ValueError("packing drops rows without images, and no document has one")
        return rows

    def _fit(self, stream: TokenStream, index: int, document: Document, limit: int, truncation: bool) -> TokenStream:
        if len(stream) <= limit:
            return stream
        if not truncation:
            raise InputError(
                f"{len(stream)} tokens are more than the {limit} of the model's context", _name(index, document),
                "Shorten it, or cut it with truncation",
            )  # fmt: skip
        soi = np.flatnonzero(stream.ids[:limit] == self.soi_token_id)
        cut_image = len(soi) and soi[-1] + self.num_image_tokens >= limit
        return stream.split(int(soi[-1]) if cut_image else limit, self.soi_token_id)[0]

    def collate(
        self,
        streams: Sequence[TokenStream],
        training: bool = False,
        padding_side: Literal["left", "right"] = "right",
        ignore_text_before_image: bool | Sequence[bool] = False,
        views: Sequence[ImageViews] | None = None,
        pad_to: int = 0,
        eight_bit: bool = False,
        separate_samples: bool | Sequence[bool] = False,
    ) -> Batch:
        """Rows of tokens as a batch.

        Args:
            streams: the rows.
            training: add labels, targets and the image-loss mask.
            padding_side: where shorter rows are padded.
            ignore_text_before_image: as in `__call__`.
            views: the images as `views` returns them; None: they are read here.
            pad_to: least length of the rows.
            eight_bit: whether images stay uint8, which takes a quarter of the memory.
            separate_samples: whether the samples of a row attend to themselves only, for all rows or for each. The
                batch has `sample_ids` if any such row has several samples.

        Raises:
            InputError: an image cannot be read; names its row and its number in the row.
        """
        longest = max(pad_to, *(len(s) for s in streams))
        ids = np.full((len(streams), longest), self.tokenizer.pad_token_id, np.int64)
        mask, learned, samples = np.zeros_like(ids), np.zeros(ids.shape, bool), np.full_like(ids, -1)
        apart = np.broadcast_to(separate_samples, len(streams))
        starts: list[int] = []
        for row, stream in enumerate(streams):
            first = longest - len(stream) if padding_side == "left" else 0
            place = slice(first, first + len(stream))
            ids[row, place], mask[row, place], learned[row, place] = stream.ids, 1, stream.learned
            samples[row, place] = stream.samples if apart[row] else 0
            bos = np.flatnonzero((stream.ids == self.tokenizer.bos_token_id) | (apart[row] & stream.starts))
            for soi in np.flatnonzero(stream.ids == self.soi_token_id):
                before = bos[bos < soi]
                starts.append(first + (int(before[-1]) if len(before) else 0))
        input_ids, attention_mask = torch.from_numpy(ids), torch.from_numpy(mask)
        images = [image for stream in streams for image in stream.images]
        rows = [row for row, stream in enumerate(streams) for _ in stream.images]
        if views is None:
            views = [
                self.views(image, training, where=f"row {row}, image {number}")
                for row, stream in enumerate(streams)
                for number, image in enumerate(stream.images)
            ]
        batch = Batch(
            boxes=[image.boxes for image in images],
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=(attention_mask.cumsum(1) - 1).clamp(min=0),
            pixel_values=_stack([v.input for v in views], self.image_size, eight_bit),
            image_rows=torch.tensor(rows, dtype=torch.long),
            document_starts=torch.tensor(starts, dtype=torch.long),
        )
        if samples.max(initial=0) > 0:
            batch["sample_ids"] = torch.from_numpy(samples)
            batch["position_ids"] = sample_positions(batch["sample_ids"])
        if training:
            batch["labels"] = build_labels(
                input_ids,
                attention_mask,
                bos_token_id=self.tokenizer.bos_token_id,
                soi_token_id=self.soi_token_id,
                image_token_id=self.image_token_id,
                learned=torch.from_numpy(learned),
                ignore_text_before_image=torch.as_tensor(ignore_text_before_image),
            )
            drawn = [v.target for v in views if v.target is not None]
            batch["target_pixel_values"] = _stack(drawn, self.target_size, eight_bit)
            batch["image_loss_mask"] = torch.tensor([float(i.supervise) for i in images])
        return batch

    def pixels(self, images: Sequence[PIL.Image.Image], size: int | None = None) -> torch.Tensor:
        """RGB images as float32 [I, 3, size, size] in [0, 1]; size None: `image_size`."""
        size = size or self.image_size
        return _stack([CROPS[self.crop](image, size) for image in images], size)

    def views(self, image: Image, training: bool, draft: bool = False, where: str = "") -> ImageViews:
        """The input view of an image and, for training, its target view. The file is decoded once.

        Args:
            image: the segment.
            training: whether the target view is needed.
            draft: whether to decode large JPEGs at a fraction of their size; see `load_image`.
            where: the place to name in errors.

        Raises:
            InputError: the image cannot be read.
        """
        sizes = [self.image_size, self.target_size] if training else [self.image_size]
        least = _least_side(image.transform, max(self.image_size, self.target_size)) if draft else None
        opened = load_image(cast("ImageSource", image.source), where, least)
        if image.target is None or not training:
            made = transformed(opened, sorted(set(sizes)), self.crop, image.transform)
            views = dict(zip(sorted(set(sizes)), made, strict=True))
            return ImageViews(views[self.image_size], views[self.target_size] if training else None)
        place = f"{where}, target" if where else "target"
        target = load_image(cast("ImageSource", image.target), place, least)
        pairs = zip((opened, target), sizes, strict=True)
        return ImageViews(*(transformed(one, [size], self.crop, image.transform)[0] for one, size in pairs))

    # ---- and back

    def decode_text(self, ids: Sequence[int]) -> str:
        """The text of `ids`, without special tokens and surrounding white space."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=True).strip()

    def to_document(self, ids: Sequence[int], images: Sequence[Any] = ()) -> Document:
        """The document of `ids` and their images.

        Raises:
            ValueError: the number of images is not that of begin-of-image tokens.
        """
        segments: list[Segment] = []
        run: list[int] = []
        remaining = list(images)
        count = sum(1 for i in ids if i == self.soi_token_id)
        if count != len(remaining):
            raise ValueError(f"the ids hold {count} begin-of-image tokens, but there are {len(remaining)} images")
        for token in [*ids, None]:
            if token is None or token == self.soi_token_id:
                if words := self.decode_text(run):
                    segments.append(Text(words))
                run = []
                if token is not None:
                    segments.append(Image(remaining.pop(0)))
            elif token != self.image_token_id:
                run.append(token)
        return Document(segments)


def _least_side(transform: Transform | None, size: int) -> int:
    """The least side in pixels that an image may be decoded at, so that the region of its transform keeps `size`."""
    x1, y1, x2, y2 = WHOLE if transform is None else transform.region
    return math.ceil(size / min(x2 - x1, y2 - y1))


def _stack(images: Sequence[np.ndarray], size: int, eight_bit: bool = False) -> torch.Tensor:
    """Stack uint8 images [size, size, 3] to float32 [I, 3, size, size] in [0, 1], or to uint8."""
    if not images:
        return torch.zeros(0, 3, size, size, dtype=torch.uint8 if eight_bit else torch.float32)
    channels_first = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
    if eight_bit:
        return channels_first.contiguous()
    return channels_first.to(torch.float32, memory_format=torch.contiguous_format).div_(255)


def _check_arguments(others: dict[str, Any], padding: bool | str, return_tensors: str | None) -> None:
    """Check for arguments that are not supported."""
    given = [name for name, value in others.items() if value is not None]
    if given:
        known = [
            n for n in inspect.signature(MMInterleavedProcessor.__call__).parameters if n not in ("self", "kwargs")
        ]
        raise ValueError(f"the processor takes no argument '{given[0]}'. {nearest_name(given[0], known)}")
    if padding not in (True, "longest"):
        raise ValueError(f"padding must be True or 'longest', not {padding!r}: shorter rows are always padded")
    if return_tensors not in (None, "pt"):
        raise ValueError(f"return_tensors must be 'pt', not {return_tensors!r}: the processor returns PyTorch tensors")


def _listed(documents: Any) -> list[Document]:
    """One document or several, as a list."""
    listed = [documents] if isinstance(documents, (Document, str)) else list(documents)
    if not listed:
        raise ValueError("there are no documents")
    for index, document in enumerate(listed):
        if not isinstance(document, Document):
            raise ValueError(f"documents[{index}] must be a Document, not {type(document).__name__}; pass strings "
                             "as text=...")  # fmt: skip
    return cast("list[Document]", listed)


def _name(index: int, document: Document) -> str:
    return document.name if document.place or document.id else f"document {index}"


def _check_segment(segment: Segment, index: int) -> None:
    if segment.is_open:
        raise InputError("an open slot has nothing to encode", f"segments[{index}]", "Fill it or remove it")
    for token in (SOI_TOKEN, IMAGE_TOKEN):
        if isinstance(segment, Text) and segment.control_tokens and token in (segment.text or ""):
            raise InputError(f"the text contains the reserved token '{token}'", f"segments[{index}]",
                             "Images are segments of their own")  # fmt: skip


def _with_image_parts(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """`messages` with all image parts in the form that templates expect, without content."""
    parts = {"image": {"type": "image"}, "image_url": {"type": "image"}}
    return [
        m if isinstance(m["content"], str) else m | {"content": [parts.get(p["type"], p) for p in m["content"]]}
        for m in messages
    ]


def _marked(text: str) -> str:
    """The text of a message for a template, marked except for the white space around it, which templates may strip."""
    words = text.strip()
    return text.replace(words, f"{_OPEN}{words}{_CLOSE}", 1) if words else text


def _mark_texts(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages with `_marked` texts."""

    def marked(part: dict[str, Any]) -> dict[str, Any]:
        return part | {"text": _marked(part["text"])} if part["type"] == "text" and part["text"] else part

    return [
        m | {"content": _marked(m["content"]) if isinstance(m["content"], str) else [marked(p) for p in m["content"]]}
        for m in messages
    ]


def _with_images(text: str, images: Iterator[Image], supervise: bool | Sequence[bool]) -> list[Segment]:
    """The segments of what a template wrote: one image token for each image, and marked texts of messages.

    Args:
        text: what it wrote.
        images: the images that are left.
        supervise: whether this is learned, or for each marked text and image whether it is; what the template wrote
            after one is as that one.

    Raises:
        InputError: there are more image tokens than images.
    """
    segments: list[Segment] = []
    learned = [supervise] if isinstance(supervise, bool) else list(supervise)
    current = learned[0]
    for number, stretch in enumerate(re.split(f"(?s){_OPEN}(.*?){_CLOSE}", text)):
        if number % 2:
            current = learned.pop(0) if len(learned) > 1 else learned[0]
            segments.append(Text(stretch, current, attached=True))
            continue
        for index, piece in enumerate(re.sub(f"[{_OPEN}{_CLOSE}]", "", stretch).split(IMAGE_TOKEN)):
            if index:
                image = next(images, None)
                if image is None:
                    raise InputError(
                        f"there are more {IMAGE_TOKEN} than images", fix=f"Write one {IMAGE_TOKEN} for each"
                    )
                current = learned.pop(0) if len(learned) > 1 else learned[0]
                segments.append(replace(image, supervise=current, role=None))
            if piece:
                segments.append(Text(piece, current, attached=True, control_tokens=True))
    return segments


def _from_strings(text: str | Sequence[str], images: Any) -> list[Document]:
    """The documents of strings with one image token for each image, and of the images."""
    texts = [text] if isinstance(text, str) else list(text)
    if images is None:
        images = [[] for _ in texts]
    elif isinstance(images, (str, Path, FileSlice, PIL.Image.Image)) or (is_array(images) and images.ndim < 4):
        images = [[images]]
    elif len(images) and not isinstance(images[0], (list, tuple)):
        images = [list(images)]
    if len(images) != len(texts):
        raise ValueError(f"{len(texts)} texts have {len(images)} lists of images; give one list for each text")
    documents = []
    for index, (string, given) in enumerate(zip(texts, images, strict=True)):
        if not isinstance(string, str):
            raise InputError(f"a text must be a string, not {type(string).__name__}", f"document {index}")
        slots = re.sub(f"(?s){_OPEN}.*?{_CLOSE}", "", string).count(IMAGE_TOKEN)
        if slots != len(given):
            raise InputError(
                f"{slots} image slots, but {len(given)} images", f"document {index}",
                f"Write one {IMAGE_TOKEN} for each image",
            )  # fmt: skip
        segments = []
        for number, source in enumerate(given):
            try:
                segments.append(Image(source))
            except InputError as error:
                raise error.at(f"document {index}, images[{number}]") from None
        documents.append(Document(_with_images(string, iter(segments), supervise=True)))
    return documents

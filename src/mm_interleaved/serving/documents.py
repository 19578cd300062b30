"""From requests to documents and settings of generation."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import PIL.Image

from ..document import Document, Image, Segment, Text
from ..generation.settings import GenerationSettings, ImageSettings, TextSettings, override
from ..inspection import InspectionSettings
from ..inspection.page import MOST_CELLS
from . import schema
from .config import ServeConfig
from .engine import Engine, GenerationRequest
from .errors import ApiError
from .images import PixelBudget, decode_data_url, read_image
from .remote import RemoteImages

MOST_TURNS = 64  # texts and images of an answer that ends by itself
Wanted = Literal["text", "image", "both"]


@dataclass
class Inputs:
    """Reads the images of one request.

    Args:
        remote: fetches images by their URL.
        budget: what the request may have.
        parts: texts and images so far.
    """

    remote: RemoteImages
    budget: PixelBudget
    parts: int = 0

    def count(self, param: str) -> None:
        """Count a part.

        Raises:
            ApiError: it is one too many.
        """
        self.parts += 1
        if self.parts > self.budget.limits.parts:
            raise ApiError(f"more than {self.budget.limits.parts} texts and images", param=param, code="too_many_parts")

    async def image(self, url: str, param: str) -> PIL.Image.Image:
        """The image of a `data:` URL, or of a URL of a listed host."""
        self.count(param)
        if url[:5].lower() == "data:":
            data = await asyncio.to_thread(decode_data_url, url, param)
        elif url[:4].lower() == "http":
            data = await self.remote.fetch(url, param, self.budget.share)
        else:
            raise ApiError("an image must be a data: URL, or an https URL of a listed host", param=param,
                           code="invalid_image_url")  # fmt: skip
        return await asyncio.to_thread(read_image, data, param, self.budget)

    def text(self, text: str, role: str, param: str) -> list[Segment]:
        """A text; empty ones are left out."""
        self.count(param)
        return [Text(text, role=role)] if text else []


def chat_role(role: str) -> str:
    """The role in documents."""
    return "system" if role == "developer" else role


async def message_segments(message: schema.Message, where: str, inputs: Inputs) -> list[Segment]:
    """The segments of a message of `/v1/responses`."""
    role = chat_role(message.role)
    if isinstance(message.content, str):
        return inputs.text(message.content, role, f"{where}.content")
    found: list[Segment] = []
    for number, part in enumerate(message.content):
        param = f"{where}.content[{number}]"
        if isinstance(part, schema.InputText):
            found += inputs.text(part.text, role, param)
        else:
            found.append(Image(await inputs.image(part.image_url, f"{param}.image_url"), role=role))
    return found


async def chat_segments(messages: Sequence[schema.ChatMessage], inputs: Inputs) -> list[Segment]:
    """The segments of a chat."""
    found: list[Segment] = []
    for index, message in enumerate(messages):
        where, role = f"messages[{index}]", chat_role(message.role)
        if message.images and not isinstance(message.content, str):
            raise ApiError("'images' goes with a text; write other content as parts", param=f"{where}.images",
                           code="invalid_value")  # fmt: skip
        if isinstance(message.content, str):
            found += await _with_images(message.content, message.images or [], role, where, inputs)
            continue
        for number, part in enumerate(message.content or []):
            param = f"{where}.content[{number}]"
            if isinstance(part, schema.ChatText):
                found += inputs.text(part.text, role, param)
            else:
                url = part.image_url.url
                found.append(Image(await inputs.image(url, f"{param}.image_url.url"), role=role))
    return found


async def _with_images(
    text: str, images: Sequence[schema.ReturnedImage], role: str, where: str, inputs: Inputs
) -> list[Segment]:
    """A text with images at their positions (in characters); those without one follow it."""
    found: list[Segment] = []
    at = 0
    ordered = sorted(enumerate(images), key=lambda pair: len(text) if pair[1].position is None else pair[1].position)
    for number, image in ordered:
        place = len(text) if image.position is None else min(max(image.position, at), len(text))
        found += inputs.text(text[at:place], role, where) if place > at else []
        found.append(Image(await inputs.image(image.image_url.url, f"{where}.images[{number}]"), role=role))
        at = place
    return found + (inputs.text(text[at:], role, where) if at < len(text) else [])


def build_document(segments: Sequence[Segment], wanted: Wanted, config: ServeConfig) -> Document:
    """A document that asks for a text, an image, or whatever follows.

    Raises:
        ApiError: there is no text and no image.
    """
    if not segments:
        raise ApiError("the input is empty", param="input", code="invalid_value")
    role = "assistant" if config.template == "chat" else None
    given = list(segments) if role else [replace(segment, role=None) for segment in segments]
    slots: list[Segment] = {"text": [Text(role=role)], "image": [Image(role=role)], "both": []}[wanted]
    return Document([*given, *slots])


@dataclass(frozen=True)
class Asked:
    """What a request asks for, by the names that its protocol has.

    Attributes:
        sampling: our own fields.
        temperature, top_p: of texts.
        output_tokens: most tokens of all texts together.
        output_images: most images; None: the limit of the server.
        previews: previews of an image.
    """

    sampling: schema.Sampling
    temperature: float | None = None
    top_p: float | None = None
    output_tokens: int | None = None
    output_images: int | None = None
    previews: int = 0


def generation_settings(asked: Asked, config: ServeConfig, engine: Engine) -> GenerationSettings:
    """The settings of a request. A request may ask for less than the server's limits, not for more.

    Raises:
        ApiError: a value is above the server's limit, or not possible with others.
    """
    own, limits = asked.sampling, config.limits
    for name, value, most in (
        ("num_inference_steps", own.num_inference_steps, min(limits.steps, engine.limits.steps)),
        ("num_candidates", own.num_candidates, limits.candidates),
        ("num_beams", own.num_beams, limits.beams),
        ("max_output_tokens", asked.output_tokens, limits.output_tokens),
        ("max_tool_calls", asked.output_images, limits.output_images),
    ):
        if value is not None and value > most:
            raise ApiError(f"'{name}' is {value}; this server allows {most}", param=name, code="above_limit")
    seed = own.seed if own.seed is not None else secrets.randbits(48)
    warm = asked.temperature is None or asked.temperature > 0
    beams = own.num_beams or 1
    if beams > 1 and asked.temperature:
        raise ApiError("'num_beams' above 1 searches for the likeliest text; leave 'temperature' out or 0",
                       param="num_beams", code="invalid_value")  # fmt: skip
    sample = warm and beams == 1
    steps = own.num_inference_steps or config.num_inference_steps or ImageSettings().num_inference_steps
    every = -(-steps // (asked.previews + 1)) if asked.previews else 0
    tokens = asked.output_tokens or limits.output_tokens
    text = TextSettings(
        max_new_tokens=tokens, min_new_tokens=min(own.min_output_tokens or 0, tokens), num_beams=beams,
        do_sample=sample, temperature=max(asked.temperature or 1.0, 1e-3) if sample else 1.0,
        top_k=own.top_k if own.top_k is not None else 50, top_p=asked.top_p if asked.top_p is not None else 1.0,
        repetition_penalty=own.repetition_penalty or 1.0,
    )  # fmt: skip
    image = override(
        GenerationSettings(), image={"num_inference_steps": steps, "seed": seed, "preview_every": every,
                                     "num_candidates": own.num_candidates or 1},
    ).image  # fmt: skip
    image = replace(image, guidance_scale=own.guidance_scale, scheduler=own.scheduler or image.scheduler)
    images = limits.output_images if asked.output_images is None else asked.output_images
    return GenerationSettings(
        text, image, seed=seed, max_turns=MOST_TURNS, stop_at_eos=True, max_tokens=tokens, max_images=max(images, 1),
        vary_noise=True,
    )  # fmt: skip


def generation_request(
    document: Document, settings: GenerationSettings, adapter: str | None, config: ServeConfig, inspect: bool = False
) -> GenerationRequest:
    """A request to the engine."""
    slots = sum(segment.is_open for segment in document.segments)
    settings = replace(settings, max_turns=slots) if slots else settings
    collected = InspectionSettings(cells=MOST_CELLS, most_mib=config.limits.inspection_mib) if inspect else None
    return GenerationRequest(document, settings, adapter, config.limits.request_seconds, collected)


def find_model(name: str | None, engine: Engine) -> str | None:
    """The adapter of that name; None: the model itself.

    Raises:
        ApiError: there is neither.
    """
    if name is None or name == engine.model:
        return None
    if name in engine.adapters:
        return name
    raise ApiError(f"The model '{name[:200]}' does not exist; there are {', '.join([engine.model, *engine.adapters])}",
                   status=404, param="model", code="model_not_found")  # fmt: skip


def check_size(size: str | None, engine: Engine, param: str) -> None:
    """Images have one size.

    Raises:
        ApiError: another one is asked for.
    """
    side = engine.limits.image_size
    if size not in (None, "auto", f"{side}x{side}"):
        raise ApiError(f"images of this model have {side}x{side} pixels; leave 'size' out", param=param,
                       code="invalid_value")  # fmt: skip

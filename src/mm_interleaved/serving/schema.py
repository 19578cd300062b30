"""The requests, as OpenAI's reference describes them, with our own fields at their end.

A field that is not here is refused. Fields whose only accepted value is the one that changes nothing are here, because
clients send them.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Id = Annotated[str, Field(min_length=1, max_length=200, pattern=r"^[A-Za-z0-9_.:-]+$")]
Text = Annotated[str, Field(max_length=2_000_000)]
ImageFormat = Literal["png", "jpeg", "webp"]
FIRST = Field(fail_fast=True)  # a list's first wrong element is reported; errors about all of them would take seconds


class Strict(BaseModel):
    """A model without unknown fields."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


# ---- our own fields


class ImageSampling(Strict):
    """Fields of this server for images, documented in docs/guides/serving.md.

    Attributes:
        seed: of texts and images; requests without one get one at random.
        num_inference_steps, guidance_scale, scheduler: of images.
    """

    seed: Annotated[int, Field(ge=0, lt=2**53)] | None = None
    num_inference_steps: Annotated[int, Field(ge=1)] | None = None
    guidance_scale: Annotated[float, Field(ge=0, le=100)] | None = None
    scheduler: Literal[
        "DDPMScheduler", "DDIMScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"
    ] | None = None  # fmt: skip


class Sampling(ImageSampling):
    """Fields of this server for images and texts, documented in docs/guides/serving.md.

    Attributes:
        num_candidates: of images.
        num_beams, top_k, repetition_penalty, min_output_tokens: of texts.
    """

    num_candidates: Annotated[int, Field(ge=1)] | None = None
    num_beams: Annotated[int, Field(ge=1)] | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    min_output_tokens: Annotated[int, Field(ge=0)] | None = None


Temperature = Annotated[float, Field(ge=0, le=2)]
TopP = Annotated[float, Field(gt=0, le=1)]
Metadata = dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]]

# ---- /v1/responses: input


class InputText(Strict):
    """A text of a message."""

    type: Literal["input_text", "output_text", "text"]
    text: Text
    annotations: list[Any] = []
    logprobs: list[Any] | None = None


class InputImage(Strict):
    """An image of a message: a `data:` URL, or a URL of a listed host."""

    type: Literal["input_image"]
    image_url: str
    detail: Literal["auto", "low", "high", "original"] | None = None


class Message(Strict):
    """A message."""

    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: Text | Annotated[list[Annotated[InputText | InputImage, Field(discriminator="type")]], FIRST]
    id: Id | None = None
    status: Literal["in_progress", "completed", "incomplete"] | None = None
    phase: Literal["commentary", "final_answer"] | None = None


class ImageCall(Strict):
    """An image that the server generated: its id, or the image itself."""

    type: Literal["image_generation_call"]
    id: Id | None = None
    result: str | None = None
    status: Literal["in_progress", "completed", "generating", "failed"] | None = None
    action: Literal["generate", "auto"] | None = None
    background: Literal["opaque", "auto"] | None = None
    output_format: ImageFormat | None = None
    quality: Literal["auto", "high"] | None = None
    revised_prompt: None = None
    size: str | None = None

    @model_validator(mode="after")
    def _something(self) -> ImageCall:
        if self.id is None and self.result is None:
            raise ValueError("needs 'id' or 'result'")
        return self


class ItemReference(Strict):
    """An item of a stored response."""

    type: Literal["item_reference"] | None = None
    id: Id


Item = Message | ImageCall | ItemReference


class ImageTool(Strict):
    """The tool that generates images."""

    type: Literal["image_generation"]
    action: Literal["generate", "auto"] | None = None
    background: Literal["opaque", "auto"] | None = None
    size: str | None = None
    quality: Literal["auto", "high"] | None = None
    output_format: ImageFormat | None = None
    output_compression: Annotated[int, Field(ge=0, le=100)] | None = None
    partial_images: Annotated[int, Field(ge=0, le=3)] | None = None


class ImageChoice(Strict):
    """Forces an image."""

    type: Literal["image_generation"]


class TextFormat(Strict):
    """Plain text."""

    type: Literal["text"]


class TextConfig(Strict):
    """The form of texts."""

    format: TextFormat | None = None


class StreamOptions(Strict):
    """Options of a stream."""

    include_obfuscation: Literal[False] | None = None
    include_usage: bool | None = None


class ResponseRequest(Sampling):
    """The body of `POST /v1/responses`; `inspect` is a field of this server, see docs/guides/inspection.md."""

    model: str | None = None
    input: Text | Annotated[list[Item], FIRST] | None = None
    instructions: Text | None = None
    previous_response_id: Id | None = None
    store: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    background: bool | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    max_tool_calls: Annotated[int, Field(ge=0)] | None = None
    temperature: Temperature | None = None
    top_p: TopP | None = None
    tools: Annotated[list[ImageTool], FIRST] | None = None
    tool_choice: Literal["none", "auto", "required"] | ImageChoice | None = None
    parallel_tool_calls: bool | None = None
    truncation: Literal["disabled"] | None = None
    text: TextConfig | None = None
    metadata: Metadata | None = None
    include: Annotated[list[Literal["message.input_image.image_url"]], FIRST] | None = None
    service_tier: Literal["auto", "default"] | None = None
    user: Annotated[str, Field(max_length=512)] | None = None
    safety_identifier: Annotated[str, Field(max_length=512)] | None = None
    prompt_cache_key: Annotated[str, Field(max_length=512)] | None = None
    inspect: bool | None = None


# ---- /v1/chat/completions


class ChatText(Strict):
    """A text part."""

    type: Literal["text"]
    text: Text


class ImageUrl(Strict):
    """The address of an image."""

    url: str
    detail: Literal["auto", "low", "high"] | None = None


class ChatImage(Strict):
    """An image part."""

    type: Literal["image_url"]
    image_url: ImageUrl


class ReturnedImage(Strict):
    """An image as answers have it in `message.images`."""

    type: Literal["image_url"]
    image_url: ImageUrl
    index: int | None = None
    position: int | None = None


class ChatMessage(Strict):
    """A message of a chat; `images` are those of an earlier answer, at their positions in its text."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[Annotated[ChatText | ChatImage, Field(discriminator="type")]], FIRST] | None = None
    name: Annotated[str, Field(max_length=64)] | None = None
    images: Annotated[list[ReturnedImage], FIRST] | None = None
    refusal: None = None


class ChatRequest(Sampling):
    """The body of `POST /v1/chat/completions`."""

    model: str | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1, fail_fast=True)]
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    max_images: Annotated[int, Field(ge=0)] | None = None
    modalities: Annotated[list[Literal["text", "image"]], FIRST] | None = None
    temperature: Temperature | None = None
    top_p: TopP | None = None
    n: Literal[1] | None = None
    store: Literal[False] | None = None
    metadata: Metadata | None = None
    service_tier: Literal["auto", "default"] | None = None
    user: Annotated[str, Field(max_length=512)] | None = None
    safety_identifier: Annotated[str, Field(max_length=512)] | None = None


# ---- /v1/images/generations, /v1/completions


class ImagesRequest(ImageSampling):
    """The body of `POST /v1/images/generations`."""

    prompt: Annotated[str, Field(min_length=1, max_length=32_000)]
    model: str | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    response_format: Literal["b64_json"] | None = None
    size: str | None = None
    quality: Literal["auto", "high"] | None = None
    background: Literal["opaque", "auto"] | None = None
    output_format: ImageFormat | None = None
    output_compression: Annotated[int, Field(ge=0, le=100)] | None = None
    user: Annotated[str, Field(max_length=512)] | None = None


class CompletionRequest(Sampling):
    """The body of `POST /v1/completions`; with `echo`, `max_tokens: 0` and `logprobs` it scores `prompt`."""

    model: str | None = None
    prompt: Text | Annotated[list[Text], Field(min_length=1, fail_fast=True)]
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    temperature: Temperature | None = None
    top_p: TopP | None = None
    n: Literal[1] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    suffix: None = None
    user: Annotated[str, Field(max_length=512)] | None = None

"""The settings of `mmi serve`."""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Literal

from pydantic import Field

from ..validation import Count, Positive, PositiveFloat, settings

MIB = 2**20


@settings
class LimitConfig:
    """What a request may ask for; requests can ask for less.

    Attributes:
        body_mib: size of a body.
        bodies_mib: size of the bodies of all requests that are being answered.
        receipt_seconds: time in which a request must have arrived, headers and body.
        write_seconds: time in which a client must read 64 KiB of an answer that waits for it.
        request_seconds: time in which a request must be finished, waiting included.
        json_depth: depth of JSON.
        json_values: lists, objects and values of JSON.
        parts: texts and images of a request.
        images: images of a request.
        pixels: pixels of all images of a request together.
        all_pixels: pixels of the images of all requests that are being answered.
        aspect: ratio of the longer to the shorter side of an image.
        output_tokens: `max_output_tokens`, and its value if a request has none.
        output_images: images of an answer.
        steps: denoising steps.
        candidates: candidates of an image, or images of `/v1/images/generations`.
        beams: beams of a text.
        inspection_mib: size of what is collected for an inspected response.
    """

    body_mib: Positive = 64
    bodies_mib: Positive = 512
    receipt_seconds: PositiveFloat = 30.0
    write_seconds: PositiveFloat = 30.0
    request_seconds: PositiveFloat = 600.0
    json_depth: Positive = 32
    json_values: Positive = 40_000
    parts: Positive = 256
    images: Positive = 16
    pixels: Positive = 64_000_000
    all_pixels: Positive = 256_000_000
    aspect: PositiveFloat = 50.0
    output_tokens: Positive = 512
    output_images: Positive = 8
    steps: Positive = 100
    candidates: Positive = 4
    beams: Positive = 5
    inspection_mib: Positive = 128

    def __post_init__(self) -> None:
        if self.bodies_mib < self.body_mib:
            raise ValueError(f"'bodies_mib' ({self.bodies_mib}) must be at least 'body_mib' ({self.body_mib})")
        if self.all_pixels < self.pixels:
            raise ValueError(f"'all_pixels' ({self.all_pixels}) must be at least 'pixels' ({self.pixels})")


@settings
class StoreConfig:
    """Stored responses, in memory.

    Attributes:
        responses: most of them; the oldest are forgotten.
        mib: memory of their images.
    """

    responses: Positive = 1000
    mib: Positive = 1024


@settings
class ServeConfig:
    """The settings of a server.

    Attributes:
        host, port: where it listens.
        keys: accepted API keys; empty: no key is needed.
        server_names: host names of this server, such as `mmi.example.com`, that requests without a key may be sent to;
            addresses, `localhost` and names without a dot are always accepted.
        allow_origins: origins of other web pages that may use the API; empty: none.
        allow_hosts: names of hosts (`name` or `name:port`) from which images may be fetched; empty: none.
        page: whether the web page is served at `/`.
        template: `document`: messages are joined to one document; `chat`: the model's chat template.
        rows: most requests that run at a time.
        memory_gib: memory for their tokens and images; fewer rows if they do not fit. None: no limit.
        waiting: most requests that wait; more are refused with status 429.
        tokens: most tokens of a document with its answer; None: the model's context.
        images_together: most images that are denoised in one call.
        num_inference_steps: denoising steps if a request has none; None: the model's default.
        keep_alive_seconds: time between comments in a stream without events.
        preview_kib: size of a preview.
        grace_seconds: time for running requests when the server ends.
        limits: what a request may ask for.
        store: stored responses.
    """

    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, lt=65536)] = 8000
    keys: list[str] = field(default_factory=list)
    server_names: list[str] = field(default_factory=list)
    allow_origins: list[str] = field(default_factory=list)
    allow_hosts: list[str] = field(default_factory=list)
    page: bool = True
    template: Literal["document", "chat"] = "document"
    rows: Positive = 8
    memory_gib: PositiveFloat | None = None
    waiting: Count = 64
    tokens: Positive | None = None
    images_together: Positive = 8
    num_inference_steps: Positive | None = None
    keep_alive_seconds: PositiveFloat = 10.0
    preview_kib: Positive = 64
    grace_seconds: PositiveFloat = 30.0
    limits: LimitConfig = field(default_factory=LimitConfig)
    store: StoreConfig = field(default_factory=StoreConfig)

    def __post_init__(self) -> None:
        if any(not key or key != key.strip() for key in self.keys):
            raise ValueError("'keys' must not be empty or begin or end with white space")

"""Settings of generation, with the original's settings as named presets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Annotated, Any

from pydantic import AfterValidator, Field

from ..io import nearest_name
from ..model.image_settings import CacheImplementation, ImageSettings
from ..validation import Count, Positive, Seed, settings


def _warm(temperature: float) -> float:
    if temperature < 1e-6:
        raise ValueError(f"temperature must be at least 1e-6, not {temperature}. "
                         "Set do_sample=False for the likeliest tokens")  # fmt: skip
    return temperature


Temperature = Annotated[float, AfterValidator(_warm)]


@settings
class TextSettings:
    """Settings of text generation.

    Attributes:
        max_new_tokens: most new tokens, the end token included.
        min_new_tokens: least new tokens before an end token.
        num_beams: width of the beam search; 1: greedy search, or sampling.
        do_sample: sample tokens instead of choosing the likeliest; needs num_beams 1.
        temperature, top_k, top_p: as in transformers, in this order; top_k 0: off. Only with do_sample.
        repetition_penalty: as in transformers; it counts new tokens, not the prompt.
        length_penalty: a finished beam scores log p / length^length_penalty; the length counts `<s>`, but not the end
            token.
        num_return_sequences: number of beams, or samples, returned for each prompt.
        cache_implementation: "static" uses tensors of fixed size, so that a CUDA device replays one captured step for
            every token; "dynamic" grows the KV cache. "auto": static on a CUDA device if the model can be captured,
            else dynamic. The texts are the same.
    """

    max_new_tokens: Positive = 30
    min_new_tokens: Count = 7
    num_beams: Positive = 5
    do_sample: bool = False
    temperature: Temperature = 1.0
    top_k: Count = 50
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.9
    repetition_penalty: Annotated[float, Field(ge=1e-6, le=1e6)] = 1.0
    length_penalty: Annotated[float, Field(ge=-10, le=10)] = 1.0
    num_return_sequences: Positive = 1
    cache_implementation: CacheImplementation = "auto"

    def __post_init__(self) -> None:
        if self.do_sample and self.num_beams > 1:
            raise ValueError("do_sample needs num_beams=1; beams are not sampled")
        if not self.do_sample and self.num_return_sequences > self.num_beams:
            raise ValueError(f"num_return_sequences={self.num_return_sequences} needs as many beams, or do_sample")


@settings
class GenerationSettings:
    """All settings of interleaved generation; they are saved with the results.

    Attributes:
        text, image: settings of texts and images.
        seed: seed of sampled text; images have `image.seed`.
        max_turns: most texts and images to generate; None: the document's value, else its number of open slots, else 2.
            Records of the original follow its rule (docs/model.md, "Interleaved generation"): their own `num_iter`
            overrides this value, unless stop_at_eos is True; then the limit is this value, else 2. For more turns than
            a record's, change its `num_iter` or set stop_at_eos; for fewer, set max_segments.
        stop_at_eos: whether `</s>` ends a document (the original's `auto_end`); None: the document's value, else yes.
        max_segments, max_tokens, max_images: further limits of what is generated; None: no limit.
        force_image: let an image follow every text (`force_gen_image_next`).
        replace_texts: continue from the document's `forced_texts` instead of generated texts
            (`force_replace_gen_text`).
        vary_noise: use other noise for each image of a document (seed + turn); the original repeats the same noise.
    """

    text: TextSettings = field(default_factory=TextSettings)
    image: ImageSettings = field(default_factory=ImageSettings)
    seed: Seed = 0
    max_turns: Positive | None = None
    stop_at_eos: bool | None = None
    max_segments: Positive | None = None
    max_tokens: Positive | None = None
    max_images: Positive | None = None
    force_image: bool = False
    replace_texts: bool = False
    vary_noise: bool = False


# docs/model.md, "Text generation". The original's min_length counts `<s>`, min_new_tokens does not: its 8 is 7 here.
TEXT_PRESETS = {
    "default": TextSettings(),
    "caption": TextSettings(max_new_tokens=20),
    "vqa": TextSettings(max_new_tokens=10, min_new_tokens=0, num_beams=3, length_penalty=0.0),
    "paragraph": TextSettings(max_new_tokens=90, min_new_tokens=89, repetition_penalty=1.2),
    "interleaved": TextSettings(max_new_tokens=90, num_beams=1, do_sample=True, repetition_penalty=1.3),
}


@dataclass(frozen=True)
class ImagePreset:
    """Named image settings.

    Attributes:
        settings: the settings.
        lossless: whether the images are those of the release's sampler; otherwise they differ, for fewer steps.
    """

    settings: ImageSettings
    lossless: bool


IMAGE_PRESETS = {
    "ddpm-30": ImagePreset(ImageSettings(), lossless=True),
    "dpm-solver-20": ImagePreset(
        ImageSettings(num_inference_steps=20, scheduler="DPMSolverMultistepScheduler"), lossless=False
    ),
    "unipc-20": ImagePreset(ImageSettings(num_inference_steps=20, scheduler="UniPCMultistepScheduler"), lossless=False),
}  # DPM-Solver++: arXiv 2211.01095; UniPC: arXiv 2302.04867


def override(settings: GenerationSettings, **changes: Any) -> GenerationSettings:
    """`settings` with the changes whose value is not None; names of `text` and `image` settings are allowed too.

    A name that several parts have (`seed`, `cache_implementation`) is set in all of them. `text` and `image` may be
    mappings of changes to one of them alone.

    Raises:
        ValueError: there is no such setting, or its value is not allowed.
    """
    alone = {part: changes.pop(part, None) or {} for part in ("text", "image")}
    for part, given in alone.items():
        if not isinstance(given, Mapping):
            raise ValueError(f"{part} must be a mapping of settings, not {given!r}")
    owners = {"": settings, "text": settings.text, "image": settings.image}
    names = {part: {f.name for f in fields(owner)} - {"text", "image"} for part, owner in owners.items()}
    known = sorted(set().union(*names.values()))
    for name in changes:
        if name not in known:
            raise ValueError(f"unknown setting '{name}'. {nearest_name(name, known)}")
    chosen = {
        part: {name: value for name, value in changes.items() if name in own and value is not None}
        for part, own in names.items()
    }
    text = replace(settings.text, **{**chosen["text"], **alone["text"]})
    image = replace(settings.image, **{**chosen["image"], **alone["image"]})
    return replace(settings, text=text, image=image, **chosen[""])

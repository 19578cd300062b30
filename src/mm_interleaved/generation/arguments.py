"""Translation of the arguments of transformers' `generate` into settings; unsupported ones are errors."""

from __future__ import annotations

from typing import Any

from transformers import GenerationConfig

from ..model import MMInterleavedConfig
from .settings import GenerationSettings, override

# Arguments of transformers that are not supported, and what to do instead.
_REFUSED = {
    "max_length": "it counts the prompt; set max_new_tokens",
    "min_length": "it counts the prompt; set min_new_tokens",
    "logits_processor": "the settings of text are all that changes scores",
    "stopping_criteria": "a text ends at </s>, at a begin-of-image token or at max_new_tokens",
    "streamer": "use generate_interleaved, which gives an event for every token",
    "prefix_allowed_tokens_fn": "use score to choose among given answers",
    "assistant_model": "there is no assisted generation",
    "inputs_embeds": "give input_ids and pixel_values",
    "return_dict_in_generate": "use generate_text, which gives scores and end tokens",
    "output_scores": "use generate_text, which gives the scores of beams",
    "output_logits": "call the model itself for logits",
    "output_attentions": "call the model itself",
    "output_hidden_states": "call the model itself",
}
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_WITHOUT_MEANING = ("transformers_version",)


def settings_from_arguments(
    settings: GenerationSettings,
    model_config: MMInterleavedConfig,
    generation_config: GenerationConfig | None = None,
    **arguments: Any,
) -> GenerationSettings:
    """`settings` changed by a `GenerationConfig` and then by single arguments; None changes nothing.

    Args:
        settings: settings to start from.
        model_config: configuration of the model, whose token ids cannot be changed.
        generation_config: of transformers; its values of None change nothing.
        **arguments: settings by their names, and the arguments of `generate` in transformers.

    Raises:
        ValueError: there is no such argument, it is not supported, or its value is not allowed.
    """
    if generation_config is not None:
        if not isinstance(generation_config, GenerationConfig):
            raise ValueError("generation_config must be a GenerationConfig of transformers, not "
                             f"{type(generation_config).__name__}; ours are given as settings=...")  # fmt: skip
        given = generation_config.to_diff_dict()
        settings = _applied(settings, model_config, {k: v for k, v in given.items() if k not in _WITHOUT_MEANING})
    return _applied(settings, model_config, arguments)


def _applied(settings: GenerationSettings, config: MMInterleavedConfig, given: dict[str, Any]) -> GenerationSettings:
    changes = {}
    for name, value in given.items():
        if name in _REFUSED and (value is None or value is False):
            continue
        if name in _REFUSED:
            raise ValueError(f"{name} is not supported: {_REFUSED[name]}")
        if name == "use_cache":
            if value is False:
                raise ValueError("use_cache=False is not supported: generation always keeps a KV cache")
        elif name in _TOKEN_IDS:
            own = getattr(config, name)
            if value not in (None, own, [own]):
                raise ValueError(f"{name}={value} is not supported: the model's is {own}")
        else:
            changes[name] = value
    return override(settings, **changes)

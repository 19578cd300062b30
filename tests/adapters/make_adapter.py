"""Makes an adapter with weights that are not zero, and notes what the model does with it in this process.

make_adapter.py BASE FOLDER [KEY=VALUE ...]
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import DynamicCache

from mm_interleaved import (
    Document,
    GenerationSettings,
    Image,
    ImageSettings,
    MMInterleaved,
    MMInterleavedProcessor,
    SegmentFinished,
    Text,
    TextSettings,
)
from mm_interleaved.adapters.folder import AdapterInfo, package_versions, processor_info
from mm_interleaved.adapters.loading import base_digest, save_adapter, start_adapter
from mm_interleaved.adapters.settings import AdapterSettings
from mm_interleaved.generation import ContinuousGenerator
from mm_interleaved.pretrained import load

RESULTS = "results.safetensors"


def make(base: Path, folder: Path, seed: int = 0, **settings: Any) -> MMInterleaved:
    """Write an adapter of `base` whose updates change the results clearly. Returns the model with it."""
    loaded = load(base)
    start_adapter(loaded.model, AdapterSettings(**{"preset": "all", "rank": 3, **settings}))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in loaded.model.named_parameters():
            if ".lora_B." in name:
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
            elif "magnitude" in name:
                parameter.mul_(1 + 0.1 * torch.randn(parameter.shape, generator=generator))
    info = AdapterInfo(base=base_digest(loaded.model), base_path=str(base), processor=processor_info(loaded.processor),
                       tasks=["vqav2"], preset="all", seed=seed, versions=package_versions())  # fmt: skip
    folder.mkdir(parents=True)
    save_adapter(loaded.model, folder, info)
    return loaded.model.eval()


def noise_image(seed: int) -> PIL.Image.Image:
    return PIL.Image.fromarray(np.random.default_rng(seed).integers(0, 256, (40, 60, 3), dtype=np.uint8))


@torch.no_grad()
def results(model: MMInterleaved, processor: MMInterleavedProcessor) -> dict[str, Tensor]:
    """What every path of generation gives: tokens (int64) and numbers (float32)."""
    image = noise_image(1)
    documents = [Document([Text("a red house"), Image(image), Text("and")]), Document([Text("hello there")])]
    batch = processor(documents, padding_side="left")
    text = {"max_new_tokens": 5, "min_new_tokens": 5}
    found = {
        "forward": model(**batch).logits,
        "greedy": model.generate(batch, num_beams=1, **text),
        "with a cache of transformers": model.generate(batch, num_beams=1, past_key_values=DynamicCache(), **text),
        "beams": model.generate(batch, num_beams=3, **text),
        "sampled": model.generate(batch, num_beams=1, do_sample=True, temperature=0.7, **text),
        "scores": torch.tensor(model.score(batch, [[[9, 8, 7], [6]], [[5, 4], [3, 2]]])),
    }
    story = processor([Document([Text("a dog"), Image(image), Text("a cat"), Image(noise_image(2))])])
    for name, scale in (("guided", 3.0), ("unguided", 1.0)):
        found[name] = model.generate_images(story, ImageSettings(num_inference_steps=2, guidance_scale=scale))
    settings = GenerationSettings(
        TextSettings(max_new_tokens=4, min_new_tokens=4, num_beams=1),
        ImageSettings(num_inference_steps=2, guidance_scale=2.0), max_turns=3, force_image=True,
    )  # fmt: skip
    for number, document in enumerate(model.generate(documents, "interleaved", processor, settings)):
        ids, made = [], []
        for segment in document.segments:
            if segment.generated is not None and isinstance(segment, Text):
                ids += segment.generated.ids
            elif segment.generated is not None:
                made.append(torch.frombuffer(bytearray(segment.source.tobytes()), dtype=torch.uint8))
        found[f"written_{number}"] = torch.tensor(ids)
        found[f"images_{number}"] = torch.stack(made).float() / 255
    found["joined"] = torch.tensor(_joined(model, processor, documents, replace(settings, max_turns=1)))
    return {name: value.contiguous() for name, value in found.items()}


def _joined(
    model: MMInterleaved, processor: MMInterleavedProcessor, documents: list[Document], settings: GenerationSettings
) -> list[int]:
    """Tokens of documents that join between steps."""
    generator, ids = ContinuousGenerator(model, processor, 2), []
    waiting = list(enumerate(documents))
    while waiting or generator.running:
        if waiting:
            key, document = waiting.pop(0)
            generator.join(key, generator.prepare(document), settings)
        for _, event in generator.step():
            if isinstance(event, SegmentFinished) and isinstance(event.segment, Text):
                ids += event.segment.generated.ids
    return ids


if __name__ == "__main__":
    torch.set_num_threads(1)
    base, target, *pairs = sys.argv[1:]
    changes = {key: json.loads(value) for key, value in (pair.split("=") for pair in pairs)}
    model = make(Path(base), Path(target), **changes)
    save_file(results(model, load(base).processor), Path(target) / RESULTS)

"""Batches that need a part of the model only, for processes that hold all of it together."""

from __future__ import annotations

from typing import Any

import PIL.Image
import pytest
import torch

from mm_interleaved.document import Document, Image, Text
from mm_interleaved.pretrained import load
from mm_interleaved.training.distillation import ConditionDistillation
from mm_interleaved.training.sharding import ForceAllBranches, take_part

IMAGE = Image(PIL.Image.new("RGB", (40, 40), "red"))
BATCHES = {
    "text": ([Text("Nothing to see.")], {}),
    "no text learned": ([Text("One."), IMAGE, IMAGE], {"loss_text_weight": 0.0}),
    "no image learned": ([IMAGE, Text("Before."), IMAGE], {"loss_image_weight": 0.0}),
}


@pytest.mark.parametrize("distilled", [False, True])
@pytest.mark.parametrize("kind", BATCHES)
def test_every_weight_has_a_gradient_and_no_loss_changes(kind: str, distilled: bool) -> None:
    whole = load("debug")
    model, processor = whole.model.train(), whole.processor
    distillation = ConditionDistillation(model, 2.0) if distilled else None
    with torch.no_grad():
        model.context_proj.bias.add_(0.1)
    segments, weights = BATCHES[kind]
    batch = {**processor(Document(segments), training=True), **weights}
    count = len(batch["pixel_values"])
    batch["noise_samples"] = model.image_decoder.sample_noise(count, torch.Generator().manual_seed(0))
    batch["layout"] = model.plan(batch["input_ids"], batch["attention_mask"], None, batch["labels"])

    def run(inputs: dict[str, Any], idle: bool = False) -> Any:
        outputs = model(**inputs, return_conditions=True)
        return outputs if distillation is None else distillation.add_to(outputs, inputs, idle)

    alone = run(batch)
    alone.loss.backward()
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    wanted = {name: p.grad for name, p in trainable.items()}
    assert None in wanted.values()

    model.zero_grad()
    inputs, idle = ForceAllBranches(conditions=distilled).complete(model, batch)
    take_part(model)
    completed = run(inputs, "loss_distillation" in idle)
    completed.loss.backward()
    torch.testing.assert_close(completed.loss, alone.loss)
    for name in ("loss_txt", "loss_img", "loss_distillation"):
        if alone.get(name) is None:
            assert name in idle or name not in completed, name
        else:
            assert name not in idle
            torch.testing.assert_close(completed[name], alone[name])
    for name, parameter in trainable.items():
        expected = torch.zeros_like(parameter) if wanted[name] is None else wanted[name]
        torch.testing.assert_close(parameter.grad, expected, msg=name)

"""Batches that need a part of the model only, for processes that hold all of it together."""

from __future__ import annotations

import PIL.Image
import pytest
import torch

from mm_interleaved.document import Document, Image, Text
from mm_interleaved.pretrained import load
from mm_interleaved.training.sharding import take_part

PICTURE = Image(PIL.Image.new("RGB", (40, 40), "red"))
BATCHES = {
    "text": ([Text("Nothing to see.")], {}),
    "no text learned": ([Text("One."), PICTURE, PICTURE], {"loss_text_weight": 0.0}),
    "nothing drawn": ([PICTURE, Text("Before."), PICTURE], {"loss_image_weight": 0.0}),
}


@pytest.mark.parametrize("kind", BATCHES)
def test_every_weight_has_a_gradient_and_no_loss_changes(kind: str) -> None:
    whole = load("debug")
    model, processor = whole.model.train(), whole.processor
    segments, weights = BATCHES[kind]
    batch = {**processor(Document(segments), training=True), **weights}
    draws = model.image_decoder.draw(len(batch["pixel_values"]), torch.Generator().manual_seed(0))
    alone = model(**batch, draws=draws)
    alone.loss.backward()
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    wanted = {name: p.grad for name, p in trainable.items()}
    assert None in wanted.values()

    model.zero_grad()
    model.keep_together()
    take_part(model)
    together = model(**batch, draws=draws)
    together.loss.backward()
    torch.testing.assert_close(together.loss, alone.loss)
    assert (together.loss_txt is None, together.loss_img is None) == (alone.loss_txt is None, alone.loss_img is None)
    for name, parameter in trainable.items():
        expected = torch.zeros_like(parameter) if wanted[name] is None else wanted[name]
        torch.testing.assert_close(parameter.grad, expected, msg=name)

"""Parts that take turns on a device: every use of a part brings it there, and nothing else changes."""

from __future__ import annotations

import copy

import pytest
import torch

from mm_interleaved import ImageSettings, MMInterleaved, MMInterleavedProcessor, TextSettings
from mm_interleaved.checkpoints.quantization import Quantization, quantize
from mm_interleaved.model.offloading import PARTS, offload
from mm_interleaved.pretrained import load

from ..generation.test_text import prompts


def spoil(model: MMInterleaved) -> None:
    """Replace the weights that are not on the device: whoever uses one without bringing its part computes NaN."""
    for name in PARTS:
        for module in model.get_submodule(name).modules():
            for key, tensor in module._parameters.items():
                if tensor is not None:
                    spoiled = torch.full(tensor.shape, torch.nan, dtype=tensor.dtype)
                    module._parameters[key] = torch.nn.Parameter(spoiled, requires_grad=False)


@pytest.mark.parametrize("kind", [None, "nf4"])
def test_outputs_do_not_change(model: MMInterleaved, processor: MMInterleavedProcessor, kind: Quantization | None
                               ) -> None:  # fmt: skip
    plain, mine = copy.deepcopy(model), copy.deepcopy(model)
    if kind is not None:
        pytest.importorskip("torchao")
        for each in (plain, mine):
            quantize(each, kind)
    batch, greedy = prompts(processor), TextSettings(max_new_tokens=4, min_new_tokens=4, num_beams=1)
    expected = plain.generate_text(batch, greedy)
    images = plain.generate_images(batch, ImageSettings(num_inference_steps=1))
    scores = plain.score(batch, [[[5, 6], [7]]] * 3)
    parts = offload(mine, "cpu")
    assert parts.resident is None
    spoil(mine)
    assert [[t.ids for t in row] for row in mine.generate_text(batch, greedy)] == [
        [t.ids for t in row] for row in expected
    ]
    assert parts.resident == "language_model"
    torch.testing.assert_close(mine.generate_images(batch, ImageSettings(num_inference_steps=1)), images)
    assert parts.resident == "image_decoder"
    torch.testing.assert_close(torch.tensor(mine.score(batch, [[[5, 6], [7]]] * 3)), torch.tensor(scores))
    assert mine.compute_device == torch.device("cpu")


def test_a_machine_without_a_gpu() -> None:
    for device in (None, "cpu"):
        with pytest.raises(ValueError, match="the device is the CPU; leave it"):
            load("debug", device=device, offload=True)

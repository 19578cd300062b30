"""Option scores (docs/model.md, "Scores"): the prompt is prefilled once, however many options there are."""

from __future__ import annotations

import pytest
import torch

from mm_interleaved import Batch, Document, Image, MMInterleaved, MMInterleavedProcessor, Text

from ..conftest import make_image

OPTIONS = [[[9, 8, 7], [6], [5, 5, 5, 5, 5]], [[4, 3]]]


@pytest.fixture(scope="module")
def batch(processor: MMInterleavedProcessor) -> Batch:
    documents = [Document([Image(make_image(1)), Text("what is it?")]), Document([Text("well"), Image(make_image(2))])]
    return processor(documents, padding_side="left")


@torch.no_grad()
@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_scores_are_sums_of_log_probabilities(model: MMInterleaved, batch: Batch, batch_size: int) -> None:
    scores = model.score(batch, OPTIONS, batch_size)
    for row, options in enumerate(OPTIONS):
        prompt = batch.input_ids[row][batch.attention_mask[row] == 1]
        for option, score in zip(options, scores[row], strict=True):
            ids = torch.cat([prompt, torch.tensor(option)])
            log_probabilities = (
                model(ids[None], pixel_values=batch.pixel_values[row : row + 1]).logits[0].log_softmax(-1)
            )
            expected = sum(float(log_probabilities[len(prompt) - 1 + k, t]) for k, t in enumerate(option))
            assert score == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("options", [[[[]], [[4]]], [[[4]], [[5], []]]])
def test_an_option_without_tokens_is_refused(model: MMInterleaved, batch: Batch, options: list) -> None:
    with pytest.raises(ValueError, match=r"option \d of row \d has no tokens"):
        model.score(batch, options)


@pytest.mark.parametrize("number", [-1, 99999999])
def test_an_id_outside_the_vocabulary_is_named(model: MMInterleaved, batch: Batch, number: int) -> None:
    with pytest.raises(ValueError, match=rf"option 1 of row 0 has the id {number}, but the vocabulary has \d+ tokens"):
        model.score(batch, [[[1], [1, number]], [[4]]])


def test_the_prompt_and_its_image_are_read_once(model: MMInterleaved, batch: Batch) -> None:
    images, tokens = [], []
    hooks = [
        model.visual_tokenizer.register_forward_hook(lambda _m, a, _o: images.append(len(a[0]))),
        model.language_model.layers[0].mlp.gate_proj.register_forward_hook(
            lambda _m, a, _o: tokens.append(a[0].shape[1])
        ),
    ]
    model.score(batch, [OPTIONS[0] * 10, OPTIONS[1]])
    for hook in hooks:
        hook.remove()
    assert images == [2]
    assert tokens.count(batch.input_ids.shape[1]) == 1
    assert max(tokens[1:]) <= 5  # afterwards only options

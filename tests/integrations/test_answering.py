"""Questions as evaluation harnesses ask them."""

from __future__ import annotations

import pytest
import torch

from mm_interleaved import Document, Image, MMInterleaved, MMInterleavedProcessor, Text, TextSettings
from mm_interleaved.generation import DocumentFinished
from mm_interleaved.integrations import answering
from mm_interleaved.integrations.answering import Answerer, cut, to_document, to_settings
from mm_interleaved.io import InputError
from mm_interleaved.pretrained import Loaded

from ..conftest import make_image

A, B = make_image(1), make_image(2)


@pytest.fixture
def answerer(model: MMInterleaved, processor: MMInterleavedProcessor) -> Answerer:
    return Answerer(Loaded(model, processor, True, "awake"), batch_size=2)


def shown(document: Document) -> list[object]:
    return [s.source if isinstance(s, Image) else s.text for s in document.segments]


@pytest.mark.parametrize(
    ("context", "images", "expected"),
    [
        ("What is it?", [A], [A, "What is it?", None]),
        ("Is <image> like <image>?", [A, B], ["Is", A, "like", B, "?", None]),
        ("<image 1> What?", [A, B], [A, B, "What?", None]),
        ("Why?", [], ["Why?", None]),
    ],
)
def test_images_stand_where_the_text_says(context: str, images: list, expected: list) -> None:
    assert shown(to_document(context, images)) == expected


def test_styles() -> None:
    assert shown(to_document("What?", [A], "vqa")) == [
        "Based on the image, please answer the question.", A, "What?", "The answer is:", None]  # fmt: skip
    chat = to_document("What?", [A], "chat")
    assert [s.role for s in chat.segments] == ["user", "user", "assistant"]
    with pytest.raises(ValueError, match="no style 'other'; styles are plain, vqa, chat"):
        to_document("What?", [], "other")
    with pytest.raises(ValueError, match="2 places for images, but 1"):
        to_document("<image> <image>", [A])


def test_arguments() -> None:
    greedy = to_settings({"max_new_tokens": 16, "temperature": 0, "do_sample": False, "until": ["\n"], "top_p": None})
    assert (greedy.max_new_tokens, greedy.num_beams, greedy.do_sample, greedy.min_new_tokens) == (16, 1, False, 0)
    sampling = to_settings({"temperature": 0.7, "do_sample": True, "top_p": 0.9})
    assert (sampling.do_sample, sampling.temperature, sampling.top_p) == (True, 0.7, 0.9)
    assert to_settings({"num_beams": 3, "temperature": 0.2, "do_sample": True}).num_beams == 3
    assert not to_settings({"num_beams": 3, "temperature": 0.2, "do_sample": True}).do_sample


def test_stop_texts() -> None:
    assert cut(" a cat\nQ: next", "\n") == "a cat"
    assert cut("a cat. It", [".", "\n\n"]) == "a cat"
    assert cut(" a cat ", None) == "a cat"


def test_no_room_for_an_answer(answerer: Answerer, caplog: pytest.LogCaptureFixture) -> None:
    """An empty answer and a warning, not the question; what cannot be read at all is named."""
    limit = answerer.model.context_length
    lengths = (len(answerer.processor.encode([Text("a " * words)], start=True)) for words in range(limit))
    words = next(words for words, length in enumerate(lengths) if length == limit)
    fits = Document([Text("a " * words), Text()])
    assert list(answerer.write([fits], TextSettings(6, 0, num_beams=1), ["mme/1"])) == [""]
    assert "document 'mme/1' ended by 'context' before an answer" in caplog.text
    longer = Document([Text("a " * (words + 5)), Text()])
    with pytest.raises(InputError, match=r"document 'mme/2': \d+ tokens are more than"):
        list(answerer.write([longer], TextSettings(6, 0, num_beams=1), ["mme/2"]))


def test_answers_are_those_of_one_question_at_a_time(
    answerer: Answerer, model: MMInterleaved, processor: MMInterleavedProcessor
) -> None:
    documents = [to_document("What is it?", [A]), to_document("Is this <image> or rather that <image> now?", [A, B]),
                 to_document("Say.", [B], "chat")]  # fmt: skip
    settings = TextSettings(6, 0, num_beams=1)
    together = list(answerer.write(documents, settings, ["1", "2", "3"]))
    for document, text in zip(documents, together, strict=True):
        *_, last = model.generate_interleaved(
            document, processor, progress=False, max_new_tokens=6, min_new_tokens=0, num_beams=1
        )
        assert isinstance(last, DocumentFinished)
        assert last.result.segments[-1].text == text


@torch.no_grad()
def test_scores_and_greediness(answerer: Answerer, processor: MMInterleavedProcessor,
                               monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    question = to_document("What is it?", [A])
    batch = processor([Document(question.segments[:-1])], padding_side="left")
    ((greedy,),) = answerer.model.generate_text(batch, TextSettings(4, 4, num_beams=1))
    known = {"likeliest": greedy.ids, "other": [*greedy.ids[:-1], 5], "start": greedy.ids[:2]}
    monkeypatch.setattr(answering, "encode_plain", lambda tokenizer, text: known[text])
    asked = [(question, "likeliest"), (question, "other"), (to_document("Why?", [B]), "other"), (question, "start")]
    scores = list(answerer.score(*zip(*asked, strict=True)))
    assert [found for _, found in scores] == [True, False, False, True]
    assert scores[0][0] > scores[1][0] != scores[2][0]
    single = [next(answerer.score([document], [text])) for document, text in asked]
    assert [s for s, _ in single] == pytest.approx([s for s, _ in scores], abs=1e-4)


def test_text_is_kept_apart_from_the_prompt(answerer: Answerer) -> None:
    """What is scored is the continuation alone: a longer one is less likely."""
    question = to_document("What is it?", [A])
    (short, _), (long, _) = answerer.score([question] * 2, ["cat", "cat cat cat cat"])
    assert long < short
    assert isinstance(question.segments[-1], Text)

"""Documents to batches and back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoProcessor

from mm_interleaved import Document, Image, MMInterleavedConfig, MMInterleavedProcessor, Text
from mm_interleaved.io import InputError
from mm_interleaved.pretrained import TOKENIZER
from mm_interleaved.processor import IMAGE_TOKEN, SOI_TOKEN, MMInterleavedTokenizer
from mm_interleaved.processor.images import center_crop
from mm_interleaved.processor.tokenizer import encode_text

from ..conftest import make_image

N = 4  # image tokens of the debug model


def words(processor: MMInterleavedProcessor, ids: torch.Tensor) -> list[str]:
    return processor.tokenizer.convert_ids_to_tokens(ids.tolist())


def test_one_document(processor: MMInterleavedProcessor) -> None:
    image = make_image(size=(100, 60))
    batch = processor(Document([Text("a cat "), Image(image), Text(" is red")]))
    assert words(processor, batch.input_ids[0]) == ["<s>", "▁a", "▁cat", SOI_TOKEN, *[IMAGE_TOKEN] * N, "▁is", "▁red"]
    assert batch.position_ids.tolist() == [list(range(10))]
    assert batch.image_rows.tolist() == [0]
    assert batch.document_starts.tolist() == [0]
    expected = center_crop(image, 56).transpose(2, 0, 1) / np.float32(255)
    assert np.array_equal(batch.pixel_values[0].numpy(), expected)
    assert "labels" not in batch
    assert set(batch) == {
        "input_ids", "attention_mask", "position_ids", "pixel_values", "image_rows", "document_starts",
    }  # fmt: skip


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(processor: MMInterleavedProcessor, side: str) -> None:
    batch = processor([Document([Text("a")]), Document([Image(make_image()), Text("b")])], padding_side=side)
    assert batch.input_ids.shape == (2, 1 + 1 + N + 1)
    real = batch.attention_mask[0].bool()
    assert real.tolist() == ([False] * 5 + [True] * 2 if side == "left" else [True] * 2 + [False] * 5)
    assert batch.position_ids[0][real].tolist() == [0, 1]
    assert batch.image_rows.tolist() == [1]
    assert batch.document_starts.tolist() == [0]


def test_zero_images(processor: MMInterleavedProcessor) -> None:
    batch = processor(Document([Text("just text")]), training=True)
    assert batch.pixel_values.shape == (0, 3, 56, 56)
    assert batch.target_pixel_values.shape == (0, 3, 32, 32)
    assert batch.image_loss_mask.shape == (0,)


def test_training_batch(processor: MMInterleavedProcessor) -> None:
    given_image, shown = make_image(1), make_image(2)
    document = Document([
        Text("a cat", supervise=False), Image(given_image, supervise=False), Text("b"), Image(given_image,
        target=shown),
    ])  # fmt: skip
    batch = processor(document, training=True)
    learned = [w for w, y in zip(words(processor, batch.input_ids[0]), batch.labels[0].tolist(), strict=True) if y >= 0]
    assert learned == ["▁b", SOI_TOKEN, "</s>"]
    assert batch.image_loss_mask.tolist() == [0.0, 1.0]
    assert torch.equal(batch.target_pixel_values[0], processor.pixels([given_image], 32)[0])
    assert torch.equal(batch.target_pixel_values[1], processor.pixels([shown], 32)[0])
    assert torch.equal(batch.pixel_values[0], batch.pixel_values[1])


def test_what_is_learned_in_neighbouring_texts(processor: MMInterleavedProcessor) -> None:
    document = Document([Text("what is it?", supervise=False), Text("a red cat"), Text("or so", supervise=False)])
    batch = processor(document, training=True)
    learned = [w for w, y in zip(words(processor, batch.input_ids[0]), batch.labels[0].tolist(), strict=True) if y >= 0]
    assert learned == ["▁a", "▁red", "▁cat"]
    whole = processor(Document([Text("what is it? a red cat or so")]), training=True)
    assert torch.equal(batch.input_ids, whole.input_ids)  # the split changes what is learned, not the tokens


def test_attached_texts(processor: MMInterleavedProcessor) -> None:
    joined = processor(Document([Text("the box"), Text("<box>", attached=True)])).input_ids
    assert torch.equal(joined, processor(Document([Text("the box<box>")])).input_ids)


def test_packing(processor: MMInterleavedProcessor) -> None:
    documents = [Document([Text("a b"), Image(make_image(k))]) for k in range(3)]
    batch = processor(documents, training=True, packing=True, max_length=20)
    assert batch.input_ids.shape[0] == 2
    assert (batch.input_ids == processor.soi_token_id).sum() == len(batch.pixel_values) == 3
    assert batch.image_rows.tolist() == [0, 0, 1]
    assert batch.document_starts.tolist() == [0, 9, 0]
    assert batch.input_ids[0, [0, 9]].tolist() == [1, 1]
    assert int(batch.input_ids[1, 0]) != 1  # the second row goes on with the third document


def test_text_alone_cannot_be_packed(processor: MMInterleavedProcessor) -> None:
    with pytest.raises(ValueError, match="no document has one"):
        processor(Document([Text("a")]), packing=True)


def test_strings_with_placeholders(processor: MMInterleavedProcessor) -> None:
    image = make_image()
    expected = processor(Document([Text("a"), Image(image), Text("b")]))
    batch = processor(text=f"a{IMAGE_TOKEN}b", images=[image])
    assert torch.equal(batch.input_ids, expected.input_ids)
    two = processor(text=["x", f"{IMAGE_TOKEN}{IMAGE_TOKEN}"], images=[[], [image, image]])
    assert two.image_rows.tolist() == [1, 1]


def test_more_slots_than_images(processor: MMInterleavedProcessor) -> None:
    with pytest.raises(InputError, match="2 image slots, but 1 images"):
        processor(text=f"{IMAGE_TOKEN} {IMAGE_TOKEN}", images=[make_image()])


SEGMENTS = st.lists(
    st.one_of(st.text("abc ", min_size=1).map(str.strip).filter(bool).map(Text), st.integers(0, 2)),
    min_size=1,
    max_size=6,
)


@given(SEGMENTS)
def test_documents_to_tensors_and_back(segments: list) -> None:
    tokenizer = MMInterleavedTokenizer.from_vocab(TOKENIZER)
    processor = MMInterleavedProcessor.for_model(MMInterleavedConfig.preset("debug"), tokenizer)
    document = Document([Image(make_image(s)) if isinstance(s, int) else s for s in segments])
    batch = processor(document)
    again = processor.to_document(batch.input_ids[0].tolist(), [i.source for i in document.images])
    assert torch.equal(processor(again).input_ids, batch.input_ids)
    text = " ".join(s.text for s in document.segments if isinstance(s, Text))
    assert " ".join(s.text for s in again.segments if isinstance(s, Text)).split() == text.split()
    assert [i.source for i in again.images] == [i.source for i in document.images]


# ---- conversations


def chat() -> Document:
    return Document.from_messages([
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "image", "image": make_image()}, {"type": "text", "text": "Who?"}]},
        {"role": "assistant", "content": "A cat."},
        {"role": "user", "content": "Sure?"},
    ])  # fmt: skip


def test_conversation_is_written_through_the_template(processor: MMInterleavedProcessor) -> None:
    segments = processor.render(chat())
    text = "".join(s.text if isinstance(s, Text) else "<image>" for s in segments)
    assert text == "Be brief. USER: <image>Who? ASSISTANT: A cat.</s>USER: Sure? ASSISTANT:"
    assert "".join(s.text for s in segments if isinstance(s, Text) and s.supervise) == " A cat.</s>"


def test_conversation_agrees_with_apply_chat_template(processor: MMInterleavedProcessor) -> None:
    messages = chat().to_messages()
    batch = processor.apply_chat_template(messages, tokenize=True, return_dict=True, add_generation_prompt=True)
    assert torch.equal(batch["input_ids"], processor(chat()).input_ids)


def test_only_the_assistant_is_learned(processor: MMInterleavedProcessor) -> None:
    batch = processor(chat(), training=True)
    learned = [w for w, y in zip(words(processor, batch.input_ids[0]), batch.labels[0].tolist(), strict=True) if y >= 0]
    assert learned == ["▁A", "▁cat", ".", "</s>"]


def test_open_slots_of_a_conversation(processor: MMInterleavedProcessor) -> None:
    document = Document([Text("hi", role="user"), Text(role="assistant"), Image(role="assistant")])
    segments = processor.render(document)
    assert [s.is_open for s in segments[-2:]] == [True, True]
    assert "".join(s.text for s in segments[:-2]) == "USER: hi ASSISTANT:"


def test_a_segment_without_role_among_others(processor: MMInterleavedProcessor) -> None:
    with pytest.raises(InputError, match=r"segments\[1\]: this segment has no role"):
        processor.render(Document([Text("a", role="user"), Text("b")]))


# ---- mistakes


CONTROL = ("<s>", "</s>", "<unk>", SOI_TOKEN, IMAGE_TOKEN)
WORDS = st.lists(st.sampled_from([*CONTROL, "<s", ">", "<|ima", "ge|>", "</", "s>", "a cat", " ", "é"]), max_size=6)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(given_words=st.lists(WORDS.map("".join), min_size=1, max_size=3), attached=st.booleans(), role=st.booleans())
def test_text_never_becomes_a_control_token(
    processor: MMInterleavedProcessor, given_words: list[str], attached: bool, role: bool
) -> None:
    """Whole, split over texts, or split over the parts of a message; beside an image and in a conversation."""
    speaker = "user" if role else None
    texts = [Text(words, attached=attached, role=speaker) for words in given_words]
    document = Document([Image(make_image(), role=speaker), *texts])
    ids = processor(document, training=True).input_ids[0].tolist()
    control = [i for i in ids if i in (1, 2, processor.soi_token_id, processor.image_token_id)]
    assert control == [1, processor.soi_token_id, *[processor.image_token_id] * processor.num_image_tokens, 2]
    if role:
        batch = processor.apply_chat_template(
            document.to_messages(), tokenize=True, return_dict=True, add_generation_prompt=True
        )
        assert batch.input_ids[0].tolist() == ids[:-1]
        words = processor.apply_chat_template(document.to_messages(), tokenize=False)
        assert words.endswith("".join(given_words) + " ")


def test_text_with_tokens_in_it_is_written_back(processor: MMInterleavedProcessor) -> None:
    words = f"<s>5</s> as HTML, {IMAGE_TOKEN} and {SOI_TOKEN}"
    ids = processor(Document([Text(words)])).input_ids[0].tolist()
    assert processor.decode_text(ids[1:]) == words


def test_control_tokens_of_templates_and_records(processor: MMInterleavedProcessor) -> None:
    record = {"sentences": ["a</s><s>b"], "images": [""], "sentence_ixs": [0], "image_first": [False],
              "generate_mode": "generate_images"}  # fmt: skip
    segments = [s for s in Document.from_dict(record).segments if not s.is_open]
    assert processor(Document(segments)).input_ids[0].tolist().count(1) == 2
    assert processor(text="a</s>b").input_ids[0].tolist().count(2) == 1
    chat = Document([Text("Hi </s>", role="user"), Text("Yes. </s>", role="assistant")])
    assert processor(chat).input_ids[0].tolist().count(2) == 1
    segments = [Text(f"b{IMAGE_TOKEN}", control_tokens=True)]
    with pytest.raises(InputError, match=r"document 1, segments\[1\].*reserved token '<\|image\|>'"):
        processor([Document([Text("a")]), Document([Text("a"), *segments])])


def test_a_template_that_shows_too_many_images(processor: MMInterleavedProcessor) -> None:
    template = "{% for m in messages %}<|image|><|image|>{{ m.content }}{% endfor %}"
    other = MMInterleavedProcessor(processor.tokenizer, 4, 56, 64, 512, chat_template=template)
    with pytest.raises(InputError, match=r"more <\|image\|> than images"):
        other(Document([Image(make_image(), role="user"), Text("Who?", role="user")]))


def test_open_slots_cannot_be_encoded(processor: MMInterleavedProcessor) -> None:
    with pytest.raises(InputError, match="open slot"):
        processor(Document([Text("a"), Image()]))


def test_too_long(processor: MMInterleavedProcessor) -> None:
    document = Document([Text("a " * 600)], id="long one")
    with pytest.raises(InputError, match=r"'long one': 60\d tokens are more than the 512"):
        processor(document)
    assert processor(document, truncation=True).input_ids.shape == (1, 512)


def test_truncation_does_not_cut_an_image(processor: MMInterleavedProcessor) -> None:
    batch = processor(Document([Text("a b"), Image(make_image())]), truncation=True, max_length=6)
    assert batch.input_ids.shape == (1, 3)
    assert len(batch.pixel_values) == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "give either documents, or text"),
        ({"documents": []}, "no documents"),
        ({"text": "a", "images": [["x"], ["y"]]}, "one list for each text"),
        ({"text": "a", "videos": ["v"]}, "no argument 'videos'"),
    ],
)
def test_wrong_calls(processor: MMInterleavedProcessor, arguments: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        processor(**arguments)


def test_tokenizer_of_another_model() -> None:
    config = MMInterleavedConfig.preset("release")
    with pytest.raises(ValueError, match="the tokenizer's soi_token_id is 2048, but the model's is 32000"):
        MMInterleavedProcessor.for_model(config, MMInterleavedTokenizer.from_vocab(
            TOKENIZER))  # fmt: skip


def test_save_and_load(tmp_path: Path, processor: MMInterleavedProcessor) -> None:
    processor.save_pretrained(tmp_path)
    again = MMInterleavedProcessor.from_pretrained(tmp_path)
    document = Document([Text("a"), Image(make_image())])
    assert torch.equal(again(document).input_ids, processor(document).input_ids)
    assert again.to_dict() == processor.to_dict()
    assert again.chat_template == processor.chat_template
    (tmp_path / "config.json").write_text('{"model_type": "mm_interleaved"}')
    assert isinstance(AutoProcessor.from_pretrained(tmp_path), MMInterleavedProcessor)


SENTENCES = st.lists(
    st.sampled_from(["A cat.", "A dog. ", " A red house.", "", "  ", "Two  words"]), min_size=1, max_size=5
)


@settings(max_examples=60)
@given(SENTENCES, st.data())
def test_a_record_has_the_ids_of_its_assembled_string(
    tmp_path_factory: pytest.TempPathFactory, sentences: list[str], data: st.DataObject
) -> None:
    """Placeholders go to their sentences, sentences are joined by a space, the whole is trimmed."""
    spots = sorted(data.draw(st.sets(st.tuples(st.integers(0, len(sentences) - 1), st.booleans()), min_size=1)))
    image = SOI_TOKEN + IMAGE_TOKEN * 4
    marked = list(sentences)
    for number, after in spots:
        marked[number] = marked[number] + image if after else image + marked[number]
    path = tmp_path_factory.mktemp("record") / "a.png"
    make_image().save(path)
    record = {
        "sentences": sentences,
        "images": [str(path) for _ in spots],
        "sentence_ixs": [number for number, _ in spots],
        "image_first": [not after for _, after in spots],
    }
    processor = MMInterleavedProcessor.for_model(
        MMInterleavedConfig.preset("debug"), MMInterleavedTokenizer.from_vocab(TOKENIZER)
    )
    found = processor.encode(Document.from_dict(record).segments).ids.tolist()
    assert found == [processor.tokenizer.bos_token_id, *encode_text(processor.tokenizer, " ".join(marked).strip())]

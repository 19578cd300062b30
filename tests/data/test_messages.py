"""Conversations in the forms that people have: what is read, what is learned, and what is refused in words."""

from __future__ import annotations

import base64
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mm_interleaved.data import DataError, SourceConfig
from mm_interleaved.data.readers import make_reader
from mm_interleaved.document import Document, Text
from mm_interleaved.processor import Batch, MMInterleavedProcessor

from .test_resume import same, through_file
from .world import loader, numbers, png, texts, write_images, write_lines

SIZE = (40, 20)  # of `wide.png`


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Images `0.png` to `5.png`, `wide.png`, and `broken.png`."""
    write_images(tmp_path, 6)
    (tmp_path / "wide.png").write_bytes(png(7, SIZE))
    (tmp_path / "broken.png").write_bytes(b"no image")
    return tmp_path


def source(root: Path, *records: Any, name: str = "data.json", **options: Any) -> SourceConfig:
    """A source of these records, in a file with a list or with lines."""
    if name.endswith(".json"):
        (root / name).write_text(json.dumps(list(records), ensure_ascii=False, indent=1))
    else:
        write_lines(root / name, records)
    plain = {"batch_size": 1, "max_length": 120, "keep_remainder": True, "shuffle": 0, **options}
    return SourceConfig("messages", root=str(root), shards=[name], **plain)


def learned(processor: MMInterleavedProcessor, batch: Batch) -> list[str]:
    """The stretches of each row's tokens that have a loss, `[]` for the token that starts an image."""
    found = []
    for ids, labels in zip(batch.input_ids.tolist(), batch.labels.tolist(), strict=True):
        for kept, group in itertools.groupby(zip(ids, labels, strict=True), lambda pair: pair[1] != -100):
            if kept:
                tokens = processor.tokenizer.convert_ids_to_tokens([i for i, _ in group])
                found.append("".join(tokens).replace("<|beginofimage|>", "[]").replace("▁", " ").strip())
    return found


def only(processor: MMInterleavedProcessor, root: Path, record: Any, **options: Any) -> tuple[str, list[str], Batch]:
    """The row of one record, and what is learned of it."""
    (batch,) = loader(processor, source(root, record, **options), sampling="sum")
    (row,) = texts(processor, batch)
    return row.replace("[] ", "[]"), learned(processor, batch), batch


ANSWER = {"role": "assistant", "content": "A cat."}
SHAREGPT = {"messages": [{"role": "user", "content": "<image>Who?"}, ANSWER], "images": ["3.png"]}
LLAVA = {
    "id": 7, "image": "3.png", "model": "x",
    "conversations": [{"from": "human", "value": "<image>\nWho?"}, {"from": "gpt", "value": "A cat."}],
}  # fmt: skip
URL = "data:image/png;base64," + base64.b64encode(png(3)).decode()
OPENAI = [
    {"messages": [{"role": "user", "content": [part, {"type": "text", "text": "Who?"}]}, ANSWER], **more}
    for part, more in [
        ({"type": "image_url", "image_url": {"url": "3.png"}}, {}),
        ({"type": "image_url", "image_url": {"url": URL}}, {}),
        ({"type": "image", "path": "3.png"}, {}),
        ({"type": "image"}, {"images": ["3.png"]}),
        ({"type": "image"}, {"images": [{"path": "3.png", "bytes": None}]}),
    ]
]


@pytest.mark.parametrize("name", ["data.json", "data.jsonl", "data.jsonl.gz"])
@pytest.mark.parametrize("record", [SHAREGPT, LLAVA, *OPENAI])
def test_one_conversation_in_each_form(
    record: dict[str, Any], name: str, root: Path, processor: MMInterleavedProcessor
) -> None:
    row, answers, batch = only(processor, root, record, name=name)
    assert row == "<s>USER:[]Who? ASSISTANT: A cat.</s>"
    assert answers == ["A cat.</s>"]
    assert numbers([batch]) == [3]
    assert batch.image_loss_mask.tolist() == [0]


def test_history_images_and_texts_alone(root: Path, processor: MMInterleavedProcessor) -> None:
    record = {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "<image><image>Which?"}, {"role": "assistant", "content": "Two."},
            {"role": "user", "content": "And <image> now?"}, {"role": "assistant", "content": "One."},
        ],
        "images": ["1.png", "2.png", "0.png"],
    }  # fmt: skip
    row, answers, batch = only(processor, root, record)
    assert row.startswith("<s>Be brief. USER:[][]Which? ASSISTANT: Two.</s>")
    assert answers == ["Two.</s>", "One.</s>"]
    assert numbers([batch]) == [1, 2, 0]
    row, answers, _ = only(processor, root, {"messages": [{"role": "user", "content": "Hello"}, ANSWER]})
    assert (row, answers) == ("<s>USER: Hello ASSISTANT: A cat.</s>", ["A cat.</s>"])
    without = {"messages": [{"role": "user", "content": "Hello"}, ANSWER], "image": ""}
    assert only(processor, root, without)[0] == row


def test_images_without_marks_come_first(root: Path, processor: MMInterleavedProcessor) -> None:
    record = {"messages": [{"role": "user", "content": "Who?"}, ANSWER], "images": ["1.png", "2.png"]}
    row, _, batch = only(processor, root, record)
    assert row.startswith("<s>USER:[][]Who?")
    assert numbers([batch]) == [1, 2]


def test_an_image_of_the_assistant_is_drawn(root: Path, processor: MMInterleavedProcessor) -> None:
    drawn = [{"type": "text", "text": "Here:"}, {"type": "image", "path": "2.png"}]
    for content, more in ((drawn, {}), ("Here: <image>", {"images": ["1.png", "2.png"]})):
        asked = (
            "<image>Redraw it."
            if more
            else [{"type": "image", "path": "1.png"}, {"type": "text", "text": "Redraw it."}]
        )
        record = {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": content}], **more}
        row, answers, batch = only(processor, root, record)
        assert row == "<s>USER:[]Redraw it. ASSISTANT: Here:[]</s>"
        assert answers == ["Here:[]", "</s>"]  # the tokens of the image itself are not learned
        assert batch.image_loss_mask.tolist() == [0, 1]


@pytest.mark.slow
@pytest.mark.parametrize("key", ["loss", "weight"])
@pytest.mark.parametrize("second", [False, 0])
def test_a_message_without_a_loss(key: str, second: object, root: Path, processor: MMInterleavedProcessor) -> None:
    messages = [
        {"role": "user", "content": "One?"}, {"role": "assistant", "content": "Yes.", key: second},
        {"role": "user", "content": "Two?", key: 0}, {"role": "assistant", "content": "No.", key: 1},
    ]  # fmt: skip
    assert only(processor, root, {"messages": messages})[1] == ["No.</s>"]
    messages[3][key], messages[1][key] = 0, 1
    assert only(processor, root, {"messages": messages})[1] == ["Yes.</s>"]


def test_losses_of_neighbouring_messages(root: Path, processor: MMInterleavedProcessor) -> None:
    """Two messages of the assistant in a row are one turn, of which only a part is learned."""
    messages = [
        {"role": "user", "content": "Go on."}, {"role": "assistant", "content": "Let me think.", "loss": False},
        {"role": "assistant", "content": "Done."},
    ]  # fmt: skip
    assert only(processor, root, {"messages": messages})[1] == ["Done.</s>"]


def test_an_assistant_who_speaks_first_does_not_learn_the_header(root: Path, processor: MMInterleavedProcessor) -> None:
    row, answers, _ = only(processor, root, {"messages": [ANSWER]})
    assert (row, answers) == ("<s>ASSISTANT: A cat.</s>", ["A cat.</s>"])


BOXES = {"bbox": [[10, 5, 20, 10], [0, 0, 40, 20]], "ref": ["a cat"]}
SHARES = {"bbox": [[0.25, 0.25, 0.5, 0.5], [0, 0, 1, 1]], "bbox_type": "norm1", "ref": ["a cat"]}


@pytest.mark.parametrize("objects", [BOXES, SHARES, BOXES | {"image_id": [0, 0]}])
def test_boxes_in_pixels_and_in_shares(objects: dict[str, Any], root: Path) -> None:
    record = {
        "messages": [
            {"role": "user", "content": "<image>Where is <ref-object>?"},
            {"role": "assistant", "content": "<box><bbox></box> in <box><bbox></box>"},
        ],
        "images": ["wide.png"], "objects": objects,
    }  # fmt: skip
    document = read(root, record)
    _, asked, answer = document.segments
    assert isinstance(asked, Text)
    assert isinstance(answer, Text)
    assert asked.text == "Where is a cat?"
    assert answer.text == "<box>(249,249)(499,499)</box> in <box>(000,000)(999,999)</box>"
    assert [box.sides for _, box in answer.boxes] == [(0.25, 0.25, 0.5, 0.5), (0, 0, 1, 1)]
    mirrored = answer.move_boxes(lambda box: type(box)(1 - box.x2, box.y1, 1 - box.x1, box.y2, box.image))
    assert mirrored.text == "<box>(499,249)(749,499)</box> in <box>(000,000)(999,999)</box>"


def read(root: Path, record: Any) -> Document:
    """The document of one record."""
    reader = make_reader(source(root, record), Path())
    found = next(iter(reader.shards.records(0)))
    return reader.document(found, None, lambda reason, example: None)  # type: ignore[arg-type]


def test_boxes_of_several_images(root: Path) -> None:
    record = {
        "messages": [{"role": "user", "content": "<image><image>Where?"},
                     {"role": "assistant", "content": "<bbox>, <bbox>"}],
        "images": ["0.png", "wide.png"], "objects": {"bbox": [[0, 0, 40, 20], [0, 0, 4, 8]], "image_id": [1, 0]},
    }  # fmt: skip
    answer = read(root, record).segments[-1]
    assert isinstance(answer, Text)
    assert answer.text == "(000,000)(999,999), (000,000)(499,999)"
    assert [box.image for _, box in answer.boxes] == [1, 0]


USER = {"role": "user", "content": "Who?"}
BAD = [
    ({"messages": [USER]}, "the last message is not the assistant's"),
    ({"messages": []}, "the last message is not the assistant's"),
    ({"text": "no messages"}, "a record has neither messages nor conversations"),
    ({"messages": [USER, {"role": "assistant", "content": " "}]}, "an answer is blank"),
    ({"messages": [USER, {"role": "robot", "content": "Beep."}]}, "unknown speaker 'robot'"),
    ({"messages": [USER, {"role": "assistant"}]}, "must be a string"),
    ({"messages": [USER, ANSWER | {"loss": "no"}]}, "the loss of a message is true or false, not 'no'"),
    ({"messages": [USER | {"loss": True}, ANSWER]}, "a message of the user cannot be learned"),
    ({"messages": [USER, ANSWER | {"loss": False}]}, "nothing to learn"),
    ({"messages": [USER | {"content": "<image>Who?"}, ANSWER]}, "0 images, but 1 places"),
    ({"messages": [USER | {"content": "<image>Who?"}, ANSWER], "images": ["0.png", "1.png"]}, "2 images, but 1 places"),
    ({"messages": [USER, ANSWER], "images": ["gone.png"]}, "gone.png"),
    ({"messages": [USER, ANSWER], "images": ["../0.png"]}, "outside"),
    ({"messages": [USER, ANSWER], "images": ["broken.png"]}, "broken.png"),
    ({"messages": [USER, ANSWER], "images": [3]}, "must be a string"),
    ({"messages": [USER, {"role": "assistant", "content": [{"type": "video"}]}]}, "unknown kind of content 'video'"),
    ({"messages": [USER, {"role": "assistant", "content": "<bbox>"}]}, "0 objects, but 1 places"),
    ({**SHAREGPT, "objects": {"bbox": [[0, 0, 1, 1]]}}, "1 objects, but 0 places"),
    ({**SHAREGPT, "messages": [USER, {"role": "assistant", "content": "<bbox>"}], "objects": {"bbox": [[0, 0, 99, 4]]}},
     "outside the image of 8 x 8 pixels"),
    ({**SHAREGPT, "messages": [USER, {"role": "assistant", "content": "<bbox>"}], "objects": {"bbox": [[5, 0, 4, 4]]}},
     "is no box"),
    ({**SHAREGPT, "messages": [USER, {"role": "assistant", "content": "<bbox>"}], "objects": {"bbox": [[4, 0, 4, 4]]}},
     "has no area"),
    ({**SHAREGPT, "messages": [USER, {"role": "assistant", "content": "<bbox>"}], "objects": {"bbox": [[0, 0, 4]]}},
     "a box has 4 sides, not 3"),
    ({**SHAREGPT, "messages": [USER, {"role": "assistant", "content": "<bbox>"}],
      "objects": {"bbox": [[0, 0, 4, 4]], "image_id": [1]}}, "there is no image 1, only 1"),
    ({**SHAREGPT, "objects": {"bbox_type": "xywh"}}, "unknown kind of boxes 'xywh'"),
    ([1, 2], "not an object"),
]  # fmt: skip


@pytest.mark.parametrize(("record", "words"), BAD)
def test_what_cannot_be_used_is_counted_and_named(
    record: Any, words: str, root: Path, processor: MMInterleavedProcessor
) -> None:
    """The other records are read."""
    made = loader(processor, source(root, record, SHAREGPT), sampling="sum")
    assert [texts(processor, batch)[0].count("A cat.") for batch in made] == [1]
    report = made.report()
    reasons = {reason: report.examples("messages")[reason] for reason in report.rejected("messages")}
    assert sum(report.rejected("messages").values()) == 1
    assert words in str(reasons)
    assert "record 0" in str(reasons)


@pytest.mark.parametrize(
    ("content", "records"),
    [
        (b"[]", 0), (b"  [1, 2 , 3]  ", 3), (b'\xef\xbb\xbf[{"a": "\xc3\xa9"}, {"b": "\xf0\x9f\x90\x88]"}]', 2),
        (b'{"a": 1}\n{"b": 2}\n', 2), (b"[[1], [2, [3]]]", 2),
    ],
)  # fmt: skip
def test_lists_and_lines_in_json_files(content: bytes, records: int, root: Path) -> None:
    (root / "x.json").write_bytes(content)
    shards = make_reader(SourceConfig("messages", root=str(root), shards=["x.json"]), Path()).shards
    found = [json.loads(record.payload.decode("utf-8-sig")) for record in shards.records(0)]
    lines = content.decode("utf-8-sig")
    assert found == (json.loads(lines) if lines.lstrip()[0] == "[" else [json.loads(x) for x in lines.splitlines()])
    assert len(found) == records
    for number, record in enumerate(list(shards.records(0))):  # each can be read alone
        assert next(iter(shards.records(0, record.offset, number))).payload == record.payload


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(values=st.lists(st.recursive(st.text() | st.integers() | st.none(), st.lists, max_leaves=4), max_size=5),
       ascii_only=st.booleans(), indent=st.sampled_from([None, 2]))  # fmt: skip
def test_items_of_lists_are_found(values: list[Any], ascii_only: bool, indent: int | None, root: Path) -> None:
    data = json.dumps(values, ensure_ascii=ascii_only, indent=indent).encode("utf-8", "surrogatepass")
    (root / "x.json").write_bytes(data)
    shards = make_reader(SourceConfig("messages", root=str(root), shards=["x.json"]), Path()).shards
    if values:
        assert [json.loads(record.payload) for record in shards.records(0)] == values


@pytest.mark.parametrize("content", [b"[1, 2", b"[1 2]", b"[1,, 2]", b"[nonsense]", b"[\xff]", b"[", b"[1]\n[2]"])
def test_damaged_lists_are_counted(content: bytes, root: Path, processor: MMInterleavedProcessor) -> None:
    (root / "x.json").write_bytes(content)
    config = source(root, SHAREGPT)
    made = loader(processor, SourceConfig(**{**vars(config), "shards": ["x.json", "data.json"]}), sampling="sum")
    assert len(list(made)) == 1
    assert made.report().rejected("messages") == {"shard damaged": 1}
    assert "x.json" in made.report().examples("messages")["shard damaged"]


@pytest.mark.parametrize("name", ["data.json", "data.jsonl"])
@pytest.mark.parametrize("shuffle", [0, 3, 100])
def test_going_on_equals_an_unbroken_run(
    name: str, shuffle: int, root: Path, processor: MMInterleavedProcessor
) -> None:
    records = [
        {"messages": [{"role": "user", "content": "<image>Who?"}, {"role": "assistant", "content": f"Number {i}."}],
         "images": [f"{i % 6}.png"]}
        for i in range(14)
    ]  # fmt: skip
    records[5]["images"] = ["gone.png"]
    config = source(root, *records, name=name, shuffle=shuffle, max_length=60)
    for rank in range(2):
        expected = list(loader(processor, config, sampling="sum", rank=rank, world_size=2))
        assert len(expected) > 2
        for stop in range(1, len(expected)):
            first = loader(processor, config, sampling="sum", rank=rank, world_size=2)
            list(itertools.islice(first, stop))
            second = loader(processor, config, sampling="sum", rank=rank, world_size=2)
            second.load_state_dict(through_file(first.state_dict()))
            rest = list(second)
            assert len(rest) == len(expected) - stop
            assert all(same(a, b) for a, b in zip(rest, expected[stop:], strict=True))


@pytest.mark.parametrize("name", ["data.json", "data.jsonl"])
def test_a_record_more_or_another_word_is_other_data(name: str, root: Path, processor: MMInterleavedProcessor) -> None:
    first = loader(processor, source(root, SHAREGPT, SHAREGPT, name=name), sampling="sum")
    next(iter(first))
    other = json.loads(json.dumps(SHAREGPT).replace("A cat.", "A dog."))
    for records, change in (
        ([SHAREGPT] * 3, "'sources.messages.documents' was 2 and is now 3"),
        ([SHAREGPT, other], "'sources.messages.digest' was"),
    ):
        second = loader(processor, source(root, *records, name=name), sampling="sum")
        second.load_state_dict(through_file(first.state_dict()))
        with pytest.raises(DataError, match=change):
            next(iter(second))

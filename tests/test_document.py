"""Documents: the three JSON forms, both ways, and what is said about mistakes."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mm_interleaved.document import ROLES, SEGMENT_FIELDS, Document, Image, Text, load_documents
from mm_interleaved.io import InputError

from .conftest import make_image

RECORD = {
    "sentences": ["A cat.", "A dog."],
    "images": ["0.png", "1.png"],
    "sentence_ixs": [0, 1],
    "image_first": [True, False],
}


def write(folder: Path, data: Any, name: str = "input.json") -> Path:
    path = folder / name
    path.write_text(data if isinstance(data, str) else json.dumps(data))
    return path


def load(folder: Path, data: Any, name: str = "input.json") -> list[Document]:
    return load_documents(write(folder, data, name))


# ---- forms


def test_segments_form(tmp_path: Path, images: list[Path]) -> None:
    data = {
        "segments": [{"text": "A."}, {"image": "0.png", "supervise": False}, {"image": None}, {"text": None}],
        "id": "x",
    }
    (document,) = load(tmp_path, data)
    expected = [Text("A."), Image(images[0].resolve(), supervise=False), Image(), Text()]
    assert document.segments == expected
    assert document.id == "x"
    assert [s.is_open for s in document.segments] == [False, False, True, True]


def test_list_and_lines_give_the_same(tmp_path: Path, images: list[Path]) -> None:
    items = [{"segments": [{"text": "A."}]}, {"segments": [{"image": "1.png"}]}]
    as_list = load(tmp_path, items)
    as_lines = load(tmp_path, "\n".join(map(json.dumps, items)) + "\n\n", "input.jsonl")
    undeclared = load(tmp_path, "\n".join(map(json.dumps, items)))
    assert [d.segments for d in as_list] == [d.segments for d in as_lines] == [d.segments for d in undeclared]


def test_messages_form_and_back(tmp_path: Path, images: list[Path]) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "image", "path": "0.png"}, {"type": "text", "text": "Who?"}]},
        {"role": "assistant", "content": "A cat."},
    ]
    (document,) = load(tmp_path, {"messages": messages})
    assert [s.role for s in document.segments] == ["system", "user", "user", "assistant"]
    assert [s.supervise for s in document.segments] == [False, False, False, True]
    again = Document.from_messages(document.to_messages())
    assert [(type(s), s.role) for s in again.segments] == [(type(s), s.role) for s in document.segments]
    assert again.to_messages() == document.to_messages()


def test_image_inside_a_data_url(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    make_image().save(buffer, "PNG")
    url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    part = {"type": "image_url", "image_url": {"url": url}}
    (document,) = load(tmp_path, {"messages": [{"role": "user", "content": [part]}]})
    assert document.segments[0].source.size == (90, 60)


def test_record_places_images_around_sentences(tmp_path: Path, images: list[Path]) -> None:
    (document,) = load(tmp_path, RECORD)
    one, two = (p.resolve() for p in images[:2])
    assert document.segments == [Image(one), Text("A cat. A dog."), Image(two)]
    assert document.max_turns == 2
    assert document.stop_at_eos is False


def test_record_that_draws_opens_its_last_image(tmp_path: Path, images: list[Path]) -> None:
    data = RECORD | {"generate_mode": "generate_images", "num_iter": 5, "images": ["0.png", "not there yet.png"]}
    (document,) = load(tmp_path, data | {"multiround_context": ["One.", ""]})
    assert document.segments[-1] == Image()
    assert document.max_turns == 5
    assert document.forced_texts == ["One.", ""]


def test_record_form_round_trip(tmp_path: Path, images: list[Path]) -> None:
    data = RECORD | {"num_iter": 3, "multiround_context": ["x"], "generate_mode": "generate_texts", "id": "r"}
    (document,) = load(tmp_path, data)
    again = Document.from_dict(document.to_record())
    assert [type(s) for s in again.segments] == [type(s) for s in document.segments]
    assert again.to_record() == document.to_record()


SEGMENTS = st.lists(
    st.one_of(
        st.builds(Text, st.text(min_size=1), st.booleans(), st.none(), st.booleans()),
        st.builds(
            Image, st.sampled_from(["a.png", "b/c.jpg"]), st.booleans(), st.none(), st.sampled_from([None, "t.png"])
        ),
        st.sampled_from([Text(), Image()]),
    ),
    min_size=1,
)


@given(SEGMENTS, st.one_of(st.none(), st.text(min_size=1)), st.one_of(st.none(), st.integers(1, 9)))
def test_dict_form_round_trip(segments: list, name: str | None, turns: int | None) -> None:
    document = Document(segments, name, turns)
    again = Document.from_dict(json.loads(json.dumps(document.to_dict())))
    as_text = [s if isinstance(s, Text) else (str(s.source), s.supervise, str(s.target)) for s in again.segments]
    assert as_text == [s if isinstance(s, Text) else (str(s.source), s.supervise, str(s.target)) for s in segments]
    assert (again.id, again.max_turns) == (name, turns)


# Documents as people get them wrong: the fields are there, and what stands in them may be anything.
LEAVES = (
    st.none()
    | st.booleans()
    | st.integers(-3, 3)
    | st.integers()
    | st.floats()
    | st.text(st.characters(codec=None, categories=None))  # half characters included
    | st.sampled_from(
        ["", "0.png", "a\0", "a" * 300, "..", "loop", "data:;base64,", "data:image/png;base64,\u00e9", "://"]
    )
    | st.sampled_from(["user", "assistant", "text", "image", "image_url", "generate_images", "generate_vqa"])
)
ANYTHING = st.recursive(LEAVES, lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(), x, max_size=3))


def objects(*names: str, **right: st.SearchStrategy) -> st.SearchStrategy:
    """Objects with some of the fields, each as it should be or anything."""
    known = dict.fromkeys(names, ANYTHING) | {name: value | ANYTHING for name, value in right.items()}
    return st.fixed_dictionaries({}, optional=known)


FEW = {"min_size": 1, "max_size": 3}
PART = objects("path", "url", type=st.sampled_from(["text", "image", "image_url"]), text=st.text(),
               image=st.just("0.png"), image_url=objects(url=st.just("0.png")))  # fmt: skip
MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(ROLES) | ANYTHING, "content": st.lists(PART, **FEW) | ANYTHING}
)
SEGMENT = objects(*SEGMENT_FIELDS) | st.fixed_dictionaries({"text": LEAVES}) | st.fixed_dictionaries({"image": LEAVES})
PAIRS = {"images": st.just(["0.png"]), "sentence_ixs": st.just([0]), "image_first": st.just([True])}
WRONG_DOCUMENT = st.one_of(
    ANYTHING,
    objects("id", "max_turns", "forced_texts", "stop_at_eos", segments=st.lists(SEGMENT, **FEW)),
    objects("id", messages=st.lists(MESSAGE, **FEW)),
    objects("num_iter", "multiround_context", "id", "generate_mode", sentences=st.lists(st.text(), **FEW), **PAIRS),
    st.tuples(
        st.fixed_dictionaries({"sentences": st.lists(st.text(), **FEW), **PAIRS}),
        objects("num_iter", "multiround_context", "id", "generate_mode"),
    ).map(lambda pair: pair[0] | pair[1]),
)


@settings(max_examples=300, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
@given(data=WRONG_DOCUMENT, name=st.sampled_from(["input.json", "input.jsonl"]))
def test_any_json_is_read_or_refused_with_words(tmp_path: Path, data: Any, name: str) -> None:
    """Whatever a file holds, it is read (and can then be written again), or it is said what is wrong with it."""
    make_image().save(tmp_path / "0.png")
    if not (tmp_path / "loop").is_symlink():
        (tmp_path / "loop").symlink_to("loop")
    try:
        (document,) = load(tmp_path, [data] if name == "input.json" else json.dumps(data), name)
    except InputError as error:
        said = error
    else:
        json.dumps(
            [document.to_messages(), document.id, document.forced_texts], default=repr, ensure_ascii=False
        ).encode()
        return
    assert said.problem
    str(said).encode()
    assert str(tmp_path / name) in str(said)


# ---- mistakes


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", ["empty"]),
        ("   \n", ["empty"]),
        ("{", ["not JSON", "column 2"]),
        ("[]", ["list of documents is empty"]),
        ("7", ["must be an object", "a whole number"]),
        ('{"segmets": []}', ["'segments'", "'segmets'"]),
        ('{"segments": []}', ["at least one segment"]),
        ('{"segments": [{}]}', ["segments[0]", "either 'text' or 'image'"]),
        ('{"segments": [{"text": 3}]}', ["segments[0].text", "must be a string"]),
        ('{"segments": [{"txet": "a"}]}', ["segments[0]", "unknown field 'txet'", "Did you mean 'text'?"]),
        ('{"segments": [{"text": "a", "role": "robot"}]}', ["role", "'robot'", "assistant"]),
        ('{"segments": [{"image": "gone.png"}]}', ["segments[0].image", "'gone.png'", "does not exist"]),
        ('{"segments": [{"image": "../secret.png"}]}', ["outside", "--image-root"]),
        ('{"segments": [{"image": "/etc/hostname"}]}', ["outside"]),
        ('{"segments": [{"image": "https://x.org/a.png"}]}', ["URL", "download it"]),
        ('{"segments": [{"image": "data:image/png;base64,AAAA"}]}', ["data URL", "no image"]),
        ('{"segments": [{"text": "a"}], "max_turns": 0}', ["max_turns", "at least 1"]),
        (
            '{"messages": [{"role": "user", "content": [{"type": "video"}]}]}',
            ["messages[0].content[0].type", "'video'"],
        ),
        ('{"messages": [{"content": "hi"}]}', ["messages[0].role"]),
        ('{"messages": []}', ["at least one message"]),
        ("[" * 100_000, ["nested too deeply"]),
    ],
)
def test_mistakes_are_named(tmp_path: Path, content: str, words: list[str]) -> None:
    path = write(tmp_path, content)
    with pytest.raises(InputError) as caught:
        load_documents(path)
    for word in [str(path), *words]:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"sentence_ixs": [0, 2]}, ["sentence_ixs[1]", "no sentence 2", "0 to 1"]),
        ({"sentence_ixs": [0, -1]}, ["sentence_ixs[1]", "no sentence -1"]),
        ({"images": ["0.png"]}, ["1, 2 and 2 entries"]),
        ({"images": [], "sentence_ixs": [], "image_first": []}, ["at least one image"]),
        ({"sentence_ixs": [1, 0]}, ["images[1]", "stands before image 0"]),
        ({"sentence_ixs": [0, 0], "image_first": [False, True]}, ["stands before"]),
        ({"image_first": [1, 0]}, ["image_first[0]", "true or false"]),
        ({"sentence_ixs": [True, 1]}, ["sentence_ixs[0]", "whole number"]),
        ({"generate_mode": "generate_song"}, ["'generate_song'"]),
        ({"num_iter": 0}, ["num_iter", "at least 1"]),
    ],
)
def test_mistakes_in_records_are_named(tmp_path: Path, images: list[Path], change: dict, words: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        load(tmp_path, [RECORD, RECORD | change])
    for word in ["record 1", *words]:
        assert word in str(caught.value)


def test_line_number_of_a_bad_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="line 3"):
        load(tmp_path, '{"segments": [{"text": "a"}]}\n\n{"segments": [{"text": "a"}}\n', "input.jsonl")


def test_missing_and_binary_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        load_documents(tmp_path / "gone.json")
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00{")
    with pytest.raises(InputError, match="not UTF-8"):
        load_documents(tmp_path / "binary.json")


def test_a_link_does_not_lead_outside(tmp_path: Path, images: list[Path]) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    (inside / "link.png").symlink_to(images[0])
    path = write(inside, {"segments": [{"image": "link.png"}]})
    with pytest.raises(InputError, match="outside"):
        load_documents(path)
    assert load_documents(path, image_root=tmp_path)[0].images[0].source == images[0].resolve()


def test_images_in_memory_have_no_path() -> None:
    with pytest.raises(InputError, match="only in memory"):
        Document([Image(PIL.Image.new("RGB", (2, 2)))]).to_dict()


def test_record_needs_an_image_and_a_closed_middle() -> None:
    with pytest.raises(InputError, match="at least one image"):
        Document([Text("a")]).to_record()
    with pytest.raises(InputError, match="segments\\[0\\]"):
        Document([Image(), Text("a")]).to_record()


ORIGINAL = {"sentences": ["A fox."], "images": ["assets/fox.png"], "sentence_ixs": [0], "image_first": [True]}


def record_in(folder: Path, **changes: object) -> Path:
    """A file with one of the original's records, whose image is relative to another folder."""
    folder.mkdir(parents=True)
    (folder / "records.json").write_text(json.dumps([ORIGINAL | changes]))
    return folder / "records.json"


def image_in(folder: Path) -> Path:
    (folder / "assets").mkdir(parents=True)
    make_image().save(folder / "assets/fox.png")
    return folder / "assets/fox.png"


def test_paths_relative_to_the_working_directory(tmp_path: Path) -> None:
    """As in the original's own example file."""
    records, image = record_in(tmp_path / "docs/examples"), image_in(tmp_path)
    with pytest.raises(InputError, match="does not exist"):
        load_documents(records)
    (document,) = load_documents(records, look_in=[tmp_path])
    assert document.images[0].source == image
    nearer = image_in(records.parent)
    assert load_documents(records, look_in=[tmp_path])[0].images[0].source == nearer


def test_paths_relative_to_the_image_root(tmp_path: Path) -> None:
    records, image = record_in(tmp_path / "docs"), image_in(tmp_path / "images")
    assert load_documents(records, tmp_path / "images")[0].images[0].source == image.resolve()


def test_all_places_that_were_looked_at_are_named(tmp_path: Path) -> None:
    records = record_in(tmp_path / "docs")
    places = "', '".join(str(tmp_path / name) for name in ("docs", "a", "b"))
    with pytest.raises(InputError, match=f"Looked in .{places}.*--image-root"):
        load_documents(records, tmp_path / "a", look_in=[tmp_path / "b"])


@pytest.mark.parametrize("name", ["../secret.png", "/etc/hostname", "assets/../../secret.png"])
def test_no_folder_that_is_looked_in_can_be_left(tmp_path: Path, name: str) -> None:
    make_image().save(tmp_path / "secret.png")
    records = record_in(tmp_path / "docs", images=[name])
    (tmp_path / "work").mkdir()
    with pytest.raises(InputError):
        load_documents(records, look_in=[tmp_path / "work"])


def test_a_record_may_have_fields_that_are_not_known(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The original's outputs are its records with `generate_results` added."""
    records = record_in(tmp_path / "docs", generate_results=[{"text": "x"}])
    image_in(tmp_path / "docs")
    assert len(load_documents(records)) == 1
    assert "'generate_results'" in caplog.text


def test_comments_as_in_the_examples_of_the_original(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('// a list\n[\n  {"segments": [{"text": "see http://x.org // y"}]} // the first\n]\n')
    (document,) = load_documents(path)
    assert document.segments[0].text == "see http://x.org // y"
    path.write_text('[\n  {"segments": [}\n] // no JSON\n')
    with pytest.raises(InputError, match="line 2"):
        load_documents(path)


def test_html_in_notebooks(tmp_path: Path) -> None:
    """Texts are escaped, slots are shown, and images are bounded, also when one cannot be read."""
    big = PIL.Image.effect_noise((2000, 1500), 80).convert("RGB")
    segments = [Text("<script>a & b</script>", role="user"), Image(big, target=big), Image(tmp_path / "<none>.png"),
                Text(generated=None), Image(), *[Image(big.resize((40, 40)))] * 40]  # fmt: skip
    page = Document(segments, id="<x>")._repr_html_()
    assert "<script" not in page
    assert "&lt;script&gt;a &amp; b&lt;/script&gt;" in page
    assert "&lt;x&gt;" in page
    assert "text to generate" in page
    assert "image to generate" in page
    assert "&lt;none&gt;.png" in page
    assert page.count("<img ") == 2 + 30  # the unreadable one counts, too
    assert page.count("a further image") == 10
    assert len(page) < 40_000 + 32 * 8000
    assert "an empty document" in Document()._repr_html_()
    assert "\u2026" in Document([Text("a" * 30_000)])._repr_html_()

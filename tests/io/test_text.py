"""Text and JSON at the edges: what is refused, and that errors say where."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mm_interleaved.io import (
    MAX_LINE,
    InputError,
    OutputError,
    check_list,
    check_strings,
    check_text,
    check_type,
    parse_json,
    read_json,
    read_json_lines,
    read_text,
)

SURROGATES = st.integers(0xD800, 0xDFFF).map(chr)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@given(JSON)
def test_json_that_can_be_written_is_read_as_it_was(value: object) -> None:
    for ascii_only in (True, False):  # escaped pairs of surrogates are whole characters
        assert parse_json(json.dumps(value, ensure_ascii=ascii_only).encode()) == value


@given(st.text(max_size=5), SURROGATES, st.text(max_size=5), JSON)
def test_lone_surrogates_are_refused_wherever_they_stand(before: str, half: str, after: str, other: object) -> None:
    text = before + half + after
    with pytest.raises(InputError, match="lone surrogate") as caught:
        check_text(text)
    assert caught.value.kind == "with a lone surrogate"
    for value in ([other, text], {"a": {"b": text}}, {"a": [other, {text: other}]}):
        with pytest.raises(InputError, match="lone surrogate"):
            check_strings(value)
        with pytest.raises(InputError, match=r"here.*lone surrogate"):
            parse_json(json.dumps(value), "here")
        assert parse_json(json.dumps(value), strict=False) == value  # for files that are checked record by record


def test_errors_name_the_key() -> None:
    with pytest.raises(
        InputError, match=r"^here, a\[1\]\.b: lone surrogate \\ud83d \(half a character\) at position 2"
    ):
        parse_json(r'{"a": [1, {"b": "x \ud83d"}]}', "here")
    with pytest.raises(InputError, match=r"^a, a field's name: lone surrogate"):
        parse_json(r'{"a": {"\udfff": 1}}')


@pytest.mark.parametrize(
    ("content", "problem", "kind"),
    [
        (b"", "empty", "empty"),
        (b" \n\t", "empty", "empty"),
        (b'{"a": 1', r"not JSON: .* at column 8\.", "not JSON"),
        (b'{"a": "b', r"not JSON: Unterminated string starting at column 7\.", "not JSON"),
        (b'{\n"a": 1}\n{"b": 2}', r"not JSON: Extra data at line 3, column 1", "not JSON"),
        (b'{"a": 1} x', "not JSON: Extra data", "not JSON"),
        (b'{"a": "\xe9"}', r"not UTF-8 text \(byte 7\)", "not UTF-8"),
        ('{"a": 1}'.encode("utf-16"), "not UTF-8", "not UTF-8"),
        (b"[" * 100_000, "nested too deeply", "not JSON"),
        (b"1" * 5_000, "a number is too long", "not JSON"),
        (b'{"a": 1, "b": {"c": 1, "c": 2}}', "the key 'c' stands twice", "with a key twice"),
        (b"\x00\x01\x02", "not JSON", "not JSON"),
    ],
)
def test_files_that_are_not_json(tmp_path: Path, content: bytes, problem: str, kind: str) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(InputError, match=problem) as caught:
        read_json(tmp_path / "a.json")
    assert caught.value.where == str(tmp_path / "a.json")
    assert caught.value.kind == kind
    assert caught.value.fix


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_json(tmp_path / "a.json") == {"a": 1}


def test_the_last_of_two_values_counts_in_files_of_others() -> None:
    assert parse_json('{"a": 1, "a": 2}', strict=False) == {"a": 2}


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.json: the file does not exist\. Check the path"):
        read_json(tmp_path / "none.json")
    for path in (tmp_path, tmp_path / ("a" * 300), tmp_path / "a\0b", tmp_path / "\ud83d"):
        with pytest.raises(InputError, match="cannot be read"):
            read_json(path)
    (tmp_path / "large.json").write_text("[1, 2, 3]")
    with pytest.raises(InputError, match="9 bytes are too many, at most 8"):
        read_text(tmp_path / "large.json", limit=8)
    with pytest.raises(InputError, match="must be an object, not a list"):
        read_json(tmp_path / "large.json", dict)


def test_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\n\n  \n{"a": 2}')
    assert list(read_json_lines(path)) == [(f"{path}, line 1", {"a": 1}), (f"{path}, line 4", {"a": 2})]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b'{"a": 1}\n[1]', "line 2: must be an object, not a list"),
        (b'{"a": 1}\n{"a"', r"line 2: not JSON: .* delimiter at column 5\."),
        (b'{"a": 1}{"a": 2}', "line 1: not JSON: Extra data"),
        (b'{"a": 1}\n\n{"a": "\xff"}', "line 3: not UTF-8"),
        (rb'{"a": "\ud83d"}', "line 1, a: lone surrogate"),
        (b"\n\n", "the file is empty"),
    ],
)
def test_lines_that_cannot_be_used(tmp_path: Path, content: bytes, problem: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(InputError, match=problem):
        list(read_json_lines(tmp_path / "a.jsonl"))


def test_an_endless_line_is_not_read_whole(tmp_path: Path) -> None:
    with (tmp_path / "a.jsonl").open("wb") as file:
        file.truncate(4 * MAX_LINE)  # zeros, and no line end
    with pytest.raises(InputError, match="line 1: longer than"):
        list(read_json_lines(tmp_path / "a.jsonl"))


def test_types() -> None:
    assert check_type(1, float, "a") == 1
    assert check_list(["a"], str, "a") == ["a"]
    for value, kind, problem in (
        (True, int, "a whole number, not true or false"), (True, float, "a number, not true or false"),
        (None, str, "a string, not null"), ({}, list, "a list, not an object"), (1.5, int, "a whole number, not a num"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=f"^here: must be {problem}.*do this"):
            check_type(value, kind, "here", "do this")
    with pytest.raises(InputError, match=r"^here\[1\]: must be a string, not a whole number"):
        check_list(["a", 1], str, "here")


def test_errors_travel_between_processes() -> None:
    for kind in (InputError, OutputError):
        error = kind("problem", "where", "fix", "kind")
        copy = pickle.loads(pickle.dumps(error))
        assert (str(copy), vars(copy)) == (str(error), vars(error))
    assert str(InputError("problem", "b").at("a")) == "a, b: problem"
    assert str(InputError("problem?", "b", "fix")) == "b: problem? fix"  # no second full stop
    assert not issubclass(OutputError, ValueError)  # a full disk must not count as a bad sample

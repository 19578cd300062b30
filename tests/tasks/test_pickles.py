"""Published pickles are read as data; nothing in them is run."""

from __future__ import annotations

import contextlib
import os
import pickle
import pickletools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mm_interleaved.io import InputError
from mm_interleaved.tasks.pickles import read_npy, read_pickle

PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(max_size=5)
    | st.binary(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=4),
    max_leaves=12,
)
FEW = settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])


@FEW
@given(PLAIN, st.integers(0, 5))
def test_plain_data(tmp_path: Path, value: object, protocol: int) -> None:
    path = tmp_path / "x.pkl"
    path.write_bytes(pickle.dumps(value, protocol))
    assert read_pickle(path) == value


@FEW
@given(hnp.arrays(st.sampled_from(["<i8", ">i4", "<f4", "S3", "U2", "?"]), hnp.array_shapes(min_side=0, max_dims=3)))
def test_arrays(tmp_path: Path, array: np.ndarray) -> None:
    path = tmp_path / "x.npy"
    np.save(path, array)
    assert_same(read_npy(path), array.tolist())
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(array, 4))
    assert_same(read_pickle(tmp_path / "x.pkl"), array.tolist() if array.size else read_pickle(tmp_path / "x.pkl"))


def assert_same(found: object, wanted: object) -> None:
    np.testing.assert_equal(np.asarray(found), np.asarray(wanted))  # counts NaN as equal


def test_arrays_of_objects(tmp_path: Path) -> None:
    """The two kinds that PororoSV has: one dict, and arrays of arrays."""
    np.save(tmp_path / "d.npy", np.array({"a": ["b"]}, object))
    assert read_npy(tmp_path / "d.npy") == {"a": ["b"]}
    ragged = np.empty(2, object)
    ragged[:] = [np.arange(3), np.zeros(0, np.int64)]
    np.save(tmp_path / "r.npy", ragged)
    assert read_npy(tmp_path / "r.npy") == [[0, 1, 2], []]
    (tmp_path / "s.pkl").write_bytes(pickle.dumps({"n": np.int64(3), "f": np.float32(0.5), "s": np.str_("x")}))
    assert read_pickle(tmp_path / "s.pkl") == {"n": 3, "f": 0.5, "s": "x"}


def test_what_python_2_wrote(tmp_path: Path) -> None:
    """Byte strings of old pickles are Latin-1 text."""
    (tmp_path / "old.pkl").write_bytes(b"(dp0\nS'caf\\xe9'\np1\n(lp2\nS'x'\np3\nas.")
    assert read_pickle(tmp_path / "old.pkl") == {"café": ["x"]}


class Runs:
    def __init__(self, call: object, *arguments: object) -> None:
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> tuple:
        return self.call, self.arguments


@pytest.mark.parametrize(
    "call",
    [(os.system, "touch {0}"), (eval, "open('{0}', 'w')"), (np.load, "{0}"), (Path, "{0}"), (getattr, 1, "real")],
)
def test_nothing_is_run(tmp_path: Path, call: tuple) -> None:
    mark = tmp_path / "ran"
    function, *arguments = call
    value = Runs(function, *[a.format(mark) if isinstance(a, str) else a for a in arguments])
    (tmp_path / "bad.pkl").write_bytes(pickle.dumps({"a": value}))
    np.save(tmp_path / "bad.npy", np.array({"a": value}, object))
    for read, name in ((read_pickle, "bad.pkl"), (read_npy, "bad.npy")):
        with pytest.raises(InputError, match=r"asks for .*; it was not run") as raised:
            read(tmp_path / name)
        assert name in str(raised.value)
    assert not mark.exists()


@pytest.mark.parametrize(
    "state",
    [(1, (2,), np.dtype("O"), False, b"\0" * 16), (1, (3,), np.dtype("<i8"), False, b"\0" * 8),
     (1, (1,), np.dtype([("a", "O")]), False, b"\0" * 8), (1, (-1,), np.dtype("<i8"), False, b""),
     (1, (2**40,), np.dtype("<i8"), False, b"\0" * 8)],
)  # fmt: skip
def test_forged_arrays(tmp_path: Path, state: tuple) -> None:
    """What would make numpy itself read foreign memory, or trip."""

    class Forged:
        def __reduce__(self) -> tuple:
            return np._core.multiarray._reconstruct, (np.ndarray, (0,), b"b"), state

    (tmp_path / "x.pkl").write_bytes(pickle.dumps(Forged(), 2))
    with pytest.raises(InputError):
        read_pickle(tmp_path / "x.pkl")


@pytest.mark.parametrize("code", [b"T", b"\x8b"])
def test_lengths_that_lead_back(tmp_path: Path, code: bytes) -> None:
    """An argument of -5 bytes ends before it begins, at its own opcode."""
    (tmp_path / "x.pkl").write_bytes(code + b"\xfb\xff\xff\xff.")
    with pytest.raises(InputError, match="a broken pickle: it has an argument of -5 bytes"):
        read_pickle(tmp_path / "x.pkl")


@pytest.mark.parametrize("keeps", [b"r\xf0\xff\xff\xff", b"p4000000000\n", b"p-1\n", b"p1_0e9\n"])
def test_numbers_that_would_fill_the_memory(tmp_path: Path, keeps: bytes) -> None:
    (tmp_path / "x.pkl").write_bytes(b"\x80\x02]" + keeps + b".")
    with pytest.raises(InputError, match="a broken pickle"):
        read_pickle(tmp_path / "x.pkl")


def test_lists_of_the_same_lists(tmp_path: Path) -> None:
    """A few hundred bytes that stand for 10^12 values."""
    value: list = ["x"]
    for _ in range(12):
        value = [value] * 10
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(value, 4))
    with pytest.raises(InputError, match="repeats its parts too often"):
        read_pickle(tmp_path / "x.pkl")
    (tmp_path / "x.pkl").write_bytes(pickle.dumps([["a"] * 5] * 5, 4))
    assert read_pickle(tmp_path / "x.pkl") == [["a"] * 5] * 5


@FEW
@given(st.data())
def test_damaged_files(tmp_path: Path, data: st.DataObject) -> None:
    """Whatever the bytes are: data or a `InputError`."""
    whole = pickle.dumps({"a": [1, "b"], "c": np.arange(3), "d": np.array([None, "x"], object)}, 4)
    cut = data.draw(st.integers(0, len(whole)))
    noise = data.draw(st.binary(max_size=8))
    content = whole[:cut] + noise + whole[data.draw(st.integers(cut, len(whole))) :]
    for name, read in (("x.pkl", read_pickle), ("x.npy", read_npy)):
        (tmp_path / name).write_bytes(content)
        with contextlib.suppress(InputError):
            read(tmp_path / name)


def test_the_forged_pickle_is_one() -> None:
    """Guards the tests above against testing nothing."""
    assert any(op.name == "REDUCE" for op, _, _ in pickletools.genops(pickle.dumps(Runs(os.system, "x"))))

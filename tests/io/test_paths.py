"""Names may not leave their folder; symbolic links of the user may."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mm_interleaved.io import InputError, find_file, resolve_inside


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "root" / "sub").mkdir(parents=True)
    (tmp_path / "root" / "sub" / "a.png").write_bytes(b"a")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "b.png").write_bytes(b"b")
    (tmp_path / "secret.png").write_bytes(b"c")
    return tmp_path / "root"


@pytest.mark.parametrize("name", ["sub/a.png", "./sub/a.png", "sub/../sub/a.png", "sub//a.png"])
def test_names_inside(root: Path, name: str) -> None:
    found = find_file(root, name)
    assert found == root / "sub" / "a.png"
    assert ".." not in found.parts


@pytest.mark.parametrize("name", ["../secret.png", "sub/../../secret.png", "/etc/hosts", "..", "../root2/a.png"])
def test_names_that_lead_out(root: Path, name: str) -> None:
    with pytest.raises(InputError, match="lies outside the folder") as caught:
        resolve_inside(root, name, "here")
    assert (caught.value.kind, caught.value.where) == ("outside its folder", "here")


def test_links_are_followed(root: Path, tmp_path: Path) -> None:
    (root / "val2014").symlink_to(tmp_path / "elsewhere")
    (root / "link.png").symlink_to(tmp_path / "secret.png")
    assert find_file(root, "val2014/b.png").read_bytes() == b"b"
    assert find_file(root, "link.png").read_bytes() == b"c"
    # The name goes back to the root, whatever the system makes of `..` behind a link.
    with pytest.raises(InputError, match="does not exist"):
        find_file(root, "val2014/../secret.png")


def test_roots_that_are_links_or_relative(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "alias").symlink_to(root)
    monkeypatch.chdir(tmp_path)
    for folder in (tmp_path / "alias", Path("alias"), Path("root"), Path("./alias/../root"), Path("root/sub/..")):
        assert find_file(folder, "sub/a.png").read_bytes() == b"a"
        assert find_file(folder, str(root / "sub" / "a.png")).read_bytes() == b"a"
        with pytest.raises(InputError, match="outside"):
            find_file(folder, "../secret.png")
    assert find_file(Path("."), "root/sub/a.png").read_bytes() == b"a"
    with pytest.raises(InputError, match="outside"):
        find_file(Path("."), "../secret.png")


def test_a_limit_holds_for_links_too(root: Path, tmp_path: Path) -> None:
    (root / "link.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(InputError, match="outside"):
        find_file(root, "link.png", limit=root)
    assert find_file(root, "link.png", limit=tmp_path) == (tmp_path / "secret.png").resolve()
    assert find_file(root, "../secret.png", limit=tmp_path).read_bytes() == b"c"
    with pytest.raises(InputError, match="outside"):
        find_file(root, "../../secret.png", limit=tmp_path)
    with pytest.raises(InputError, match="outside"):
        find_file(root, "sub/a.png", limit=tmp_path / "elsewhere")


@pytest.mark.parametrize(
    ("name", "problem", "kind"),
    [
        ("", "no name of a file", "without a name"),
        (" ", "no name of a file", "without a name"),
        (None, "None is no name", "without a name"),
        (7, "7 is no name", "without a name"),
        ("a\0b", "no name of a file", "without a name"),
        ("\ud83d.png", "lone surrogate", "with a lone surrogate"),
        ("https://example.org/a.png", "is a URL", "is a URL"),
        ("none.png", "'none.png' does not exist. Paths are relative to", "missing"),
        ("sub/a.png/b", "does not exist", "missing"),
        ("sub", "'sub' is a folder", "is a folder"),
        ("loop", "goes round in circles", "missing"),
        ("loop/a.png", "goes round in circles", "missing"),
        ("a" * 300, r"'a{60}\.\.\.' is no path: File name too long", "missing"),
    ],
)
def test_names_that_cannot_be_used(root: Path, name: object, problem: str, kind: str) -> None:
    (root / "loop").symlink_to("loop")
    with pytest.raises(InputError, match=problem) as caught:
        find_file(root, name, "here")
    assert (caught.value.kind, caught.value.where) == (kind, "here")


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    folder.mkdir()
    (folder / "a.png").write_bytes(b"a")
    assert find_file(folder, "a.png").read_bytes() == b"a"

from __future__ import annotations

from pathlib import Path

import PIL.Image
import pytest

from mm_interleaved.cli import main


def run(*arguments: object) -> None:
    with pytest.raises(SystemExit) as ended:
        main([str(a) for a in ("toyworld", *arguments)])
    assert not ended.value.code


def fails(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    with pytest.raises(SystemExit) as ended:
        main([str(a) for a in ("toyworld", *arguments)])
    assert ended.value.code
    return " ".join(capsys.readouterr().err.split())


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.slow
def test_the_number_of_workers_changes_nothing(tmp_path: Path) -> None:
    arguments = ("write", "--format", "coco", "-n", 210, "--size", 48, "--split", "val", "--seed", 4)
    run(*arguments, "--out", tmp_path / "one", "--workers", 1)
    run(*arguments, "--out", tmp_path / "three", "--workers", 3)
    one = contents(tmp_path / "one")
    assert len(one) == 210 + 4
    assert one == contents(tmp_path / "three")


def test_write_prints_the_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("write", "--format", "pairs", "--out", tmp_path / "x", "-n", 3, "--size", 48)
    assert capsys.readouterr().out.strip() == str(tmp_path / "x")
    assert (tmp_path / "x" / "0000000.txt").is_file()


def test_write_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    assert "is not empty" in fails(capsys, "write", "--format", "pairs", "--out", tmp_path / "full", "-n", 1)
    assert "formats are" in fails(capsys, "write", "--format", "x", "--out", tmp_path / "new", "-n", 1)
    assert "at least 1" in fails(capsys, "write", "--format", "pairs", "--out", tmp_path / "new", "-n", 0)
    assert "splits are" in fails(
        capsys, "write", "--format", "pairs", "--out", tmp_path / "new", "-n", 1, "--split", "x"
    )
    assert (tmp_path / "full" / "file").read_text() == "mine"


def test_show_draws_a_sheet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("show", "--out", tmp_path / "sheet.png", "-n", 4, "--size", 48)
    sheet = PIL.Image.open(tmp_path / "sheet.png").convert("RGB")
    assert sheet.width > 48
    assert len(sheet.getcolors(1 << 24)) > 50
    run("show", "--out", tmp_path / "again.png", "-n", 4, "--size", 48)
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "sheet.png").read_bytes()
    run("show", "--out", tmp_path / "stories.png", "-n", 2, "--size", 48, "--form", "story")
    assert (tmp_path / "stories.png").read_bytes() != (tmp_path / "sheet.png").read_bytes()


def test_show_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "forms are" in fails(capsys, "show", "--out", tmp_path / "x.png", "--form", "novel")
    assert "splits are" in fails(capsys, "show", "--out", tmp_path / "x.png", "--split", "novel")
    assert "does not exist" in fails(capsys, "show", "--out", tmp_path / "no" / "x.png", "-n", 1)

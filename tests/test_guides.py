"""What the pages without tests of their own show works, and every command of every page exists."""

from __future__ import annotations

import contextlib
import json
import re
import runpy
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import typer.core
import typer.main
import yaml

from mm_interleaved.cli import app
from mm_interleaved.cli.plugins import COMMANDS
from mm_interleaved.configuration import make_config
from mm_interleaved.data import DataConfig
from mm_interleaved.document import Document, load_documents

from .cli.conftest import Outcome, mmi
from .test_docs import READ

__all__ = ["mmi"]
ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
QUICK = ["num_inference_steps=2", "max_new_tokens=4", "--device", "cpu"]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def examples(page: Path) -> dict[str, str]:
    """The marked blocks of a page by name."""
    return dict(re.findall(r"<!-- example: (\S+) -->\n```\w+\n(.*?)```", page.read_text(), re.DOTALL))


def commands(text: str) -> list[list[str]]:
    """The command lines of `mmi` in the text of a block."""
    joined = text.replace("\\\n", " ")
    return [shlex.split(line, comments=True)[1:] for line in joined.splitlines() if re.match(r" *mmi ", line)]


def shown(page: Path) -> list[list[str]]:
    """The command lines of `mmi` in all blocks of a page."""
    text = page.read_text()
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    return commands("\n".join([*blocks(page, "sh"), *re.findall(r"^ {4}(mmi .*)$", prose, re.MULTILINE)]))


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    shutil.copytree(ROOT / "examples/images", tmp_path / "images")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", [p for p in READ if shown(p)], ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_exists_with_its_options(page: Path) -> None:
    root = typer.main.get_command(app)
    for arguments in shown(page):
        if arguments[0].startswith("-") or arguments[0] in ("dots", *COMMANDS):  # of plug-ins
            continue
        with root.make_context("mmi", list(arguments)) as context:
            name, command, rest = root.resolve_command(context, list(arguments))  # type: ignore[attr-defined]
            while isinstance(command, typer.core.TyperGroup) and rest:  # `mmi data check`
                name, command, rest = command.resolve_command(context, rest)
            if "--help" not in rest:
                with contextlib.closing(command.make_context(name, rest, parent=context)) as parsed:
                    assert parsed.params is not None


@pytest.mark.slow
def test_the_quick_start(elsewhere: Path, mmi: Callable[..., Outcome]) -> None:
    found = examples(DOCS / "quickstart.md")
    Path("story.json").write_text(found["story.json"])
    for arguments in commands(found["generate"]):
        assert mmi(*arguments, *QUICK).code == 0
    assert {"report.html", "results.json"} <= {path.name for path in (elsewhere / "story").iterdir()}
    exec(compile(found["python"], "docs/quickstart.md", "exec"), {"__name__": "example"})
    assert Path("ball.png").is_file()


def test_documents(elsewhere: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = examples(DOCS / "guides/documents.md")
    for name in ("house.json", "chat.json"):
        Path(name).write_text(found[name])
        assert len(load_documents(name)) == 1
    names: dict[str, object] = {}
    exec(compile(found["python"], "docs/guides/documents.md", "exec"), names)
    assert "[False, False, False, True]" in capsys.readouterr().out
    same, document = names["same"], names["document"]
    assert isinstance(same, Document)
    assert isinstance(document, Document)
    assert same.to_dict() == document.to_dict()


@pytest.mark.slow
def test_generation(elsewhere: Path, mmi: Callable[..., Outcome], capsys: pytest.CaptureFixture[str]) -> None:
    found = examples(DOCS / "guides/generation.md")
    for arguments in commands(found["commands"]):
        said = mmi(*arguments, *QUICK)
        assert said.code == 0, said.err
    exec(compile(found["stream"], "docs/guides/generation.md", "exec"), {"__name__": "example"})
    assert "segments, ended by slots" in capsys.readouterr().out
    assert Path("car.png").is_file()
    exec(compile(found["alone"], "docs/guides/generation.md", "exec"), {"__name__": "example"})
    assert "[2, 3, 128, 128]" in capsys.readouterr().out


def test_presets_are_those_of_the_code() -> None:
    from mm_interleaved.generation import IMAGE_PRESETS, TEXT_PRESETS

    text = (DOCS / "guides/generation.md").read_text().split("## Settings")[1].split("## As a stream")[0]
    rows = "".join(re.findall(r"^\| (`.*?) \|", text, re.MULTILINE))
    assert {*TEXT_PRESETS, *IMAGE_PRESETS} <= set(re.findall(r"`([\w-]+)`", rows))


def test_records_of_the_data_formats() -> None:
    records = [json.loads(block) for block in blocks(DOCS / "data_formats.md", "json")]
    documents = [Document.from_dict(record) for record in records if record.keys() & {"segments", "messages"}]
    assert len(documents) == 2
    assert [sorted(record) for record in records[2:]] == [
        ["caption", "image"], ["image_info", "similarity_matrix", "text_list"], ["images", "texts"],
    ]  # fmt: skip


def test_excerpts_of_the_data_guide() -> None:
    text = (DOCS / "guides/data.md").read_text()
    excerpts = re.findall(r"\n\n((?: {4}\S.*\n| {4,}.*\n)+)", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))
    excerpts = [excerpt for excerpt in excerpts if not excerpt.strip().startswith("mmi")]
    assert len(excerpts) == 2
    for excerpt in excerpts:
        found = yaml.safe_load(excerpt)
        source = found[0] if isinstance(found, list) else {"type": "toyworld", "name": "toy", **found}
        assert make_config({"sources": [source]}, DataConfig).sources


def test_python_for_ray_is_python() -> None:
    found = blocks(DOCS / "guides/batch.md", "python")
    assert len(found) == 2
    for code in found:
        compile(code, "docs/guides/batch.md", "exec")


@pytest.mark.slow
def test_the_card_of_the_small_model(elsewhere: Path) -> None:
    (code,) = blocks(ROOT / "src/mm_interleaved/pretrained/small/README.md", "python")
    exec(compile(code, "README.md", "exec"), {"__name__": "example"})


# ---- reference pages from the code


@pytest.fixture(scope="module")
def describe() -> dict[str, Callable[[], str]]:
    found = runpy.run_path(str(ROOT / "scripts/describe_interface.py"), run_name="described")
    return found["KINDS"]


def test_every_setting_has_a_meaning(describe: dict[str, Callable[[], str]]) -> None:
    rows = re.findall(r"^\| `.*\|$", describe["settings"](), re.MULTILINE)
    assert len(rows) > 200
    assert not [row for row in rows if row.endswith("|  |")]


def test_every_command_and_option_has_a_meaning(describe: dict[str, Callable[[], str]]) -> None:
    text = describe["commands"]()
    for name in typer.main.get_command(app).commands:  # type: ignore[attr-defined]
        assert f"## mmi {name}\n" in text
    assert "### mmi toyworld write\n" in text  # of a plug-in
    assert not re.findall(r"^\| `.*\|  \|$", text, re.MULTILINE)

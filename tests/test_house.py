"""Rules of the house that a machine can check."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "mm_interleaved"
ROOMS = [
    "document", "files", "validation", "configuration", "toyworld", "ops", "model", "processor", "generation", "data",
    "metrics", "tasks", "evaluation", "training", "pretrained", "bench", "integrations", "cli",
]  # fmt: skip
FILES = sorted(SOURCE.rglob("*.py"))


def room(parts: tuple[str, ...]) -> str:
    return parts[0].removesuffix(".py")


def imported(path: Path) -> list[tuple[str, ...]]:
    """Modules of this package that a file imports, without the package's name."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = path.relative_to(SOURCE).parts[: -node.level]
            names = [node.module] if node.module else [alias.name for alias in node.names]
            found += [(*base, *name.split(".")) for name in names]
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
            found += [tuple(n.split(".")[1:]) for n in names if n.split(".")[0] == "mm_interleaved"]
    return found


def test_every_file_is_in_a_room() -> None:
    assert {room(p.relative_to(SOURCE).parts) for p in FILES} == {*ROOMS, "__init__"}


@pytest.mark.parametrize("path", [p for p in FILES if p.parent != SOURCE or p.name != "__init__.py"], ids=str)
def test_imports_point_down(path: Path) -> None:
    here = room(path.relative_to(SOURCE).parts)
    for module in imported(path):
        if module and module != ("__version__",):
            assert ROOMS.index(room(module)) <= ROOMS.index(here), f"{here} imports {'.'.join(module)}"


@pytest.mark.parametrize("path", FILES, ids=str)
def test_nothing_catches_everything(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None
            assert getattr(node.type, "id", "") not in ("Exception", "BaseException")


def test_documents_know_no_torch() -> None:
    for path in (SOURCE / "document").glob("*.py"):
        assert not re.search(r"^(import|from) torch", path.read_text(), re.MULTILINE)


def test_the_lock_file_pins_versions_and_nothing_else() -> None:
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9_.-]+==[A-Za-z0-9.]+", line) for line in pins)
    names = {re.split("==", line)[0].lower().replace("_", "-") for line in pins}
    project = (ROOT / "pyproject.toml").read_text()
    wanted = re.findall(r'^    "([a-z0-9_-]+)>=', project, re.MULTILINE)
    assert wanted
    assert {w.replace("_", "-") for w in wanted} <= names

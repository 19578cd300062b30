"""The documentation hangs together: links, anchors, and the sections that code cites."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CITED = ("docs/model.md", "docs/data_formats.md")


def tracked(*patterns: str) -> list[Path]:
    listed = subprocess.run(["git", "ls-files", *patterns], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:  # an archive without git
        return sorted(path for pattern in patterns for path in ROOT.rglob(pattern) if ".venv" not in path.parts[0])
    return [ROOT / name for name in listed.stdout.splitlines() if (ROOT / name).is_file()]


PAGES = tracked("*.md")


def headings(page: Path) -> list[str]:
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    return re.findall(r"^#+ (.+)$", text, re.MULTILINE)


def anchor(heading: str) -> str:
    """As GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    prose = re.sub(r"^```.*?^```|`[^`\n]*`", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        path, _, section = target.partition("#")
        if "://" in target:
            continue
        found = page.parent / path if path else page
        if not found.exists() or (section and section not in map(anchor, headings(found))):
            broken.append(target)
    assert not broken


def test_cited_sections_exist() -> None:
    """Comments cite sections by their headings: `docs/model.md, "UNet"`."""
    wrong = []
    known = {name: headings(ROOT / name) for name in CITED}
    assert all(len(set(found)) == len(found) for found in known.values())  # so that a citation is unambiguous
    for path in tracked("*.py", "*.yaml"):
        text = re.sub(r"\s*\n[ #]*", " ", path.read_text())
        for name in CITED:
            for section in re.findall(rf'{re.escape(name)}, "([^"]+)"', text):
                if section not in known[name]:
                    wrong.append(f"{path.relative_to(ROOT)}: {name}, {section!r}")
    assert not wrong


def test_every_page_is_in_the_index() -> None:
    index = (ROOT / "docs" / "README.md").read_text()
    pages = [page.relative_to(ROOT / "docs") for page in tracked("docs/*.md") if page.name != "README.md"]
    assert pages
    assert not [page for page in pages if f"({page})" not in index]


def test_pages_that_code_names_exist() -> None:
    named = re.compile(r"\b(?:docs|dev)/[\w/.-]+\.(?:md|png|json)\b")
    wrong = [
        f"{path.relative_to(ROOT)}: {name}"
        for path in tracked("*.py", "*.yaml", "*.toml")
        for name in named.findall(path.read_text())
        if not (ROOT / name).exists()
    ]
    assert not wrong

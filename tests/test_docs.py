"""The documentation hangs together: links, anchors, and the sections that code cites."""

from __future__ import annotations

import ast
import re
import subprocess
import tomllib
from collections import Counter
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


# ---- code blocks

READ = [page for page in PAGES if page.relative_to(ROOT).parts[0] not in ("tests", "benchmarks", "dev")]
BLOCKS = tomllib.loads((ROOT / "tests/blocks.toml").read_text())


def count_blocks(page: Path) -> Counter[str]:
    """How many blocks of each language a page has, and how many indented ones."""
    text = page.read_text()
    found = Counter(re.findall(r"^```(\w*)\n.*?^```", text, re.MULTILINE | re.DOTALL))
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    found["indented"] = len(re.findall(r"(?<=\n\n)(?: {4}\S.*\n)+", prose))
    return +found


@pytest.mark.parametrize("page", READ, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_code_block_is_run_or_says_why_not(page: Path) -> None:
    name = str(page.relative_to(ROOT))
    entry = BLOCKS.get(name, {})
    assert entry.keys() <= {"run", "parsed", "shown", "by", "why"}
    listed = sum((Counter(entry.get(kind, {})) for kind in ("run", "parsed", "shown")), Counter())
    assert count_blocks(page) == listed, f"add the blocks of {name} to tests/blocks.toml, and a test that runs them"
    assert "by" in entry or not ("run" in entry or "parsed" in entry)
    assert "why" in entry or not ("shown" in entry or "parsed" in entry)
    assert all((ROOT / test).is_file() for test in entry.get("by", []))


def test_no_page_of_blocks_is_gone() -> None:
    assert not BLOCKS.keys() - {str(page.relative_to(ROOT)) for page in READ}


# ---- error messages

OURS = (ROOT / "docs/faq.md").read_text().partition("## Messages of other programs")[0]


def messages() -> set[str]:
    """The strings of the sources, with `…` for what is filled in."""
    found = set(re.findall(r'echo "([^"]+)"', (ROOT / "scripts/setup").read_text()))
    for path in tracked("src/mm_interleaved/*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                found.add("".join(str(v.value) if isinstance(v, ast.Constant) else "…" for v in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.add(node.value)
    return found


def test_messages_that_are_explained_exist() -> None:
    known = messages()
    quoted = re.findall(r"^### `(.+)`$", OURS, re.MULTILINE)
    assert len(quoted) >= 30
    assert len(quoted) == OURS.count("\n### ")
    assert not [message for message in quoted if not any(message in text for text in known)]


# ---- the site

NAV = (ROOT / "mkdocs.yml").read_text().partition("\nnav:\n")[2]


def test_every_page_is_in_the_navigation() -> None:
    listed = set(re.findall(r"([\w/.-]+\.md)$", NAV, re.MULTILINE))
    pages = {str(page.relative_to(ROOT / "docs")) for page in tracked("docs/*.md")}
    assert {name for name in listed if not name.startswith("repository/")} == pages
    assert all((ROOT / name.removeprefix("repository/")).is_file() for name in listed - pages)

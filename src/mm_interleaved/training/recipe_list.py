"""The names of the package's recipes. This module imports nothing heavy, so that the list is shown at once."""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parents[1] / "recipes"


def list_recipes() -> dict[str, str]:
    """The descriptions of the package's recipes by name."""
    files = sorted(path for path in FOLDER.glob("*.yaml") if not path.name.startswith("_"))
    return {path.stem: path.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ") for path in files}

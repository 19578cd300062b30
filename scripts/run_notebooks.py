"""Runs the notebooks of examples/ from start to end, in a copy of that folder; what they show is not kept.

python scripts/run_notebooks.py [NOTEBOOK ...]
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

EXAMPLES = Path(__file__).parents[1] / "examples"
SECONDS = 120  # of a cell


def run(notebook: Path) -> str | None:
    """Run a notebook; returns why it cannot be accepted; None: it can."""
    content = nbformat.read(notebook, as_version=4)
    nbformat.validate(content)
    if any(cell.get("outputs") or cell.get("execution_count") for cell in content.cells):
        return "it has outputs; remove them before it is committed"
    with tempfile.TemporaryDirectory() as folder:
        place = shutil.copytree(EXAMPLES, Path(folder) / "examples")
        client = NotebookClient(content, timeout=SECONDS, kernel_name="python3",
                                resources={"metadata": {"path": str(place)}})  # fmt: skip
        try:
            client.execute()
        except CellExecutionError as error:
            return str(error)
    return None


def main() -> int:
    """Run all notebooks, or those that are named; the exit status is 1 if one fails."""
    failed = False
    for notebook in [Path(name) for name in sys.argv[1:]] or sorted(EXAMPLES.glob("*.ipynb")):
        begun, error = time.monotonic(), run(notebook)
        failed |= error is not None
        print(f"{notebook.name}: {error or 'ran'} ({time.monotonic() - begun:.0f} s)", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())

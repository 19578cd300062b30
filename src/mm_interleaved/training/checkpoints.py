"""Checkpoint folders of a run: written aside, then renamed, so that whatever bears the name is whole."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from ..io import read_json

ASIDE = "checkpoint.incomplete"
_NAME = re.compile(r"checkpoint-(\d+)")


def list_checkpoints(run: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first."""
    found = []
    for folder in run.glob("checkpoint-*"):
        match = _NAME.fullmatch(folder.name)
        if match and (folder / "trainer_state.json").is_file():
            found.append((int(match[1]), folder))
    return [folder for _, folder in sorted(found)]


def find_resume(run: Path, resume: str) -> Path | None:
    """The checkpoint to go on from.

    Args:
        run: folder of the run.
        resume: `auto`, `never`, or a checkpoint folder.

    Raises:
        ValueError: the named folder is no checkpoint; or `never`, but the run has some, which would be overwritten.
    """
    own = list_checkpoints(run)
    if resume == "auto":
        return own[-1] if own else None
    if resume == "never":
        if own:
            raise ValueError(f"'{run}' has checkpoints already; choose another 'output', or resume=auto to go on")
        return None
    folder = Path(resume)
    if not (folder / "trainer_state.json").is_file():
        raise ValueError(f"resume: '{folder}' is no checkpoint of a run (it has no trainer_state.json)")
    return folder


def step_of(checkpoint: Path) -> int:
    """The step after which a checkpoint was written.

    Raises:
        ValueError: its state is damaged.
    """
    path = checkpoint / "trainer_state.json"
    try:
        return int(read_json(path)["global_step"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"'{path}' cannot be read ({error}); resume from another checkpoint") from None


def prune(run: Path, keep: int) -> None:
    """Remove all but the `keep` newest checkpoints."""
    for folder in list_checkpoints(run)[:-keep]:
        shutil.rmtree(folder)

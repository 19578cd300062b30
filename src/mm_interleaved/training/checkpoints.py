"""Checkpoint folders of a run: written under another name, then renamed, each with a manifest of its files.

    manifest.json    {"files": {name: {"size": bytes, "sha256": digest}}}

The manifest shows whether a file was damaged or changed since it was written, before anything is loaded.
"""

from __future__ import annotations

import hashlib
import logging
import re
import shutil
from pathlib import Path

from ..configuration import describe_differences, read_settings
from ..io import InputError, read_json, write_json
from ..validation import parse
from .config import OptimizerConfig

ASIDE = "checkpoint.incomplete"
MANIFEST = "manifest.json"
SETTINGS = "config.yaml"
log = logging.getLogger(__name__)
_NAME = re.compile(r"checkpoint-(\d+)")


def list_checkpoints(run: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    found = []
    for folder in run.glob("checkpoint-*"):
        match = _NAME.fullmatch(folder.name)
        if match and (folder / "trainer_state.json").is_file():
            found.append((int(match[1]), folder))
    return [folder for _, folder in sorted(found)]


def write_manifest(folder: Path) -> None:
    """Note the size and digest of every file of a checkpoint; its last file to be written."""
    files = {str(p.relative_to(folder)): {"size": p.stat().st_size, "sha256": _digest(p)}
             for p in sorted(folder.rglob("*")) if p.is_file() and p.name != MANIFEST}  # fmt: skip
    write_json(folder / MANIFEST, {"files": files})


def find_damage(folder: Path) -> str:
    """What is wrong with a checkpoint, naming the file; "" if nothing is.

    One without a manifest, of an earlier version, only has to have a state of the optimizer and of the schedule.
    """
    if not (folder / MANIFEST).is_file():
        sharded = any(path.is_dir() for path in folder.iterdir())  # DeepSpeed and FSDP write folders
        missing = [n for n in ("optimizer.pt", "scheduler.pt") if not sharded and not (folder / n).is_file()]
        return f"{missing[0]} is missing" if missing else ""
    try:
        for name, about in read_json(folder / MANIFEST)["files"].items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != about["size"]:
                return f"{name} has {path.stat().st_size} bytes instead of {about['size']}"
            if _digest(path) != about["sha256"]:
                return f"{name} has other content than was written"
    except (InputError, OSError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} cannot be read ({error})"
    return ""


def _digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def find_resume(run: Path, resume: str) -> Path | None:
    """The checkpoint to resume from: the newest undamaged one, with a warning about each damaged one after it.

    Args:
        run: folder of the run.
        resume: `auto`, `never`, or a checkpoint folder.

    Raises:
        ValueError: the named folder is no checkpoint or a damaged one; all are damaged; or `never`, but the run has
            some, which would be overwritten.
    """
    own = list_checkpoints(run)
    if resume == "auto":
        return _newest_whole(own)
    if resume == "never":
        if own:
            raise ValueError(f"'{run}' has checkpoints already; choose another 'output', or resume=auto to go on")
        return None
    folder = Path(resume)
    if not (folder / "trainer_state.json").is_file():
        raise ValueError(f"resume: '{folder}' is no checkpoint of a run (it has no trainer_state.json)")
    if damage := find_damage(folder):
        raise ValueError(f"resume: '{folder}' is damaged: {damage}; name another checkpoint, or resume=auto")
    return folder


def _newest_whole(own: list[Path]) -> Path | None:
    damaged = []
    for folder in reversed(own):
        if not (damage := find_damage(folder)):
            for line in damaged:
                log.warning("%s; going on from %s", line, folder)
            return folder
        damaged.append(f"'{folder}' is damaged: {damage}")
    if damaged:
        raise ValueError(f"no checkpoint is whole. {'; '.join(damaged)}. Remove them to start anew")
    return None


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


def check_groups(checkpoint: Path, config: OptimizerConfig) -> None:
    """Check that the optimizer's state in a checkpoint belongs to the same kind of optimizer and parameter groups.

    Raises:
        ValueError: the settings that determine them differ; names them.
    """
    path = checkpoint / SETTINGS
    if not path.is_file():
        return
    old = parse(read_settings(path)["optimizer"], OptimizerConfig, str(path))
    if changes := describe_differences(_group_settings(old), _group_settings(config)):
        raise ValueError(
            f"the optimizer's state in '{checkpoint}' does not fit: {changes}. Keep these settings, or start a new run "
            "from its weights with model.init_from.checkpoint"
        )


def _group_settings(config: OptimizerConfig) -> dict[str, object]:
    """The settings that determine the optimizer's kind and its parameter groups."""
    muon = {"plain": list(config.muon.plain)} if config.kind == "muon" else None
    groups = [group.pattern for group in config.groups]
    return {"optimizer": {"kind": config.kind, "groups": groups, "no_decay": list(config.no_decay), "muon": muon}}


def prune(run: Path, keep: int) -> None:
    """Remove all but the `keep` newest checkpoints."""
    for folder in list_checkpoints(run)[:-keep]:
        shutil.rmtree(folder)

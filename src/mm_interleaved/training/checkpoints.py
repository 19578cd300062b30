"""Checkpoint folders of a run: written under another name, then renamed, each with a manifest of its files.

    manifest.json    {"files": {name: {"size": bytes, "sha256": digest}}}

The manifest shows whether a file was damaged or changed since it was written, before anything is loaded.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ..adapters.settings import AdapterSettings
from ..configuration import describe_differences, read_settings
from ..io import InputError, read_json, write_json, writing
from ..validation import parse
from .config import OptimizerConfig, RunConfig

ASIDE = "checkpoint.incomplete"
MANIFEST = "manifest.json"
SETTINGS = "config.yaml"
BEST, LAST = "best", "last"  # stand for one of the checkpoints
_READERS = 8  # files that are read at once to compute their digests
log = logging.getLogger(__name__)
_NAME = re.compile(r"checkpoint-(\d+)")
_ADAPTER = ("preset", "targets", "rank", "alpha", "dora", "rslora")  # settings that determine its weights


def list_checkpoints(run: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    found = []
    for folder in run.glob("checkpoint-*"):
        match = _NAME.fullmatch(folder.name)
        if match and (folder / "trainer_state.json").is_file():
            found.append((int(match[1]), folder))
    return [folder for _, folder in sorted(found)]


def write_manifest(folder: Path, known: Mapping[str, Any] | None = None) -> None:
    """Note the size and digest of every file of a checkpoint; its last file to be written.

    Args:
        folder: folder of the checkpoint.
        known: the entries of files that other processes have written.
    """
    files = dict(known or {})
    names = [str(p.relative_to(folder)) for p in sorted(folder.rglob("*")) if p.is_file() and p.name != MANIFEST]
    files |= {name: describe_file(folder / name) for name in names if name not in files}
    write_json(folder / MANIFEST, {"files": files})


def describe_file(path: Path) -> dict[str, Any]:
    """The size and digest of a file, as a manifest has them."""
    return {"size": path.stat().st_size, "sha256": _digest(path)}


def find_damage(folder: Path) -> str:
    """What is wrong with a checkpoint, naming the file; "" if nothing is.

    One without a manifest, of an earlier version, only has to have a state of the optimizer and of the schedule.
    """
    if not (folder / MANIFEST).is_file():
        sharded = any(path.is_dir() for path in folder.iterdir())  # DeepSpeed and FSDP write folders
        missing = [n for n in ("optimizer.pt", "scheduler.pt") if not sharded and not (folder / n).is_file()]
        return f"{missing[0]} is missing" if missing else ""
    try:
        files = read_json(folder / MANIFEST)["files"]
        for name, about in files.items():  # first what takes no time
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != about["size"]:
                return f"{name} has {path.stat().st_size} bytes instead of {about['size']}"
        with ThreadPoolExecutor(_READERS) as readers:  # digests are computed outside of the interpreter's lock
            found = dict(zip(files, readers.map(_digest, [folder / name for name in files]), strict=True))
        changed = [name for name, about in files.items() if found[name] != about["sha256"]]
    except (InputError, OSError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} cannot be read ({error})"
    return f"{changed[0]} has other content than was written" if changed else ""


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


def check_groups(checkpoint: Path, config: RunConfig) -> None:
    """Check that the optimizer's state in a checkpoint belongs to the same kind of optimizer and the same parameters.

    Raises:
        ValueError: the settings that determine them differ; names them.
    """
    path = checkpoint / SETTINGS
    if not path.is_file():
        return
    settings = read_settings(path)
    old = parse(settings["optimizer"], OptimizerConfig, str(path))
    adapter = settings.get("adapter")
    adapter = None if adapter is None else parse(adapter, AdapterSettings, str(path))
    before = _group_settings(old, settings.get("trainer", {}), adapter, settings.get("freeze", []))
    now = _group_settings(
        config.optimizer, config.trainer, getattr(config, "adapter", None), getattr(config, "freeze", [])
    )
    if changes := describe_differences(before, now):
        raise ValueError(
            f"the optimizer's state in '{checkpoint}' does not fit: {changes}. Keep these settings, or start a new run "
            "from its weights with model.init_from.checkpoint"
        )


def _group_settings(
    config: OptimizerConfig, trainer: dict[str, Any], adapter: AdapterSettings | None, freeze: Sequence[str]
) -> dict[str, object]:
    """The settings that determine the optimizer's kind and its parameters."""
    muon = {"plain": list(config.muon.plain)} if config.kind == "muon" else None
    groups = [group.pattern for group in config.groups]
    own = {"kind": config.kind, "groups": groups, "no_decay": list(config.no_decay), "muon": muon}
    layers = None if adapter is None else {name: getattr(adapter, name) for name in _ADAPTER}
    return {"optimizer": own, "trainer": {"optim": trainer.get("optim")}, "adapter": layers, "freeze": sorted(freeze)}


def prune(run: Path, keep: int, best: int | None = None) -> None:
    """Remove all but the `keep` newest checkpoints and that of step `best`."""
    for folder in list_checkpoints(run)[:-keep]:
        if folder.name != f"checkpoint-{best}":
            shutil.rmtree(folder)


def point(link: Path, target: str) -> None:
    """Let `link` stand for the folder `target` beside it, also if it stands for another one.

    It is a relative symbolic link. On a file system without them it is a copy, whose files are hard links if possible.
    """
    aside = link.with_name(f".{link.name}.incomplete")
    _remove(aside)
    with writing(link):
        try:
            aside.symlink_to(target, target_is_directory=True)
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.EACCES):
                raise
            shutil.copytree(link.with_name(target), aside, copy_function=_hard_link)
        if not link.is_symlink() and link.is_dir():
            shutil.rmtree(link)
        if link.is_symlink() and not aside.is_symlink():
            link.unlink()
        aside.replace(link)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _hard_link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links either
        shutil.copy2(source, target)

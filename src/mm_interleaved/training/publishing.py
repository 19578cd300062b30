"""The final model in a repository of a model hub. A failed push changes nothing in the folder of the run."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from ..checkpoints.checkpoint import CheckpointError
from ..checkpoints.hub import check_push, push
from ..io import InputError, read_json, write_json
from .config import HubConfig, TrainingError

FILE = "pushed.json"  # in the folder of a run: the repository, and the digest of what it got


class Push:
    """Pushes the final model of a run, unless the repository has it.

    Args:
        config: the repository.
        run: folder of the run.

    Raises:
        ValueError: the repository's name is no name, or nobody is logged in. This is checked before training begins.
    """

    def __init__(self, config: HubConfig, run: Path) -> None:
        self.config, self.path = config, run / FILE
        check_push(config.repo)

    def send(self, model: Path, console: Console) -> None:
        """Push the folder of a model.

        Raises:
            TrainingError: the hub refuses it or cannot be reached; the run itself is complete.
        """
        about = {"repo": self.config.repo, "files": {p.name: p.stat().st_mtime_ns for p in sorted(model.iterdir())}}
        if self._known() == about:
            return
        with console.status(f"pushing to {self.config.repo}"):
            try:
                address = push(model, self.config.repo, self.config.private)
            except CheckpointError as error:
                raise TrainingError(
                    f"the model is trained and saved in '{model}', but was not pushed: {error}. The same command "
                    "pushes it again"
                ) from None
        write_json(self.path, about)
        console.print(f"pushed: {address}", highlight=False)

    def _known(self) -> object:
        try:
            return read_json(self.path)
        except InputError:
            return None

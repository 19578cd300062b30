"""The command `mmi dots`. Help is shown without PyTorch, so a command imports what it needs when it runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def write(
    out: Annotated[Path, typer.Argument(help="The folder to make.")],
    count: Annotated[int, typer.Option("-n", "--count", help="Number of images.", min=1)] = 20,
    seed: Annotated[int, typer.Option(help="Another seed, other images.", min=0)] = 0,
) -> None:
    """Write the files of the task dots: images, and answers.jsonl with the number of dots of each."""
    import numpy as np

    from mm_interleaved.io import atomic_folder

    from .source import draw_dots

    rng = np.random.default_rng(seed)
    lines = []
    with atomic_folder(out) as folder:  # refuses a folder with files, and leaves none that is incomplete
        for index in range(count):
            number = int(rng.integers(1, 10))
            draw_dots(number, rng).save(folder / f"{index}.png")
            lines.append(json.dumps({"image": f"{index}.png", "count": number}) + "\n")
        (folder / "answers.jsonl").write_text("".join(lines), encoding="utf-8")
    typer.echo(out)

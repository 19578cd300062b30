"""The exam of the small model: the same test for each of several models, as a table with intervals and goals.

python benchmarks/exam.py small runs/small/model --split val --output runs/exam        # while choosing
python benchmarks/exam.py small runs/small/model --output runs/exam                    # the test, once
python benchmarks/exam.py --freeze                                                      # after a change of the test

Texts are greedy; one image is generated for each prompt, by the model's defaults. `exam.sha256` has the sums of all
files that make and score the test, as `sha256sum -c` reads them, so results can be compared as long as they hold.
OUTPUT gets a file of each model and `table.md`; a model whose file is complete is not asked again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mm_interleaved.io import write_atomic

ROOT = Path(__file__).resolve().parents[1]
SUMS = Path(__file__).with_name("exam.sha256")
FROZEN = (
    "benchmarks/quality.py", "src/toyworld/assets/*", "src/toyworld/language/*.py", "src/toyworld/detector.py",
    "src/toyworld/draw.py", "src/toyworld/figures.py", "src/toyworld/grounds.py", "src/toyworld/kinds.py",
    "src/toyworld/sampling.py", "src/toyworld/scene.py", "src/toyworld/score.py", "src/toyworld/sprites.py",
    "src/toyworld/stage.py", "src/toyworld/stories.py",
)  # fmt: skip
SEED = 4711
FEWEST = 20  # questions of a type that may be the worst
TASKS = ("captions", "questions", "boxes", "typed", "drawing", "stories")


@dataclass(frozen=True)
class Row:
    """A line of the table.

    Attributes:
        title: what is measured.
        task, name: where `quality.py` writes it.
        goal: in the measure's unit.
        lower: whether less is better.
    """

    title: str
    task: str
    name: str
    goal: float
    lower: bool = False


ROWS = (
    Row("captions: stated facts right", "captions", "facts_right", 0.97),
    Row("captions: objects mentioned", "captions", "mentioned", 0.97),
    Row("questions", "questions", "right", 0.95),
    Row("questions of the worst type", "questions", "worst", 0.85),
    Row("boxes at IoU 0.5", "boxes", "accuracy", 0.90),
    Row("letters in questions", "typed", "glyph", 0.95),
    Row("letters drawn", "drawing", "glyphs_read", 0.75),
    Row("drawing: kind and colour", "drawing", "found_kind_color", 0.95),
    Row("drawing: relations", "drawing", "relations_right", 0.85),
    Row("drawing: surplus objects for each asked for", "drawing", "extras", 0.03, lower=True),
    Row("drawing: all right and nothing else", "drawing", "perfect", 0.70),
    Row("stories: kind and colour", "stories", "found_kind_color", 0.92),
    Row("stories: all right", "stories", "perfect", 0.70),
    Row("stories: whole look kept", "stories", "kept", 0.75),
)


def frozen_sums(root: Path = ROOT) -> dict[str, str]:
    """SHA-256 of each file that makes or scores the test, by its path."""
    paths = sorted({path for pattern in FROZEN for path in root.glob(pattern) if path.is_file()})
    return {path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def changed_files(root: Path = ROOT, sums: Path = SUMS) -> list[str]:
    """Files whose sums are not those of `sums`, new and missing ones too."""
    lines = sums.read_text().splitlines() if sums.is_file() else []
    kept = {path: digest for digest, path in (line.split("  ", 1) for line in lines)}
    found = frozen_sums(root)
    return sorted(path for path in kept.keys() | found.keys() if kept.get(path) != found.get(path))


def freeze() -> None:
    """Write the sums of the files as they are."""
    write_atomic(SUMS, "".join(f"{digest}  {path}\n" for path, digest in frozen_sums().items()))


def value(result: Mapping[str, Any], row: Row) -> tuple[float, list[float] | None] | None:
    """A measure and its interval, or None if it was not asked."""
    task = result.get(row.task, {})
    name = row.name
    if name == "worst":
        types = [key[2:] for key, count in task.items() if key.startswith("n_") and count >= FEWEST]
        if not types:
            return None
        name = min(types, key=lambda one: task[one])
    return (task[name], task.get("intervals", {}).get(name)) if name in task else None


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Each measure with its interval for every model, and the goal; percent, surplus objects as they are."""
    lines = [f"| | {' | '.join(results)} | goal |", "|---" * (len(results) + 2) + "|"]
    for row in ROWS:
        scale, form = (1.0, "{:.2f}") if row.lower else (100.0, "{:.0f}")
        cells = []
        for result in results.values():
            found = value(result, row)
            if found is None:
                cells.append("")
                continue
            mean, interval = found
            bounds = [] if interval is None else [form.format(scale * bound) for bound in interval]
            cells.append(form.format(scale * mean) + (f" ({bounds[0]} to {bounds[1]})" if bounds else ""))
        lines.append(f"| {row.title} | {' | '.join(cells)} | {form.format(scale * row.goal)} |")
    return "\n".join(lines) + "\n"


def label(model: str) -> str:
    """A model's name in the table and of its file."""
    parts = Path(model).resolve().parts if Path(model).is_dir() else (model,)
    return "-".join(parts[-2:])


def asked(options: argparse.Namespace, model: str, output: Path) -> dict[str, Any]:
    """What `quality.py` finds of a model; from its file, if that is of this test and complete."""
    state = {"exam": hashlib.sha256(SUMS.read_bytes()).hexdigest(), "split": options.split, "samples": options.samples,
             "drawn": options.drawn, "model": model}  # fmt: skip
    about = output.with_suffix(".about.json")
    if about.is_file() and json.loads(about.read_text()) == state:
        return json.loads(output.read_text())
    command = [
        sys.executable, ROOT / "benchmarks/quality.py", model, "--split", options.split, "--seed", SEED, "--samples",
        options.samples, "--drawn", options.drawn, "--batch", options.batch, "--device", options.device, "--tasks",
        *options.tasks, "--types", "glyph", "where", "--each", 1, "--images", output.with_suffix(""), "--output",
        output, *(["--steps", options.steps] if options.steps else []),
    ]  # fmt: skip
    subprocess.run([str(word) for word in command], check=True)
    if options.tasks == list(TASKS):
        write_atomic(about, json.dumps(state) + "\n")
    return json.loads(output.read_text())


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help="names or folders")
    parser.add_argument("--split", choices=("val", "test"), default="test")
    parser.add_argument("--samples", type=int, default=400, help="scenes of each task that reads")
    parser.add_argument("--drawn", type=int, default=160, help="captions, and stories, that are drawn")
    parser.add_argument("--steps", type=int, help="of each image; default: that of quality.py")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--output", type=Path, default=Path("runs/exam"), help="folder")
    parser.add_argument(
        "--freeze", action="store_true", help="write the sums of the files that make and score the test"
    )
    options = parser.parse_args(given)
    if not options.freeze and not options.models:
        parser.error("name at least one model, for example: small")
    return options


def main() -> None:
    """Freeze, or ask all models and print the table."""
    options = arguments()
    if options.freeze:
        freeze()
        return
    if changed := changed_files():
        raise SystemExit(
            f"the test is not the frozen one: {', '.join(changed)} changed. Restore these files, or run "
            "`python benchmarks/exam.py --freeze` and ask all models again."
        )
    options.output.mkdir(parents=True, exist_ok=True)
    results = {label(model): asked(options, model, options.output / f"{label(model)}.json") for model in options.models}
    found = table(results)
    write_atomic(options.output / "table.md", found)
    print(found, end="")


if __name__ == "__main__":
    main()

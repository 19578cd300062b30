"""`mmi data check` for the sources of a training run, and for the tasks that it evaluates."""

from __future__ import annotations

import itertools
import time
from dataclasses import field, replace
from pathlib import Path

from rich.table import Table

from ..configuration import load_config
from ..data import DataConfig, DataError, DataReport, ReplayConfig, build_loader
from ..data.report import COUNTS
from ..data.sheet import contact_sheet
from ..evaluation import TaskSuite
from ..io import write_image
from ..pretrained import TOKENIZER
from ..processor import Batch, MMInterleavedProcessor
from ..training.building import build_processor
from ..training.config import InitConfig, ModelConfig
from ..validation import settings
from .console import console, output
from .data_tasks import check_tasks
from .errors import UsageError


@settings
class CheckConfig:
    """The parts of a training configuration that describe data."""

    data: DataConfig
    replay: ReplayConfig | None = None
    evaluation: TaskSuite | None = None
    model: ModelConfig = field(default_factory=lambda: ModelConfig(InitConfig(preset="small")))


def check_training(config: Path, overrides: list[str], batches: int, seconds: float, sheet: Path, rows: int) -> None:
    """Read a sample of every source of a training run, and all files of the tasks that it evaluates.

    Raises:
        UsageError: the settings, a source or the files of a task cannot be used.
    """
    checked = load_config(config, CheckConfig, overrides, partial=True)
    data = checked.data if checked.replay is None else checked.data.with_replay(checked.replay)
    try:
        processor = find_processor(checked.model)
    except (ValueError, OSError) as error:  # the latter of libraries, for files that are damaged
        raise UsageError(str(error)) from None
    failed, samples = [], []
    for index, source in enumerate(data.sources):
        with console.status(f"reading {source.name}"):
            found, report, problem = sample_source(data, index, processor, batches)
        _print_source(source.name, found, report, problem)
        failed += [source.name] if problem else []
        samples += found[:rows]
    if samples:
        write_image(sheet, contact_sheet(samples, processor, rows=1))
        output.print(f"contact sheet: {sheet}")
    problems = [f"these sources cannot be used: {', '.join(failed)}"] if failed else []
    if checked.evaluation is not None:
        try:
            check_tasks(checked.evaluation.chosen())
        except UsageError as error:
            problems.append(str(error))
    if problems:
        raise UsageError("; ".join(problems))
    if seconds:
        _print_speed(data, processor, seconds)


def find_processor(source: ModelConfig) -> MMInterleavedProcessor:
    """The processor of a run. If files of its model are missing, a preset takes their place, which is printed.

    Raises:
        ValueError: the settings contradict each other, or a folder has unsuitable files.
    """
    init = source.init_from
    configs: list[Path] = []  # the image sizes and the longest sequence are in them
    tokenizer = init.checkpoint
    if init.components is not None:
        tokenizer = init.components.llm
        configs = [Path(tokenizer, "config.json"), Path(init.components.clip, "config.json"),
                   Path(init.components.diffusion, "unet", "config.json")]  # fmt: skip
    elif init.checkpoint is not None:
        configs = [Path(init.checkpoint, "config.json")]
    missing = [path for path in configs if not path.is_file()]
    preset = "release" if init.components is not None else "small"
    if missing:
        output.print(f"these files of the model do not exist: {', '.join(map(str, missing))}; sizes are those of the "
                     f"preset '{preset}'", highlight=False, markup=False, soft_wrap=True)  # fmt: skip
        source = replace(source, init_from=InitConfig(preset=preset), weights=[])
    tokenizer = source.tokenizer or tokenizer
    if tokenizer is not None and not Path(tokenizer).exists():
        output.print(f"the tokenizer '{tokenizer}' does not exist; tokens are those of this package's tokenizer",
                     highlight=False, markup=False, soft_wrap=True)  # fmt: skip
        tokenizer = None
    return build_processor(replace(source, tokenizer=str(tokenizer or TOKENIZER)))


def sample_source(
    config: DataConfig, index: int, processor: MMInterleavedProcessor, batches: int
) -> tuple[list[Batch], DataReport, str]:
    """The first batches of one source, its report, and its error."""
    source = replace(config.sources[index], replay=False)
    if config.mix == "row":
        source = replace(source, batch_size=config.batch_size)
    one = replace(config, sources=[source], probabilities=[], replay_share=0.0, sampling="sum", mix="batch",
                  num_workers=0, pin_memory=False, compat=[])  # fmt: skip
    found: list[Batch] = []
    try:
        loader = build_loader(one, processor)
    except DataError as error:
        return [], DataReport(), str(error)
    try:
        for batch in itertools.islice(loader, batches):
            found.append(batch)
    except DataError as error:
        first, *_ = str(error).splitlines()  # the others are counts, which the table has
        return found, loader.report(), first.removesuffix(":")
    return found, loader.report(), ""


def _print_source(name: str, batches: list[Batch], report: DataReport, problem: str) -> None:
    counts, rejected, examples = report.counts(name), report.rejected(name), report.examples(name)
    table = Table(title=f"{name}: a sample", title_justify="left", show_header=False)
    for what in COUNTS:
        table.add_row(what, f"{counts.get(what, 0):,}", "")
    for what, value in batch_statistics(batches).items():
        table.add_row(what, value, "")
    for reason, number in sorted(rejected.items(), key=lambda item: -item[1]):
        table.add_row(f"[yellow]{reason}[/]", f"{number:,}", examples[reason].replace("[", r"\["))
    output.print(table)
    if problem:
        output.print(f"[bold red]{problem}[/]", highlight=False)


def batch_statistics(batches: list[Batch]) -> dict[str, str]:
    """Means over the rows of the batches."""
    if not batches:
        return {}
    rows = sum(len(b.input_ids) for b in batches)
    lengths = [int(n) for b in batches for n in b.attention_mask.sum(1)]
    learned = sum(int((b.labels != -100).sum()) for b in batches)
    images = sum(len(b.image_rows) for b in batches)
    drawn = sum(int(b.image_loss_mask.sum()) for b in batches if b.image_loss_mask is not None)
    places = sum(b.input_ids.numel() for b in batches)
    return {
        "tokens in a row": f"{sum(lengths) / rows:.1f} ({min(lengths)} to {max(lengths)})",
        "images in a row": f"{images / rows:.2f}",
        "tokens learned": f"{learned / sum(lengths):.1%}",
        "images learned": f"{drawn / images:.1%}" if images else "none",
        "padding": f"{1 - sum(lengths) / places:.1%}",
    }


def _print_speed(config: DataConfig, processor: MMInterleavedProcessor, seconds: float) -> None:
    """Print the tokens and images per second of the loader alone, after its first batch."""
    loader = build_loader(replace(config, sampling="forever"), processor)
    tokens = images = rows = 0
    with console.status("measuring the speed"):
        begin = time.perf_counter()
        iterator = iter(loader)
        next(iterator)
        first, start = time.perf_counter() - begin, time.perf_counter()
        while (passed := time.perf_counter() - start) < seconds:
            batch = next(iterator)
            tokens += int(batch.attention_mask.sum())
            images, rows = images + len(batch.image_rows), rows + len(batch.input_ids)
    workers = f"{config.num_workers} worker processes" if config.num_workers else "the main process"
    output.print(
        f"the loader alone, {workers}: {tokens / passed:,.0f} tokens/s, {images / passed:,.1f} images/s, "
        f"{rows / passed:,.1f} rows/s; first batch after {first:.1f} s"
    )

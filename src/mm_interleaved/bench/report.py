"""Presentation of results: a table on the screen, Markdown, plots, and a comparison of two runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.table import Table

from ..io import writing
from .base import Row

COLUMNS = ("line", "case", "value", "reference", "ratio", "bound", "of bound", "peak", "reference's peak", "held", "")


def cells(row: Row) -> list[str]:
    """The cells of a row in the table."""
    peaks = ["-" if p is None else f"{p / 2**20:,.0f} MiB" for p in (row.peak_bytes, row.reference_peak_bytes)]
    return [
        row.line,
        row.case,
        f"{number(row.value)} {row.unit}",
        "-" if row.reference is None else number(row.reference),
        "-" if row.ratio is None else f"{row.ratio:.1f}x",
        "-" if row.bound is None else number(row.bound),
        "-" if row.of_bound is None else f"{row.of_bound:.0%}",
        *peaks,
        "-" if row.reserved_bytes is None else f"{row.reserved_bytes / 2**30:.1f} GiB",
        "; ".join(x for x in ("" if row.lossless else "lossy", row.note) if x),
    ]


def number(value: float) -> str:
    """A number with three significant digits."""
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def line(row: Row) -> str:
    """A row as a line for the screen."""
    _, case, value, reference, ratio, bound, share, peak, reference_peak, held, note = cells(row)
    parts = [f"{row.line:18} {case:58} {value:>16}"]
    if row.reference is not None:
        parts.append(f"reference {reference} ({ratio})")
    if row.bound is not None:
        parts.append(f"bound {bound} ({share})")
    if row.peak_bytes is not None:
        parts.append(f"peak {peak}" + ("" if row.reference_peak_bytes is None else f", reference's {reference_peak}"))
    if row.reserved_bytes is not None:
        parts.append(f"holds {held}")
    return "; ".join([*parts, *([note] if note else [])])


def _weights(result: dict[str, Any]) -> str:
    kind = result.get("quantization", "none")
    return result["dtype"] if kind == "none" else f"{result['dtype']}, language model {kind}"


def markdown(result: dict[str, Any]) -> str:
    """The whole result as Markdown."""
    gpu = result["gpu"] or "no GPU"
    lines = [
        f"# {result['preset']}, {_weights(result)}, {gpu}",
        "",
        f"{result['date']}, `{result['command']}`. {result['processor']}; {gpu}; copies "
        f"{result['bytes_per_second'] / 1e12:.3g} TB/s, multiplies {result['operations_per_second'] / 1e12:.3g} "
        "TFLOP/s; " + ", ".join(f"{k} {v}" for k, v in result["versions"].items()) + ".",
        "",
        "Less is better. *reference* is the plain way in the same run, *bound* what the machine allows, *peak* the "
        "memory that the work needs beyond what was there, *held* all that the process held on the GPU meanwhile.",
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|---|---|" + "---:|" * (len(COLUMNS) - 3) + "---|",
    ]  # fmt: skip
    lines += ["| " + " | ".join(c.replace("|", "/") for c in cells(row)) + " |" for row in rows_of(result)]
    if result["trouble"]:
        lines += ["", *(f"- {t['line']}: {t['reason']}" for t in result["trouble"])]
    return "\n".join(lines) + "\n"


def rows_of(result: dict[str, Any]) -> list[Row]:
    """The rows of a result from a file."""
    known = Row.__dataclass_fields__
    return [Row(**{k: v for k, v in row.items() if k in known}) for row in result["rows"]]


def comparison(a: dict[str, Any], b: dict[str, Any]) -> Table:
    """The table that compares two results row by row."""
    out = Table(title=f"{a['date']} {a['gpu'] or 'CPU'}  :  {b['date']} {b['gpu'] or 'CPU'}")
    for name in ("line", "case", "A", "B", "A / B"):
        out.add_column(name, justify="left" if name in ("line", "case") else "right", no_wrap=True)
    before, after = ({(r.line, r.case): r for r in rows_of(x)} for x in (a, b))
    for key in [*before, *(k for k in after if k not in before)]:
        x, y = before.get(key), after.get(key)
        values = ["-" if r is None else f"{number(r.value)} {r.unit}" for r in (x, y)]
        out.add_row(*key, *values, f"{x.value / y.value:.2f}" if x and y else "-")
    return out


PLOTS = {
    "layer-by-images": ("images", "ms", "An MMFS layer over a whole text"),
    "decode-by-images": ("images", "ms a token", "A token"),
    "session": ("rounds", "s", "A session"),
}


def plots(result: dict[str, Any], folder: Path, stem: str) -> list[Path]:
    """Plot the rows that depend on a number of images or rounds; returns the written files."""
    import matplotlib.pyplot as plt

    written = []
    for name, (across, unit, title) in PLOTS.items():
        rows = [r for r in rows_of(result) if r.line == name and r.x is not None]
        if len(rows) < 2:
            continue
        memory = any(r.peak_bytes is not None for r in rows) and name == "layer-by-images"
        figure, axes = plt.subplots(1, 2 if memory else 1, figsize=(9 if memory else 4.8, 3.4), squeeze=False)
        _curves(axes[0, 0], rows, [("fast", "value"), ("plain reference", "reference"), ("bound", "bound")], 1)
        axes[0, 0].set(xlabel=across, ylabel=unit, title=title)
        if memory:
            _curves(axes[0, 1], rows, [("fast", "peak_bytes"), ("plain reference", "reference_peak_bytes")], 2**20)
            axes[0, 1].set(xlabel=across, ylabel="MiB", title="memory beyond its inputs")
        figure.tight_layout()
        written.append(folder / f"{stem}-{name}.png")
        with writing(written[-1]):
            figure.savefig(written[-1], dpi=100)
        plt.close(figure)
    return written


def _curves(axis: Any, rows: list[Row], kinds: list[tuple[str, str]], scale: float) -> None:
    for label, name in kinds:
        points = [(r.x, getattr(r, name) / scale) for r in rows if getattr(r, name) is not None]
        if points:
            axis.plot(*zip(*points, strict=True), marker="o", markersize=3, label=label)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.set_ylim(bottom=0)
    axis.legend()

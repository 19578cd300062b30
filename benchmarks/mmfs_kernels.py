"""The fused MMFS attention against its plain composition, in one run, with the bounds of the machine beside both.

python benchmarks/mmfs_kernels.py --output benchmarks/results/mmfs_kernels.json                   # one GPU
python benchmarks/mmfs_kernels.py --preset debug --device cpu --dtype float32 --length 64    # to see that it runs

`operator` is the attention alone. `layer` is the whole synchronizer: for inference with values kept and the query side
folded; with gradients as in training, the values projected from the maps. Tokens see the pictures before them, `n`
spread evenly over the text; "all" lets every token see every picture. `decode` is one token behind all of them, on a
GPU inside a CUDA graph. `grid` is one map of the UNet, two drawings with one earlier picture each.

Every time is the median of events; the cache is emptied before each. Bounds count what cannot be avoided: each input
read once, each result written once, the arithmetic of matrix products and samples. `cache_bytes` is what the samples
read through the caches (four neighbours each), which is what binds the kernels.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from machine import describe
from release import Clock, limits
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from mm_interleaved.model import MMInterleavedConfig
from mm_interleaved.model.config import MMFSConfig
from mm_interleaved.model.mmfs import MMFS, PreparedMMFS, VisibleImages
from mm_interleaved.model.vit_adapter import cell_centres
from mm_interleaved.ops import mmfs_attention, why_not_triton


@dataclass
class Case:
    """One synchronizer and who looks at what."""

    name: str
    config: MMFSConfig
    width: int  # of queries
    features: int  # width of the maps
    images: Tensor  # [groups, slots]
    queries: int  # a group
    side: int | None = None  # of the map of queries; None: tokens
    gradients: bool = True

    @property
    def pictures(self) -> int:
        return int(self.images.max()) + 1

    @property
    def shapes(self) -> list[tuple[int, int]]:
        return [(s, s) for s in self.config.levels]

    @property
    def base(self) -> int:
        return self.config.base_size or self.side or self.config.levels[-1]


def tokens(batch: int, length: int, n: int, everything: bool = False) -> Tensor:
    """[batch * length, n]: the pictures that each token sees."""
    place, slot = torch.arange(length)[:, None], torch.arange(n)
    count = torch.full_like(place, n) if everything else 1 + place * n // length
    row = torch.where(slot < count, count - 1 - slot, -1)
    first = torch.arange(batch)[:, None, None] * n
    return torch.where(row >= 0, row + first, -1).flatten(0, 1)


def cases(preset: str, length: int) -> list[Case]:
    """What the release's tasks are made of, in the size of a preset."""
    config = MMInterleavedConfig.preset(preset)
    text, features, mmfs = config.text_config.hidden_size, config.vision_config.hidden_size, config.mmfs
    last = tokens(1, length, 15)[-1:]
    found = [
        Case("tokens, batch 1, n 15", mmfs, text, features, tokens(1, length, 15), 1),
        Case("tokens, batch 1, n 15, all", mmfs, text, features, tokens(1, length, 15, True), 1),
        Case("tokens, batch 4, n 5", mmfs, text, features, tokens(4, length, 5), 1),
        Case("decode, n 15", mmfs, text, features, last, 1, gradients=False),
    ]
    grids = {side: channels for channels, side in reversed(config.image_decoder.skip_shapes())}
    for side, channels in sorted(grids.items(), reverse=True):
        seen = torch.arange(2)[:, None]
        found.append(Case(f"grid {side}", config.image_decoder.mmfs, channels, features, seen, side * side, side))
    return found


class Work:
    """A case on a device: its layer, its inputs, and what can be timed."""

    def __init__(self, case: Case, device: torch.device, dtype: torch.dtype) -> None:
        self.case = case
        torch.manual_seed(0)
        self.mmfs = MMFS(case.config, case.width, case.features).to(device, dtype)
        torch.nn.init.normal_(self.mmfs.sampling_offsets.weight, std=case.width**-0.5)
        groups, positions = len(case.images), sum(h * w for h, w in case.shapes)
        self.query = torch.randn(groups, case.queries, case.width, device=device, dtype=dtype)
        self.maps = torch.randn(case.pictures, positions, case.features, device=device, dtype=dtype)
        visible = VisibleImages.build(case.images, case.pictures)
        self.visible = VisibleImages(visible.images.to(device), visible.routes.to(device))
        centre = torch.full((1, 1, 2), 0.5, device=device)
        self.reference = centre if case.side is None else cell_centres([case.side], device)[None]
        with torch.no_grad():
            self.prepared = self.mmfs.prepare(self.maps)
            sides = self.mmfs._query_side(self.query, case.images.shape[1], self.prepared.folded)
        self.inputs = [x.detach().contiguous() for x in (self.prepared.values, *sides)]

    def operator(self, backend: str) -> Tensor:
        """The attention alone."""
        case = self.case
        scales = [side / case.base for side in case.config.levels]
        return mmfs_attention(
            *self.inputs, self.reference, self.visible.images, case.shapes, scales,
            routes=self.visible.routes, backend=backend,
        )[0]  # fmt: skip

    def layer(self, backend: str, training: bool) -> Tensor:
        """The synchronizer."""
        self.mmfs.backend = backend
        prepared = PreparedMMFS(self.mmfs.project(self.maps)) if training else self.prepared
        return self.mmfs(self.query, prepared, self.visible, self.case.shapes, self.reference, self.case.base)

    def call(self, part: str, backend: str, gradients: bool) -> Callable[[], Tensor]:
        """What is timed; with gradients it goes back from a fixed random gradient."""

        def forward() -> Tensor:
            return self.operator(backend) if part == "operator" else self.layer(backend, gradients)

        leaves = [*self.inputs] if part == "operator" else [self.query, self.maps, *self.mmfs.parameters()]
        for leaf in leaves:
            leaf.requires_grad_(gradients).grad = None
        if not gradients:
            return torch.no_grad()(forward)
        gradient = torch.randn_like(forward())

        def both() -> Tensor:
            for leaf in leaves:
                leaf.grad = None
            out = forward()
            out.backward(gradient)
            return out.detach()

        return both


def samples(case: Case) -> int:
    """Bilinear samples of one head channel that the case takes."""
    return int((case.images >= 0).sum()) * case.queries * len(case.shapes) * case.config.num_points


def roofline(work: Work, part: str, gradients: bool) -> dict[str, int]:
    """Bytes of device memory and operations that the work needs at least; bytes through the caches.

    A gradient is written like its input, which is read again; products cost twice as much on the way back; so do
    samples, whose neighbours are read again and added to.
    """
    case, config = work.case, work.case.config
    width, count, rows = config.hidden_size, samples(case), work.query.shape[0] * case.queries
    size = work.query.element_size()
    taken = count * width
    operations = 2 * (4 + 1) * taken
    moved = sum(x.numel() * x.element_size() for x in (*work.inputs, work.visible.images)) + rows * width * 4
    if part == "layer":
        heads_width = work.inputs[1].shape[-1] + work.inputs[2].shape[-1]
        products = rows * (case.width * (heads_width + width))
        if gradients:
            values = work.maps.shape[0] * work.maps.shape[1] * case.features * width
            products = rows * (case.width * (case.width + heads_width + width)) + values
            moved += work.maps.numel() * size
        operations += 2 * products
        weights = sum(p.numel() for n, p in work.mmfs.named_parameters() if gradients or "dynamic" not in n)
        moved += (weights + 2 * work.query.numel()) * size
    factor = 3 if gradients else 1
    return {"bytes": moved * factor, "operations": operations * factor, "cache_bytes": taken * 4 * size * factor}


def in_graph(work: Callable[[], Tensor]) -> Callable[[], object]:
    """Recorded once; a call replays it."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def median(work: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Milliseconds."""
    for _ in range(2):
        work()
    if device.type != "cuda":
        times = []
        for _ in range(repeats):
            begin = time.perf_counter()
            work()
            times.append(1e3 * (time.perf_counter() - begin))
        return statistics.median(times)
    cold = torch.empty(2**28, dtype=torch.uint8, device=device)
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for begin, end in events:
        cold.zero_()
        begin.record()
        work()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) for begin, end in events)


def peak(work: Callable[[], object], device: torch.device) -> int | None:
    """Bytes that a call needs beyond what was there."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def measure(work: Work, part: str, gradients: bool, speed: dict[str, float], repeats: int) -> dict[str, object]:
    """One row: both forms, and the bound."""
    device, needs = work.query.device, roofline(work, part, gradients)
    row: dict[str, object] = {"case": work.case.name, "part": part, "gradients": gradients, **needs}
    by_memory = 1e3 * needs["bytes"] / speed["bytes_per_second"]
    by_arithmetic = 1e3 * needs["operations"] / speed["operations_per_second"]
    row["bound_ms"] = max(by_memory, by_arithmetic)
    results = {}
    for name, backend in (("fused", "auto"), ("plain", "plain")):
        call = work.call(part, backend, gradients)
        results[name] = call().detach().float()
        row[f"{name}_peak_bytes"] = peak(call, device)
        graph = device.type == "cuda" and work.case.name.startswith("decode")
        row[f"{name}_ms"] = median(in_graph(call) if graph else call, device, repeats)
    row["difference"] = float((results["fused"] - results["plain"]).norm() / results["plain"].norm())
    return row


def table(rows: list[dict[str, object]]) -> Table:
    """For people."""
    out = Table(title="fused : plain")
    for name in ("case", "part", "way", "ms", "ratio", "bound ms", "of bound", "peak MiB", "difference"):
        out.add_column(name, justify="left" if name in ("case", "part", "way") else "right", no_wrap=True)
    for row in rows:
        peaks = [row["fused_peak_bytes"], row["plain_peak_bytes"]]
        out.add_row(
            row["case"],
            row["part"],
            "with backward" if row["gradients"] else "forward",
            f"{row['fused_ms']:.3f} : {row['plain_ms']:.3f}",
            f"{row['plain_ms'] / row['fused_ms']:.1f}",
            f"{row['bound_ms']:.3f}",
            f"{100 * row['bound_ms'] / row['fused_ms']:.0f} %",
            "-" if peaks[0] is None else " : ".join(f"{p / 2**20:.0f}" for p in peaks),
            f"{row['difference']:.1e}",
        )
    return out


def main() -> None:
    """Measure, print, and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="release", help="the size: release, small or debug")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a text")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    options = parser.parse_args()
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    speed = limits(Clock(device), dtype)
    console, rows, reason = Console(), [], "the kernels are for CUDA devices"
    chosen = cases(options.preset, options.length)
    for case in track(chosen, "cases", console=Console(stderr=True), transient=True):
        work = Work(case, device, dtype)
        if device.type == "cuda":
            reason = why_not_triton(work.prepared.values, case.config.num_points)
        for part in ("operator", "layer"):
            for gradients in (False, True) if case.gradients else (False,):
                rows.append(measure(work, part, gradients, speed, options.repeats))
    console.print(table(rows))
    if reason is not None:
        console.print(f"Both columns ran the plain form: {reason}.")
    if options.output is not None:
        result = {**describe(), "preset": options.preset, "dtype": options.dtype, "kernels": reason or "triton"}
        options.output.write_text(json.dumps({**result, **speed, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()

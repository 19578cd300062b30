"""Lines about MMFS: the attention alone, and the whole synchronizer, kernels against the plain composition.

`op` is the attention alone. `layer` is the whole synchronizer: for inference with values kept and the query side
folded; with gradients as in training, the values projected from the maps. Tokens see the images before them, `n`
spread evenly over the text. `decode` is one token behind all of them, on a GPU inside a CUDA graph. `grid` is one map
of the UNet, two drawings with one earlier image each.

Bounds count what cannot be avoided: each input read once, each result written once, the arithmetic of matrix products
and samples.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..model import MMInterleavedConfig
from ..model.config import MMFSConfig
from ..model.mmfs import MMFS, VisibleImages
from ..model.roofline import Need
from ..model.static import capture
from ..model.vit_adapter import cell_centres
from ..ops import MMFSInputs, mmfs_attention, why_not_triton
from ..ops.mmfs_attention import Backend
from .base import Bench, Row

AHEAD = 128  # times that a large buffer is written before what is timed: 8 ms on an H200


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
    def num_images(self) -> int:
        return int(self.images.max()) + 1

    @property
    def shapes(self) -> list[tuple[int, int]]:
        return [(s, s) for s in self.config.levels]

    @property
    def base(self) -> int:
        return self.config.base_size or self.side or self.config.levels[-1]


def tokens(batch: int, length: int, n: int, everything: bool = False) -> Tensor:
    """[batch * length, n]: the images that each token sees."""
    place, slot = torch.arange(length)[:, None], torch.arange(n)
    count = torch.full_like(place, n) if everything else 1 + place * n // length
    row = torch.where(slot < count, count - 1 - slot, -1)
    first = torch.arange(batch)[:, None, None] * n
    return torch.where(row >= 0, row + first, -1).flatten(0, 1)


def cases(bench: Bench) -> list[Case]:
    """What the tasks of a model of that size are made of."""
    config, length = MMInterleavedConfig.preset(bench.preset), bench.sizes.length
    text, features, mmfs = config.text_config.hidden_size, config.vision_config.hidden_size, config.mmfs
    n, few = bench.sizes.images, max(bench.sizes.images // 3, 1)
    last = tokens(1, length, n)[-1:]
    found = [
        Case(f"tokens, batch 1, n {n}", mmfs, text, features, tokens(1, length, n), 1),
        Case(f"tokens, batch 4, n {few}", mmfs, text, features, tokens(4, length, few), 1),
        Case(f"decode, n {n}", mmfs, text, features, last, 1, gradients=False),
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
        self.maps = torch.randn(case.num_images, positions, case.features, device=device, dtype=dtype)
        visible = VisibleImages.build(case.images, case.num_images)  # the plain form is timed without sorting
        assert visible.routes is not None  # on the host they are always sorted
        self.visible = VisibleImages(visible.images.to(device), visible.routes.to(device))
        centre = torch.full((1, 1, 2), 0.5, device=device)
        self.reference = centre if case.side is None else cell_centres([case.side], device)[None]
        with torch.no_grad():
            self.values, self.derived = self.mmfs.project(self.maps), self.mmfs.derive_query()
            sides = self.mmfs._query_side(self.query, case.images.shape[1], self.derived)
        values, offsets, logits, *tables = (x.detach().contiguous() for x in (self.values, *sides))
        self.inputs = (values, offsets, logits, tables[0], tables[1])

    def operator(self, backend: Backend) -> Tensor:
        """The attention alone."""
        case = self.case
        scales = [side / case.base for side in case.config.levels]
        given = MMFSInputs(*self.inputs, self.reference, self.visible.images, case.shapes, scales, self.visible.routes)
        return mmfs_attention(given, backend=backend)[0]

    def layer(self, backend: Backend, training: bool) -> Tensor:
        """The synchronizer."""
        self.mmfs.backend = backend
        values, derived = (self.mmfs.project(self.maps), None) if training else (self.values, self.derived)
        place = self.visible, self.case.shapes, self.reference, self.case.base
        return self.mmfs(self.query, values, *place, derived)

    def call(self, part: str, backend: Backend, gradients: bool) -> Callable[[], Tensor]:
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


def need(work: Work, part: str, gradients: bool) -> Need:
    """Bytes of device memory and operations that the work needs at least.

    A gradient is written like its input, which is read again; products cost twice as much on the way back; so do
    samples, whose neighbours are read again and added to.
    """
    case, config = work.case, work.case.config
    width, rows = config.hidden_size, work.query.shape[0] * case.queries
    size = work.query.element_size()
    operations = 2 * (4 + 1) * samples(case) * width
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
    return Need(operations, moved) * (3 if gradients else 1)


def median(work: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Milliseconds; on a GPU those of its own work.

    It is kept busy first, so that the host, whose launches take longer than the kernels of a single layer, is ahead, as
    it is in a training step. The caches hold nothing of use then.
    """
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
        for _ in range(AHEAD):
            cold.zero_()
        begin.record()
        work()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) for begin, end in events)


def measured(bench: Bench, work: Work, line: str, gradients: bool) -> Row:
    """One row: kernels where they can run, and the plain composition."""
    device = bench.device
    reason = why_not_triton(work.values, work.case.config.num_points) if device.type == "cuda" else "on a CPU"
    graph = device.type == "cuda" and work.case.name.startswith("decode")
    part, found, times, peaks = "operator" if line == "op" else "layer", [], [], []
    for backend in ("plain",) if reason else ("triton", "plain"):
        call = work.call(part, backend, gradients)
        found.append(call().detach().float())
        peaks.append(bench.clock.peak(call))
        times.append(median(capture(call, device) if graph else call, device, bench.sizes.repeats))
    note = f"plain: {reason}" if reason else f"{float((found[0] - found[1]).norm() / found[1].norm()):.1e} apart"
    case = f"{work.case.name}, {'with backward' if gradients else 'forward'}"
    return Row(line, case, "ms", times[0], None if reason else times[1],
               1e3 * bench.bound(need(work, part, gradients)), peaks[0], None if reason else peaks[1],
               note=note)  # fmt: skip


def op(bench: Bench) -> Iterator[Row]:
    """The attention alone."""
    yield from _rows(bench, "op")


def layer(bench: Bench) -> Iterator[Row]:
    """The whole synchronizer."""
    yield from _rows(bench, "layer")


def _rows(bench: Bench, line: str) -> Iterator[Row]:
    for case in cases(bench):
        work = Work(case, bench.device, bench.dtype)
        for gradients in (False, True) if case.gradients else (False,):
            yield measured(bench, work, line, gradients)


def layer_by_images(bench: Bench) -> Iterator[Row]:
    """A layer over a whole text against the number of its images: time and memory."""
    config = MMInterleavedConfig.preset(bench.preset)
    text, features = config.text_config.hidden_size, config.vision_config.hidden_size
    for n in bench.sizes.counts:
        case = Case(f"tokens, n {n}", config.mmfs, text, features, tokens(1, bench.sizes.length, n), 1)
        row = measured(bench, Work(case, bench.device, bench.dtype), "layer-by-images", False)
        row.x = n
        yield row

"""Lines about MMFS: the attention operator and the whole synchronizer, kernels against PyTorch operators.

`op` is the attention operator. `layer` is the whole synchronizer: for inference with cached values and derived weights;
with gradients as in training, where values are projected from the maps. In texts, `n` images are distributed evenly,
and are visible to the tokens after them. `decode` is one token after all of them, on a GPU inside a CUDA graph. `grid`
is one map of the UNet for two images with one earlier image each.

Bounds count unavoidable work: each input is read once, each result is written once, and the arithmetic of matrix
products and samples.

Axes: I images, S spatial positions of all levels, Q queries, N heads, P points, V levels.
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
from ..model.mmfs import MMFS, QuerySide, VisibleImages
from ..model.roofline import Need
from ..model.static import capture
from ..model.vit_adapter import cell_centres
from ..ops import MMFSInputs, mmfs_attention, promote, sampling_points, why_not_triton
from ..ops.deformable import Shapes
from ..ops.mmfs_attention import Backend, mmfs_output
from .base import Bench, Row

TURNS = 15  # of each variant of a layer with and without a recorder
AHEAD = 128  # writes of a large buffer before the timed work: 8 ms on an H200


@dataclass
class Case:
    """One synchronizer with the visible images of its queries."""

    name: str
    config: MMFSConfig
    width: int  # width of queries
    features: int  # width of the maps
    images: Tensor  # [groups, slots]
    queries: int  # queries of a group
    side: int | None = None  # side of the map of queries; None: tokens
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
    """The visible images of each token: [batch * length, n]."""
    place, slot = torch.arange(length)[:, None], torch.arange(n)
    count = torch.full_like(place, n) if everything else 1 + place * n // length
    row = torch.where(slot < count, count - 1 - slot, -1)
    first = torch.arange(batch)[:, None, None] * n
    return torch.where(row >= 0, row + first, -1).flatten(0, 1)


def cases(bench: Bench) -> list[Case]:
    """The cases for a model of that size."""
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
    """A case on a device: its layer, its inputs, and the calls to time."""

    def __init__(self, case: Case, device: torch.device, dtype: torch.dtype) -> None:
        self.case = case
        torch.manual_seed(0)
        self.mmfs = MMFS(case.config, case.width, case.features).to(device, dtype)
        torch.nn.init.normal_(self.mmfs.sampling_offsets.weight, std=case.width**-0.5)
        groups, positions = len(case.images), sum(h * w for h, w in case.shapes)
        self.query = torch.randn(groups, case.queries, case.width, device=device, dtype=dtype)
        self.maps = torch.randn(case.num_images, positions, case.features, device=device, dtype=dtype)
        visible = VisibleImages.build(case.images, case.num_images)  # sorting is not timed
        assert visible.routes is not None  # always computed on the host
        self.visible = VisibleImages(visible.images.to(device), visible.routes.to(device))
        centre = torch.full((1, 1, 2), 0.5, device=device)
        self.reference = centre if case.side is None else cell_centres([case.side], device)[None]
        with torch.no_grad():
            self.values, self.derived = self.mmfs.project(self.maps), self.mmfs.derive_query()
            sides = self.mmfs._query_side(self.query, case.images.shape[1], self.derived)
        values, offsets, logits, *tables = (x.detach().contiguous() for x in (self.values, *sides))
        self.inputs = (values, offsets, logits, tables[0], tables[1])

    def operator(self, backend: Backend) -> Tensor:
        """The attention operator."""
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
        """The call to time; with gradients it includes a backward pass from a fixed random gradient."""

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
    """Number of bilinear samples of the case, for one channel of a head."""
    return int((case.images >= 0).sum()) * case.queries * len(case.shapes) * case.config.num_points


def need(work: Work, part: str, gradients: bool) -> Need:
    """The least bytes of device memory and operations of the work.

    In the backward pass inputs are read again and gradients of the same sizes are written; products and samples cost
    twice as much.
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
    """The median time in milliseconds; on a GPU without the host's time.

    The GPU is kept busy first, so that the host, whose launches take longer than the kernels of one layer, is ahead, as
    in a training step. This also clears the caches.
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
    """One row: the kernels, if they can run, and PyTorch operators."""
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


class _WithoutRecorder(MMFS):
    """MMFS without the point at which a recorder can be attached."""

    def mix(
        self, sides: QuerySide, values: Tensor, visible: VisibleImages, shapes: Shapes, reference: Tensor, base: int,
        dtype: torch.dtype | None = None,
    ) -> Tensor:  # fmt: skip
        """As in `MMFS`."""
        scales = [side / base for side in self.config.levels]
        inputs = MMFSInputs(values, *sides, reference, visible.images, shapes, scales, visible.routes)
        ignore = self.ignore_token.view(self.config.num_heads, -1)
        return mmfs_output(inputs, ignore, dtype or promote(sides[0].dtype), backend=self.backend).flatten(2)


def recorder(bench: Bench) -> Iterator[Row]:
    """What inspection costs: a layer with the point of the recorder against one without it, and with a recorder.

    The check of an attribute costs less than the noise of a machine, so the variants take turns, and the quickest turn
    of each counts.
    """
    for case in cases(bench):
        if case.gradients and case.side is None:
            continue
        work = Work(case, bench.device, bench.dtype)
        call, own = work.call("layer", "auto", False), type(work.mmfs)
        times: dict[str, list[float]] = {"off": [], "without": [], "on": []}
        for _ in range(TURNS):
            for name, found in times.items():
                work.mmfs.__class__ = _WithoutRecorder if name == "without" else own
                work.mmfs.recorder = _record if name == "on" else None
                found.append(median(call, bench.device, 3))
        off, without, on = (min(found) for found in times.values())
        yield Row("recorder", f"{case.name}, off against without", "ms", off, without)
        yield Row("recorder", f"{case.name}, on against off", "ms", on, off)


def _record(inputs: MMFSInputs) -> None:
    """What a recorder does with the inputs of a call."""
    found = sampling_points(inputs)
    for part in (found.locations, found.weights, found.ignored):
        part.float().cpu()


def layer_by_images(bench: Bench) -> Iterator[Row]:
    """Time and memory of a layer over a whole text, by number of images."""
    config = MMInterleavedConfig.preset(bench.preset)
    text, features = config.text_config.hidden_size, config.vision_config.hidden_size
    for n in bench.sizes.counts:
        case = Case(f"tokens, n {n}", config.mmfs, text, features, tokens(1, bench.sizes.length, n), 1)
        row = measured(bench, Work(case, bench.device, bench.dtype), "layer-by-images", False)
        row.x = n
        yield row

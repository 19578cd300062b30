"""MMFS, the multi-modal feature synchronizer (MM-Interleaved, arXiv 2401.10208, section 3.2).

Axes: I images, S spatial positions of all levels, N heads, D channels of a head, V levels, P points, Q queries;
G groups of queries that see the same images, R slots of a group for images, the most recent one first.

A query (a text token, a cell of a UNet map) samples the multi-scale maps of the images before it. Per query and head,
for image i, level l, point p:

    z_i    = W_dyn q + b_dyn + R[r_i]                   r_i: 1 for the most recent visible image, 2 before it, ...
    a_ilp  = (W_att z_i + b_att)_lp                     logits
    o_ip   = (W_off z_i + b_off)_p                      offsets, the same for all levels
    w      = softmax over all visible (i, l, p) and one more slot, whose logit is 0 and whose value is `ignore_token`
    out    = W_out (sum_ilp w_ilp * bilinear(V_il, reference + o_ip / base) + w_ignore * ignore_token) + b_out

The published form (`mmfs_reference`) writes that one slot as n * levels slots of logit -ln(n * levels) and hides
images with a penalty of -10000; the two agree to rounding for every mask, because e^-10000 is exactly 0.
`MMFS.forward` is the fast form: the query is projected once and not once per image, invisible images are skipped,
values come in already projected, and the query maps are one product, W_off W_dyn and W_att W_dyn: in generation derived
once per call (`derive_query`), in training in every step with more queries than outputs, for then the product of the
weights costs less than W_dyn q of all queries. From there on it is one operator, `ops.mmfs_attention`, with Triton
kernels on CUDA devices.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..ops import MMFSInputs, deformable_attention_reference, image_routes, promote
from ..ops.deformable import Shapes
from ..ops.mmfs_attention import Backend, mmfs_output, why_no_kernel
from .config import MMFSConfig
from .weights import is_plain

QuerySide = tuple[Tensor, Tensor, Tensor, Tensor]  # offsets and logits of the queries, and what each slot adds to them


@dataclass
class VisibleImages:
    """Which images each group of queries sees.

    Attributes:
        images: [G, R] indices into the list of images, most recent first; -1 where there is none.
        routes: [I, longest] for every image the positions in `images.view(-1)` that name it, padded with -1; None:
            sorted by each call of the reference implementation. The kernels need none.
    """

    images: Tensor
    routes: Tensor | None = None

    @classmethod
    def build(cls, images: Tensor, num_images: int) -> VisibleImages:
        """With `images` [G, R] sorted by image, once for all layers; not on CUDA devices, where it would wait."""
        return cls(images, None if images.is_cuda else image_routes(images, num_images))

    @classmethod
    def from_mask(cls, mask: Tensor) -> VisibleImages:
        """From a dense mask [batch, queries, n], 1 = visible, where row b owns the images b*n to b*n + n - 1.

        There are batch * queries groups of one query each.
        """
        batch, queries, n = mask.shape
        newest_first = mask.bool().flip(-1).view(batch * queries, n)
        slots = max(int(newest_first.sum(-1).max()), 0) if newest_first.numel() else 0
        order = torch.argsort(newest_first.int(), dim=-1, descending=True, stable=True)[:, :slots]
        first = (torch.arange(batch, device=mask.device) * n).repeat_interleave(queries)[:, None]
        images = torch.where(newest_first.gather(1, order), first + n - 1 - order, -1)
        return cls.build(images, batch * n)

    def mask(self, num_images: int) -> Tensor:
        """[G, num_images], 1 = visible."""
        numbers = torch.arange(num_images, device=self.images.device)
        return (self.images[..., None] == numbers).any(1).long()


@dataclass
class DerivedQuery:
    """W_off W_dyn and W_att W_dyn as one linear map, without rows whose results the published form overwrites.

    Attributes:
        weight: [N * P * (2 + V), query width].
        bias: [N * P * (2 + V)].
        table: [max_images - 1, N * P * (2 + V)], what recency r = 1, 2, ... adds.
    """

    weight: Tensor
    bias: Tensor
    table: Tensor


@dataclass
class DerivedOutput:
    """Another linear map after W_out, as one linear map.

    Attributes:
        weight: [outputs, hidden size].
        bias: [outputs].
    """

    weight: Tensor
    bias: Tensor


class MMFS(nn.Module):
    """The synchronizer for queries of width `query_size` into maps of width `feature_size`."""

    switches = ("implementation", "backend")  # a captured graph keeps them; see `weights.state_of`

    def __init__(self, config: MMFSConfig, query_size: int, feature_size: int) -> None:
        super().__init__()
        self.config = config
        self.implementation = "fast"
        self.backend: Backend = "auto"  # of the fast form
        heads, points, levels = config.num_heads, config.num_points, len(config.levels)
        self.dynamic_offset_mask = nn.Linear(query_size, query_size)
        self.query_relpos = nn.Embedding(config.max_images, query_size)
        self.sampling_offsets = nn.Linear(query_size, heads * points * 2)
        # One slot more than points: the release computes an "ignore" logit and then overwrites it with a constant.
        self.attention_weights = nn.Linear(query_size, heads * levels * (points + 1))
        self.value_proj = nn.Linear(feature_size, config.hidden_size)
        self.output_proj = nn.Linear(config.hidden_size, query_size)
        self.ignore_token = nn.Parameter(torch.zeros(1, 1, 1, config.hidden_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The initialisation that training starts from (of the language model's synchronizers)."""
        for linear in (self.dynamic_offset_mask, self.attention_weights):
            nn.init.normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)
        nn.init.trunc_normal_(self.query_relpos.weight, std=0.02)
        nn.init.zeros_(self.sampling_offsets.weight)
        nn.init.uniform_(self.sampling_offsets.bias, -self.config.offset_init, self.config.offset_init)
        for linear in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)
        nn.init.zeros_(self.ignore_token)

    def project(self, features: Tensor) -> Tensor:
        """Maps [I, S, features] to values [I, S, N, D], which serve every query that sees these images."""
        return self.value_proj(features).unflatten(-1, (self.config.num_heads, -1))

    def empty_query(self) -> DerivedQuery:
        """Room for what `derive_query` writes."""
        weight, outputs = self.dynamic_offset_mask.weight, self.num_query_outputs
        return DerivedQuery(
            weight.new_empty(outputs, self.dynamic_offset_mask.in_features),
            weight.new_empty(outputs),
            weight.new_empty(self.config.max_images - 1, outputs),
        )

    def empty_output(self, weight: Tensor) -> DerivedOutput:
        """Room for what `derive_output` of `weight` [outputs, query size] writes."""
        return DerivedOutput(weight.new_empty(len(weight), self.config.hidden_size), weight.new_empty(len(weight)))

    @property
    def num_query_outputs(self) -> int:
        """N * P * (2 + V), the offsets and logits of a query."""
        return self.config.num_heads * self.config.num_points * (2 + len(self.config.levels))

    @torch.no_grad()
    def derive_query(self, out: DerivedQuery | None = None) -> DerivedQuery | None:
        """The query maps as one, from the weights of this moment; no gradients, nothing waits for the device.

        Args:
            out: tensors to write into, whose addresses a captured graph knows; None: new ones.

        Returns:
            `out` or new tensors in the type of the weights; None where one of the maps must be called as a module.
        """
        dynamic, recency = self.dynamic_offset_mask, self.query_relpos
        if not is_plain(dynamic, recency, self.sampling_offsets, self.attention_weights):
            return None
        out = out or self.empty_query()
        weight, bias = self._query_maps()
        out.weight.copy_(_product(weight, dynamic.weight))
        # The bias passes the same map as the rows of the table, so it goes along as one more row.
        rows = _product(torch.cat([recency.weight[1:], dynamic.bias[None]]), weight.T)
        out.table.copy_(rows[:-1])
        out.bias.copy_(rows[-1] + bias)
        return out

    @torch.no_grad()
    def derive_output(
        self, weight: Tensor, bias: Tensor | None, out: DerivedOutput | None = None
    ) -> DerivedOutput | None:
        """The output projection and the linear map after it as one; like `derive_query` otherwise.

        Args:
            weight: [outputs, query size] of the map after it.
            bias: [outputs]; None: it has none.
            out: tensors to write into; None: new ones.
        """
        if not is_plain(self.output_proj):
            return None
        out = out or self.empty_output(weight)
        out.weight.copy_(_product(weight, self.output_proj.weight))
        passed = _product(weight, self.output_proj.bias[:, None])[:, 0]
        out.bias.copy_(passed if bias is None else passed + bias)
        return out

    def _query_maps(self) -> tuple[Tensor, Tensor]:
        """W_off and W_att one above the other [N * P * (2 + V), width], without overwritten rows; and their biases."""
        points, attention = self.config.num_points, self.attention_weights
        used = attention.weight.unflatten(0, (-1, points + 1))[:, :-1].flatten(0, 1)
        used_bias = attention.bias.unflatten(0, (-1, points + 1))[:, :-1].flatten()
        return torch.cat([self.sampling_offsets.weight, used]), torch.cat([self.sampling_offsets.bias, used_bias])

    def _folded_for(self, query: Tensor, slots: int) -> DerivedQuery | None:
        """The query maps as one for these queries of a training step, with gradients.

        None where that does not pay, or where the maps must be called as modules.
        """
        dynamic = self.dynamic_offset_mask
        linears = (dynamic, self.sampling_offsets, self.attention_weights)
        width, kind = query.shape[-1], query.device.type
        if query.numel() <= self.num_query_outputs * width or not is_plain(*linears, self.query_relpos):
            return None
        if any(x.weight.device != query.device for x in linears):
            return None
        halved = torch.is_autocast_enabled(kind) and query.dtype != torch.float64
        dtype = torch.get_autocast_dtype(kind) if halved else dynamic.weight.dtype
        weight, bias = (x.to(dtype) for x in self._query_maps())
        return DerivedQuery(
            weight=weight @ dynamic.weight.to(dtype),
            bias=weight @ dynamic.bias.to(dtype) + bias,
            table=self.query_relpos.weight[1 : slots + 1].to(dtype) @ weight.T,
        )

    def _separated(self, query: Tensor, slots: int) -> QuerySide:
        """Offsets and logits of the query, and what each slot adds to them (the linear maps split over the sum z)."""
        z = self.dynamic_offset_mask(query)
        recency = self.query_relpos(torch.arange(1, slots + 1, device=query.device))
        nothing = torch.zeros_like(recency[:1])
        tables = []
        for linear in (self.sampling_offsets, self.attention_weights):
            rows = linear(torch.cat([recency, nothing]))  # linear(0) is the bias; called as a module for offloading
            tables.append(rows[:-1] - rows[-1:])
        return self.sampling_offsets(z), self.attention_weights(z), tables[0], tables[1]

    def _query_side(self, query: Tensor, slots: int, derived: DerivedQuery | None) -> QuerySide:
        """Offsets and logits of the queries, and the table of what each slot adds to either."""
        points = self.config.num_points
        derived = derived or self._folded_for(query, slots)
        if derived is None:
            offsets, logits, offset_table, logit_table = self._separated(query, slots)
            logits, logit_table = (
                x.unflatten(-1, (-1, points + 1))[..., :points].flatten(-2) for x in (logits, logit_table)
            )
            return offsets, logits, offset_table, logit_table
        return self.split(F.linear(query, derived.weight, derived.bias), derived.table[:slots])

    def split(self, both: Tensor, table: Tensor) -> QuerySide:
        """Offsets and logits apart, as `mix` takes them, out of the product with a `DerivedQuery` and its table."""
        heads, points = self.config.num_heads, self.config.num_points
        sizes = [heads * points * 2, heads * points * len(self.config.levels)]
        offsets, logits = both.split(sizes, -1)
        offset_table, logit_table = table.split(sizes, -1)
        return offsets, logits, offset_table, logit_table

    def _project_out(self, mixed: Tensor, derived: DerivedOutput | None) -> Tensor:
        return self.output_proj(mixed) if derived is None else F.linear(mixed, derived.weight, derived.bias)

    def forward(
        self,
        query: Tensor,
        values: Tensor,
        visible: VisibleImages,
        shapes: Shapes,
        reference: Tensor,
        base: int,
        derived_query: DerivedQuery | None = None,
        derived_output: DerivedOutput | None = None,
    ) -> Tensor:
        """Look at the images.

        Args:
            query: [G, Q, width]; all queries of a group see the same images.
            values: [I, S, N, D] of all images, from `project`.
            visible: the images of each group.
            shapes: (height, width) of every level.
            reference: [G or 1, Q, 2] the (x, y) in [0, 1] around which each query samples.
            base: offsets count in 1/base of the image's side.
            derived_query: `derive_query()`; None: the maps themselves.
            derived_output: `derive_output(...)`, which stands for the output projection and the map after it. Both are
                ignored by `implementation = "reference"`.

        Returns:
            [G, Q, width], or [G, Q, outputs of `derived_output`].

        Raises:
            ValueError: a query sees more images than the relative-position table has rows for.
        """
        slots = visible.images.shape[1]
        if slots >= self.config.max_images:
            raise ValueError(
                f"{slots} images are visible at once, but this model distinguishes at most "
                f"{self.config.max_images - 1}; split the document"
            )
        ignore = self.ignore_token.view(self.config.num_heads, -1)
        output = derived_output if self.implementation == "fast" else None
        if slots == 0:
            constant = self._project_out(ignore.reshape(-1).to(query.dtype), output)
            return constant.expand(*query.shape[:-1], -1)
        if self.implementation == "reference":
            return self._forward_reference(query, values, visible, shapes, reference, base)
        sides = self._query_side(query, slots, derived_query)
        mixed = self.mix(sides, values, visible, shapes, reference, base, dtype=query.dtype)
        return self._project_out(mixed, output)

    def mix(
        self,
        sides: QuerySide,
        values: Tensor,
        visible: VisibleImages,
        shapes: Shapes,
        reference: Tensor,
        base: int,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """What the queries see, before the output projection.

        Args:
            sides: offsets and logits of the queries, and the tables of what each slot adds to them.
            values: [I, S, N, D].
            visible, shapes, reference, base: as in `forward`.
            dtype: of the result; None: float32 or better.

        Returns:
            [G, Q, hidden size].
        """
        scales = [side / base for side in self.config.levels]
        inputs = MMFSInputs(values, *sides, reference, visible.images, shapes, scales, visible.routes)
        ignore = self.ignore_token.view(self.config.num_heads, -1)
        return mmfs_output(inputs, ignore, dtype or promote(sides[0].dtype), backend=self.backend).flatten(2)

    def _forward_reference(
        self, query: Tensor, values: Tensor, visible: VisibleImages, shapes: Shapes, reference: Tensor, base: int
    ) -> Tensor:
        """Through the published form: every query weighs every image, those it does not see with a penalty."""
        groups, queries, _ = query.shape
        mask = visible.mask(len(values))[:, None].expand(-1, queries, -1).flatten(0, 1)
        reference = reference.expand(groups, queries, 2).flatten(0, 1)
        out, _, _ = mmfs_reference(
            self, query.flatten(0, 1)[None], values[None], mask[None], shapes, reference[None], base
        )
        return out.view(groups, queries, -1)


def why_mmfs_waits(layers: Iterable[MMFS], dtype: torch.dtype) -> str | None:
    """Why these layers wait for a CUDA device, so that no CUDA graph can hold them; None: they do not."""
    for mmfs in layers:
        if mmfs.implementation != "fast" or mmfs.backend == "plain":
            return "MMFS is set to its reference implementation"
        reason = why_no_kernel(dtype, mmfs.config.hidden_size // mmfs.config.num_heads, mmfs.config.num_points)
        if reason is not None:
            return f"MMFS runs its reference implementation: {reason}"
    return None


def mmfs_reference(
    mmfs: MMFS, query: Tensor, values: Tensor, mask: Tensor, shapes: Shapes, reference: Tensor, base: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The published form: the reference implementation of `MMFS.forward`.

    Args:
        mmfs: the layer whose parameters are used.
        query: [batch, queries, width].
        values: [batch, n, positions, heads, head dim] the images of each row.
        mask: [batch, queries, n] or [batch, n], 1 = visible. A mask of another length than the query counts with its
            last row only (the release's cached decoding).
        shapes, base: as in `MMFS.forward`.
        reference: [batch or 1, queries, 2].

    Returns:
        Output [batch, queries, width]; locations [batch, queries, heads, n * levels, points, 2]; weights
        [batch, queries, heads, n * levels, points] without the ignore slots.
    """
    config = mmfs.config
    heads, points, levels = config.num_heads, config.num_points, len(config.levels)
    batch, length, _ = query.shape
    mask = mask[:, None].expand(-1, length, -1) if mask.dim() == 2 else mask
    mask = mask[:, -1:].expand(-1, length, -1) if mask.shape[1] != length else mask
    n = mask.shape[-1]
    recency = (mask * (mask.sum(-1, keepdim=True) + 1 - mask.cumsum(-1))).long()

    z = mmfs.dynamic_offset_mask(query)[:, :, None] + mmfs.query_relpos(recency)  # [batch, queries, n, width]
    work = promote(query.dtype)
    offsets = mmfs.sampling_offsets(z).to(work).unflatten(-1, (heads, 1, points, 2))
    logits = mmfs.attention_weights(z).to(work).unflatten(-1, (heads, levels, points + 1))
    logits = logits - 10000.0 * (1 - mask)[..., None, None, None]
    ignore_slot = torch.full_like(logits[..., :1], -math.log(n * levels))
    logits = torch.cat([logits[..., :points], ignore_slot], dim=-1)  # [batch, queries, n, heads, levels, points + 1]
    weights = logits.transpose(2, 3).flatten(3).softmax(-1).view(batch, length, heads, n * levels, points + 1)

    sizes = offsets.new_tensor([[w, h] for h, w in shapes])[:, None]
    ratio = offsets.new_tensor([side / base for side in config.levels])[:, None, None]
    locations = reference.to(offsets.dtype)[:, :, None, None, None, None] + offsets * ratio / sizes
    locations = locations.transpose(2, 3).flatten(3, 4)  # [batch, queries, heads, n * levels, points, 2]
    sampled = deformable_attention_reference(values.flatten(1, 2), list(shapes) * n, locations, weights[..., :points])
    ignored = weights[..., points].sum(-1)[..., None] * mmfs.ignore_token.view(heads, -1)
    out = mmfs.output_proj((sampled + ignored.flatten(2)).to(query.dtype))
    return out, locations, weights[..., :points]


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b with sums in float32 or better, in that type: rounding is left to whoever copies the result."""
    with torch.autocast(a.device.type, enabled=False):
        if a.is_cuda and a.dtype == b.dtype and a.dtype in (torch.bfloat16, torch.float16):
            return torch.mm(a, b, out_dtype=torch.float32)  # exact inputs: the type of the products need not be float32
        work = promote(a.dtype)
        return a.to(work) @ b.to(work)

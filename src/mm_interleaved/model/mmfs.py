"""MMFS, the multi-modal feature synchronizer (MM-Interleaved, arXiv 2401.10208, section 3.2).

A query (a text token, a cell of a UNet map) samples the multi-scale maps of the pictures before it. Per query and head,
for picture i, level l, point p:

    z_i    = W_dyn q + b_dyn + R[r_i]                   r_i: 1 for the most recent visible picture, 2 before it, ...
    a_ilp  = (W_att z_i + b_att)_lp                     logits
    o_ip   = (W_off z_i + b_off)_p                      offsets, the same for all levels
    w      = softmax over all visible (i, l, p) and one more slot, whose logit is 0 and whose value is `ignore_token`
    out    = W_out (sum_ilp w_ilp * bilinear(V_il, reference + o_ip / base) + w_ignore * ignore_token) + b_out

The published form (`mmfs_reference`) writes that one slot as n * levels slots of logit -ln(n * levels) and hides
pictures with a penalty of -10000; the two agree to rounding for every mask, because e^-10000 is exactly 0.
`MMFS.forward` is the fast form: the query is projected once and not once per picture, invisible pictures are skipped,
values come in already projected, and the two query projections are folded into one: for inference once and for all, in
training in every step with more queries than folded outputs, for then W_off W_dyn costs less than W_dyn q of all of
them. From there on it is one operator, `ops.mmfs_attention`, with Triton kernels on CUDA devices.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..ops import deformable_attention_reference, picture_routes, promote
from ..ops.deformable import Shapes
from ..ops.mmfs_attention import Backend, mmfs_output
from .config import MMFSConfig


@dataclass
class VisibleImages:
    """Which pictures each group of queries sees.

    Attributes:
        images: [groups, slots] indices into the list of pictures, most recent first; -1 where there is none.
        routes: [pictures, longest] for every picture the positions in `images.view(-1)` that name it, padded with -1;
            None: sorted where the plain form needs them. The kernels need none.
    """

    images: Tensor
    routes: Tensor | None = None

    @classmethod
    def build(cls, images: Tensor, num_images: int) -> VisibleImages:
        """Sort the entries of `images` [groups, slots] by picture, once for all layers."""
        return cls(images, picture_routes(images, num_images))

    @classmethod
    def from_mask(cls, mask: Tensor) -> VisibleImages:
        """From a dense mask [batch, queries, n], 1 = visible, where row b owns the pictures b*n to b*n + n - 1.

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
        """[groups, num_images], 1 = visible."""
        pictures = torch.arange(num_images, device=self.images.device)
        return (self.images[..., None] == pictures).any(1).long()


@dataclass
class FoldedQuery:
    """W_off and W_att times W_dyn, with the dead rows left out: the query side of MMFS for inference."""

    weight: Tensor  # [heads * points * (2 + levels), query width]
    bias: Tensor
    table: Tensor  # [max_images - 1, heads * points * (2 + levels)] contribution of r = 1, 2, ...


@dataclass
class FoldedOutput:
    """Another linear map times W_out: what follows the samples, for inference."""

    weight: Tensor  # [outputs, hidden size]
    bias: Tensor


@dataclass
class PreparedMMFS:
    """What one MMFS layer keeps between calls.

    Attributes:
        values: [pictures, positions, heads, head dim], projected once per picture.
        folded: the folded query side, or None where the weights are not at hand (offloaded).
        output: stands for the output projection and the map after it; None: only the former.
    """

    values: Tensor
    folded: FoldedQuery | None = None
    output: FoldedOutput | None = None


class MMFS(nn.Module):
    """The synchronizer for queries of width `query_size` into maps of width `feature_size`."""

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
        """The initialisation that training starts from (spec/model 3.1, LLM column)."""
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
        """Maps [pictures, positions, features] to values [pictures, positions, heads, head dim]."""
        return self.value_proj(features).unflatten(-1, (self.config.num_heads, -1))

    def fold(self) -> FoldedQuery:
        """The folded query side, without the slots that are computed and overwritten in the published form."""
        dtype = self.dynamic_offset_mask.weight.dtype
        folded = self._folded_in(promote(dtype), self.config.max_images - 1)
        return FoldedQuery(folded.weight.to(dtype), folded.bias.to(dtype), folded.table.to(dtype))

    def _folded_in(self, dtype: torch.dtype, slots: int) -> FoldedQuery:
        """The folded query side by products in `dtype`, with the table's first rows."""
        points, dynamic = self.config.num_points, self.dynamic_offset_mask
        used = self.attention_weights.weight.unflatten(0, (-1, points + 1))[:, :-1].flatten(0, 1)
        used_bias = self.attention_weights.bias.unflatten(0, (-1, points + 1))[:, :-1].flatten()
        weight = torch.cat([self.sampling_offsets.weight, used]).to(dtype)
        bias = torch.cat([self.sampling_offsets.bias, used_bias]).to(dtype)
        return FoldedQuery(
            weight=weight @ dynamic.weight.to(dtype),
            bias=weight @ dynamic.bias.to(dtype) + bias,
            table=self.query_relpos.weight[1 : slots + 1].to(dtype) @ weight.T,
        )

    def fold_output(self, weight: Tensor, bias: Tensor) -> FoldedOutput:
        """The output projection and the map `weight` [outputs, width], `bias` [outputs] after it, as one."""
        dtype = weight.dtype
        work = promote(dtype)
        both = weight.to(work) @ self.output_proj.weight.to(work)
        return FoldedOutput(both.to(dtype), (weight.to(work) @ self.output_proj.bias.to(work) + bias).to(dtype))

    def prepare(self, features: Tensor, folded: FoldedQuery | None = None) -> PreparedMMFS:
        """Everything about `features` [pictures, positions, width] that does not depend on a query.

        `folded` is the folded query side, if it is at hand.
        """
        offloaded = self.dynamic_offset_mask.weight.is_meta and not features.is_meta
        return PreparedMMFS(self.project(features), None if offloaded else folded or self.fold())

    def _project_out(self, mixed: Tensor, output: FoldedOutput | None) -> Tensor:
        return self.output_proj(mixed) if output is None else F.linear(mixed, output.weight, output.bias)

    def _separated(self, query: Tensor, slots: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Offsets and logits of the query, and what each slot adds to them (the linear maps split over the sum z)."""
        z = self.dynamic_offset_mask(query)
        recency = self.query_relpos(torch.arange(1, slots + 1, device=query.device))
        nothing = torch.zeros_like(recency[:1])
        tables = []
        for linear in (self.sampling_offsets, self.attention_weights):
            rows = linear(torch.cat([recency, nothing]))  # linear(0) is the bias; called as a module for offloading
            tables.append(rows[:-1] - rows[-1:])
        return self.sampling_offsets(z), self.attention_weights(z), tables[0], tables[1]

    def _folded_for(self, query: Tensor, slots: int) -> FoldedQuery | None:
        """The query side folded for these queries, with gradients; None where that pays not, or cannot be.

        The weights must be those of plain linear maps, and at hand: adapters, quantized weights, and weights that come
        when their module is called have a form of their own.
        """
        linears = (self.dynamic_offset_mask, self.sampling_offsets, self.attention_weights)
        width, kind = query.shape[-1], query.device.type
        plain = all(type(x) is nn.Linear and type(x.weight) in (Tensor, nn.Parameter) for x in linears)
        plain = plain and all(x.weight.shape == (x.out_features, width) for x in linears)
        outputs = self.config.num_heads * self.config.num_points * (2 + len(self.config.levels))
        if not plain or any(x.weight.device != query.device for x in linears) or query.numel() <= outputs * width:
            return None
        halved = torch.is_autocast_enabled(kind) and query.dtype != torch.float64
        dtype = torch.get_autocast_dtype(kind) if halved else self.dynamic_offset_mask.weight.dtype
        return self._folded_in(dtype, slots)

    def _query_side(self, query: Tensor, slots: int, folded: FoldedQuery | None) -> tuple[Tensor, ...]:
        """Offsets and logits of the queries, and the table of what each slot adds to either."""
        points = self.config.num_points
        folded = folded or self._folded_for(query, slots)
        if folded is None:
            offsets, logits, offset_table, logit_table = self._separated(query, slots)
            logits, logit_table = (
                x.unflatten(-1, (-1, points + 1))[..., :points].flatten(-2) for x in (logits, logit_table)
            )
            return offsets, logits, offset_table, logit_table
        return self.split(F.linear(query, folded.weight, folded.bias), folded.table[:slots])

    def split(self, both: Tensor, table: Tensor) -> tuple[Tensor, ...]:
        """Offsets and logits apart, as `mix` takes them, out of a folded projection and its table."""
        heads, points = self.config.num_heads, self.config.num_points
        sizes = [heads * points * 2, heads * points * len(self.config.levels)]
        return *both.split(sizes, -1), *table.split(sizes, -1)

    def forward(
        self,
        query: Tensor,
        prepared: PreparedMMFS,
        visible: VisibleImages,
        shapes: Shapes,
        reference: Tensor,
        base: int,
    ) -> Tensor:
        """Look at the pictures.

        Args:
            query: [groups, queries, width]; all queries of a group see the same pictures.
            prepared: the values of all pictures.
            visible: the pictures of each group.
            shapes: (height, width) of every level.
            reference: [groups or 1, queries, 2] the (x, y) in [0, 1] around which each query samples.
            base: offsets count in 1/base of the picture's side.

        Returns:
            [groups, queries, width], or what `prepared.output` makes of it (in the fast form).

        Raises:
            ValueError: a query sees more pictures than the relative-position table has rows for.
        """
        slots = visible.images.shape[1]
        if slots >= self.config.max_images:
            raise ValueError(
                f"{slots} pictures are visible at once, but this model distinguishes at most "
                f"{self.config.max_images - 1}; split the document"
            )
        ignore = self.ignore_token.view(self.config.num_heads, -1)
        output = prepared.output if self.implementation == "fast" else None
        if slots == 0:
            constant = self._project_out(ignore.reshape(-1).to(query.dtype), output)
            return constant.expand(*query.shape[:-1], -1)
        if self.implementation == "reference":
            return self._forward_reference(query, prepared.values, visible, shapes, reference, base)
        sides = self._query_side(query, slots, prepared.folded)
        mixed = self.mix(sides, prepared.values, visible, shapes, reference, base, dtype=query.dtype)
        return self._project_out(mixed, output)

    def mix(
        self,
        sides: tuple[Tensor, ...],
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
            values: [pictures, positions, heads, head dim].
            visible, shapes, reference, base: as in `forward`.
            dtype: of the result; None: float32 or better.

        Returns:
            [groups, queries, hidden size].
        """
        scales = [side / base for side in self.config.levels]
        ignore = self.ignore_token.view(self.config.num_heads, -1)
        dtype = dtype or promote(sides[0].dtype)
        mixed = mmfs_output(
            values, *sides, reference, visible.images, shapes, scales, ignore, dtype,
            routes=visible.routes, backend=self.backend,
        )  # fmt: skip
        return mixed.flatten(2)

    def _forward_reference(
        self, query: Tensor, values: Tensor, visible: VisibleImages, shapes: Shapes, reference: Tensor, base: int
    ) -> Tensor:
        """Through the published form: every query weighs every picture, those it does not see with a penalty."""
        groups, queries, _ = query.shape
        mask = visible.mask(len(values))[:, None].expand(-1, queries, -1).flatten(0, 1)
        reference = reference.expand(groups, queries, 2).flatten(0, 1)
        out, _, _ = mmfs_reference(
            self, query.flatten(0, 1)[None], values[None], mask[None], shapes, reference[None], base
        )
        return out.view(groups, queries, -1)


def mmfs_reference(
    mmfs: MMFS, query: Tensor, values: Tensor, mask: Tensor, shapes: Shapes, reference: Tensor, base: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The published form, as slow as it is plain; the twin of `MMFS.forward`.

    Args:
        mmfs: the layer whose parameters are used.
        query: [batch, queries, width].
        values: [batch, n, positions, heads, head dim] the pictures of each row.
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

"""MMFS, the multi-modal feature synchronizer (MM-Interleaved, arXiv 2401.10208, section 3.2).

Axes: I images, S spatial positions of all levels, N heads, D channels of a head, V levels, P points, Q queries,
G groups of queries with the same visible images, R slots of a group for visible images, the most recent one first.

A query (a text token, a cell of a UNet map) samples the multi-scale maps of the images before it. Per query and head,
for image i, level l, point p:

    z_i    = W_dyn q + b_dyn + R[r_i]                   r_i: 1 for the most recent visible image, 2 before it, ...
    a_ilp  = (W_att z_i + b_att)_lp                     logits
    o_ip   = (W_off z_i + b_off)_p                      offsets, the same for all levels
    w      = softmax over all visible (i, l, p) and one more slot, whose logit is 0 and whose value is `ignore_token`
    out    = W_out (sum_ilp w_ilp * bilinear(V_il, reference + o_ip / base) + w_ignore * ignore_token) + b_out

docs/model.md, "MMFS", has both forms. `mmfs_reference` is the published form: n * V ignore slots of logit -ln(n * V),
and a penalty of -10000 for images that are not visible. Both forms agree to rounding for every mask, because e^-10000
is exactly 0.

`MMFS.forward` is the computed form. It projects the query once instead of once per image, skips images that are not
visible, and takes values that are already projected. The query maps become one product, W_off W_dyn and W_att W_dyn.
Generation derives it once per call (`derive_query`); training does so in every step with more queries than outputs,
because then the product of the weights costs less than W_dyn q of all queries. The rest is one operator,
`ops.mmfs_attention`, with Triton kernels on CUDA devices.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..ops import MMFSInputs, deformable_attention_reference, image_routes, promote
from ..ops.deformable import Shapes
from ..ops.devices import chooses_kernels
from ..ops.mmfs_attention import Backend, mmfs_output, why_no_kernel
from .config import MMFSConfig
from .weights import is_plain

QuerySide = tuple[Tensor, Tensor, Tensor, Tensor]  # offsets and logits of the queries, and the tables of both by slot


@dataclass
class VisibleImages:
    """The visible images of each group of queries.

    Attributes:
        images: [G, R] indices into the list of images, most recent first; -1 where there is none.
        routes: [I, longest] for every image the positions in `images.view(-1)` that name it, padded with -1; None: each
            call of the reference implementation computes them. The kernels need none.
    """

    images: Tensor
    routes: Tensor | None = None

    @classmethod
    def build(cls, images: Tensor, num_images: int) -> VisibleImages:
        """With routes for `images` [G, R], once for all layers; not on CUDA devices, where that would synchronise."""
        return cls(images, None if chooses_kernels(images.device) else image_routes(images, num_images))

    def mask(self, num_images: int) -> Tensor:
        """The dense mask [G, num_images], 1 = visible."""
        numbers = torch.arange(num_images, device=self.images.device)
        return (self.images[..., None] == numbers).any(1).long()


@dataclass
class DerivedQuery:
    """W_off W_dyn and W_att W_dyn as one linear layer, without the rows of ignore points.

    Attributes:
        weight: [N * P * (2 + V), query width].
        bias: [N * P * (2 + V)].
        table: [max_images - 1, N * P * (2 + V)], added for recency r = 1, 2, ...
    """

    weight: Tensor
    bias: Tensor
    table: Tensor


@dataclass
class DerivedOutput:
    """The product of W_out and the linear layer after it, as one linear layer.

    Attributes:
        weight: [outputs, hidden size].
        bias: [outputs].
    """

    weight: Tensor
    bias: Tensor


class MMFS(nn.Module):
    """The synchronizer for queries of width `query_size` into maps of width `feature_size`."""

    switches = ("implementation", "backend")  # part of the state of a captured graph; see `weights.state_of`

    def __init__(self, config: MMFSConfig, query_size: int, feature_size: int) -> None:
        super().__init__()
        self.config = config
        self.implementation = "fast"
        self.backend: Backend = "auto"  # used by implementation "fast"
        self.recorder: Callable[[MMFSInputs], None] | None = None  # gets the operator's inputs; see `inspection/`
        heads, points, levels = config.num_heads, config.num_points, len(config.levels)
        self.dynamic_offset_mask = nn.Linear(query_size, query_size)
        self.query_relpos = nn.Embedding(config.max_images, query_size)
        self.sampling_offsets = nn.Linear(query_size, heads * points * 2)
        # One more slot than points: docs/model.md, "Ignore slots are constant".
        self.attention_weights = nn.Linear(query_size, heads * levels * (points + 1))
        self.value_proj = nn.Linear(feature_size, config.hidden_size)
        self.output_proj = nn.Linear(config.hidden_size, query_size)
        self.ignore_token = nn.Parameter(torch.zeros(1, 1, 1, config.hidden_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The initial values for training, of the language model's synchronizers."""
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
        """Values [I, S, N, D] of maps [I, S, features], the same for all queries."""
        return self.value_proj(features).unflatten(-1, (self.config.num_heads, -1))

    def empty_query(self) -> DerivedQuery:
        """Empty tensors for `derive_query` to write into."""
        weight, outputs = self.dynamic_offset_mask.weight, self.num_query_outputs
        return DerivedQuery(
            weight.new_empty(outputs, self.dynamic_offset_mask.in_features),
            weight.new_empty(outputs),
            weight.new_empty(self.config.max_images - 1, outputs),
        )

    def empty_output(self, weight: Tensor) -> DerivedOutput:
        """Empty tensors for `derive_output` of `weight` [outputs, query size] to write into."""
        return DerivedOutput(weight.new_empty(len(weight), self.config.hidden_size), weight.new_empty(len(weight)))

    @property
    def num_query_outputs(self) -> int:
        """Number of offsets and logits of a query, N * P * (2 + V)."""
        return self.config.num_heads * self.config.num_points * (2 + len(self.config.levels))

    @torch.no_grad()
    def derive_query(self, out: DerivedQuery | None = None) -> DerivedQuery | None:
        """The query maps as one linear layer, from the current weights; without gradients or synchronisation.

        Args:
            out: tensors to write into, for captured graphs, which read fixed addresses; None: new tensors.

        Returns:
            `out` or new tensors in the type of the weights; None if one of the maps must be called as a module.
        """
        dynamic, recency = self.dynamic_offset_mask, self.query_relpos
        if not is_plain(dynamic, recency, self.sampling_offsets, self.attention_weights):
            return None
        out = out or self.empty_query()
        weight, bias = self._query_maps()
        out.weight.copy_(_product(weight, dynamic.weight))
        # The bias is multiplied by the same matrix as the rows of the table, so it is appended as one more row.
        rows = _product(torch.cat([recency.weight[1:], dynamic.bias[None]]), weight.T)
        out.table.copy_(rows[:-1])
        out.bias.copy_(rows[-1] + bias)
        return out

    @torch.no_grad()
    def derive_output(
        self, weight: Tensor, bias: Tensor | None, out: DerivedOutput | None = None
    ) -> DerivedOutput | None:
        """The output projection and the linear layer after it as one layer; otherwise as `derive_query`.

        Args:
            weight: [outputs, query size] of the layer after it.
            bias: [outputs]; None: no bias.
            out: tensors to write into; None: new tensors.
        """
        if not is_plain(self.output_proj):
            return None
        out = out or self.empty_output(weight)
        out.weight.copy_(_product(weight, self.output_proj.weight))
        passed = _product(weight, self.output_proj.bias[:, None])[:, 0]
        out.bias.copy_(passed if bias is None else passed + bias)
        return out

    def _query_maps(self) -> tuple[Tensor, Tensor]:
        """W_off and W_att stacked, [N * P * (2 + V), width], without the rows of ignore points; and their biases."""
        points, attention = self.config.num_points, self.attention_weights
        used = attention.weight.unflatten(0, (-1, points + 1))[:, :-1].flatten(0, 1)
        used_bias = attention.bias.unflatten(0, (-1, points + 1))[:, :-1].flatten()
        return torch.cat([self.sampling_offsets.weight, used]), torch.cat([self.sampling_offsets.bias, used_bias])

    def _derived_for(self, query: Tensor, slots: int) -> DerivedQuery | None:
        """The query maps as one linear layer with gradients, for the queries of a training step.

        None if that is not faster, or if the maps must be called as modules.
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
        """Offsets and logits of the query, and the tables of both by slot, computed by the modules."""
        z = self.dynamic_offset_mask(query)
        recency = self.query_relpos(torch.arange(1, slots + 1, device=query.device))
        nothing = torch.zeros_like(recency[:1])
        tables = []
        for linear in (self.sampling_offsets, self.attention_weights):
            rows = linear(torch.cat([recency, nothing]))  # linear(0) is the bias; a call works with offloading too
            tables.append(rows[:-1] - rows[-1:])
        return self.sampling_offsets(z), self.attention_weights(z), tables[0], tables[1]

    def _query_side(self, query: Tensor, slots: int, derived: DerivedQuery | None) -> QuerySide:
        """Offsets and logits of the queries, and the tables of both by slot."""
        points = self.config.num_points
        derived = derived or self._derived_for(query, slots)
        if derived is None:
            offsets, logits, offset_table, logit_table = self._separated(query, slots)
            logits, logit_table = (
                x.unflatten(-1, (-1, points + 1))[..., :points].flatten(-2) for x in (logits, logit_table)
            )
            return offsets, logits, offset_table, logit_table
        return self.split(F.linear(query, derived.weight, derived.bias), derived.table[:slots])

    def split(self, both: Tensor, table: Tensor) -> QuerySide:
        """Split the product with a `DerivedQuery`, and its table, into offsets and logits for `mix`."""
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
        """Attend to the visible images.

        Args:
            query: [G, Q, width]; all queries of a group have the same visible images.
            values: [I, S, N, D] of all images, from `project`.
            visible: the visible images of each group.
            shapes: (height, width) of every level.
            reference: [G or 1, Q, 2] the point (x, y) in [0, 1] around which each query samples.
            base: the unit of offsets is 1/base of the image's side.
            derived_query: `derive_query()`; None: the modules.
            derived_output: `derive_output(...)`, which replaces the output projection and the layer after it. Both are
                ignored if `implementation` is "reference".

        Returns:
            [G, Q, width], or [G, Q, outputs of `derived_output`].

        Raises:
            ValueError: more images are visible than the relative-position table has rows.
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
        """The weighted sums of samples, before the output projection.

        Args:
            sides: offsets and logits of the queries, and the tables of both by slot.
            values: [I, S, N, D].
            visible, shapes, reference, base: as in `forward`.
            dtype: type of the result; None: float32 or better.

        Returns:
            [G, Q, hidden size].
        """
        scales = [side / base for side in self.config.levels]
        inputs = MMFSInputs(values, *sides, reference, visible.images, shapes, scales, visible.routes)
        if self.recorder is not None:
            self.recorder(inputs)
        ignore = self.ignore_token.view(self.config.num_heads, -1)
        return mmfs_output(inputs, ignore, dtype or promote(sides[0].dtype), backend=self.backend).flatten(2)

    def _forward_reference(
        self, query: Tensor, values: Tensor, visible: VisibleImages, shapes: Shapes, reference: Tensor, base: int
    ) -> Tensor:
        """`forward` by the published form, in which invisible images have a penalty."""
        groups, queries, _ = query.shape
        mask = visible.mask(len(values))[:, None].expand(-1, queries, -1).flatten(0, 1)
        reference = reference.expand(groups, queries, 2).flatten(0, 1)
        out, _, _ = mmfs_reference(
            self, query.flatten(0, 1)[None], values[None], mask[None], shapes, reference[None], base
        )
        return out.view(groups, queries, -1)


def why_mmfs_waits(layers: Iterable[MMFS], dtype: torch.dtype) -> str | None:
    """Why these layers synchronise with a CUDA device and so cannot be captured in a CUDA graph; None: they do not."""
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
        query: [B, Q, width].
        values: [B, n, S, N, D] the n images of each row.
        mask: [B, Q, n] or [B, n], 1 = visible. If its length is not that of the query, only its last row is used, as in
            the release's cached decoding.
        shapes, base: as in `MMFS.forward`.
        reference: [B or 1, Q, 2].

    Returns:
        Output [B, Q, width]; locations [B, Q, N, n * V, P, 2]; weights [B, Q, N, n * V, P] without the ignore slots.
    """
    config = mmfs.config
    heads, points, levels = config.num_heads, config.num_points, len(config.levels)
    batch, length, _ = query.shape
    mask = mask[:, None].expand(-1, length, -1) if mask.dim() == 2 else mask
    mask = mask[:, -1:].expand(-1, length, -1) if mask.shape[1] != length else mask
    n = mask.shape[-1]
    recency = (mask * (mask.sum(-1, keepdim=True) + 1 - mask.cumsum(-1))).long()

    z = mmfs.dynamic_offset_mask(query)[:, :, None] + mmfs.query_relpos(recency)  # [B, Q, n, width]
    work = promote(query.dtype)
    offsets = mmfs.sampling_offsets(z).to(work).unflatten(-1, (heads, 1, points, 2))
    logits = mmfs.attention_weights(z).to(work).unflatten(-1, (heads, levels, points + 1))
    logits = logits - 10000.0 * (1 - mask)[..., None, None, None]
    ignore_slot = torch.full_like(logits[..., :1], -math.log(n * levels))
    logits = torch.cat([logits[..., :points], ignore_slot], dim=-1)  # [B, Q, n, N, V, P + 1]
    weights = logits.transpose(2, 3).flatten(3).softmax(-1).view(batch, length, heads, n * levels, points + 1)

    sizes = offsets.new_tensor([[w, h] for h, w in shapes])[:, None]
    ratio = offsets.new_tensor([side / base for side in config.levels])[:, None, None]
    locations = reference.to(offsets.dtype)[:, :, None, None, None, None] + offsets * ratio / sizes
    locations = locations.transpose(2, 3).flatten(3, 4)  # [B, Q, N, n * V, P, 2]
    sampled = deformable_attention_reference(values.flatten(1, 2), list(shapes) * n, locations, weights[..., :points])
    ignored = weights[..., points].sum(-1)[..., None] * mmfs.ignore_token.view(heads, -1)
    out = mmfs.output_proj((sampled + ignored.flatten(2)).to(query.dtype))
    return out, locations, weights[..., :points]


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in float32 or better, not yet rounded to the type of the factors."""
    with torch.autocast(a.device.type, enabled=False):
        if a.is_cuda and a.dtype == b.dtype and a.dtype in (torch.bfloat16, torch.float16):
            return torch.mm(a, b, out_dtype=torch.float32)  # factors in half precision, sums in float32
        work = promote(a.dtype)
        return a.to(work) @ b.to(work)

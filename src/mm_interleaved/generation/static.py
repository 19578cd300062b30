"""One token a row through the language model, over memory that never moves.

`StaticDecoder` keeps everything that a step reads or writes in tensors of fixed size: keys and values, the pictures'
MMFS values, which columns each row has, the new tokens. So a step is the same work every time; on a CUDA device it is
captured once in a CUDA graph and replayed, which spares the host thousands of launches a token. On a CPU the same
function is called directly.

A decoder takes over from a `Context` (`load`), reads on (`read`), and gives back what it has read (`store`). Its twin
is `Context.append_text`. Decoders are kept for the next text (`borrow`), because capturing takes as long as dozens of
tokens.
"""

from __future__ import annotations

import logging
import weakref
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..model import MMInterleavedModel
from ..model.language_model import ImageMemory, MMFSDecoderLayer, Synchronizer, synchronizers
from ..model.mm_interleaved import TextHead
from ..model.mmfs import VisibleImages
from ..model.static import Pool, capture
from ..model.weights import readable, state_of
from ..ops import attend, project, project_gated, promote, why_not_kernels
from ..ops.decoding import MOST_ROWS, rotate
from ..ops.scaled_rows import ScaledRows, Weights
from .context import Context
from .settings import CacheImplementation

log = logging.getLogger(__name__)

KEPT = 3  # decoders a model keeps for later
# Rows that the kernels multiply better than the library does, by the type of the weights (`mmi bench --only products`).
PRODUCT_ROWS, SCALED_PRODUCT_ROWS = 1, MOST_ROWS
# Room grows by so many columns, so that a captured step serves several turns of a session; by fewer where many rows
# would make them large (at the release's size a column of a row takes 0.8 MB).
COLUMNS = {"cuda": 1024, "cpu": 64}
FEWEST_COLUMNS, MOST_CELLS = 64, 16384  # columns, and rows times columns
SLOTS = {"cuda": 8, "cpu": 1}  # fewest pictures that there is room for once there is one, for the same reason


def why_not_static(model: MMInterleavedModel) -> str | None:
    """Why `model` cannot decode with a static cache; None: it can."""
    text, layers = model.config.text_config, model.language_model.layers
    parts = (model.visual_tokenizer, model.language_model, model.lm_head)
    devices = {p.device for part in parts for p in part.parameters()}
    if len(devices) > 1 or any(d.type == "meta" for d in devices):
        return "its weights are offloaded, or spread over several devices"
    if set(getattr(text, "layer_types", None) or ["full_attention"]) != {"full_attention"}:
        return "not all of its layers have full attention"
    if getattr(layers[0].self_attn, "sliding_window", None) or (
        getattr(text, "sliding_window", None) and text.model_type == "mistral"
    ):
        return f"its attention looks back {text.sliding_window} tokens only"
    if text.hidden_act != "silu":
        return f"its MLP has the activation {text.hidden_act}, and only silu is known"
    return None


@cache
def _warn_once(message: str) -> None:
    log.warning(message)


def uses_static(model: MMInterleavedModel, implementation: CacheImplementation) -> bool:
    """Whether to decode with a static cache.

    Raises:
        ValueError: "static" was asked for, but the model cannot.
    """
    if implementation == "dynamic" or (implementation == "auto" and model.compute_device.type != "cuda"):
        return False
    reason = why_not_static(model)
    if reason is not None and implementation == "static":
        raise ValueError(f"cache_implementation='static' is not possible for this model: {reason}; take 'dynamic'")
    if reason is not None:
        _warn_once(f"decoding without a static cache, which is slower: {reason}")
    return reason is None


@dataclass(frozen=True)
class Room:
    """How much a decoder holds.

    Attributes:
        rows: that are read together.
        columns: of all of them.
        slots: pictures that one row sees.
        pictures: of all rows.
    """

    rows: int
    columns: int
    slots: int
    pictures: int

    @classmethod
    def needed(cls, context: Context, width: int, steps: int) -> Room:
        """For `width` copies of every row of `context` and `steps` more tokens, rounded up."""
        rows = len(context.mask) * width
        device = context.mask.device.type
        unit, fewest = COLUMNS.get(device, COLUMNS["cpu"]), SLOTS.get(device, SLOTS["cpu"])
        unit = max(min(unit, MOST_CELLS // _power_of_two(rows)), FEWEST_COLUMNS)
        columns = -(-(context.mask.shape[1] + steps) // unit) * unit
        slots = context.visible.shape[1]
        pictures = 0 if context.memory is None or slots == 0 else len(context.memory)
        most = context.model.config.mmfs.max_images - 1
        return cls(rows, columns, min(_power_of_two(slots, fewest), most), _power_of_two(pictures, fewest))


def _power_of_two(count: int, fewest: int = 1) -> int:
    """The next one that is not less than `fewest`; 0 for 0."""
    return 1 << (max(count, fewest) - 1).bit_length() if count else 0


class StaticDecoder:
    """Reads a token a row; all its tensors stay where they are.

    Args:
        model: whose language model reads. Only a weak reference is kept.
        room: how much it holds.
        captured: whether to capture the step in a CUDA graph; None: on a CUDA device.
        kernels: whether to use the Triton kernels of `ops.decoding`, those of products where they are better than the
            library; None: if they can run.

    Attributes:
        logits: [rows, vocab] of what comes next, float32 or better.
    """

    def __init__(
        self, model: MMInterleavedModel, room: Room, captured: bool | None = None, kernels: bool | None = None
    ) -> None:
        self._model = weakref.ref(model)
        self.room = room
        config, text = model.config, model.config.text_config
        device, dtype = model.compute_device, model.language_model.norm.weight.dtype
        like = {"dtype": dtype, "device": device}
        whole = {"dtype": torch.long, "device": device}
        rows, layers = room.rows, len(model.language_model.layers)
        kept = (layers, rows, text.num_key_value_heads, room.columns, text.head_dim)
        self.keys, self.values = torch.zeros(kept, **like), torch.zeros(kept, **like)
        self.source = torch.full((rows, room.columns), -1, **whole)
        self.column = torch.zeros(1, **whole)
        self.positions = torch.zeros(rows, **whole)
        self.embeds = torch.zeros(rows, text.hidden_size, **like)
        self.reading = torch.zeros(rows, dtype=torch.bool, device=device)
        self.hidden = torch.zeros(room.columns, rows, text.hidden_size, **like)
        self.last = torch.zeros(rows, text.hidden_size, **like)
        self.logits = torch.zeros(rows, config.vocab_size, dtype=promote(dtype), device=device)
        self.visible = VisibleImages(
            torch.full((rows, room.slots), -1, **whole), torch.full((room.pictures, rows), -1, **whole)
        )
        self.own = torch.arange(rows, **whole)
        self.memory = self._empty_memory(model)
        self.outputs = self._empty_outputs(model)
        self.centre = torch.full((1, 1, 2), 0.5, device=device)
        possible = why_not_kernels(self.last, text.head_dim) is None and device.type == "cuda"
        self.kernels = possible if kernels is None else kernels
        self.first = 0  # column where this text begins
        self.block: Tensor | None = None
        self.replay_block = None
        self.replay = None  # `load` overwrites what the recording leaves behind
        if device.type == "cuda" if captured is None else captured:
            self.replay = capture(self._step, device)

    def _empty_memory(self, model: MMInterleavedModel) -> ImageMemory:
        """Room for the values of all pictures, and for what is derived from the weights."""
        mmfs, cells = model.config.mmfs, sum(side * side for side in model.config.mmfs.levels)
        like = {"dtype": self.last.dtype, "device": self.last.device}
        shape = (self.room.pictures, cells, mmfs.num_heads, mmfs.hidden_size // mmfs.num_heads)
        layers = synchronizers(model.language_model)
        values, derived = [torch.zeros(shape, **like) for _ in layers], [s.mmfs.derive_query() for s in layers]
        nothing = torch.zeros(0, cells, model.config.vision_config.hidden_size, **like)
        return ImageMemory(nothing, [(side, side) for side in mmfs.levels], values, derived)

    def _empty_outputs(self, model: MMInterleavedModel) -> list[tuple[Tensor, Tensor]]:
        """Room for the output projection of every MMFS layer, its gate multiplied in."""
        layers = [s.mmfs.output_proj for s in synchronizers(model.language_model)]
        return [(torch.zeros_like(layer.weight), torch.zeros_like(layer.bias)) for layer in layers]

    # ---- taking over and giving back

    @torch.no_grad()
    def load(self, context: Context, width: int = 1) -> None:
        """Take over from `context`, with `width` copies of every row; nothing that it has read is copied `width` times.

        The context may not read on until `store`.
        """
        context.flush()
        self.first = columns = context.mask.shape[1]
        for index, layer in enumerate(context.cache.layers):
            self.keys[index, ::width, :, :columns] = layer.keys
            self.values[index, ::width, :, :columns] = layer.values
        self.source.fill_(-1)
        home = (self.own // width * width)[:, None]
        mask = context.mask.repeat_interleave(width, 0)
        self.source[:, :columns] = torch.where(mask == 1, home, -1)
        self.column.fill_(columns)
        self.positions.copy_(mask.sum(1))
        self.last.copy_(context.last.repeat_interleave(width, 0))
        self._load_pictures(context, width)
        self._say(context.model.lm_head)

    def _load_pictures(self, context: Context, width: int) -> None:
        images, routes, slots = self.visible.images, self.visible.routes, context.visible.shape[1]
        images.fill_(-1)
        if not self.room.slots:
            return
        images[:, :slots] = context.visible.repeat_interleave(width, 0)
        seen = (
            images == torch.arange(self.room.pictures, device=images.device)[:, None, None]
        )  # [pictures, rows, slots]
        entry = self.own * self.room.slots + seen.int().argmax(-1)
        routes.copy_(torch.where(seen.any(-1), entry, -1))
        count = len(context.memory)
        for ours, theirs in zip(self.memory.values, context.memory.values, strict=True):
            ours[:count] = theirs
        for ours, synchronizer in zip(self.memory.derived, synchronizers(context.model.language_model), strict=True):
            if ours is not None:
                synchronizer.mmfs.derive_query(ours)
        for (weight, bias), synchronizer in zip(self.outputs, synchronizers(context.model.language_model), strict=True):
            gate, output = synchronizer.gate.tanh(), synchronizer.mmfs.output_proj
            weight.copy_(gate * output.weight)
            bias.copy_(gate * output.bias)

    @torch.no_grad()
    def store(self, context: Context, count: int) -> None:
        """Let `context`, from which this was loaded with one copy of every row, know the first `count` columns read."""
        if not count:
            return
        new = slice(self.first, self.first + count)
        for index in range(len(self.keys)):
            context.cache.update(self.keys[index][:, :, new], self.values[index][:, :, new], index)
        mask = (self.source[:, new] >= 0).long()
        context.extend(self.hidden[new].transpose(0, 1).clone(), mask)

    # ---- reading

    @torch.no_grad()
    def read(self, tokens: Tensor, reading: Tensor) -> None:
        """Read `tokens` [rows] where `reading` [rows] says so; then `logits` is what comes next. Waits for nothing."""
        self.embeds.copy_(self._model().embed(tokens[:, None], None)[:, 0])
        self.reading.copy_(reading)
        (self.replay or self._step)()

    def prepare_block(self, columns: int) -> None:
        """Get ready for `read_block` with so many columns; what was loaded is lost if this is the first time."""
        if self.block is not None and self.block.shape[1] == columns:
            return
        self.block = self.embeds.new_zeros(len(self.embeds), columns, self.embeds.shape[1])
        self.column.zero_()  # there is room for the steps that recording takes
        self.replay_block = capture(self._block_step, self.block.device) if self.replay is not None else None

    @torch.no_grad()
    def read_block(self, embeds: Tensor, reading: Tensor) -> None:
        """Read several columns at once: `embeds` [rows, columns, width] where `reading` [rows] says so.

        All rows must be rows of the context (no beams), and see the same pictures in all columns.
        """
        self.block.copy_(embeds)
        self.reading.copy_(reading)
        (self.replay_block or self._block_step)()

    def reorder(self, parents: Tensor) -> None:
        """Make row i what row `parents[i]` was; both belong to the same row of the context."""
        self.source.copy_(self.source[parents])
        self.positions.copy_(self.positions[parents])
        self.last.copy_(self.last[parents])

    def _step(self) -> None:
        """The work of one token; tensors only, no number of which the host needs to know."""
        model = self._model()
        language = model.language_model
        self.source.index_copy_(1, self.column, self.own.masked_fill(~self.reading, -1)[:, None])
        hidden = self.embeds
        cos, sin = language.rotary_emb(hidden[:, None], self.positions[:, None])
        for index, layer in enumerate(language.layers):
            hidden = self._layer(layer, hidden, cos[:, 0], sin[:, 0], index)
        hidden = language.norm(hidden)
        self.hidden.index_copy_(0, self.column, hidden[None])
        self.last.copy_(torch.where(self.reading[:, None], hidden, self.last))
        self._say(model.lm_head)
        self.positions.add_(self.reading)
        self.column.add_(1)

    def _say(self, head: TextHead) -> None:
        """The logits after the last token of every row."""
        weights = self._weights(head.head, head.new)
        if weights is None:
            self.logits.copy_(head(self.last))
            return
        both = project(self.last, weights, [head.head.bias, head.new.bias], backend="triton")
        vocab = self.logits.shape[1]
        self.logits.copy_(both[:, :vocab])
        self.logits[:, vocab - head.num_new :] += both[:, vocab:]

    def _layer(self, layer: MMFSDecoderLayer, hidden: Tensor, cos: Tensor, sin: Tensor, index: int) -> Tensor:
        attention = layer.self_attn
        maps = (attention.q_proj, attention.k_proj, attention.v_proj)
        query, key, value = self._project(hidden, layer.input_layernorm, maps)
        if hasattr(attention, "q_norm"):
            query, key = (
                norm(x.unflatten(-1, (-1, attention.head_dim))).flatten(-2)
                for x, norm in ((query, attention.q_norm), (key, attention.k_norm))
            )
        mixed = attend(
            query, key, value, cos, sin, self.keys[index], self.values[index], self.source, self.column,
            attention.scaling, backend="triton" if self.kernels else "plain",
        )  # fmt: skip
        hidden = self._add(hidden, mixed, attention.o_proj)
        if layer.synchronizer is not None:
            hidden = self._look(layer.synchronizer, hidden)
        return self._mlp(layer, hidden)

    def _block_step(self) -> None:
        """The work of several columns."""
        model = self._model()
        language, hidden = model.language_model, self.block
        count = hidden.shape[1]
        steps = torch.arange(count, device=hidden.device)
        columns = self.column + steps
        filled = self.own.masked_fill(~self.reading, -1)[:, None].expand(-1, count).contiguous()
        self.source.index_copy_(1, columns, filled)
        place = torch.arange(self.room.columns, device=hidden.device)
        seen = (self.source >= 0)[:, None] & (place <= columns[:, None])
        mask = hidden.new_zeros(seen.shape).masked_fill(~seen, torch.finfo(hidden.dtype).min)[:, None]
        rotary = language.rotary_emb(hidden, self.positions[:, None] + steps)
        visible = self._block_visible(steps)
        for index, layer in enumerate(language.layers):
            hidden = hidden + self._block_attention(layer, hidden, rotary, columns, mask, index)
            if layer.synchronizer is not None:
                hidden = hidden + layer.synchronizer(hidden, self.memory, visible)
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        hidden = language.norm(hidden)
        self.hidden.index_copy_(0, columns, hidden.transpose(0, 1).contiguous())
        self.last.copy_(torch.where(self.reading[:, None], hidden[:, -1], self.last))
        self._say(model.lm_head)
        self.positions.add_(self.reading * count)
        self.column.add_(count)

    def _block_attention(
        self,
        layer: MMFSDecoderLayer,
        hidden: Tensor,
        rotary: tuple[Tensor, Tensor],
        columns: Tensor,
        mask: Tensor,
        index: int,
    ) -> Tensor:
        attention, x = layer.self_attn, layer.input_layernorm(hidden)
        maps = (attention.q_proj, attention.k_proj, attention.v_proj)
        query, key, value = (m(x).unflatten(-1, (-1, attention.head_dim)) for m in maps)
        if hasattr(attention, "q_norm"):
            query, key = attention.q_norm(query), attention.k_norm(key)
        cos, sin = (x[:, None] for x in rotary)
        query, key = (rotate(x.transpose(1, 2), cos, sin) for x in (query, key))
        keys, values = self.keys[index], self.values[index]
        keys.index_copy_(2, columns, key)
        values.index_copy_(2, columns, value.transpose(1, 2))
        grouped = query.shape[1] != keys.shape[1]
        mixed = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=attention.scaling,
                                               enable_gqa=grouped)  # fmt: skip
        return attention.o_proj(mixed.transpose(1, 2).flatten(2))

    def _block_visible(self, steps: Tensor) -> VisibleImages:
        """What every token of a block sees: what its row sees."""
        count, slots = len(steps), max(self.room.slots, 1)
        routes = self.visible.routes[..., None]  # [pictures, rows, 1] of row * slots + slot
        entries = (routes // slots * count + steps) * slots + routes % slots
        images = self.visible.images.repeat_interleave(count, 0, output_size=len(self.own) * count)
        return VisibleImages(images, entries.masked_fill(routes < 0, -1).flatten(1))

    def _weights(self, *linears: nn.Module) -> list[Weights] | None:
        """What kernels read of modules; None: they must be called."""
        found = [readable(m) for m in linears] if self.kernels else [None]
        kinds = {type(w) is ScaledRows for w in found}
        most = SCALED_PRODUCT_ROWS if True in kinds else PRODUCT_ROWS
        return None if any(w is None for w in found) or len(kinds) > 1 or self.room.rows > most else found

    def _project(self, x: Tensor, norm: nn.Module, maps: tuple[nn.Module, ...]) -> tuple[Tensor, ...]:
        weights = self._weights(*maps)
        if weights is None:
            x = norm(x)
            return tuple(m(x) for m in maps)
        biases = [m.bias for m in maps]
        out = project(x, weights, biases, gain=norm.weight, eps=norm.variance_epsilon, backend="triton")
        return out.split([len(w) for w in weights], dim=-1)

    def _add(self, residual: Tensor, x: Tensor, linear: nn.Module) -> Tensor:
        weights = self._weights(linear)
        if weights is not None:
            return project(x, weights, [linear.bias], residual=residual, backend="triton")
        plain = readable(linear)
        if isinstance(plain, Tensor) and linear.bias is None:
            return torch.addmm(residual, x, plain.T)
        return residual + linear(x)

    def _mlp(self, layer: MMFSDecoderLayer, hidden: Tensor) -> Tensor:
        mlp, norm = layer.mlp, layer.post_attention_layernorm
        weights = self._weights(mlp.gate_proj, mlp.up_proj, mlp.down_proj)
        if weights is None or mlp.gate_proj.bias is not None:
            return hidden + mlp(norm(hidden))
        gated = project_gated(hidden, *weights[:2], gain=norm.weight, eps=norm.variance_epsilon, backend="triton")
        return self._add(hidden, gated, mlp.down_proj)

    def _look(self, synchronizer: Synchronizer, hidden: Tensor) -> Tensor:
        mmfs, norm, slots = synchronizer.mmfs, synchronizer.query_norm, self.room.slots
        derived = self.memory.derived[synchronizer.index]
        if derived is None or self._weights(mmfs.output_proj) is None or not slots or mmfs.implementation != "fast":
            return hidden + synchronizer(hidden[:, None], self.memory, self.visible)[:, 0]
        (weight, bias), values = self.outputs[synchronizer.index], self.memory.values[synchronizer.index]
        both = project(hidden, [derived.weight], [derived.bias], gain=norm.weight, eps=norm.variance_epsilon,
                       backend="triton")  # fmt: skip
        sides = mmfs.split(both[:, None], derived.table[:slots])
        mixed = mmfs.mix(sides, values, self.visible, self.memory.shapes, self.centre, synchronizer.base_size,
                         hidden.dtype)  # fmt: skip
        return project(mixed[:, 0], [weight], [bias], residual=hidden, backend="triton")


def read_column(context: Context, tokens: Tensor, reading: Tensor) -> None:
    """Let `context` read one plain token [batch] in the rows `reading` [batch]; the twin of `append_text`."""
    with borrow(context.model, Room.needed(context, 1, 1)) as decoder:
        decoder.load(context)
        decoder.read(tokens, reading)
        decoder.store(context, 1)


_pool: Pool[StaticDecoder] = Pool(KEPT)


def borrow(model: MMInterleavedModel, room: Room) -> AbstractContextManager[StaticDecoder]:
    """A decoder with that room, for nobody else until it is given back."""
    weights = state_of(model.language_model, model.lm_head)
    return _pool.borrow(model, room, weights, lambda: StaticDecoder(model, room))

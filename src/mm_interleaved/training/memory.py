"""An estimate of the GPU memory of a training run, from its settings alone.

One step of the real model runs on tensors without content (`FakeTensorMode`), as it would on a CUDA device, while every
allocation is counted. So activations, recomputation, and copies in half precision cannot differ from the code. What the
step does not show follows from the number of weights: optimizer states, averages, and the division by FSDP2 or ZeRO.
Kernels' workspaces and fragmentation are a fixed share (`OVERHEAD`).

Axes: B rows of the batch, L tokens of a row, I images.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import _engine_run_backward
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..checkpoints.quantization import frozen_linears, stored_bytes
from ..generation import MMInterleaved
from ..io import read_json
from ..model import MMInterleavedConfig
from ..ops.devices import shapes_as_on_cuda
from .building import empty_model, quantized_modules, set_types
from .checkpointing import enable_checkpointing
from .config import TrainConfig
from .sharding import BLOCKS

BLOCK = 512  # bytes; PyTorch's allocator rounds up to it
OVERHEAD = 0.04  # share of all for fragmentation and the workspaces of kernels, see benchmarks/results
GIB = 2**30
VAE = "image_decoder.vae."


@dataclass(frozen=True)
class BatchSizes:
    """Sizes of a batch of one process.

    Attributes:
        rows, tokens: number and length of the rows.
        images: images in all rows.
        targets: target images of the image loss.
    """

    rows: int
    tokens: int
    images: int
    targets: int

    @classmethod
    def of(cls, config: TrainConfig, model: MMInterleavedConfig) -> BatchSizes:
        """The largest batch that the settings allow, as far as they say."""
        return max(cls.of_sources(config, model), key=lambda size: (size.rows * size.tokens, size.images, size.targets))

    @classmethod
    def of_sources(cls, config: TrainConfig, model: MMInterleavedConfig) -> list[BatchSizes]:
        """The largest batch of each source of `config.training_data`.

        Rows hold as many images as `max_images_per_sequence` allows, or else as fit with as much text as image tokens.
        """
        longest = min(model.text_config.max_position_embeddings, model.max_context_length)
        sizes = []
        for source in config.training_data.sources:
            rows = config.data.batch_size if config.data.mix == "row" else source.batch_size
            tokens = min(source.max_length or longest, longest)
            most = max((tokens - 1) // (model.num_image_tokens + 1), 0)  # after `<s>`
            images = rows * min(source.max_images_per_sequence or max(most // 2, 1), most)
            weight = config.losses.image if source.loss_image_weight is None else source.loss_image_weight
            targets = round(images * config.losses.image_fraction) if weight else 0
            sizes.append(cls(rows, tokens, images, targets))
        return sizes


@dataclass
class MemoryEstimate:
    """Bytes of GPU memory of one process at the largest moment of a step.

    Attributes:
        parts: bytes by part: weights, frozen weights, gradients, optimizer, average, activations, ...
        sizes: the batch that was assumed.
        world_size: number of processes.
    """

    parts: dict[str, int]
    sizes: BatchSizes
    world_size: int = 1

    @property
    def total(self) -> int:
        """All bytes."""
        return sum(self.parts.values())

    def __str__(self) -> str:
        """One line, such as "about 61 GiB on one GPU (frozen weights 25.1, activations 20.3, ...)"."""
        gib = {name: f"{name} {size / GIB:.1f}" for name, size in self.parts.items() if size >= 0.05 * GIB}
        where = "on one GPU" if self.world_size == 1 else f"on each of {self.world_size} GPUs"
        inside = f" ({', '.join(gib.values())})" if gib else ""
        return f"about {_rounded(self.total / GIB)} GiB {where}{inside}"


def _rounded(gib: float) -> str:
    return f"{gib:.0f}" if gib >= 10 else f"{gib:.1f}"


def estimate(
    config: TrainConfig,
    model_config: MMInterleavedConfig,
    world_size: int = 1,
    sizes: BatchSizes | None = None,
) -> MemoryEstimate:
    """Estimate the memory of one process of a run. Takes about ten seconds and little memory at any size.

    Args:
        config: settings of the run.
        model_config: the model, for instance from `building.build_config(config.model)`.
        world_size: number of processes, each with a GPU.
        sizes: sizes of a batch; None: `BatchSizes.of`.

    Raises:
        InputError: the adapter selects no layer, or the one to train further cannot be read.
    """
    sizes = sizes or BatchSizes.of(config, model_config)
    divided, half = bool(config.fsdp), computes_in_half(config)
    model = empty_model(config, model_config)
    _ = model.image_decoder.scheduler  # is made on first use, and computes with its content
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    inputs = _Inputs(model, model_config, sizes)
    with fake, shapes_as_on_cuda(), _casts_as_on_cuda():
        model.to_empty(device="cpu")
        set_types(model, config)
        for parameter in model.parameters() if half else ():
            parameter.data = parameter.data.to(_compute_type(config))
        weights = _Weights.of(model, _compute_type(config) if divided else None)
        if divided:  # weights are gathered in the type of computation, so autocast copies none
            for name, parameter in model.named_parameters():
                if not name.startswith(VAE):
                    parameter.data = parameter.data.to(_compute_type(config))
        if config.gradient_checkpointing:
            enable_checkpointing(model, config.selective_checkpointing)
        peak = _peak_of_step(model.train(), inputs, config, keep_gradients=not divided)
    parts = _static_parts(config, weights, world_size)
    parts["activations"] = max(peak - (0 if divided else weights.gradient_bytes), 0)
    if config.model.quantize != "none":
        linears = [layer.weight for layer in frozen_linears(model, quantized_modules(model, config)).values()]
        fewer = sum(stored_bytes(w.shape[0], w.shape[1], w.element_size(), config.model.quantize) for w in linears)
        parts["frozen weights"] -= _bytes(linears) - fewer
        parts["activations"] += max(_bytes([weight]) for weight in linears)  # one layer is whole while it computes
    parts["overhead"] = int(OVERHEAD * sum(parts.values()))
    return MemoryEstimate({name: size for name, size in parts.items() if size}, sizes, world_size)


def _compute_type(config: TrainConfig) -> torch.dtype:
    return getattr(torch, config.precision)


def computes_in_half(config: TrainConfig) -> bool:
    """Whether all weights, also those of the VAE, have the type of computation, as with DeepSpeed in half precision.

    It keeps float32 copies of the trained ones beside the optimizer's states, and autocast is off.
    """
    return bool(config.deepspeed) and config.precision != "float32"


# ---- weights and what is stored for each of them


@dataclass
class _Weights:
    """Bytes of the weights of a model, before they are divided.

    Attributes:
        trained, frozen: bytes of weights and buffers.
        vae: bytes of the VAE, which is never divided; part of `frozen`.
        elements: number of trained scalars.
        gathered: bytes that a process holds in whole while it computes, with FSDP2.
    """

    trained: int
    frozen: int
    vae: int
    elements: int
    gathered: int

    @classmethod
    def of(cls, model: nn.Module, compute: torch.dtype | None) -> _Weights:
        """The weights of `model`; `compute` is the type that FSDP2 gathers them in, None: no FSDP2."""
        unique = {id(p): (name, p) for name, p in model.named_parameters()}.values()
        trained = [p for _, p in unique if p.requires_grad]
        frozen = [p for _, p in unique if not p.requires_grad]
        vae = [p for name, p in unique if name.startswith(VAE)]
        return cls(
            trained=_bytes(trained),
            frozen=_bytes([*frozen, *model.buffers()]),
            vae=_bytes(vae),
            elements=sum(p.numel() for p in trained),
            gathered=0 if compute is None else _gathered(model, compute.itemsize),
        )

    @property
    def gradient_bytes(self) -> int:
        """Bytes of all gradients, which have the type of their weights."""
        return self.trained


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(_block(t.numel() * t.element_size()) for t in tensors)


def _block(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _gathered(model: nn.Module, itemsize: int) -> int:
    """Weights that FSDP2 holds in whole at one moment: those outside of blocks, and three of the largest blocks.

    While a block computes, the next one is gathered, and gradients of the one before are reduced.
    """
    blocks = [module for module in model.modules() if isinstance(module, BLOCKS)]
    inside = {id(p) for block in blocks for p in block.parameters()}
    outside = [p for name, p in model.named_parameters() if id(p) not in inside and not name.startswith(VAE)]
    largest = max((sum(p.numel() for p in block.parameters()) for block in blocks), default=0)
    return itemsize * (sum(p.numel() for p in outside) + 3 * largest)


def _static_parts(config: TrainConfig, weights: _Weights, world_size: int) -> dict[str, int]:
    """What a process stores between steps, and gradients."""
    weight_share = gradient_share = state_share = 1
    if config.fsdp:
        weight_share = gradient_share = state_share = world_size
    stage = zero_stage(config)
    state_share = world_size if stage >= 1 else state_share
    gradient_share = world_size if stage >= 2 else gradient_share
    weight_share = world_size if stage >= 3 else weight_share
    states = _state_bytes(config) * weights.elements
    parts = {
        "weights": weights.trained // weight_share,
        "float32 copies": 4 * weights.elements // state_share if computes_in_half(config) else 0,
        "frozen weights": weights.vae + (weights.frozen - weights.vae) // weight_share,
        "gathered weights": weights.gathered,
        "gradients": weights.gradient_bytes // gradient_share,
        "optimizer": states // state_share,
        "average": weights.trained // weight_share if config.ema.decay else 0,
    }
    if stage >= 1:
        parts["buckets"] = _zero_buckets(config, weights)
    elif world_size > 1 and not config.fsdp and not config.deepspeed:
        parts["buckets"] = weights.gradient_bytes  # of DDP
    return parts


def zero_settings(config: TrainConfig) -> dict[str, Any]:
    """The settings of ZeRO in a run's DeepSpeed file; {}: there is none."""
    return read_json(Path(config.deepspeed)).get("zero_optimization", {}) if config.deepspeed else {}


def zero_stage(config: TrainConfig) -> int:
    """The stage of ZeRO; 0: none."""
    return int(zero_settings(config).get("stage", 0))


def _zero_buckets(config: TrainConfig, weights: _Weights) -> int:
    """Bytes in which ZeRO collects gradients: one bucket, or two of which one is reduced meanwhile."""
    zero = zero_settings(config)
    elements = min(int(zero.get("reduce_bucket_size", 500_000_000)), weights.elements)
    count = 2 if zero.get("overlap_comm", False) else 1
    return count * elements * _compute_type(config).itemsize if zero.get("contiguous_gradients", True) else 0


def _state_bytes(config: TrainConfig) -> int:
    """Bytes of optimizer states for a weight: two of AdamW in float32, one of Muon; fewer with 8 or 4 bits."""
    name = str(config.trainer.get("optim", ""))
    if "8bit" in name or "4bit" in name:
        return 2 if "8bit" in name else 1
    return 4 if config.optimizer.kind == "muon" else 8


# ---- one step without content


class _Inputs:
    """Arguments of a training step of the given sizes.

    The layout is computed from token ids with content: rows of one document each, with images evenly distributed.
    """

    def __init__(self, model: MMInterleaved, config: MMInterleavedConfig, sizes: BatchSizes) -> None:
        self.model, self.config, self.sizes = model, config, sizes
        self.ids = torch.stack([_row(config, sizes, row) for row in range(sizes.rows)])
        mask, labels = torch.ones_like(self.ids), self.ids.masked_fill(self.ids == config.image_token_id, -100)
        targets = torch.arange(sizes.targets) if sizes.targets else None
        self.layout = model.plan(self.ids, mask, labels=labels, target_images=targets, routes=False)
        self.mask, self.labels = mask, labels

    def arguments(self) -> dict[str, Any]:
        """The arguments of `forward`; call it inside the fake mode."""
        side, target, sizes = self.config.vision_config.image_size, self.config.image_decoder.image_size, self.sizes
        made: dict[str, Any] = {"input_ids": self.ids.clone(), "attention_mask": self.mask.clone(),
                                "labels": self.labels.clone(), "layout": self.layout}  # fmt: skip
        if sizes.images:
            made["pixel_values"] = torch.empty(sizes.images, 3, side, side, dtype=torch.uint8)
        if sizes.targets:
            made["target_pixel_values"] = torch.empty(sizes.images, 3, target, target, dtype=torch.uint8)
            made["noise_samples"] = self.model.image_decoder.sample_noise(sizes.targets)
        return made


def _row(config: MMInterleavedConfig, sizes: BatchSizes, row: int) -> Tensor:
    """Token ids [L] of a row with its share of the images."""
    images = sizes.images * (row + 1) // sizes.rows - sizes.images * row // sizes.rows
    image = [config.soi_token_id] + [config.image_token_id] * config.num_image_tokens
    text = sizes.tokens - 1 - images * len(image)
    if text < 0:
        raise ValueError(f"{images} images do not fit into {sizes.tokens} tokens")
    word = next(i for i in range(config.vocab_size) if i not in _reserved(config))
    ids = [config.bos_token_id]
    for number in range(images):
        ids += [word] * (text * (number + 1) // (images + 1) - text * number // (images + 1)) + image
    return torch.tensor(ids + [word] * (sizes.tokens - len(ids)))


def _reserved(config: MMInterleavedConfig) -> set[int]:
    return {getattr(config, f"{name}_token_id") for name in ("bos", "eos", "pad", "soi", "image")}


def _peak_of_step(model: nn.Module, inputs: _Inputs, config: TrainConfig, keep_gradients: bool) -> int:
    """Most bytes that a forward and backward pass allocate at once; without gradients unless they are kept."""
    trained = [p for p in model.parameters() if p.requires_grad]
    if not keep_gradients:
        for parameter in trained:
            parameter.register_post_accumulate_grad_hook(_drop_gradient)
    elif config.accumulation > 1:
        for parameter in trained:
            parameter.grad = torch.empty_like(parameter)
    before = sum(_block(p.grad.numel() * p.grad.element_size()) for p in trained if p.grad is not None)
    with _Allocations() as counted:
        arguments = inputs.arguments()
        with torch.autocast(
            "cpu", _compute_type(config), enabled=config.precision != "float32" and not computes_in_half(config)
        ):
            loss = model(**arguments).loss
        # `loss.backward()` would be a function in which `_WideOperators` is off, also for what is recomputed.
        _engine_run_backward((loss,), (torch.ones_like(loss),), False, False, (), allow_unreachable=True,
                             accumulate_grad=True)  # fmt: skip
    return counted.peak + before


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


class _Allocations(TorchDispatchMode):
    """Counts the bytes of storages that operators make.

    Attributes:
        now, peak: bytes at this moment, and most so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._alive: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage(), given)
        return result

    def _add(self, storage: torch.UntypedStorage, given: set[int]) -> None:
        key = storage._cdata
        if key in self._alive or key in given:
            return
        size = _block(storage.nbytes())

        def free(_: object) -> None:
            del self._alive[key]
            self.now -= size

        self._alive[key] = weakref.ref(storage, free)
        self.now += size
        self.peak = max(self.peak, self.now)


@contextmanager
def _casts_as_on_cuda() -> Iterator[None]:
    """Autocast on the CPU keeps the type of operators that CUDA's autocast computes in float32; inside it does not."""
    with _WideOperators():
        yield


class _WideOperators(TorchFunctionMode):
    WIDE = frozenset({F.layer_norm, F.group_norm, F.softmax, torch.softmax, Tensor.softmax, F.log_softmax,
                      F.cross_entropy, F.mse_loss, torch.pow, Tensor.pow, torch.sum, Tensor.sum, torch.exp, Tensor.exp,
                      torch.cumsum, Tensor.cumsum, torch.rsqrt, Tensor.rsqrt})  # fmt: skip

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.rms_norm:  # one kernel on CUDA devices, which keeps as much as that of a layer norm
            return torch.native_layer_norm(args[0], args[1], kwargs["weight"], None, 1e-5)[0]
        if func in self.WIDE and torch.is_autocast_enabled("cpu"):
            args = [_widened(x) for x in args]
            kwargs = {name: _widened(x) for name, x in kwargs.items()}
        return func(*args, **kwargs)


def _widened(value: Any) -> Any:
    half = isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16)
    return value.float() if half else value

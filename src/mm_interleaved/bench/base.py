"""What every line of the benchmark stands on: the model, the sizes, the clock, and the row that comes out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import cast

import torch
from torch import Tensor

from ..checkpoints.quantization import Quantization, quantize
from ..generation import GenerationState, MMInterleaved
from ..generation.settings import CacheImplementation
from ..generation.workspace import uses_graphs
from ..model import MMInterleavedConfig
from ..model.cost import Cost, measure
from ..model.mmfs import MMFS
from ..model.roofline import Need
from ..ops.mmfs_attention import Backend
from ..pretrained import TOKENIZER, Loaded
from ..processor import MMInterleavedProcessor, MMInterleavedTokenizer
from .machine import Clock, Speed


@dataclass
class Row:
    """One measurement.

    Attributes:
        line, case: what was measured.
        unit: of `value`, `reference` and `bound`; less is better.
        value: of the fast way.
        reference: of its plain reference in the same run; None: there is none.
        bound: what the machine allows.
        peak_bytes, reference_peak_bytes: memory needed beyond what was there; None: not measured.
        reserved_bytes: most memory that the process held on the GPU while the row was measured, the weights among it.
        lossless: whether the fast way's results are the reference's.
        note: whatever else is worth knowing.
        x: number of images or rounds, for plots.
    """

    line: str
    case: str
    unit: str
    value: float
    reference: float | None = None
    bound: float | None = None
    peak_bytes: int | None = None
    reference_peak_bytes: int | None = None
    reserved_bytes: int | None = None
    lossless: bool = True
    note: str = ""
    x: int | None = None

    @property
    def ratio(self) -> float | None:
        """How many times as long the reference takes."""
        return None if self.reference is None else self.reference / self.value

    @property
    def of_bound(self) -> float | None:
        """Share of what the machine allows."""
        return None if self.bound is None else self.bound / self.value


@dataclass
class Sizes:
    """How much work each line does.

    Attributes:
        texts: (tokens, images) of contexts that are decoded from.
        tokens: decoded for a figure; `reference_tokens` by the reference, which is slower.
        beams: of beam search.
        length, images: of the text that is prefilled.
        drawing: (tokens, images) of the context that an image is drawn from; `steps` denoising steps.
        rounds, round_tokens: of a session; `reference_rounds` of its reference.
        batch, batch_length, batch_images: of a training step.
        captions: of a batch of the evaluation.
        counts: numbers of images over which lines are drawn.
        repeats: of short work.
    """

    texts: Sequence[tuple[int, int]] = ((600, 5), (1800, 15))
    tokens: int = 64
    reference_tokens: int = 8
    beams: int = 5
    length: int = 2048
    images: int = 15
    drawing: tuple[int, int] = (400, 3)
    steps: int = 30
    rounds: int = 10
    round_tokens: int = 60
    reference_rounds: int = 2
    batch: int = 4
    batch_length: int = 2048
    batch_images: int = 8
    captions: int = 64
    counts: Sequence[int] = (1, 2, 5, 10, 15, 20, 30)
    repeats: int = 20


SIZES = {
    "release": Sizes(),
    "small": Sizes(texts=((200, 2), (600, 5)), tokens=32, reference_tokens=32, length=512, images=5, drawing=(200, 2),
                   rounds=4, round_tokens=16, reference_rounds=4, batch=2, batch_length=256, batch_images=3, repeats=5,
                   counts=(1, 5, 15, 30)),
    "debug": Sizes(texts=((60, 2),), tokens=4, reference_tokens=4, beams=2, length=60, images=2, drawing=(40, 1),
                   steps=2, rounds=2, round_tokens=3, reference_rounds=2, batch=1, batch_length=64, batch_images=2,
                   captions=3, counts=(1, 3), repeats=2),
}  # fmt: skip


@dataclass
class Bench:
    """One run.

    Attributes:
        preset: size of the model.
        device, dtype: where and in which type it runs.
        sizes: how much work is done.
        compile: whether images are also drawn by a compiled UNet, which takes minutes to make.
        mmfs: backend of every synchronizer; None: as the model has it.
        quantization: of the language model's large matrices; None: none.
        say: told about what is going on.
    """

    preset: str
    device: torch.device
    dtype: torch.dtype
    sizes: Sizes
    compile: bool = False
    mmfs: str | None = None
    quantization: Quantization | None = None
    say: Callable[[str], object] = field(default=lambda text: None)

    @cached_property
    def clock(self) -> Clock:
        """Of the device."""
        return Clock(self.device)

    @cached_property
    def speed(self) -> Speed:
        """Of the machine."""
        return self.clock.speed(self.dtype)

    @cached_property
    def cost(self) -> Cost:
        """Of the model, with as many steps as are drawn."""
        return measure(MMInterleavedConfig.preset(self.preset), steps=self.sizes.steps)

    @cached_property
    def loaded(self) -> Loaded:
        """The model, made when a line first needs it."""
        begin = self.clock()
        loaded = fresh(self.preset, self.device, self.dtype)
        if self.mmfs is not None:
            for module in loaded.model.modules():
                if isinstance(module, MMFS):
                    module.backend = cast(Backend, self.mmfs)  # `mmi bench` has checked it
        if self.quantization is not None:
            quantize(loaded.model, self.quantization)
        self.say(f"model made in {self.clock() - begin:.0f} s")
        return loaded

    @property
    def model(self) -> MMInterleaved:
        """The model itself."""
        return self.loaded.model

    @cached_property
    def noise(self) -> Tensor:
        """Pixels of as many images as any line takes, on the device, so that no line has to make them."""
        side, sizes = self.model.config.vision_config.image_size, self.sizes
        most = max(sizes.images, *sizes.counts, *(count for _, count in sizes.texts))
        return torch.rand(most, 3, side, side, generator=torch.Generator().manual_seed(0)).to(self.device)

    def bound(self, need: Need) -> float:
        """Seconds that the machine needs at least."""
        return need.seconds(self.speed.bytes_per_second, self.speed.operations_per_second)


def fresh(preset: str, device: torch.device, dtype: torch.dtype) -> Loaded:
    """A model of that size with random weights and none at zero, made on the device.

    What it writes means nothing and costs the same. It writes tokens of the package's tokenizer only.
    """
    config, small = MMInterleavedConfig.preset(preset), MMInterleavedConfig.preset("small")
    words, text = small.text_config.vocab_size, config.text_config
    text.vocab_size = max(text.vocab_size, words)
    for name in ("bos", "eos", "pad", "soi", "image"):
        setattr(config, f"{name}_token_id", getattr(small, f"{name}_token_id"))
    before = torch.get_default_dtype()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        torch.set_default_dtype(dtype)
        try:
            with device:
                model = MMInterleaved(config).eval()
        finally:
            torch.set_default_dtype(before)
        with torch.no_grad():
            for parameter in model.parameters():
                if not parameter.any():
                    parameter.normal_(std=0.02)
            model.lm_head.head.bias[words:] = -1e4  # the tokenizer knows no more tokens
    model.image_decoder.vae.float()
    tokenizer = MMInterleavedTokenizer.from_vocab(TOKENIZER)
    return Loaded(model, MMInterleavedProcessor.for_model(config, tokenizer), trained=False, name=preset)


def document(config: MMInterleavedConfig, length: int, images: int) -> Tensor:
    """Token ids [length] of one document with so many whole images spread over it."""
    ids = [config.bos_token_id]
    room = length - 1 - images * (1 + config.num_image_tokens)
    if room < images + 1:
        raise ValueError(f"{images} images do not fit into {length} tokens")
    for _ in range(images):
        ids += [20] * (room // (images + 1)) + [config.soi_token_id]
        ids += [config.image_token_id] * config.num_image_tokens
    return torch.tensor(ids + [20] * (length - len(ids)))


def prefilled(
    bench: Bench, length: int, images: int, implementation: CacheImplementation = "auto", tokens: int = 0
) -> GenerationState:
    """A state of one row that has read so many tokens and images, with room for `tokens` more at once."""
    model = bench.model
    ids = document(model.config, length, images)[None]
    state = GenerationState(
        model, 1, uses_graphs(model, implementation), tokens=length + tokens, slots=images, images=images
    )
    state.prefill(ids, torch.ones_like(ids), bench.noise[:images] if images else None)
    return state

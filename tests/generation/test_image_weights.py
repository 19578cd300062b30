"""Images follow the weights of the moment: adapters, hooks, and writes that leave no trace, with and without capture.

A CUDA graph is stood in for by a frozen copy of the UNet that shares the memory of its weights: like a graph it sees
values change, and neither hooks nor adapters nor weights that moved.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator

import pytest
import torch
from diffusers.training_utils import EMAModel
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from mm_interleaved import MMInterleaved, MMInterleavedConfig
from mm_interleaved.model import denoising
from mm_interleaved.model.image_decoder import ImageSettings
from mm_interleaved.model.unet import DerivedWeights, EarlierImages, UNetSynchronizer

from ..conftest import awaken

IMAGE_SIDE = ("image_decoder", "visual_tokenizer", "context_proj")
KINDS = ["dynamic", "static"]


def frozen(step: Callable[[], None], _device: torch.device) -> Callable[[], None]:
    """What `capture` gives, on a CPU."""
    graphed = step.__self__
    unet = graphed._unet()
    memory = {id(p): nn.Parameter(p.data, p.requires_grad) for p in unet.parameters()}
    memory |= {id(b): b.data for b in unet.buffers()}
    copied = copy.deepcopy(unet, memory)
    step()

    def replay() -> None:
        real, graphed._unet = graphed._unet, lambda: copied
        step()
        graphed._unet = real

    return replay


@pytest.fixture(autouse=True)
def made(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[object]]:
    """The `GraphedUNet`s made during a test, with their capture stood in for."""
    made = []

    class Watched(denoising.GraphedUNet):
        def __init__(self, *args: object) -> None:
            made.append(self)
            super().__init__(*args[:5], captured=True)

    monkeypatch.setattr(denoising, "GraphedUNet", Watched)
    monkeypatch.setattr(denoising, "capture", frozen)
    denoising._pool.clear()
    yield made
    denoising._pool.clear()


def inputs(model: MMInterleaved) -> tuple[Tensor, Tensor]:
    """Two images, and what was read before two others."""
    generator = torch.Generator().manual_seed(3)
    side, width = model.config.vision_config.image_size, model.config.text_config.hidden_size
    return torch.rand(2, 3, side, side, generator=generator), torch.randn(2, 5, width, generator=generator)


@torch.no_grad()
def outputs(model: MMInterleaved, kind: str = "dynamic", steps: int = 1) -> dict[str, Tensor]:
    """All that the image side makes: visual tokens, latents and images."""
    pixels, hidden = inputs(model)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    decoder, features = model.image_decoder, model.encode_images(pixels)
    conditions = decoder.resampler(model.project_context(hidden, mask), mask)
    seen = EarlierImages.build(features.pyramid, torch.tensor([[0], [1]]))
    settings = ImageSettings(num_inference_steps=steps, guidance_scale=1.5, cache_implementation=kind)
    *_, last = decoder.denoise(conditions, seen, settings, torch.Generator().manual_seed(0))
    return {"tokens": features.tokens, "latents": last.latents, "images": decoder.decode(last.latents)}


def same(found: dict[str, Tensor], expected: dict[str, Tensor], bound: float = 1e-5) -> bool:
    return all(far(found[name], x) <= bound for name, x in expected.items())


def far(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1))


def plainly(model: MMInterleaved, steps: int = 1) -> dict[str, Tensor]:
    """The same without any fast path: a copy of the model, MMFS in its published form, modules called in each step."""
    fresh = copy.deepcopy(model)
    fresh.set_mmfs_implementation("reference")
    return outputs(fresh, steps=steps)


@pytest.fixture
def mine(model: MMInterleaved) -> MMInterleaved:
    """A model of this test's own."""
    return copy.deepcopy(model)


def image_side(model: nn.Module) -> dict[str, nn.Module]:
    """Its linear maps and convolutions, by name; without those in groups, which PEFT cannot merge."""
    return {
        name: module
        for name, module in model.named_modules()
        if name.startswith(IMAGE_SIDE) and isinstance(module, (nn.Linear, nn.Conv2d))
        if getattr(module, "groups", 1) == 1
    }


def adapted(model: MMInterleaved, names: list[str] | None = None, adapter: str = "default") -> PeftModel:
    """`model` with a random adapter on those modules; None: on every linear map and convolution of the image side."""
    names = list(image_side(model)) if names is None else names
    config = LoraConfig(r=2, lora_alpha=2, target_modules=names, init_lora_weights=False)
    torch.manual_seed(1)
    return get_peft_model(model, config, adapter_name=adapter).eval()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("preset", ["debug", pytest.param("small", marks=pytest.mark.slow)])
def test_an_adapter_acts_like_the_merged_adapter(preset: str, kind: str) -> None:
    torch.manual_seed(0)
    model = awaken(MMInterleaved(MMInterleavedConfig.preset(preset))).eval()
    before, count = outputs(model, kind, 2), len(image_side(model))
    adapter = adapted(model)
    assert sum(hasattr(m, "lora_A") for m in model.modules()) == count
    found = outputs(model, kind, 2)
    assert not same(found, before, 1e-2)
    merged = adapter.merge_and_unload()
    assert len(image_side(merged)) == count
    for expected in (outputs(merged, kind, 2), plainly(merged, 2)):
        assert same(found, expected, 1e-4)
        assert float((found["images"] - expected["images"]).abs().max()) < 2 / 255
    clipped = (found["images"] == 0) | (found["images"] == 1)
    assert clipped.float().mean() < 0.5  # or images would say little


SYNCHRONIZER = "image_decoder.unet.synchronizers.1."


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "name",
    [f"mmfs.{n}" for n in ("dynamic_offset_mask", "sampling_offsets", "attention_weights", "value_proj", "output_proj")]
    + ["conv"],
)
def test_an_adapter_on_one_map_of_a_synchronizer(mine: MMInterleaved, name: str, kind: str) -> None:
    """What is derived from it is derived no more; the rest still is."""
    before = outputs(mine, kind)
    adapter = adapted(mine, [SYNCHRONIZER + name])
    found = outputs(mine, kind)
    assert not same(found, before, 1e-4)
    derived = mine.image_decoder.unet.derive()
    assert (derived[1].query is None) == (name in ("mmfs.dynamic_offset_mask", "mmfs.sampling_offsets",
                                                   "mmfs.attention_weights"))  # fmt: skip
    assert (derived[1].output is None) == (name in ("mmfs.output_proj", "conv"))
    assert all(d.query is not None and d.output is not None for d in (derived[0], *derived[2:]))
    assert same(found, plainly(adapter.merge_and_unload()))


# ---- writes between two calls


def _data(model: MMInterleaved) -> None:
    for parameter in model.image_decoder.parameters():
        parameter.data.mul_(1.05)


def _replaced(model: MMInterleaved) -> None:
    for parameter in model.image_decoder.parameters():
        parameter.data = parameter.data * 1.05


def _ema(model: MMInterleaved) -> None:
    average = EMAModel([nn.Parameter(p * 1.05) for p in model.image_decoder.parameters()])
    average.copy_to(model.image_decoder.parameters())


def _optimizer(model: MMInterleaved) -> None:
    parameters = list(model.image_decoder.unet.parameters())
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    torch.optim.SGD(parameters, lr=0.01).step()


def _loaded(model: MMInterleaved) -> None:
    model.load_state_dict({name: x * 1.05 for name, x in model.state_dict().items()})


def _one_map(part: str) -> Callable[[MMInterleaved], None]:
    """Only one parameter of a synchronizer, all others stay."""

    def write(model: MMInterleaved) -> None:
        parameter = model.get_parameter(SYNCHRONIZER + part)
        parameter.data.add_(0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))

    return write


PARTS = ("mmfs.dynamic_offset_mask.weight", "mmfs.dynamic_offset_mask.bias", "mmfs.query_relpos.weight",
         "mmfs.sampling_offsets.weight", "mmfs.attention_weights.bias", "mmfs.output_proj.weight", "conv.weight",
         "conv.bias", "mmfs.value_proj.weight", "feature_norm.weight", "query_norm.weight")  # fmt: skip
WHOLE = {"data": _data, "replaced": _replaced, "ema": _ema, "optimizer": _optimizer, "loaded": _loaded}
WRITES = {**WHOLE, **{part: _one_map(part) for part in PARTS}}


@pytest.mark.parametrize(("how", "kind"), [*((how, "static") for how in WRITES), *((how, "dynamic") for how in WHOLE)])
def test_the_next_call_sees_what_was_written(mine: MMInterleaved, made: list, how: str, kind: str) -> None:
    before = outputs(mine, kind)
    WRITES[how](mine)
    found = outputs(mine, kind)
    assert not same(found, before, 1e-4)
    assert same(found, plainly(mine))
    moved = how == "replaced"
    assert len(made) == (0 if kind == "dynamic" else 2 if moved else 1)


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_are_switched_between_calls(mine: MMInterleaved, kind: str) -> None:
    """Off and on, another one, merged in place, another strength."""
    bare = outputs(mine, kind)
    names = [name for name in image_side(mine) if name.startswith((SYNCHRONIZER, "image_decoder.unet.mid_block"))]
    adapter = adapted(mine, names, "first")
    first = outputs(mine, kind)
    with adapter.disable_adapter():
        assert same(outputs(mine, kind), bare)
    assert same(outputs(mine, kind), first)
    adapter.add_adapter("second", copy.deepcopy(adapter.peft_config["first"]))
    adapter.set_adapter("second")
    second = outputs(mine.eval(), kind)
    assert not same(second, first, 1e-4)
    assert same(second, plainly(mine))
    adapter.set_adapter("first")
    assert same(outputs(mine, kind), first)
    adapter.merge_adapter(["first"])
    assert same(outputs(mine, kind), first)
    adapter.unmerge_adapter()
    for module in mine.modules():
        if hasattr(module, "lora_A"):
            module.scale_layer(0.5)
    weaker = outputs(mine, kind)
    assert not same(weaker, first, 1e-4)
    assert same(weaker, plainly(mine))
    merged = adapter.merge_and_unload()
    assert same(outputs(merged, kind), weaker)


# ---- hooks


def hooked() -> list[str]:
    """A module of every kind of the image decoder: those whose names differ in more than the block."""
    with torch.device("meta"):
        decoder = MMInterleaved(MMInterleavedConfig.preset("debug")).image_decoder
    kinds: dict[str, str] = {}
    for name, module in decoder.named_modules():
        if name.startswith(("unet.", "resampler", "vae.decoder", "vae.post_quant")) and _is_called(module):
            kinds.setdefault(re.sub(r"(down|up)_blocks\.\d+|mid_block|\d+", "*", name), name)
    return [f"image_decoder.{name}" for name in kinds.values()]


def _is_called(module: nn.Module) -> bool:
    return type(module).forward is not nn.ModuleList.forward


def changed(model: MMInterleaved, name: str, everywhere: bool) -> tuple[dict[str, Tensor], int]:
    """Outputs with a hook on one module that changes what it gives, and its calls; `everywhere`: idle hooks on all."""
    calls = 0

    def change(_module: nn.Module, _given: tuple, output: object) -> object:
        nonlocal calls
        calls += 1
        first = output[0] if isinstance(output, tuple) else output
        grown = first * 1.5 + 0.1
        return (grown, *output[1:]) if isinstance(output, tuple) else grown

    handles = [model.get_submodule(name).register_forward_hook(change)]
    if everywhere:
        handles += [m.register_forward_hook(lambda *_: None) for m in model.image_decoder.modules()]
    try:
        return outputs(model), calls
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("name", hooked())
def test_a_hook_runs_and_acts_as_without_fast_paths(model: MMInterleaved, name: str) -> None:
    """With hooks everywhere nothing is derived, fused or prepared."""
    (found, calls), (expected, wanted) = (changed(model, name, everywhere) for everywhere in (False, True))
    assert calls == wanted
    assert same(found, expected)
    if calls:
        assert not same(found, outputs(model), 1e-6)


def test_hooks_everywhere_mean_no_derived_weights(mine: MMInterleaved) -> None:
    for module in mine.modules():
        module.register_forward_pre_hook(lambda *_: None)
    assert mine.image_decoder.unet.derive() == [DerivedWeights(None, None)] * len(mine.image_decoder.unet.synchronizers)


def test_a_hook_forbids_the_capture(mine: MMInterleaved, made: list, caplog: pytest.LogCaptureFixture) -> None:
    """In words if it was asked for; a captured graph from before the hook is not replayed."""
    outputs(mine, "static")
    handle = mine.image_decoder.unet.conv_in.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="a Conv2d: it has hooks; take 'dynamic'"):
        outputs(mine, "static")
    handle.remove()
    outputs(mine, "static")
    assert len(made) == 1


def test_derived_weights_are_written_where_they_lie(mine: MMInterleaved) -> None:
    """A captured graph knows their addresses; a layer without gradients keeps none."""
    layer = next(m for m in mine.modules() if isinstance(m, UNetSynchronizer))
    derived = layer.derive()
    tensors = [*vars(derived.query).values(), *vars(derived.output).values()]
    before = [x.clone() for x in tensors]
    _data(mine)
    again = layer.derive(derived)
    written = [*vars(again.query).values(), *vars(again.output).values()]
    assert all(a is b for a, b in zip(written, tensors, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(written, before, strict=True))
    assert not any(x.requires_grad for x in written)

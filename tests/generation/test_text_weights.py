"""Text, scores and sessions follow the weights of the moment: adapters, hooks, and writes that leave no trace.

A CUDA graph is stood in for by a frozen copy of the model that shares the memory of its weights: like a graph it sees
values change, and neither hooks nor adapters nor weights that moved.
"""

from __future__ import annotations

import copy
import importlib.util
import re
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from diffusers.training_utils import EMAModel
from peft import IA3Config, LNTuningConfig, LoHaConfig, LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.optim.swa_utils import AveragedModel

from mm_interleaved import (
    Batch,
    Document,
    Image,
    ImageSettings,
    MMInterleaved,
    MMInterleavedConfig,
    MMInterleavedProcessor,
    Text,
    TextSettings,
)
from mm_interleaved.checkpoints.quantization import quantize
from mm_interleaved.generation import image_encoder, interleaved, mm_interleaved, workspace
from mm_interleaved.generation.settings import GenerationSettings
from mm_interleaved.generation.text import score_options, write_beams, write_greedy
from mm_interleaved.generation.workspace import POOL
from mm_interleaved.model.fused import decoding_kernels
from mm_interleaved.model.language_model import synchronizers
from mm_interleaved.model.weights import why_not_captured
from mm_interleaved.ops.mmfs_attention import HAS_TRITON

from ..conftest import awaken, make_image

KINDS = ["dynamic", "static"]
GREEDY = TextSettings(max_new_tokens=5, min_new_tokens=5, num_beams=1)
BEAMS = TextSettings(max_new_tokens=3, min_new_tokens=3, num_beams=2)
OPTIONS = [[[9, 8, 7], [6]], [[5, 4]]]


def frozen(step: Callable[[], None], _device: torch.device) -> Callable[[], None]:
    """What `capture` gives, on a CPU."""
    owner = getattr(step, "__self__", None) or step.__closure__[0].cell_contents
    model, images = owner._model(), getattr(owner, "images", None)
    copied = copy.copy(model)
    used = ("visual_tokenizer",) if images is None else ("language_model", "lm_head", "soi_token")
    copied._modules = dict(model._modules)
    for name in used:
        module = model.get_submodule(name)
        memory = {id(p): nn.Parameter(p.data, p.requires_grad) for p in module.parameters()}
        memory |= {id(b): b.data for b in module.buffers()}
        copied._modules[name] = copy.deepcopy(module, memory)
    derived = None if images is None else list(images.derived)
    step()

    def replay() -> None:
        real, owner._model = owner._model, lambda: copied
        if images is not None:
            now, images.derived = images.derived, derived
        step()
        owner._model = real
        if images is not None:
            images.derived = now

    return replay


def uses_graphs(model: MMInterleaved, implementation: str) -> bool:
    """As the real one, as if there were a CUDA device."""
    reason = why_not_captured(model.language_model, model.lm_head, model.soi_token)
    if implementation == "static" and reason is not None:
        raise ValueError(reason)
    return implementation == "static"


@pytest.fixture(autouse=True)
def made(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[object]]:
    """What was captured during a test, with the capture stood in for."""
    made = []

    class Graphed(image_encoder.GraphedImageEncoder):
        def __init__(self, *args: object) -> None:
            super().__init__(*args, captured=True)

    monkeypatch.setattr(image_encoder, "GraphedImageEncoder", Graphed)
    for module in (image_encoder, workspace):
        monkeypatch.setattr(module, "capture", lambda *args: made.append(args[0]) or frozen(*args))
    for module in (interleaved, mm_interleaved):
        monkeypatch.setattr(module, "uses_graphs", uses_graphs)
    for pool in (POOL, image_encoder._pool):
        pool.clear()
    yield made
    for pool in (POOL, image_encoder._pool):
        pool.clear()


@torch.no_grad()
def outputs(model: MMInterleaved, kind: str = "dynamic", texts: bool = True) -> dict[str, Tensor]:
    """Logits after a prompt, three more tokens and an image; with `texts` also texts, and scores of options."""
    config = model.config
    side, slots = config.vision_config.image_size, [config.image_token_id] * config.num_image_tokens
    pixels = torch.rand(3, 3, side, side, generator=torch.Generator().manual_seed(3))
    head = [config.bos_token_id, 11, config.soi_token_id, *slots]
    ids = torch.tensor([[*head, 12, 13], [config.bos_token_id, 14, *[15] * len(slots), 16, 17, 18]])
    batch = Batch(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels[:1])
    state = model.prefill(batch, kind)
    found = {}
    if texts:
        found["scores"] = torch.tensor([x for row in score_options(state, OPTIONS) for x in row])
        found["beams"] = torch.tensor([text.ids for row in write_beams(state, BEAMS) for text in row])
    logits = [state.next_logits().clone()]
    state.reserve_steps(3)
    lengths = list(state.lengths)
    for tokens in ([20, 21], [22, 23], [config.soi_token_id] * 2):
        logits.append(state.decode_step(torch.tensor(tokens), torch.ones(2, dtype=torch.bool)).clone())
    state.settle([n + 3 for n in lengths])
    state.append_images([0, 1], pixels[1:])
    logits.append(state.next_logits().clone())
    if texts:
        written = write_greedy(state, GREEDY, [torch.Generator()] * 2)
        found["greedy"] = torch.tensor([row[0].ids for row in written])
    return {"logits": torch.stack(logits), **found}


def same(found: dict[str, Tensor], expected: dict[str, Tensor], bound: float = 1e-4) -> bool:
    """Equal tokens, and numbers within `bound` of the largest, at least of 1."""
    tokens = ("greedy", "beams")
    return all(
        torch.equal(found[name], x) if name in tokens else far(found[name], x) <= bound for name, x in expected.items()
    )


def far(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1))


def plainly(model: MMInterleaved, texts: bool = True) -> dict[str, Tensor]:
    """The same without any fast path: a copy of the model, MMFS in its published form, modules called in each step."""
    fresh = copy.deepcopy(model)
    fresh.set_mmfs_implementation("reference")
    return outputs(fresh, texts=texts)


@pytest.fixture
def mine(model: MMInterleaved) -> MMInterleaved:
    """A model of this test's own."""
    return copy.deepcopy(model)


def linear_maps(model: nn.Module) -> list[str]:
    """Names of all linear maps and convolutions; without those in groups, which PEFT cannot merge."""
    return [
        name for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d)) and getattr(module, "groups", 1) == 1
    ]  # fmt: skip


def adapted(model: MMInterleaved, names: list[str] | None = None, adapter: str = "default") -> PeftModel:
    """`model` with a random adapter on those modules; None: on every linear map and convolution."""
    names = linear_maps(model) if names is None else names
    config = LoraConfig(r=2, lora_alpha=2, target_modules=names, init_lora_weights=False)
    torch.manual_seed(1)
    return get_peft_model(model, config, adapter_name=adapter).eval()


# ---- adapters


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("preset", ["debug", pytest.param("small", marks=pytest.mark.slow)])
def test_an_adapter_acts_like_the_merged_adapter(preset: str, kind: str, made: list) -> None:
    torch.manual_seed(0)
    model = awaken(MMInterleaved(MMInterleavedConfig.preset(preset))).eval()
    before, names = outputs(model, kind), linear_maps(model)
    parts = ("language_model.", "lm_head.head", "lm_head.new", "visual_tokenizer.", "context_proj", "image_decoder.")
    assert all(any(name.startswith(part) for name in names) for part in parts)
    adapter = adapted(model, names)
    assert sum(hasattr(m, "lora_A") for m in model.modules()) == len(names)
    found = outputs(model, kind)
    assert far(found["logits"], before["logits"]) > 1e-2
    merged = adapter.merge_and_unload()
    assert linear_maps(merged) == names
    assert same(found, outputs(merged, kind))
    assert same(found, plainly(merged))
    assert bool(made) == (kind == "static")


@pytest.mark.parametrize("kind", KINDS)
def test_a_session_with_an_adapter(mine: MMInterleaved, processor: MMInterleavedProcessor, kind: str) -> None:
    """Text, an image, text: the same as with the merged adapter."""
    settings = GenerationSettings(
        TextSettings(max_new_tokens=5, min_new_tokens=5, num_beams=1, cache_implementation=kind),
        ImageSettings(num_inference_steps=2, guidance_scale=1.5), max_turns=4, force_image=True,
    )  # fmt: skip
    documents = [Document([Text("a red house"), Image(make_image(1)), Text("and")]), Document([Text("hello")])]

    def session(model: MMInterleaved) -> tuple[list[object], list[np.ndarray]]:
        segments = [s for d in model.generate(documents, "interleaved", processor, settings) for s in d.segments]
        ids = [s.generated.ids for s in segments if isinstance(s, Text) and s.generated]
        images = [np.asarray(s.source).astype(int) for s in segments if isinstance(s, Image) and s.generated]
        return ids, images

    before = session(mine)
    adapter = adapted(mine)
    ids, images = session(mine)
    expected_ids, expected = session(adapter.merge_and_unload())
    assert (len(ids), len(images)) == (4, 4)
    assert ids == expected_ids != before[0]
    assert max(np.abs(a - b).max() for a, b in zip(images, expected, strict=True)) <= 2
    assert max(np.abs(a - b).max() for a, b in zip(images, before[1], strict=True)) > 2


SYNCHRONIZER = "language_model.layers.0.synchronizer."
QUERY = ("mmfs.dynamic_offset_mask", "mmfs.query_relpos", "mmfs.sampling_offsets", "mmfs.attention_weights")


@pytest.mark.parametrize("name", [*QUERY, "mmfs.value_proj", "mmfs.output_proj"])
def test_an_adapter_on_one_map_of_a_synchronizer(mine: MMInterleaved, name: str) -> None:
    """Nothing is derived from it any more; the other synchronizers are as before."""
    kind = "static"
    before = outputs(mine, kind, texts=False)
    adapter = adapted(mine, [SYNCHRONIZER + name])
    found = outputs(mine, kind, texts=False)
    assert not same(found, before, 1e-5)
    derived = [s.derive() is not None for s in synchronizers(mine.language_model)]
    assert derived == [name == "mmfs.value_proj", *[True] * (len(derived) - 1)]
    assert same(found, plainly(mine, texts=False))
    assert same(found, plainly(adapter.merge_and_unload(), texts=False))


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_are_switched_between_calls(mine: MMInterleaved, kind: str) -> None:
    """Off and on, another one, merged in place, another strength."""
    bare = outputs(mine, kind, texts=False)
    names = [n for n in linear_maps(mine) if n.startswith((SYNCHRONIZER, "language_model.layers.1.", "lm_head"))]
    adapter = adapted(mine, names, "first")
    first = outputs(mine, kind, texts=False)
    with adapter.disable_adapter():
        assert same(outputs(mine, kind, texts=False), bare)
    assert same(outputs(mine, kind, texts=False), first)
    adapter.add_adapter("second", copy.deepcopy(adapter.peft_config["first"]))
    adapter.set_adapter("second")
    second = outputs(mine.eval(), kind, texts=False)
    assert not same(second, first)
    assert same(second, plainly(mine, texts=False))
    adapter.set_adapter("first")
    assert same(outputs(mine, kind, texts=False), first)
    adapter.merge_adapter(["first"])
    assert same(outputs(mine, kind, texts=False), first)
    adapter.unmerge_adapter()
    layers = [m for m in mine.modules() if hasattr(m, "lora_A")]
    for change in (lambda m: m.set_scale("first", 0.5), lambda m: m.scale_layer(3.0)):
        before = outputs(mine, kind, texts=False)
        for layer in layers:
            change(layer)
        found = outputs(mine, kind, texts=False)
        assert not same(found, before)
        assert same(found, plainly(mine, texts=False))
    assert same(outputs(adapter.merge_and_unload(), kind, texts=False), found)


OTHERS = {
    "DoRA": LoraConfig(r=2, target_modules=["q_proj", "output_proj", "sampling_offsets"], use_dora=True,
                       init_lora_weights=False),
    "embeddings": LoraConfig(r=2, target_modules=["embed_tokens", "query_relpos"], init_lora_weights=False),
    "whole modules": LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head", "output_proj"]),
    "single tokens": LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[20, 21, 22]),
    "IA3": IA3Config(target_modules=["k_proj", "output_proj"], feedforward_modules=[], init_ia3_weights=False),
    "LoHa": LoHaConfig(r=2, target_modules=["down_proj", "dynamic_offset_mask"], init_weights=False),
    "norms": LNTuningConfig(target_modules=["input_layernorm", "query_norm"]),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_other_adapters_act_and_are_switched_off(mine: MMInterleaved, name: str) -> None:
    kind = "static"
    bare = outputs(mine, kind, texts=False)
    adapter = get_peft_model(mine, copy.deepcopy(OTHERS[name])).eval()
    with torch.no_grad():
        for key, parameter in mine.named_parameters():
            if any(part in key for part in ("modules_to_save", "trainable_tokens", "ln_tuning")):  # equal at first
                parameter.add_(0.1 * torch.randn_like(parameter))
    found = outputs(mine, kind, texts=False)
    assert not same(found, bare)
    assert same(found, plainly(mine, texts=False))
    assert same(outputs(mine, "dynamic", texts=False), found)
    with adapter.disable_adapter():
        assert same(outputs(mine, kind, texts=False), bare)
    assert same(outputs(mine, kind, texts=False), found)


# ---- writes between two calls


def _data(model: MMInterleaved) -> None:
    for parameter in model.parameters():
        parameter.data.mul_(1.05)


def _replaced(model: MMInterleaved) -> None:
    for parameter in model.parameters():
        parameter.data = parameter.data * 1.05


def _ema(model: MMInterleaved) -> None:
    EMAModel([nn.Parameter(p * 1.05) for p in model.parameters()]).copy_to(model.parameters())


def _averaged(model: MMInterleaved) -> None:
    """PyTorch's average, copied back as training loops do."""
    average = AveragedModel(model.language_model)
    for mine, other in zip(model.language_model.parameters(), average.module.parameters(), strict=True):
        mine.detach().copy_(other.detach() * 1.05)


def _optimizer(model: MMInterleaved) -> None:
    parameters = list(model.parameters())
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    torch.optim.SGD(parameters, lr=0.01).step()


def _loaded(model: MMInterleaved) -> None:
    model.load_state_dict({name: x * 1.05 for name, x in model.state_dict().items()})


def _assigned(model: MMInterleaved) -> None:
    model.load_state_dict({name: x * 1.05 for name, x in model.state_dict().items()}, assign=True)


def _one(name: str) -> Callable[[MMInterleaved], None]:
    """Only one parameter, all others stay."""

    def write(model: MMInterleaved) -> None:
        parameter = model.get_parameter(name)
        parameter.data.add_(0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))

    return write


class Doubled(nn.Module):
    """A parametrization."""

    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


Doubled.__module__ = "torch.doubled"  # of a package whose modules may be captured


def _parametrized(name: str) -> Callable[[MMInterleaved], None]:
    def write(model: MMInterleaved) -> None:
        owner, _, parameter = name.rpartition(".")
        parametrize.register_parametrization(model.get_submodule(owner), parameter, Doubled())

    return write


PARTS = [
    *(SYNCHRONIZER + part for part in (
        "gate", "query_norm.weight", "feature_norm.weight", "mmfs.ignore_token", "mmfs.dynamic_offset_mask.weight",
        "mmfs.dynamic_offset_mask.bias", "mmfs.query_relpos.weight", "mmfs.sampling_offsets.weight",
        "mmfs.sampling_offsets.bias", "mmfs.attention_weights.weight", "mmfs.attention_weights.bias",
        "mmfs.value_proj.weight", "mmfs.output_proj.weight", "mmfs.output_proj.bias")),
    "language_model.norm.weight", "lm_head.new.bias",
]  # fmt: skip
PARAMETRIZED = [SYNCHRONIZER + part for part in (
    "gate", "query_norm.weight", "mmfs.ignore_token", "mmfs.output_proj.weight", "mmfs.query_relpos.weight",
    "mmfs.sampling_offsets.bias")] + ["language_model.layers.0.self_attn.q_proj.weight", "lm_head.head.weight",
                                      "language_model.embed_tokens.weight"]  # fmt: skip
WHOLE = {
    "data": _data, "replaced": _replaced, "ema": _ema, "averaged": _averaged, "optimizer": _optimizer,
    "loaded": _loaded, "assigned": _assigned,
}  # fmt: skip
WRITES = {
    **WHOLE,
    **{part: _one(part) for part in PARTS},
    **{f"parametrized {part}": _parametrized(part) for part in PARAMETRIZED},
}  # fmt: skip


@pytest.mark.parametrize(("how", "kind"), [*((how, "static") for how in WRITES), *((how, "dynamic") for how in WHOLE)])
def test_the_next_call_sees_what_was_written(mine: MMInterleaved, made: list, how: str, kind: str) -> None:
    before, captures = outputs(mine, kind, texts=False), len(made)
    with torch.no_grad():
        WRITES[how](mine)
    found = outputs(mine, kind, texts=False)
    assert not same(found, before, 1e-5)
    assert same(found, plainly(mine, texts=False))
    moved = how in ("replaced", "assigned") or how.startswith("parametrized")
    assert (len(made) > captures) == (kind == "static" and moved)


@pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed")
@pytest.mark.parametrize("kind", KINDS)
def test_quantized_weights_are_those_of_the_next_call(mine: MMInterleaved, kind: str) -> None:
    before = outputs(mine, kind)
    quantize(mine, "int8")
    found = outputs(mine, kind)
    assert not same(found, before, 1e-5)
    assert far(found["logits"], before["logits"]) < 0.1
    rounded = copy.deepcopy(mine)
    for module in rounded.modules():
        if type(module) is nn.Linear and type(module.weight.data) is not Tensor:
            module.weight = nn.Parameter(module.weight.dequantize())
    assert same(found, outputs(rounded, kind))
    assert same(found, plainly(rounded))


# ---- hooks


def hooked() -> list[str]:
    """A module of every kind of what writes text: those whose names differ in more than the layer."""
    with torch.device("meta"):
        model = MMInterleaved(MMInterleavedConfig.preset("debug"))
    kinds: dict[str, str] = {}
    for name, module in model.named_modules():
        if name.startswith(("language_model", "lm_head", "soi_token")) and type(module) is not nn.ModuleList:
            kinds.setdefault(re.sub(r"\d+", "*", name), name)
    return list(kinds.values())


def changed(model: MMInterleaved, name: str, everywhere: bool = False) -> tuple[dict[str, Tensor], int]:
    """Outputs with a hook on one module that changes what it gives, and its calls; `everywhere`: idle hooks on all."""
    calls = 0

    def change(_module: nn.Module, _given: tuple, output: object) -> object:
        nonlocal calls
        calls += 1
        if isinstance(output, Tensor):
            return output * 1.5 + 0.1
        if isinstance(output, tuple):
            return (output[0] * 1.5 + 0.1, *output[1:])
        output.last_hidden_state = output.last_hidden_state * 1.5 + 0.1
        return output

    handles = [model.get_submodule(name).register_forward_hook(change)]
    if everywhere:
        handles += [m.register_forward_hook(lambda *_: None) for m in model.modules()]
    try:
        return outputs(model, texts=False), calls
    finally:
        for handle in handles:
            handle.remove()


@pytest.fixture(scope="module")
def unhooked(model: MMInterleaved) -> dict[str, Tensor]:
    return outputs(model, texts=False)


@pytest.mark.parametrize("name", hooked())
def test_a_hook_runs_and_acts_as_without_fast_paths(model: MMInterleaved, unhooked: dict, name: str) -> None:
    """With hooks everywhere nothing is derived or fused."""
    (found, calls), (expected, wanted) = (changed(model, name, everywhere) for everywhere in (False, True))
    assert calls == wanted > 0
    assert same(found, expected)
    assert not same(found, unhooked, 1e-6)


@pytest.mark.parametrize("pre", [False, True], ids=["hook", "pre-hook"])
@pytest.mark.parametrize("kernels", ["never", pytest.param("always", marks=pytest.mark.skipif(
    not HAS_TRITON or torch.cuda.is_available(), reason="for Triton's interpreter"))])  # fmt: skip
def test_hooks_run_once_for_each_forward(
    mine: MMInterleaved, processor: MMInterleavedProcessor, pre: bool, kernels: str
) -> None:
    """A prompt and a token are two forwards."""
    counts = dict.fromkeys(hooked(), 0)
    for name in counts:
        module = mine.get_submodule(name)
        register = module.register_forward_pre_hook if pre else module.register_forward_hook

        def count(*_: object, name: str = name) -> None:
            counts[name] += 1

        register(count)
    with decoding_kernels(kernels):
        mine.generate_text(processor(Document([Image(make_image(1)), Text("a")])), TextSettings(2, 2, 1))
    of_images = {f"{SYNCHRONIZER}{name}" for name in ("feature_norm", "mmfs.value_proj")}  # once an image
    twice = {f"{SYNCHRONIZER}mmfs.{name}" for name in ("sampling_offsets", "attention_weights")}  # of queries, of slots
    expected = {name: 1 if name in of_images else 4 if name in twice else 2 for name in counts}
    assert counts == expected


@pytest.mark.parametrize("name", ["self_attn", "mlp"])
def test_hooks_see_the_usual_input_and_output(model: MMInterleaved, name: str) -> None:
    """The normed hidden states, and what is added to the hidden states; as a library's decoder layer has it."""
    layer, seen = model.language_model.layers[1], {}
    norm = layer.input_layernorm if name == "self_attn" else layer.post_attention_layernorm

    def keep(key: str) -> Callable[..., None]:
        return lambda _m, given, _kwargs, output: seen.update({key: (given[0], output)})

    block = getattr(layer, name)
    handles = [module.register_forward_hook(keep(key), with_kwargs=True)
               for key, module in {"block": block, "norm": norm, "layer": layer}.items()]  # fmt: skip
    outputs(model)
    for handle in handles:
        handle.remove()
    assert torch.equal(seen["block"][0], seen["norm"][1])
    if name == "mlp":
        torch.testing.assert_close(seen["layer"][1], seen["norm"][0] + seen["block"][1])
    else:
        torch.testing.assert_close(seen["layer"][0], seen["norm"][0])
        assert seen["block"][1].shape == seen["layer"][0].shape


def test_a_hook_forbids_the_capture(mine: MMInterleaved, made: list) -> None:
    """What was captured before the hook is not replayed under it, and serves again afterwards."""
    before, captures = outputs(mine, "static"), len(made)
    handle = mine.language_model.layers[1].mlp.register_forward_hook(lambda _m, _given, output: output * 2)
    with pytest.raises(ValueError, match="a GatedMLP: it has hooks"):
        outputs(mine, "static")
    assert not same(outputs(mine), before)
    handle.remove()
    assert same(outputs(mine, "static"), before)
    assert len(made) > captures > 0


def test_derived_weights_are_written_where_they_lie(mine: MMInterleaved) -> None:
    """A captured graph knows their addresses; a layer without gradients keeps none."""
    layer = synchronizers(mine.language_model)[0]
    derived = layer.derive()
    tensors = [*vars(derived.query).values(), *vars(derived.output).values()]
    before = [x.clone() for x in tensors]
    _data(mine)
    again = layer.derive(derived)
    written = [*vars(again.query).values(), *vars(again.output).values()]
    assert all(a is b for a, b in zip(written, tensors, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(written, before, strict=True))
    assert not any(x.requires_grad for x in written)

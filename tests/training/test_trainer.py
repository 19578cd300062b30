"""What a run reports, keeps and refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

from mm_interleaved import Document, Image, MMInterleaved, MMInterleavedConfig, Text
from mm_interleaved.cli import main
from mm_interleaved.configuration import load_config
from mm_interleaved.pretrained import TOKENIZER, load
from mm_interleaved.training import graphs
from mm_interleaved.training.building import build, build_config
from mm_interleaved.training.config import (
    EMAConfig,
    LossConfig,
    ShapesConfig,
    TrainConfig,
    TrainingError,
)
from mm_interleaved.training.ema import EMA
from mm_interleaved.training.graphs import CapturedStep
from mm_interleaved.training.pipeline import choose_targets, prepare_documents, seed_of
from mm_interleaved.training.run import compile_regions, train
from mm_interleaved.validation import ConfigError

from ..conftest import make_image
from .conftest import ROOT, arguments, logged, whole_model
from .stand_in import Colors


def test_a_debug_run_from_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """Everything at once: the loss falls, and log, samples, checkpoints and a model that loads are there."""
    monkeypatch.chdir(ROOT)
    run = tmp_path / "run"
    main_ok(["train", "--device", "cpu", "configs/debug.yaml", f"output={run}", "log_every=5"])
    losses = logged(run)
    assert list(losses) == [5, 10, 15, 20]
    assert losses[20] < losses[5] - 0.5
    entry = json.loads((run / "log.jsonl").read_text().splitlines()[0])
    wanted = {"loss_txt", "loss_img", "grad_norm", "lr/rest", "tokens_per_second", "images_per_second"}
    assert wanted | {"data_wait_share", "loader_decode_share", "padding_share", "steps_per_second"} <= set(entry)
    assert entry["loss"] == pytest.approx(entry["loss_txt"] + 10 * entry["loss_img"], rel=1e-4)
    assert set(logged(run, "eval_loss")) == {10, 20}
    assert (run / "samples/0000020.png").is_file()
    assert (run / "samples/0000020.txt").read_text().strip()
    assert [len(json.loads((run / f"samples/{step:07}.json").read_text())) for step in (0, 20)] == [2, 2]
    assert list((run / "tensorboard").iterdir())
    (given,) = (v for k, v in json.loads((run / "data-rank0.json").read_text()).items() if k != "step")
    assert given["counts"]["documents"] > 0
    assert not list(run.rglob("*.bin"))
    loaded = load(run / "final")
    assert loaded.trained
    assert load_config(run / "config.yaml", TrainConfig).steps == 20


def main_ok(words: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert not ended.value.code, words


class Poisoned(Colors):
    """The third batch has an image that is no number."""

    def __iter__(self):
        for number, batch in enumerate(super().__iter__()):
            if number == 2:
                batch.pixel_values[0, 0, 0, 0] = float("nan")
            yield batch


def test_a_loss_that_is_no_number_stops_the_run_and_leaves_its_batch(settings, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"the loss of step 3 is not finite.*no checkpoint was saved before"):
        train(settings("log_every=5"), TOKENIZER, "cpu", Poisoned)
    folder = tmp_path / "run/bad-batch-rank0"
    assert json.loads((folder / "batch.json").read_text())["step"] == 3
    assert torch.isnan(load_file(folder / "batch.safetensors")["pixel_values"]).sum() == 1
    with pytest.raises(
        TrainingError, match=r"step 3 is not finite.*the last good checkpoint is '.*later/checkpoint-2'"
    ):
        train(settings("log_every=5", "save_every=2", run="later"), TOKENIZER, "cpu", Poisoned)


def test_an_average_follows_its_formula() -> None:
    layer = torch.nn.Linear(1, 1, bias=False)
    ema = EMA(layer, EMAConfig(decay=0.9, start_step=1))
    for step, value in ((1, 1.0), (2, 2.0), (3, 3.0)):
        layer.weight.data.fill_(value)
        ema.update(step)
    with ema.applied():
        assert layer.weight.item() == pytest.approx(0.9 * (0.9 * 1 + 0.1 * 2) + 0.1 * 3)
    assert layer.weight.item() == 3.0


def test_an_average_is_what_the_run_hands_over(settings, tmp_path: Path) -> None:
    train(settings("steps=3", "save_every=3", "ema.decay=0.5"), TOKENIZER, "cpu", Colors)
    run = tmp_path / "run"
    average = load_file(run / "checkpoint-3/ema.safetensors")
    final, last = (load_file(run / name / "model.safetensors") for name in ("final", "checkpoint-3"))
    assert all(torch.equal(final[n], t) for n, t in average.items())
    assert not torch.equal(final["context_proj.weight"], last["context_proj.weight"])


def test_bfloat16_keeps_float32_weights_where_it_learns(settings, tmp_path: Path) -> None:
    changes = [
        "precision=bfloat16",
        "losses.vae_dtype=bfloat16",
        "losses.image_fraction=0.5",
        "losses.noise_samples_per_image=2",
    ]
    train(settings("steps=2", "save_every=2", "gradient_checkpointing=true", *changes), TOKENIZER, "cpu", Colors)
    weights = load_file(tmp_path / "run/checkpoint-2/model.safetensors")
    kinds = {name: t.dtype for name, t in weights.items()}
    assert kinds["context_proj.weight"] == torch.float32
    assert kinds["image_decoder.vae.encoder.conv_in.weight"] == torch.bfloat16
    assert load(tmp_path / "run/final").model.image_decoder.vae.dtype == torch.float32


def test_only_one_part_is_trained_where_the_other_is_frozen(settings, tmp_path: Path) -> None:
    frozen = r'model.overrides={frozen: ["language_model\\.", "image_decoder\\.vae\\."]}'
    train(settings("steps=2", "save_every=0", frozen), TOKENIZER, "cpu", Colors)
    train(settings("steps=1", "save_every=0", "optimizer.lr=1e-30", run="before"), TOKENIZER, "cpu", Colors)
    after, before = (load_file(tmp_path / r / "final/model.safetensors") for r in ("run", "before"))
    changed = {n.split(".")[0] for n in after if not torch.equal(after[n], before[n])}
    assert "language_model" not in changed
    assert {"visual_tokenizer", "lm_head", "image_decoder"} <= changed


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("optimizer.weight_decai=1", "Did you mean 'weight_decay'"),
        ("precision=fp8", "precision must be 'float32', 'bfloat16' or 'float16'"),
        ("model.init_from.checkpoint=x", "exactly one of preset, checkpoint and components, not preset and checkpoint"),
        ("model.checkpoint=x", "unknown key 'checkpoint' in model .*It is now 'init_from.checkpoint'"),
        ("model.vae=x", "unknown key 'vae' in model .*an entry of 'weights': {from: FOLDER}"),
        ("model.weights=[{form: x}]", r"unknown key 'form' in model.weights\[0\] .*Did you mean 'from'"),
        ("model.weights=[{from: fresh}]", "fresh needs parameters"),
        ("losses.image_fraction=0", "losses.image_fraction must be greater than 0, not 0"),
        ("steps=0", "steps must be at least 1, not 0"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(tmp_path: Path, change: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(ROOT / "configs/debug.yaml", TrainConfig, arguments(tmp_path, change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("text_config.hiden_size=32", "unknown key 'text_config.hiden_size'. Did you mean 'hidden_size'"),
        (
            "image_decoder.unet.layer_per_block=1",
            "unknown key .*unet.layer_per_block'. Did you mean 'layers_per_block'",
        ),
        ("mmfs_evry=2", "unknown key 'mmfs_evry'. Did you mean 'mmfs_every'"),
        ("text_config.hidden_size=33", r"text_config: The hidden size \(33\) is not a multiple"),
        ("text_config.hidden_size=big", "text_config: Field 'hidden_size' expected int"),
    ],
)
def test_overrides_that_do_not_fit_are_refused(settings, change: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_config(settings(f"model.overrides.{change}").model, TOKENIZER)


def test_overrides_may_set_what_a_library_knows(settings) -> None:
    model = settings(
        "model.overrides.text_config.rope_parameters.rope_theta=5000.0",
        "model.overrides.image_decoder.unet.dropout=0.1",
    )
    config = build_config(model.model, TOKENIZER)
    assert config.text_config.rope_parameters["rope_theta"] == 5000.0
    assert config.image_decoder.unet["dropout"] == 0.1


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model.safetensors", "model.safetensors' is damaged or cut short"),
        ("generation_config.json", "generation_config.json"),
        ("tokenizer.model", "holds no tokenizer"),
    ],
)
def test_a_damaged_checkpoint_is_named(settings, tmp_path: Path, name: str, message: str) -> None:
    _, changes = whole_model(tmp_path / "model")
    path = tmp_path / "model" / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2] if path.is_file() else b"{")
    with pytest.raises(ValueError, match=message):
        build(settings(*changes), TOKENIZER)


def test_every_configuration_of_the_repository_can_be_read() -> None:
    for path in sorted((ROOT / "configs").rglob("*.yaml")):
        if path.name not in (
            "evaluate.yaml",
            "release_tasks.yaml",
            "release_finetuned.yaml",
            "recipe.yaml",  # of scripts/train_small
        ):  # read by their own tests
            load_config(path, TrainConfig)


@pytest.mark.parametrize(("llm", "unet"), [(False, False), (False, True), (True, False)])
def test_ablations_go_on_from_a_model_with_everything(tmp_path: Path, llm: bool, unet: bool) -> None:
    whole = load("debug")
    whole.model.save_pretrained(tmp_path)
    whole.processor.save_pretrained(tmp_path)
    for p in whole.model.image_decoder.unet.parameters():
        p.data.add_(0.1)
    whole.model.save_pretrained(tmp_path / "draws")
    changes = [
        f"model.init_from={{checkpoint: {tmp_path}}}", "model.init_from.preset=null",
        f"model.mmfs={{llm: {llm}, unet: {unet}}}",
        f"model.weights=[{{from: {tmp_path / 'draws'}, parameters: '^image_decoder\\.unet\\.'}}]",
    ]  # fmt: skip
    model, _ = build(load_config(ROOT / "configs/small/pretrain.yaml", TrainConfig, changes))
    own, given = model.state_dict(), whole.model.state_dict()
    assert all(torch.equal(value, given[name].to(value.dtype)) for name, value in own.items())
    left_out = {name for name in given if name not in own}
    kept = {True: unet, False: llm}  # whether the UNet's, and the language model's, are there
    assert left_out == {
        name for name in given if "synchronizer" in name and not kept[name.startswith("image_decoder")]
    }  # fmt: skip


def test_weights_from_several_folders_in_any_order(tmp_path: Path) -> None:
    whole, _ = whole_model(tmp_path / "whole")
    unet = f"{{from: {tmp_path / 'whole'}, parameters: '^image_decoder\\.unet\\.'}}"
    tokens = f"{{from: {tmp_path / 'whole'}, parameters: '^visual_tokenizer\\.'}}"
    models = [
        build(
            load_config(ROOT / "configs/debug.yaml", TrainConfig, [f"model.weights=[{', '.join(entries)}]"]), TOKENIZER
        )
        for entries in ((unet, tokens), (tokens, unet))
    ]
    one, other = (model.state_dict() for model, _ in models)
    assert all(torch.equal(one[name], other[name]) for name in one)
    taken = {name for name in one if torch.equal(one[name], whole[name].to(one[name].dtype))}
    parts = ("image_decoder.unet.", "visual_tokenizer.")
    assert {name for name in one if name.startswith(parts)} <= taken
    assert "lm_head.head.weight" not in taken
    twice = load_config(ROOT / "configs/debug.yaml", TrainConfig, [f"model.weights=[{unet}, {unet}]"])
    with pytest.raises(ValueError, match=r"model\.weights names image_decoder\.unet\.\S+ twice"):
        build(twice, TOKENIZER)


def test_a_unet_that_does_not_fit(tmp_path: Path, debug_config: MMInterleavedConfig) -> None:
    weights = f"model.weights=[{{from: {tmp_path}, parameters: '^image_decoder\\.unet\\.'}}]"
    config = load_config(ROOT / "configs/debug.yaml", TrainConfig, [weights])
    with pytest.raises(ValueError, match=r"holds no \.safetensors"):
        build(config, TOKENIZER)
    tree = debug_config.to_dict()
    tree["image_decoder"]["unet"]["block_out_channels"] = [16, 24, 40]
    MMInterleaved(MMInterleavedConfig(**tree)).save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"is of another model: image_decoder\.unet\..* is \(40,.* there and \(32,.* in this one"
    ):
        build(config, TOKENIZER)


def test_seeds_differ_and_do_not_depend_on_the_process() -> None:
    seeds = {seed_of(seed, number) for seed in range(20) for number in range(500)}
    assert len(seeds) == 10_000
    assert seed_of(0, 1) == seed_of(0, 1)


def test_some_images_are_chosen() -> None:
    assert choose_targets(7, 1.0, 3, ShapesConfig()) is None
    chosen = choose_targets(7, 0.5, 3, ShapesConfig())
    assert chosen is not None
    assert len(chosen) == len(set(chosen.tolist())) == 4
    assert {tuple(choose_targets(7, 0.5, s, ShapesConfig()).tolist()) for s in range(20)} != {tuple(chosen.tolist())}


def test_images_that_count_are_chosen_first() -> None:
    weights = torch.tensor([0.0, 1.0, 0.0, 0.5, 1.0, 0.0])
    chosen = [choose_targets(6, 0.5, s, ShapesConfig(), weights).tolist() for s in range(20)]
    assert chosen == [[1, 3, 4]] * 20
    more = [choose_targets(6, 0.8, s, ShapesConfig(), weights).tolist() for s in range(20)]
    assert all({1, 3, 4} < set(m) for m in more)
    assert {tuple(m) for m in more} == {tuple(sorted({1, 3, 4, a, b})) for a, b in [(0, 2), (0, 5), (2, 5)]}


def test_padded_shapes_change_no_loss() -> None:
    """Blank images behind the real ones are seen by nothing, longer contexts are masked."""
    small = load("debug")
    images = [Image(make_image(number)) for number in range(3)]
    documents = [Document([Text("a red house"), images[0], images[1]]), Document([images[2], Text("a cat")])]
    batch = small.processor(documents, training=True)
    found = []
    fixed = ShapesConfig(1, images=7, targets=3, conditioning=3, context=50, labelled=99, visible=4)
    for shapes in (ShapesConfig(), ShapesConfig(8), fixed):
        inputs = prepare_documents(small.model, LossConfig(), shapes)(batch, 5, torch.device("cpu"))
        inputs.pop("stats")
        small.model.zero_grad()
        outputs = small.model(**inputs)
        outputs.loss.backward()
        found.append((inputs, outputs, small.model.visual_tokenizer.proj.weight.grad.clone()))
    (_, expected, gradient), (padded, *_), (fixed, *_) = found
    assert len(padded["pixel_values"]) == 8
    assert padded["layout"].context_length % 8 == 0
    layout = fixed["layout"]
    assert (len(fixed["pixel_values"]), len(layout.conditioning_images), layout.context_length) == (7, 3, 50)
    assert (len(layout.label_positions), layout.visible.images.shape[1]) == (99, 4)
    for _, outputs, also in found[1:]:
        torch.testing.assert_close(outputs.loss_txt, expected.loss_txt, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(outputs.loss_img, expected.loss_img, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(also, gradient, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("count", "fraction", "multiple", "drawn"), [(10, 0.5, 1, 5), (70, 0.5, 32, 32), (9, 1, 4, 8), (3, 1, 4, 3)]
)
def test_how_many_images_are_drawn(count: int, fraction: float, multiple: int, drawn: int) -> None:
    chosen = choose_targets(count, fraction, 0, ShapesConfig(multiple))
    assert (count if chosen is None else len(set(chosen.tolist()))) == drawn


class Waits(TorchDispatchMode):
    """Refuses what makes a GPU's host wait for it."""

    refused = ("_local_scalar_dense", "nonzero", "_unique", "bincount", "masked_select", "is_nonzero")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert not name.startswith(self.refused), f"{name} needs the result at once"
        return func(*args, **(kwargs or {}))


def test_a_planned_step_waits_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """So it can be captured; as when capture, transformers is told not to look at values."""
    small = load("debug")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    documents = [
        Document([Text("a red house"), Image(make_image(0)), Image(make_image(1))]),
        Document([Text("no image")]),
    ]
    shapes = ShapesConfig(1, images=3, targets=2, conditioning=2, context=60, labelled=90, visible=3)
    batch = small.processor(documents, training=True)
    inputs = prepare_documents(small.model, LossConfig(), shapes)(batch, 5, torch.device("cpu"))
    inputs.pop("stats")
    with Waits():
        small.model(**inputs).loss.backward()


def test_what_a_recording_takes_apart_and_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU, with the capture replaced by what would be captured."""
    small = load("debug")
    captured: list[int] = []

    def capture(step, device):
        captured.append(1)
        return step

    monkeypatch.setattr(graphs, "capture", capture)
    shapes = ShapesConfig(1, images=3, targets=2, conditioning=2, context=60, labelled=90, visible=3, graph=True)
    step = CapturedStep(shapes)
    prepare = prepare_documents(small.model, LossConfig(), shapes)
    for seed, count in enumerate([2, 1, 2]):
        images = [Image(make_image(seed + n)) for n in range(count)]
        batch = small.processor(Document([Text("a red house"), *images]), training=True)
        fill = {"input_ids": small.processor.tokenizer.pad_token_id, "attention_mask": 0, "labels": -100}
        for name, value in fill.items():
            row = batch[name]
            batch[name] = torch.nn.functional.pad(row, (0, 60 - row.shape[1]), value=value)
        inputs = prepare(batch, seed, torch.device("cpu"))
        inputs.pop("stats")
        found = []
        for call in (lambda m, x: m(**x), step):
            small.model.zero_grad()
            outputs = call(small.model, inputs)
            outputs.loss.backward()
            found.append((outputs, small.model.context_proj.weight.grad.clone()))
        (expected, gradient), (outputs, same) = found
        assert torch.equal(outputs.loss, expected.loss)
        assert torch.equal(outputs.loss_txt, expected.loss_txt)
        assert torch.equal(same, gradient)
    assert (len(captured), step.replayed, step.uncaptured) == (1, 2, 1)
    assert step.take_share() == pytest.approx(2 / 3)
    assert (step.replayed, step.uncaptured) == (0, 0)


@pytest.mark.slow
def test_compiled_blocks_compute_the_same_in_a_recording(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled as far as a CPU does it quickly: traced forward and backward, then run operator by operator."""
    monkeypatch.setattr(graphs, "capture", lambda step, device: step)
    small = load("debug")
    shapes = ShapesConfig(1, images=2, targets=2, conditioning=1, context=60, labelled=40, visible=2, graph=True)
    document = Document([Text("a red house"), Image(make_image(0)), Text("and a tree"), Image(make_image(1))])
    inputs = prepare_documents(small.model, LossConfig(), shapes)(
        small.processor(document, training=True), 0, torch.device("cpu")
    )
    inputs.pop("stats")
    torch._dynamo.utils.counters.clear()  # of whatever was compiled before
    found = []
    for compiled in (False, True):
        if compiled:
            compile_regions(small.model, "regional", "aot_eager")
        small.model.zero_grad()
        step = CapturedStep(shapes)
        found.append((step(small.model, inputs).loss, small.model.context_proj.weight.grad.clone()))
        assert step.replayed == 1
    assert torch._dynamo.utils.counters["graph_break"] == {}
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 10
    torch.testing.assert_close(found[1], found[0])


def test_batches_without_earlier_images_are_recorded_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "capture", lambda step, device: step)
    small = load("debug")
    shapes = ShapesConfig(1, images=1, targets=1, context=20, labelled=20, visible=1, graph=True)
    step, batch = (
        CapturedStep(shapes),
        small.processor(Document([Text("a red house"), Image(make_image(0))]), training=True),
    )
    inputs = prepare_documents(small.model, LossConfig(), shapes)(batch, 0, torch.device("cpu"))
    inputs.pop("stats")
    expected = small.model(**inputs).loss
    assert torch.equal(step(small.model, inputs).loss, expected)
    assert step.replayed == 1
    with pytest.raises(ValueError, match=r"graph needs every size but that of conditioning"):
        ShapesConfig(1, images=1, targets=1, labelled=20, visible=1, graph=True)

"""Pre-training of the language model on texts: what they state, its run, and what it hands over."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mm_interleaved.configuration import load_config
from mm_interleaved.data import DataConfig, SourceConfig
from mm_interleaved.pretrained import TOKENIZER
from mm_interleaved.training.building import build, build_tokenizer
from mm_interleaved.training.config import InitConfig, MMFSSwitches, ModelConfig, TrainConfig, WeightsConfig
from toyworld.curriculum.config import PartRunConfig
from toyworld.curriculum.images import ImageLoader, ToyTexts, prepare_texts
from toyworld.curriculum.language import LanguageTask
from toyworld.curriculum.parts import SharedReader
from toyworld.curriculum.run import train_language
from toyworld.curriculum.stated import OBJECTS, STATED, stated_facts
from toyworld.detector import TRAITS
from toyworld.language import caption, paragraph
from toyworld.language.phrases import CELL_NAMES
from toyworld.sampling import random_scene, scene_rng
from toyworld.scene import GROUNDS, RELATIONS, SIZES

from .conftest import PART, ROOT, logged, whole_model

DATA = DataConfig([SourceConfig("toyworld")])


def settings(output: Path, *changes: str) -> PartRunConfig:
    return load_config(ROOT / "configs/small/language.yaml", PartRunConfig, [*PART, f"output={output}", *changes])


@pytest.mark.parametrize("tell", [caption, paragraph])
def test_what_is_told_is_true_and_complete(tell) -> None:
    """Against the scene, and against the facts that the text lists."""
    names = list(STATED)
    for index in range(60):
        rng = scene_rng(4, "val", index)
        scene = random_scene(rng, split="val")
        text = tell(scene, rng)
        numbers, ground = stated_facts(text)
        order = list(dict.fromkeys(f.obj for f in text.facts if f.name == "object"))
        assert numbers[:, 0].tolist() == [1] * len(order) + [0] * (OBJECTS - len(order))
        count = 0
        for row, obj in zip(numbers.tolist(), (scene.objects[i] for i in order), strict=False):
            truth = {n: values.index(getattr(obj.attributes, n)) for n, values in TRAITS.items()}
            truth |= {"size": SIZES.index(obj.size), "cell": obj.cell, "there": 1}
            found = {n: v for n, v in zip(names, row, strict=True) if v >= 0}
            count += len(found) - 1
            if "relation" in found:
                other, relation = order[found.pop("other")], RELATIONS[found.pop("relation")]
                assert relation in scene.relation(scene.objects.index(obj), other)
                count -= 1
            assert found.items() <= truth.items()
        assert (numbers[len(order) :, 1:] == -100).all()
        stated = {(f.name, f.obj) for f in text.facts if f.obj is not None and f.name != "count"}
        assert count == len(stated)
        grounds = [f.value for f in text.facts if f.name == "ground"]
        assert [GROUNDS[int(ground)]] == grounds if grounds else ground == -100
    assert len(CELL_NAMES) == STATED["cell"]


def test_a_run_learns_and_hands_its_weights_to_a_model(tmp_path: Path) -> None:
    assert train_language(settings(tmp_path / "run", "steps=30"), TOKENIZER, "cpu") is None
    losses = logged(tmp_path / "run")
    assert losses[30] < losses[1] - 1
    quality = json.loads((tmp_path / "run/final/quality.json").read_text())
    assert 0 <= quality["eval_accuracy_kind"] <= 1
    state = load_file(tmp_path / "run/final/language.safetensors")
    assert not any(
        name.startswith(("visual_tokenizer", "image_decoder.unet")) or "synchronizer" in name for name in state
    )
    for switches in ({}, {"llm": False, "unet": False}):
        source = ModelConfig(
            InitConfig(preset="debug"), [WeightsConfig(str(tmp_path / "run/final"))], mmfs=MMFSSwitches(**switches)
        )
        model, _ = build(TrainConfig(output="", steps=1, model=source, data=DATA), TOKENIZER)
        own = model.state_dict()
        assert all(torch.equal(own[name], value) for name, value in state.items())


def test_an_interrupted_run_goes_on_as_if_nothing_had_happened(tmp_path: Path) -> None:
    assert train_language(settings(tmp_path / "whole"), TOKENIZER, "cpu") is None
    assert train_language(settings(tmp_path / "parts", "steps=3"), TOKENIZER, "cpu") is None
    shutil.rmtree(tmp_path / "parts/final")
    assert train_language(settings(tmp_path / "parts"), TOKENIZER, "cpu") is None
    assert logged(tmp_path / "parts")[6] == logged(tmp_path / "whole")[6]


def test_a_run_starts_from_a_whole_model(tmp_path: Path) -> None:
    own, source = whole_model(tmp_path / "whole")
    assert train_language(settings(tmp_path / "run", *source), TOKENIZER, "cpu") is None
    found = load_file(tmp_path / "run/final/language.safetensors")
    assert all(torch.allclose(own[name], value, atol=1e-7) for name, value in found.items())


def test_a_run_starts_from_the_weights_it_is_given(tmp_path: Path) -> None:
    assert train_language(settings(tmp_path / "one", "steps=40", "ema.decay=0"), TOKENIZER, "cpu") is None
    again = settings(tmp_path / "two", "steps=1", f"model.weights=[{{from: {tmp_path / 'one/final'}}}]")
    assert train_language(again, TOKENIZER, "cpu") is None
    assert logged(tmp_path / "two", "loss_txt")[1] < logged(tmp_path / "one", "loss_txt")[1] - 0.5


def test_only_what_belongs_to_text_learns() -> None:
    config = settings(Path("x"))
    model = build(TrainConfig(output="", steps=1, model=config.model, data=DATA), TOKENIZER)[0].config
    texts = ToyTexts(config.data, build_tokenizer(config.model, TOKENIZER), model.soi_token_id)
    inputs = prepare_texts(next(iter(ImageLoader(config.data, texts))), 0, torch.device("cpu"))
    inputs.pop("stats")
    assert inputs["input_ids"].shape[1] % 16 == 0
    task = LanguageTask(model)
    task(**inputs).loss.backward()
    moved = {name for name, p in task.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert {"reader.linear.weight", "model.context_proj.weight", "model.image_decoder.resampler.queries"} < moved
    assert not any(".visual_tokenizer." in name or ".unet." in name or "synchronizer" in name for name in moved)


def test_a_shared_reader_reads_every_vector_alike() -> None:
    torch.manual_seed(0)
    reader = SharedReader(8, {"a": 3, "b": 2}).eval()
    vectors = torch.randn(4, 5, 8)
    wanted = torch.stack([torch.randint(0, 3, (4, 5)), torch.randint(0, 2, (4, 5))], -1)
    loss, right = reader(vectors, wanted)
    turned, same = reader(vectors.flip(1), wanted.flip(1))
    torch.testing.assert_close(loss, turned)
    assert right == same
    wanted[:, 1:] = -100
    part, _ = reader(vectors[:, :1], wanted[:, :1])
    torch.testing.assert_close(reader(vectors, wanted)[0], part)
    assert float(reader(vectors, torch.full_like(wanted, -100))[0]) == 0


def test_too_few_conditions_are_refused(tmp_path: Path) -> None:
    few = settings(tmp_path, "model.overrides={image_decoder: {resampler: {num_queries: 5}}}")
    with pytest.raises(ValueError, match="num_queries must be at least 6"):
        train_language(few, TOKENIZER, "cpu")

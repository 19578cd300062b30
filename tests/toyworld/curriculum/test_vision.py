"""Pre-training of the visual tokenizer: its labels, its run, and what it hands over."""

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
from mm_interleaved.training.building import build
from mm_interleaved.training.config import InitConfig, ModelConfig, TrainConfig, WeightsConfig
from toyworld.curriculum.config import PartRunConfig
from toyworld.curriculum.images import ImageLoader, ToyScenes
from toyworld.curriculum.run import train_vision
from toyworld.curriculum.vision import VisionTask, cell_traits
from toyworld.detector import TRAITS
from toyworld.sampling import random_scene, scene_rng
from toyworld.scene import SIZES
from toyworld.train_detector import labels

from .conftest import PART, ROOT, logged, whole_model

DATA = DataConfig([SourceConfig("toyworld")])


def settings(output: Path, *changes: str) -> PartRunConfig:
    return load_config(ROOT / "configs/small/vision.yaml", PartRunConfig, [*PART, f"output={output}", *changes])


def test_cells_say_what_stands_in_them() -> None:
    """Against the scenes themselves, whose objects know their cells."""
    for index in range(40):
        scene = random_scene(scene_rng(3, "val", index), split="val")
        objects = [t for t in scene.objects if t.place == "cell" and max(abs(o) for o in t.offset) < 0.3]
        geometry, traits = labels(scene)
        found = cell_traits(geometry[None], traits[None])[0]
        alone = [t for t in objects if sum(o.cell == t.cell for o in scene.objects) == 1]
        for obj in alone:
            row = found[obj.cell]
            assert row[0] == 1
            assert [values[i] for values, i in zip(TRAITS.values(), row[1:].tolist(), strict=True)] == [
                getattr(obj.attributes, name) for name in TRAITS
            ]
        empty = set(range(9)) - {t.cell for t in scene.objects}
        assert not found[sorted(empty), 0].any()


def test_a_run_learns_and_hands_its_weights_to_a_model(tmp_path: Path) -> None:
    config = settings(tmp_path / "run", "steps=30")
    assert train_vision(config, TOKENIZER, "cpu") is None
    losses = logged(tmp_path / "run")
    assert losses[30] < losses[1] - 1
    quality = json.loads((tmp_path / "run/final/quality.json").read_text())
    assert 0 <= quality["eval_accuracy_color"] <= 1
    source = ModelConfig(InitConfig(preset="debug"), [WeightsConfig(str(tmp_path / "run/final"))])
    run = TrainConfig(output="", steps=1, model=source, data=DATA)
    model, _ = build(run, TOKENIZER)
    plain, _ = build(
        TrainConfig(output="", steps=1, model=ModelConfig(InitConfig(preset="debug")), data=DATA), TOKENIZER
    )
    name = "visual_tokenizer.proj.weight"
    assert not torch.equal(model.state_dict()[name], plain.state_dict()[name])
    assert model.config.to_dict() == plain.config.to_dict()


def test_a_run_starts_from_a_whole_model(tmp_path: Path) -> None:
    own, source = whole_model(tmp_path / "whole")
    assert train_vision(settings(tmp_path / "run", *source), TOKENIZER, "cpu") is None
    found = load_file(tmp_path / "run/final/visual_tokenizer.safetensors")
    name = "visual_tokenizer.encoder.embeddings.patch_embedding.weight"
    assert torch.allclose(own[name], found[name], atol=1e-7)


def test_tokens_are_handed_over_at_unit_length(tmp_path: Path) -> None:
    """A mean square of 1 on scenes of the kind that it has learned from."""
    config = settings(tmp_path, "ema.decay=0")
    model, _ = build(TrainConfig(output="", steps=1, model=config.model, data=DATA), TOKENIZER)
    task = VisionTask(model.config)
    batches = list(ImageLoader(config.data, ToyScenes(config.data, 56)))
    with torch.no_grad():
        task.visual_tokenizer.proj.weight.mul_(300)  # as training makes it
        for batch in batches * 4:  # the running statistics settle
            task(**batch)
    model.load_state_dict(task.weights(), strict=False)
    with torch.no_grad():
        tokens = torch.cat([model.encode_images(batch["images"]).tokens for batch in batches])
    assert 0.9 < tokens.square().mean() < 1.1


def test_an_interrupted_run_goes_on_as_if_nothing_had_happened(tmp_path: Path) -> None:
    assert train_vision(settings(tmp_path / "whole"), TOKENIZER, "cpu") is None
    assert train_vision(settings(tmp_path / "parts", "steps=3"), TOKENIZER, "cpu") is None
    shutil.rmtree(tmp_path / "parts/final")
    assert train_vision(settings(tmp_path / "parts"), TOKENIZER, "cpu") is None
    assert logged(tmp_path / "parts")[6] == logged(tmp_path / "whole")[6]


def test_every_reader_is_used() -> None:
    """Each map and the tokens have a gradient from their own loss."""
    config = settings(Path("x"))
    task = VisionTask(build(TrainConfig(output="", steps=1, model=config.model, data=DATA), TOKENIZER)[0].config)
    batch = next(iter(ImageLoader(config.data, ToyScenes(config.data, 56))))
    task(**batch).loss.backward()
    heads = [*task.map_readers.parameters(), *task.token_reader.parameters()]
    assert all(p.grad.abs().sum() > 0 for p in heads)
    assert task.visual_tokenizer.proj.weight.grad.abs().sum() > 0
    assert len(SIZES) == 2


@pytest.mark.parametrize("content", [None, "small"])
def test_weights_that_do_not_fit_are_refused(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "visual_tokenizer.safetensors").write_bytes(b"")
    source = ModelConfig(InitConfig(preset="debug"), [WeightsConfig(str(tmp_path))])
    with pytest.raises(ValueError, match=r"holds no .safetensors|is damaged"):
        build(TrainConfig(output="", steps=1, model=source, data=DATA), TOKENIZER)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("data.folder=images", "labels"),
        ("data.batch_size=1", "at least 2"),
        ("gradient_checkpointing=true", "without it"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(change: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        settings(Path("x"), change)

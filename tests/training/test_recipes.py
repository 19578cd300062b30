"""Recipes of fine-tuning: they can be read, their values say how sure they are, and each of them trains."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from mm_interleaved.configuration import make_config
from mm_interleaved.io import InputError
from mm_interleaved.pretrained import TOKENIZER
from mm_interleaved.training.config import TrainConfig
from mm_interleaved.training.recipes import FOLDER, list_recipes, load_recipe
from mm_interleaved.training.run import train
from mm_interleaved.validation import ConfigError

from .conftest import ROOT

MODEL = {"init_from": {"preset": "debug"}}
DATA = {"sources": [{"type": "toyworld"}]}
RECIPES = sorted(list_recipes())
SURE = ("release", "paper", "paper, low confidence", "third party", "our choice", "as above")
LEAST = {"output": "run", "steps": 2, "model": MODEL, "data": DATA}


def test_there_is_a_recipe_for_each_task() -> None:
    wanted = {"sft", "vqa", "caption", "grounding", "text-to-image", "segmentation-to-image", "vist", "pororo",
              "flintstones", "visdial", "instructions", "own-documents", "own-messages", "own-folder"}  # fmt: skip
    assert set(RECIPES) == wanted
    assert all(10 < len(description) <= 110 for description in list_recipes().values())


def test_the_recipes_are_also_among_the_configurations() -> None:
    """Where people look for them in a checkout."""
    assert (ROOT / "configs/finetune").resolve() == FOLDER


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_needs_a_model_and_data_only(recipe: str) -> None:
    """No file of the data is needed to check the settings."""
    config = load_recipe(recipe, "debug", overrides=["data.root=some/folder"])
    assert config.output == f"runs/finetune/{recipe}"
    assert config.data.root == "some/folder"
    assert config.evaluation is None or config.evaluation.root == "some/folder"
    assert config.losses.scale == "global"
    assert load_recipe(recipe, "small", overrides=["data.root=x"]).model.init_from.checkpoint is not None


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_value_says_how_sure_it_is(path: Path) -> None:
    unmarked = []
    for line in path.read_text().splitlines():
        text, _, comment = line.partition("  # ")
        key, _, value = text.strip().removeprefix("- ").partition(":")
        needs_mark = bool(value.strip().removeprefix("&boxes")) and not line.lstrip().startswith("#")
        if needs_mark and key not in ("extends", "type", "root") and comment.partition(":")[0] not in SURE:
            unmarked.append(line)
    assert not unmarked


def test_a_file_of_ones_own_is_a_recipe(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("output: here\nsteps: 5\ndata:\n  sources: [{type: toyworld}]\n")
    config = load_recipe(str(tmp_path / "mine.yaml"), "debug", overrides=["epochs=2"])
    assert (config.output, config.steps, config.epochs) == ("here", None, 2)


@pytest.mark.parametrize(
    ("recipe", "model", "overrides", "message"),
    [
        ("vaq", "small", [], "there is no recipe 'vaq'.* Did you mean 'vqa'"),
        ("vqa", None, [], "no model is given. Add --model small"),
        ("vqa", "smal", [], "no folder has this name.* Did you mean 'small'"),
        ("vqa", "tests", [], "has no config.json"),
        ("own-folder", "small", [], "data.root must be given .* Add data.root=VALUE"),
        ("vqa", "small", ["cutoff_len=512"], "unknown key 'cutoff_len' .* Here it is 'data.max_length'"),
        ("vqa", "small", ["data.sources.0.option.limit=3"], "Did you mean 'options'"),
    ],
)
def test_what_cannot_be_used_is_explained(
    recipe: str, model: str | None, overrides: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(InputError, match=message):
        load_recipe(recipe, model, overrides=overrides)


@pytest.mark.parametrize(
    ("override", "ours"),
    [
        ("learning_rate=1e-4", "optimizer.lr"),
        ("per_device_train_batch_size=2", "data.batch_size"),
        ("gradient_accumulation_steps=8", "accumulation"),
        ("freeze_vit=true", "freeze=[vision]"),
        ("optimizer.learning_rate=1", "optimizer.lr"),
        ("data.cutoff_len=512", "data.max_length"),
        ("lora-rank=8", "adapter.rank"),
    ],
)
def test_a_name_of_another_trainer_is_translated(override: str, ours: str) -> None:
    with pytest.raises(ConfigError, match="unknown key") as error:
        make_config(LEAST, TrainConfig, [override])
    assert f"'{ours}'" in str(error.value)


def test_a_mistyped_name_of_ours_still_gets_the_nearest_one() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'log_every'"):
        make_config(LEAST, TrainConfig, ["log_evry=1"])


def test_samples_come_from_the_data(tmp_path: Path) -> None:
    """The last learned part is open; the page shows it before and after training beside what the data have."""
    shutil.copytree(ROOT / "examples", tmp_path / "data")
    source = {"type": "documents", "shards": ["training.jsonl"], "max_length": 96, "keep_remainder": True}
    config = make_config(
        LEAST | {
            "output": str(tmp_path / "run"), "precision": "float32", "tensorboard": False, "sample_every": 3,
            "data": {"root": str(tmp_path / "data"), "batch_size": 1, "mix": "row", "sources": [source]},
            "samples": {"from_data": True, "num_inference_steps": 2, "max_new_tokens": 4},
        },
        TrainConfig,
    )  # fmt: skip
    train(config, TOKENIZER, "cpu")
    steps = sorted(int(path.stem) for path in (tmp_path / "run/samples").glob("*.json"))
    assert steps == [0, 2]
    (caption, image, *_) = json.loads((tmp_path / "run/samples/0000002.json").read_text())
    assert [s["generated"] for s in caption["segments"]] == [False, True]
    assert caption["wanted"][0]["text"].startswith("Mila the fox has")
    assert image["segments"][-1]["image"] == "0000002_1_1.png"
    page = (tmp_path / "run/report.html").read_text()
    assert "step 0" in page
    assert all(f'src="samples/{name}"' in page for name in ("0000000_1_1.png", "0000002_1_1.png", "wanted_1.png"))
    assert (tmp_path / "run/samples/wanted_1.png").is_file()

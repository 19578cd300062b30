"""Recipes of fine-tuning: they can be read, their values say how sure they are, and each of them trains."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import PIL.Image
import pytest

from mm_interleaved.configuration import make_config
from mm_interleaved.document import Box, Document, Image, Text
from mm_interleaved.io import InputError
from mm_interleaved.pretrained import TOKENIZER
from mm_interleaved.training.config import TrainConfig
from mm_interleaved.training.familiar import FAMILIAR
from mm_interleaved.training.memory import BatchSizes, MemoryEstimate
from mm_interleaved.training.recipe_list import FOLDER, list_recipes
from mm_interleaved.training.recipes import load_recipe
from mm_interleaved.training.run import train
from mm_interleaved.training.samples import sample_documents
from mm_interleaved.validation import ConfigError
from toyworld.writers import write_dataset
from toyworld.writers.base import Job

from ..cli.conftest import Outcome, mmi
from ..tasks.conftest import FILES
from ..tasks.official import OFFICIAL
from .conftest import ROOT, whole_model

__all__ = ["mmi"]
finetune = import_module("mm_interleaved.cli.finetune")  # the package has the command under this name
memory = import_module("mm_interleaved.cli.memory")
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
    assert "step 2, finished" in page
    assert "<th>step 0</th>" in page
    assert all(f'src="samples/{name}"' in page for name in ("0000000_1_1.png", "0000002_1_1.png", "wanted_1.png"))
    assert (tmp_path / "run/samples/wanted_1.png").is_file()


def test_samples_see_images_as_training_does(tmp_path: Path) -> None:
    """The image of a box is stretched, also where the only box is in the answer that is left open."""
    PIL.Image.new("RGB", (40, 20)).save(tmp_path / "wide.png")
    turns = [{"role": "user", "content": "<image>Where?"}, {"role": "assistant", "content": "<bbox>"}]
    record = {"messages": turns, "images": ["wide.png"], "objects": {"bbox": [[10, 5, 20, 10]]}}
    (tmp_path / "a.jsonl").write_text(json.dumps(record))
    source = {"type": "messages", "shards": ["a.jsonl"]}
    config = make_config(LEAST | {"data": {"root": str(tmp_path), "sources": [source]}}, TrainConfig)
    ((document, wanted),) = sample_documents(config)
    (image,) = document.images
    assert image.transform is not None
    assert image.transform.square == "squash"
    assert document.segments[-1].is_open
    assert isinstance(wanted, Text)
    assert wanted.text == "(249,249)(499,499)"


def toy_data(task: str, folder: Path) -> list[str]:
    """Write the training phase of a task in its official layout; the options of the source that name the folders."""
    form, images = FILES[task]
    if not folder.exists() and task in OFFICIAL:
        OFFICIAL[task][0](folder)
    elif not folder.exists():
        write_dataset(form, folder, Job(6, "train", 0, 64))
    return [f"images={folder / images}", f"annotations={folder}"]


def own_data(recipe: str, folder: Path) -> None:
    """Write two images with texts in the form of a recipe for data of one's own."""
    folder.mkdir()
    names = ["fox.png", "house.png"]
    for name in names:
        shutil.copy(ROOT / "examples/images" / name, folder)
    lines: list[dict[str, Any]]
    if recipe == "own-folder":
        lines = [{"file_name": name, "text": f"A {name[:-4]}."} for name in names]
        path = folder / "metadata.jsonl"
    elif recipe == "own-messages":
        path = folder / "chats.jsonl"
        lines = [{
            "messages": [{"role": "user", "content": "<image>What is it?"}, {"role": "assistant", "content": "A fox."}],
            "images": ["fox.png"],
        }]  # fmt: skip
    else:
        path = folder / "own.jsonl"
        lines = [{"segments": [{"text": "A fox."}, {"image": "fox.png"}]}, {"segments": [{"text": "No image."}]}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_trains_on_data_in_the_official_layout(
    recipe: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    shared = tmp_path_factory.getbasetemp()
    changes = ["steps=2", "data.batch_size=1", "log_every=1", "tensorboard=false", "save_every=0", "sample_every=0",
               f"data.root={tmp_path / 'own'}"]  # fmt: skip
    if recipe.startswith("own-"):
        own_data(recipe, tmp_path / "own")
    for index, source in enumerate(load_recipe(recipe, "debug", overrides=changes).data.sources):
        if source.type == "task":
            task = source.options["task"]
            changes += [f"data.sources.{index}.options.{option}"
                        for option in toy_data(task, shared / f"recipe-{FILES[task][0]}")]  # fmt: skip
    config = load_recipe(recipe, "debug", output=str(tmp_path / "run"), overrides=changes)
    train(config, TOKENIZER, "cpu")
    log = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in log] == [1, 2]
    assert all(0 < entry["loss"] < 100 for entry in log)
    assert (tmp_path / "run/final/config.json").is_file()
    report = json.loads((tmp_path / "run/data-rank0.json").read_text())
    assert sum(entry["counts"]["rows"] for name, entry in report.items() if name != "step") >= 2


def test_an_adapter_is_trained_with_a_recipe(tmp_path: Path) -> None:
    whole_model(tmp_path / "base")
    own_data("own-folder", tmp_path / "own")
    changes = [f"data.root={tmp_path / 'own'}", "steps=2", "precision=float32", "sample_every=0", "adapter.rank=2"]
    config = load_recipe("own-folder", str(tmp_path / "base"), "image", str(tmp_path / "run"), changes)
    assert (config.optimizer.lr, config.optimizer.groups) == (2e-4, [])
    train(config, TOKENIZER, "cpu")
    assert (tmp_path / "run/final/adapter_model.safetensors").is_file()


def test_a_run_too_large_for_the_gpu_is_refused(
    mmi: Callable[..., Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Above 1.3 times its memory only with --force; above its memory with a warning; and the page warns, too."""
    monkeypatch.setattr("mm_interleaved.training.run.train", lambda *given: None)
    own_data("own-folder", tmp_path / "own")
    recipe = ["finetune", "own-folder", f"data.root={tmp_path / 'own'}", "--model", "debug", "--output",
              tmp_path / "run"]  # fmt: skip
    needed = 100 * 2**20
    estimate = MemoryEstimate({"weights": needed}, BatchSizes(1, 1, 1, 1))
    for module in (finetune, memory):
        monkeypatch.setattr(module, "estimate_memory", lambda *given: estimate)
    for arguments in (recipe, ["train", ROOT / "configs/debug.yaml", f"output={tmp_path / 'run'}"]):
        for share, code, words in ((1.1, 0, ""), (0.9, 0, "needs about 0.1 GiB"), (0.7, 1, "or start with --force")):
            for module in (finetune, memory):
                monkeypatch.setattr(module, "gpu_memory", lambda device, share=share: int(needed * share))
            said = mmi(*arguments)
            assert (said.code, words in said.err) == (code, True), said.err
            assert not (tmp_path / "run").exists()
        assert mmi(*arguments, "--force").code == 0
    said = mmi(*recipe, "--check")
    assert said.code == 0
    assert "needs about" in (tmp_path / "run" / finetune.PAGE).read_text()


@pytest.mark.slow
def test_the_page_shows_what_is_learned(mmi: Callable[..., Outcome], tmp_path: Path) -> None:
    """Texts with and without a loss, a target image, boxes on the image as it is fed, and what is left out."""
    folder = tmp_path / "own"
    own_data("own-documents", folder)
    lines = [
        {"segments": [{"image": "fox.png", "supervise": False}, {"text": "Where is it? <box>", "supervise": False},
                      {"text": "(100,200)(599,799)</box>"}]},
        {"segments": [{"image": "gone.png"}, {"text": "Gone."}]},
    ]  # fmt: skip
    with (folder / "own.jsonl").open("a") as file:
        file.write("".join(json.dumps(line) + "\n" for line in lines))
    said = mmi("finetune", "own-documents", "--model", "debug", "--check", f"data.root={folder}", "--output",
               tmp_path / "run", "freeze=[vision]")  # fmt: skip
    assert said.code == 0, said.err
    page = (tmp_path / "run" / finetune.PAGE).read_text()
    assert f"page: {tmp_path / 'run' / finetune.PAGE}" in said.out
    assert "<span>Where is it? &lt;box&gt;</span>" in page
    assert '<span class="learned">A fox.</span>' in page
    assert "left:10.01%;top:20.02%;width:49.95%;height:59.96%" in page
    assert page.count('<figure class="target">') == 1  # the fox that is drawn
    assert "does not exist" in page.split("an example")[1]
    assert "about 0." in page
    visual = re.search(r"visual_tokenizer</td><td class=\"n\">[\d,]+</td><td class=\"n\">([\d,]+)</td>", page)
    assert visual is not None
    assert visual[1] == "0"
    assert not re.search(r"(src|href)=\"(?!data:)", page)  # it needs no other file


@pytest.mark.slow
def test_boxes_are_drawn_on_the_image_that_they_are_in(mmi: Callable[..., Outcome], tmp_path: Path) -> None:
    """Two images whose boxes are stated after both, in a document and in a conversation; also flipped."""
    own_data("own-documents", tmp_path / "own")
    boxes = {1: Box(0.2, 0.2, 0.4, 0.4, image=1), 2: Box(0.5, 0.5, 0.9, 1.0, image=0), 3: Box(0, 0, 0.25, 0.5, image=1)}
    images = [Image(Path(name), supervise=False) for name in ("fox.png", "house.png")]
    for role in (None, "user"):
        asked = [replace(image, role=role) for image in images]
        answer = Text.of("Here: ", boxes[1], " and ", boxes[2], " and ", boxes[3], role=role and "assistant")
        line = json.dumps(Document([*asked, Text("Where?", False, role), answer]).to_dict())
        (tmp_path / "own/own.jsonl").write_text(line + "\n")
        for flip in (0, 1):
            said = mmi("finetune", "own-documents", "--model", "debug", "--check", f"data.root={tmp_path / 'own'}",
                       "--output", tmp_path / "run", f"data.sources.0.augment.flip={flip}")  # fmt: skip
            assert said.code == 0, said.err
            page = (tmp_path / "run" / finetune.PAGE).read_text()
            shown = [re.findall(r"left:([\d.]+)%[^<]*<b>(\d)</b>", figure) for figure in page.split("<figure")[1:3]]
            lefts = [[(f"{100 * (1 - b.x2 if flip else b.x1):.1f}", str(n)) for n, b in boxes.items() if b.image == i]
                     for i in (0, 1)]  # fmt: skip
            assert [[(f"{float(left):.1f}", number) for left, number in found] for found in shown] == lefts


REFUSED = {
    "no data": ["data.root=nowhere"],
    "a source without samples": ["data.sources.0.options.column=title"],
    "a setting of the Trainer": ["trainer.report_too=wandb"],
    "a base that cannot be quantised": ["model.quantize=int8"],
    "samples of a file that is not there": ["samples.documents=nowhere.json", "sample_every=1"],
    "held-out data that are not there": ["eval_data={sources: [{type: imagefolder, root: gone}]}", "eval_every=1"],
    "a row too short for an image": ["data.max_length=8"],
    "epochs of no batch": ["epochs=1", "data.sources.0.options.column=title"],
    "a task that is not there": ["evaluation={tasks: [{task: gqa, root: gone}]}", "evaluate_every=1"],
    "an adapter that matches nothing": ["adapter.targets=[gone]"],
    "all parts frozen": ["freeze=[llm, vision, image_decoder, mmfs]"],
}


@pytest.mark.slow
def test_a_warm_up_as_long_as_the_run_is_told(mmi: Callable[..., Outcome], tmp_path: Path) -> None:
    own_data("own-folder", tmp_path / "own")
    for warmup, told in ((1, False), (2, True)):
        said = mmi("finetune", "own-folder", "--model", "debug", f"data.root={tmp_path / 'own'}", "steps=2",
                   "sample_every=0", f"schedule.warmup_steps={warmup}", "--output", tmp_path / str(warmup), "--device",
                   "cpu")  # fmt: skip
        assert said.code == 0, said.err
        assert ("the learning rate never reaches its value" in said.err) == told


@pytest.mark.parametrize("changes", REFUSED.values(), ids=REFUSED)
def test_a_refused_start_leaves_nothing(
    changes: list[str], mmi: Callable[..., Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No folder of the run and no file in it."""
    monkeypatch.chdir(tmp_path)
    own_data("own-folder", tmp_path / "own")
    before = sorted(tmp_path.rglob("*"))
    said = mmi("finetune", "own-folder", "--model", "debug", "data.root=own", "steps=2", "sample_every=0", *changes,
               "--device", "cpu")  # fmt: skip
    assert said.code == 1
    assert "error: " in said.err
    assert sorted(tmp_path.rglob("*")) == before, said.err


@pytest.mark.parametrize(
    ("overrides", "origin"),
    [
        (["steps=5", "epochs=2"], "override 'steps=5' and override 'epochs=2'"),
        (["epochs=2", "data.sampling=forever"], "override 'epochs=2' and override 'data.sampling=forever'"),
        (
            ["selective_checkpointing=true", "gradient_checkpointing=false"],
            "override 'selective_checkpointing=true' and override 'gradient_checkpointing=false'",
        ),
        (["early_stopping.metric=a/b", "evaluation=null"], "override 'evaluation=null'"),
    ],
)
def test_an_error_names_the_argument_that_set_a_value(overrides: list[str], origin: str) -> None:
    """Not the file of the recipe alone, which may have nothing of it."""
    with pytest.raises(ConfigError) as error:
        load_recipe("vqa", "debug", overrides=overrides)
    assert f"({origin})" in str(error.value)


BAD_CHECKS = {
    "no folder": ("data.root=nowhere", "error: source 'imagefolder': there is no folder nowhere"),
    "a number as a caption": ("data.sources.0.options.column=year", "'year' malformed (own/metadata.jsonl, line"),
    "an unknown setting of the Trainer": ("trainer.report_too=wandb", "unknown key 'report_too' in trainer"),
    "a row too short for an image": ("data.max_length=8", "document longer than a row (own/metadata.jsonl, line"),
    "a field that the template lacks": (
        "data.sources.0.options.image_prompt='{title}'",
        "(own/metadata.jsonl, line 2: the prompt '{title}' has a field {title}; there",
    ),
    "a template without quotes": ("data.sources.0.options.image_prompt={x} y", "Put quotes around it: 'data.sources"),
}


@pytest.mark.parametrize(("override", "words"), BAD_CHECKS.values(), ids=BAD_CHECKS)
def test_the_check_says_why_data_cannot_be_used(
    override: str, words: str, mmi: Callable[..., Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one message, without an estimate for rows that are not there."""
    monkeypatch.chdir(tmp_path)
    own_data("own-folder", tmp_path / "own")
    lines = [json.dumps({"file_name": name, "text": "A fox.", "year": 1999}) for name in ("fox.png", "house.png")]
    (tmp_path / "own/metadata.jsonl").write_text("\n".join(lines))
    said = mmi("finetune", "own-folder", "--model", "debug", "--check", "data.root=own", override)
    assert said.code == 1
    assert words in said.err
    assert said.err.count("imagefolder'") <= 1
    assert "GiB" not in said.out


def test_the_check_tells_what_is_left_out(mmi: Callable[..., Outcome], tmp_path: Path) -> None:
    own_data("own-folder", tmp_path / "own")
    with (tmp_path / "own/metadata.jsonl").open("a") as file:
        file.write('\n{"file_name": "fox.png"}\n')
    said = mmi("finetune", "own-folder", "--model", "debug", "--check", f"data.root={tmp_path / 'own'}", "--output",
               tmp_path / "run")  # fmt: skip
    assert said.code == 0, said.err
    assert "source 'imagefolder' leaves out: 1 x 'text' missing" in said.err


@pytest.mark.parametrize("ours", sorted({words.split("'")[1] for words in FAMILIAR.values() if "Here it is" in words}))
def test_what_names_of_other_trainers_stand_for_exists(ours: str) -> None:
    """A setting without its last part is unknown; with it, another problem is found, or none."""
    if ours.startswith("data.sources[0].options"):
        return  # of the task
    key = ours.partition("=")[0].replace("[0]", ".0")
    value = ours.partition("=")[2] or "null"
    try:
        make_config(LEAST, TrainConfig, [f"{key}={value}"])
    except ConfigError as error:
        assert "unknown key" not in str(error)  # noqa: PT017

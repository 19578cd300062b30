"""`mmi data check`, on the examples of the documentation."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from mm_interleaved.configuration import read_settings
from mm_interleaved.pretrained import TOKENIZER
from toyworld.writers import write_dataset
from toyworld.writers.base import Job

from ..data.world import write_images, write_lines
from .conftest import Outcome

Mmi = Callable[..., Outcome]

CONFIGS = Path(__file__).parents[2] / "configs"
DOCS = Path(__file__).parents[2] / "docs" / "guides" / "data.md"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The files that docs/guides/data.md shows, with images; the place where commands run."""
    examples = dict(re.findall(r"<!-- example: (\S+) -->\n```\w+\n(.*?)```", DOCS.read_text(), re.DOTALL))
    assert len(examples) == 7
    for name, text in examples.items():
        path = tmp_path / ("config.yaml" if name == "config" else name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    for images in ("pairs/images", "mmc4/images", "documents", "chats", "drawings"):
        write_images(tmp_path / images, 2)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def table(output: str, source: str) -> dict[str, str]:
    """The first two columns of what is printed of a source."""
    text = output.split(f"{source}: a sample")[1].split(": a sample")[0]
    return {m[0].strip(): m[1].strip() for m in re.findall(r"│([^│]*)│([^│]*)│[^│]*│", text)}


def test_every_source_is_shown(mmi: Mmi, folder: Path) -> None:
    shown = mmi("data", "check", "config.yaml", "--seconds", "0.2", "--sheet", "look.png")
    assert shown.code == 0, shown.err
    captions, mmc4, documents = (table(shown.out, name) for name in ("captions", "mmc4", "documents"))
    assert (captions["documents"], captions["images"], captions["shard missing"]) == ("2", "2", "1")
    assert (mmc4["documents"], mmc4["images"]) == ("1", "2")
    assert (documents["documents"], documents["images"], documents["images learned"]) == ("3", "3", "66.7%")
    assert re.search(r"the main process: [\d,]+ tokens/s, [\d,.]+ images/s", shown.out)
    sheet = np.asarray(PIL.Image.open(folder / "look.png"))
    for number in (0, 1):  # the images that `write_images` drew stand on it
        assert (np.abs(sheet.astype(int) - (number, 0, 128)).max(-1) <= 1).sum() > 3 * 100 * 100


SAMPLES = """
data:
  probabilities: sqrt_size
  sources:
    - {type: messages, root: chats, shards: ["*.json", "*.jsonl"]}
    - {type: imagefolder, root: drawings, options: {learn: either, image_prompt: "{text} ({style})"}}
    - {type: task, root: vqav2, options: {task: vqav2, images: ., annotations: .}}
evaluation:
  tasks: [{task: vqav2, images: vqav2, annotations: vqav2, phase: train}]
model: {init_from: {preset: debug}}
"""


def test_samples_for_fine_tuning_and_evaluated_tasks(mmi: Mmi, folder: Path) -> None:
    """Own conversations, own images and a task are shown, and the tasks that the run evaluates are checked."""
    write_dataset("vqav2", folder / "vqav2", Job(4, "train", 0, 48))
    (folder / "samples.yaml").write_text(SAMPLES)
    shown = mmi("data", "check", "samples.yaml", "--seconds", "0.2")
    assert shown.code == 0, shown.err
    messages, drawings, questions = (table(shown.out, name) for name in ("messages", "imagefolder", "task"))
    assert (messages["documents"], messages["images"]) == ("5", "3")
    assert (drawings["documents"], drawings["images"]) == ("2", "2")
    assert (questions["documents"], questions["images learned"]) == (questions["records"], "0.0%")
    assert re.search(r"vqav2: good: \d+ samples", shown.out)
    shown = mmi("data", "check", "samples.yaml", "--seconds", "0", "evaluation.tasks.0.phase=val")
    assert shown.code == 1
    assert "the files of these tasks are not complete: vqav2" in shown.err
    shown = mmi("data", "check", "samples.yaml", "--seconds", "0", "data.sources.2.options.annotations=nowhere")
    assert shown.code == 1
    assert "these sources cannot be used: task" in shown.err
    assert "nowhere" in shown.out


def test_overrides_count(mmi: Mmi, folder: Path) -> None:
    arguments = ("data", "check", "config.yaml", "--seconds", "0")
    assert "similarity too low" not in mmi(*arguments).out
    shown = mmi(*arguments, "data.sources.1.sim_threshold=0.3", "steps=7")
    assert table(shown.out, "mmc4")["similarity too low"] == "1"
    assert "tokens/s" not in shown.out
    assert (folder / "data.png").is_file()


def test_a_source_that_gives_nothing_is_an_error(mmi: Mmi, folder: Path) -> None:
    (folder / "mmc4/images/0.png").write_bytes(b"")
    (folder / "mmc4/images/1.png").unlink()
    shown = mmi("data", "check", "config.yaml")
    assert shown.code == 1
    assert "these sources cannot be used: mmc4" in shown.err
    mmc4 = table(shown.out, "mmc4")
    assert (mmc4["image empty"], mmc4["image missing"], mmc4["no image left"]) == ("1", "1", "1")
    assert table(shown.out, "documents")["documents"] == "3"


def test_reasons_show_their_examples(mmi: Mmi, folder: Path) -> None:
    write_lines(folder / "documents" / "bad.jsonl", ["junk [/] text"])
    assert "bad.jsonl, line 1" in mmi("data", "check", "config.yaml", "--seconds", "0").out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            "data.sources.0.rot=x",
            "unknown key 'rot' in data.sources[0] (override 'data.sources.0.rot=x'). Did you mean 'root'?",
        ),
        (
            "data.sources.0.type=parquet",
            "unknown source type 'parquet' (data.sources[0] in override 'data.sources.0.type=parquet')",
        ),
        ("model.init_from.preset=smal", "'small' or 'debug', not 'smal' (override 'model.init_from.preset=smal'). Did"),
        ("model.tokenizer=config.yaml", "'config.yaml' holds no tokenizer: "),
    ],
)
def test_mistakes_are_explained(mmi: Mmi, folder: Path, change: str, message: str) -> None:
    shown = mmi("data", "check", "config.yaml", change)
    assert shown.code == 1
    assert message in shown.err


def test_the_reason_why_a_source_cannot_be_used_is_shown(mmi: Mmi, folder: Path) -> None:
    shown = mmi("data", "check", "config.yaml", "data.sources.0.max_length=3")
    assert shown.code == 1
    assert "source 'captions': an image of 5 tokens does not " in shown.out


def folders(found: dict[str, Any]) -> set[str]:
    """The folders that the model and the sources of a training run need."""
    init = found["model"]["init_from"]
    named = [init.get("checkpoint"), *(init.get("components") or {}).values()]
    return {name for name in named if name} | {s["root"] for s in found["data"]["sources"] if "root" in s}


# configs/small/recipe.yaml is read by scripts/train_small alone.
RUNS = sorted(path for path in CONFIGS.rglob("*.yaml") if path.name != "recipe.yaml")


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
@pytest.mark.slow
def test_every_configuration_of_the_project(
    path: Path, mmi: Mmi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where no folder exists, each missing one is named; what can be checked without them is checked."""
    monkeypatch.chdir(tmp_path)
    found = read_settings(path)
    said = mmi("data", "check", path, "--seconds", "0", "--batches", "1", "--rows", "1")
    if "tasks" in found:
        assert said.code == 1
        for task in found["tasks"]:
            assert f"{task.get('name', task['task'])}: not complete" in said.out
        assert said.out.count("does not exist") >= len(found["tasks"])
    elif "sources" in found["data"]:
        for name in folders(found):
            assert re.search(rf"(there is no folder|do not exist:) .*{re.escape(name)}", said.out), name
        absent = [s for s in found["data"]["sources"] if "root" in s]
        assert said.code == (1 if absent else 0)
        assert ("documents" in table(said.out, "toyworld")) if not absent else "cannot be used" in said.err
    else:
        assert said.code == 1
        assert "'data' has no 'sources'" in said.err


def test_components_need_only_their_tokenizer(mmi: Mmi, folder: Path) -> None:
    """Without weights and configurations the tokenizer of the language model is used, and its absence is stated."""
    parts = [f"model.init_from.components.{name}={name}" for name in ("llm", "clip", "diffusion")]
    arguments = ("data", "check", "config.yaml", "model.init_from.preset=null", *parts, "--seconds", "0")
    shutil.copytree(TOKENIZER.parent, folder / "llm", ignore=shutil.ignore_patterns("model*", "config.json"))
    shutil.copy(TOKENIZER, folder / "llm")
    said = mmi(*arguments)
    assert said.code == 0, said.err
    assert "do not exist: llm/config.json, clip/config.json, diffusion/unet/config.json" in said.out
    assert "the tokenizer" not in said.out
    shutil.rmtree(folder / "llm")
    assert "the tokenizer 'llm' does not exist" in mmi(*arguments).out


class TestTasks:
    @pytest.fixture
    def vqav2(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """Toy data of VQAv2 under datasets/, as the documented tree has them."""
        monkeypatch.chdir(tmp_path)
        write_dataset("vqav2", tmp_path / "datasets/VQAv2", Job(3, "val", 0, 48))
        (tmp_path / "datasets/coco").symlink_to("VQAv2")
        return tmp_path / "datasets/VQAv2"

    def test_a_task(self, mmi: Mmi, vqav2: Path) -> None:
        said = mmi("data", "check", "vqav2", "root=datasets")
        assert said.code == 0, said.err
        assert "vqav2: good: 6 samples, 3 images these are files of the toy world" in said.out
        (vqav2 / "toyworld.json").unlink()
        assert "the official set has 214,354 records, not 6" in mmi("data", "check", "vqav2").out

    def test_the_command_to_prepare_is_named_and_uses_the_same_folder(
        self, mmi: Mmi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        (tmp_path / "TextVQA_0.5.1_val.json").write_text(json.dumps({"data": [
            {"question_id": 1, "question": "who?", "image_id": "a1", "answers": ["me"] * 10}]}))  # fmt: skip
        said = mmi("data", "check", "textvqa")
        command = re.search(r"then convert the official files: mmi (data prepare .*--phase val)", said.out)
        assert command is not None
        assert mmi(*command[1].replace("FOLDER", ".").split()).code == 0
        write_images(tmp_path / "datasets/textvqa/train_images", 1)
        (tmp_path / "datasets/textvqa/train_images/0.png").rename(tmp_path / "datasets/textvqa/train_images/a1.jpg")
        said = mmi("data", "check", "textvqa")
        assert said.code == 0, said.out
        assert "textvqa: good: 1 samples" in said.out

    def test_the_tasks_of_an_evaluation(self, mmi: Mmi, vqav2: Path, tmp_path: Path) -> None:
        """All are looked at; what is missing is named with where it comes from."""
        (tmp_path / "e.yaml").write_text("output: x\nroot: datasets\ntasks: [{task: gqa}, {task: vqav2, limit: 2}]\n")
        said = mmi("data", "check", "e.yaml")
        assert said.code == 1
        assert "gqa: not complete" in said.out
        assert "Get the balanced questions and images of GQA 1.2" in said.out
        assert "vqav2: good: 2 samples" in said.out
        assert "not complete: gqa" in said.err
        assert mmi("data", "check", "e.yaml", "only=[vqav2]").code == 0

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            (["vqa2"], "neither a file nor a task: unknown task 'vqa2'. Did you mean 'vqav2'?"),
            (["vqav2", "rot=datasets"], "unknown key 'rot' (override 'rot=datasets'). Did you mean 'root'?"),
            (["vqav2", "phase=dev"], "there is no phase 'dev'. Phases are val, train"),
        ],
    )
    def test_words_that_cannot_be_used(self, arguments: list[str], words: str, mmi: Mmi) -> None:
        said = mmi("data", "check", *arguments)
        assert said.code == 1
        assert words in said.err

    def test_an_evaluation_with_a_mistyped_key(self, mmi: Mmi, tmp_path: Path) -> None:
        (tmp_path / "e.yaml").write_text("output: x\ntaks: [{task: gqa}]\n")
        said = mmi("data", "check", tmp_path / "e.yaml")
        assert said.code == 1
        assert "has neither 'data'" in said.err
        assert "unknown key 'taks'. Did you mean 'tasks'?" in said.err

    def test_prepare(self, mmi: Mmi, tmp_path: Path) -> None:
        (tmp_path / "TextVQA_0.5.1_val.json").write_text(json.dumps({"data": [
            {"question_id": 1, "question": "who?", "image_id": "a1", "answers": ["me"] * 10}]}))  # fmt: skip
        said = mmi("data", "prepare", "textvqa", "--source", tmp_path, "--root", tmp_path / "datasets")
        assert said.code == 0, said.err
        assert "textvqa_val_questions.json: 1 questions" in said.out
        assert f"mmi data check textvqa root={tmp_path / 'datasets'}" in said.out
        missing = mmi("data", "check", "textvqa", f"root={tmp_path / 'datasets'}")
        assert "has its images in this folder, which does not exist" in missing.out
        refused = mmi("data", "prepare", "vqav2", "--source", tmp_path)
        assert refused.code == 1
        assert "reads its files as they are" in refused.err
        assert "unknown task 'textvqaa'" in mmi("data", "prepare", "textvqaa", "--source", tmp_path).err

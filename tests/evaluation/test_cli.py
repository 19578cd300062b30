"""`mmi evaluate`: what it says, what it writes, and the gallery."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest

from mm_interleaved.cli.gallery import choose
from mm_interleaved.configuration import load_config
from mm_interleaved.evaluation import EvaluateConfig
from mm_interleaved.evaluation.reported import PAPER
from mm_interleaved.tasks import TASKS, make_task

from ..adapters.make_adapter import make
from ..cli.conftest import Outcome, mmi
from .conftest import MakeTask, contents, lines

__all__ = ["mmi"]
ROOT = Path(__file__).parents[2]
Command = Callable[..., Outcome]


class Page(HTMLParser):
    """Text, and the sources of images."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.images: list[str] = []
        self.articles: list[dict[str, str | None]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        if tag == "img":
            self.images.append(found["src"] or "")
        if tag == "article":
            self.articles.append(found)

    def handle_data(self, data: str) -> None:
        self.text += data


def test_results_and_galleries(
    task: MakeTask, settings_file: Callable[..., Path], mmi: Command, tmp_path: Path
) -> None:
    names = ["vqav2", "visdial", "pororo", "ade20k"]
    config = settings_file(*(task(n, limit=2) for n in names))
    said = mmi("evaluate", config, "--device", "cpu", "batch_size=2")
    assert said.code == 0, said.err
    assert "miou of ade20k skipped: no segmentation model" in said.out
    assert "results.json" in said.out
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert results["config"]["batch_size"] == 2
    assert set(results["versions"]) >= {"mm-interleaved", "torch"}
    assert (results["seed"], results["model"]["trained"]) == (0, True)
    assert load_config(tmp_path / "out/config.yaml", EvaluateConfig).batch_size == 2
    for name in names:
        folder = tmp_path / "out" / name
        page = Page((folder / "gallery.html").read_text())
        assert len(page.articles) == 2
        assert page.images
        for url in page.images:  # relative, and there
            assert (folder / url).is_file()
        for record in lines(folder / "predictions.jsonl"):
            assert record["id"] in page.text
            if "prediction" in record:
                assert record["prediction"] in page.text
            assert set(record.get("images", [])) <= set(page.images)


def test_an_adapter_is_evaluated(
    task: MakeTask, settings_file: Callable[..., Path], mmi: Command, tmp_path: Path
) -> None:
    """Its results belong to it: another scale of its updates is another model."""
    config = settings_file(task("vqav2", limit=2))
    base = load_config(config, EvaluateConfig).model
    make(Path(base), tmp_path / "adapter", preset="llm")
    command = ("evaluate", config, "--device", "cpu", "--adapter", tmp_path / "adapter")
    said = mmi(*command)
    assert said.code == 0, said.err
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert results["model"]["name"] == f"{base} + {tmp_path / 'adapter'}"
    assert results["config"]["adapters"] == [str(tmp_path / "adapter")]
    settings = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps({**settings, "lora_alpha": 7}))
    for again in (mmi(*command), mmi("evaluate", config, "--device", "cpu")):
        assert again.code == 1
        assert "weights" in again.err


def test_the_gallery_shows_the_worst_first_and_hides_no_markup(
    task: MakeTask, settings_file: Callable[..., Path], mmi: Command, tmp_path: Path
) -> None:
    config = settings_file(task("vqav2", prompt="<b>{image}</b> {question}"))
    mmi("evaluate", config, "--device", "cpu")
    folder = tmp_path / "out/vqav2"
    questions = {s.id: s for s in make_task(task("vqav2")).samples()}
    scores = {r["id"]: r["scores"]["vqa_accuracy"]["accuracy"] for r in lines(folder / "scores.jsonl")}
    wanted = sorted(scores, key=lambda key: scores[key])
    text = (folder / "gallery.html").read_text()
    page = Page(text)
    assert [a["data-words"].split()[0] for a in page.articles if a["data-words"]] == wanted
    assert "<b>" not in text
    assert "&lt;b&gt;" in text
    assert all(q.meta["question"] in page.text for q in questions.values())


def test_which_samples_a_gallery_shows() -> None:
    scores = {str(i): float(i) for i in range(100)}
    shown = choose(scores, list(scores), 10)
    assert shown[:5] == ["0", "1", "2", "3", "4"]
    assert len(set(shown)) == 10
    assert int(shown[-1]) > 75
    assert choose(scores, ["2", "1"], 10) == ["1", "2"]
    assert len(set(choose({}, list(scores), 10))) == 10


def test_another_run_is_refused_and_overwritten_if_asked(
    task: MakeTask, settings_file: Callable[..., Path], mmi: Command, tmp_path: Path
) -> None:
    config = settings_file(task("coco", limit=1), gallery=0)
    assert mmi("evaluate", config, "--device", "cpu").code == 0
    before = contents(tmp_path / "out")
    (tmp_path / "out/coco/mine.txt").write_text("kept")
    refused = mmi("evaluate", config, "--device", "cpu", "seed=1")
    assert refused.code == 1
    assert "'seed' was 0 and is now 1" in refused.err
    assert contents(tmp_path / "out") == before
    assert mmi("evaluate", config, "--device", "cpu", "seed=1", "--overwrite").code == 0
    assert contents(tmp_path / "out") != before
    assert (tmp_path / "out/coco/mine.txt").read_text() == "kept"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("batchsize=3", "unknown key 'batchsize' (override 'batchsize=3'). Did you mean 'batch_size'?"),
        (
            "tasks.0.phases=val",
            "unknown key 'phases' in tasks[0] (override 'tasks.0.phases=val'). Did you mean 'phase'?",
        ),
        (
            "tasks.0.task=vqa2",
            "unknown task 'vqa2' (tasks[0] in override 'tasks.0.task=vqa2'). Did you",
        ),
        ("only=[okvqa]", "'only' names 'okvqa', which is not among the tasks: vqav2"),
        ("model=nowhere", "error: unknown model 'nowhere', and no folder has this name. Known: small, debug"),
        ("dtype=int8", "dtype must be 'float32'"),
        ("quantization=int3", "quantization must be 'int8', 'fp8', 'int4' or 'nf4'"),
        ("max_unreadable=2", "max_unreadable must be at most 1, not 2"),
        ("tasks=[]", "tasks must have at least 1 item, not 0"),
        ("tasks=[{task: gqa}, {task: gqa}]", "two of 'tasks' are called 'gqa'"),
        ("tasks.0.name=../other", "becomes a folder's"),
    ],
)
def test_settings_that_cannot_be_used(change: str, words: str, task: MakeTask, settings_file: Callable[..., Path],
                                      mmi: Command) -> None:  # fmt: skip
    file = settings_file(task("vqav2"))
    said = mmi("evaluate", file, change, "--device", "cpu")
    assert said.code == 1
    assert words.replace("{file}", str(file)) in said.err


@pytest.mark.parametrize("command", ["evaluate", "train"])
def test_gpus_are_not_chosen_by_name(
    command: str, task: MakeTask, settings_file: Callable[..., Path], mmi: Command
) -> None:
    file = settings_file(task("vqav2")) if command == "evaluate" else ROOT / "configs/debug.yaml"
    said = mmi(command, file, "--device", "cuda")
    assert said.code == 1
    assert "--device can only be cpu, not 'cuda'; choose GPUs with CUDA_VISIBLE_DEVICES" in said.err


def test_a_failed_task_ends_in_an_error(task: MakeTask, settings_file: Callable[..., Path], mmi: Command) -> None:
    config = settings_file(task("llava_conversations"), task("gqa", limit=1))
    said = mmi("evaluate", config, "--device", "cpu")
    assert said.code == 1
    assert "not everything could be evaluated. llava_conversations:" in said.err
    assert "| gqa |" in said.out.replace("│", "|")


@pytest.mark.parametrize("name", ["release_tasks.yaml", "release_finetuned.yaml", "small/evaluate.yaml"])
def test_configurations_of_the_repository(name: str) -> None:
    config = load_config(ROOT / "configs" / name, EvaluateConfig)
    for chosen in config.chosen():
        make_task(chosen)


def test_the_release_is_configured_as_it_was_evaluated() -> None:
    """Tasks, prompts and settings of docs/data_formats.md, "Task files"."""
    config = load_config(ROOT / "configs/release_tasks.yaml", EvaluateConfig)
    tasks = {t.task: make_task(t) for t in config.chosen()}
    assert list(tasks) == ["coco_karpathy", "flickr30k", "nocaps", "image2paragraph", "visdial", "coco", "lncoco",
                           "vqav2", "okvqa", "vizwiz_vqa", "textvqa"]  # fmt: skip
    paragraph = tasks["image2paragraph"].settings.text
    assert (paragraph.max_new_tokens, paragraph.min_new_tokens, paragraph.num_beams) == (90, 89, 5)
    assert (paragraph.repetition_penalty, paragraph.length_penalty) == (1.2, 1.0)
    for name, candidates in (("coco", 8), ("lncoco", 1)):
        drawn = tasks[name].settings.image
        assert (drawn.num_inference_steps, drawn.guidance_scale, drawn.num_candidates) == (250, 3.5, candidates)
        assert tasks[name].config.limit == 30_000
    assert all(t.config.compat for t in tasks.values())
    assert config.batch_size == 2


def test_reported_values_name_tasks_and_phases() -> None:
    for (name, phase), (_, *values) in PAPER.items():
        assert phase in TASKS[name].phases
        assert all(re.fullmatch(r"-|~?\d+(\.\d+)?", value) for value in values)
        assert values != ["-", "-"]
    table = (ROOT / "src/mm_interleaved/evaluation/reported.py").read_text()
    assert "None of them was measured here" in table

"""lmms-eval runs a task of its own kind, on toy data, with our model. Needs the extra `lmms-eval`."""

from __future__ import annotations

import importlib.util
import json
import tomllib
from pathlib import Path

import pytest

from mm_interleaved import MMInterleaved, MMInterleavedProcessor
from toyworld.writers import write_dataset
from toyworld.writers.base import Job

from ..conftest import make_image

PROJECT = Path(__file__).parents[2] / "pyproject.toml"
TASK = """
task: toy
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_visual: !function functions.images
doc_to_text: !function functions.question
doc_to_target: answer
generation_kwargs: {{max_new_tokens: 6, until: ["\\n"]}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
"""
FUNCTIONS = """
import PIL.Image

def images(doc):
    return [PIL.Image.open(doc["image"]).convert("RGB")]

def question(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]
"""


def test_the_entry_point_leads_somewhere() -> None:
    project = tomllib.loads(PROJECT.read_text())["project"]
    module, _, name = project["entry-points"]["lmms_eval.models"]["mm_interleaved"].partition(":")
    assert importlib.util.find_spec(module) is not None
    assert name == "MANIFEST"
    assert project["optional-dependencies"]["lmms-eval"]


@pytest.fixture
def checkpoint(model: MMInterleaved, processor: MMInterleavedProcessor, tmp_path: Path) -> Path:
    pytest.importorskip("lmms_eval", reason="lmms-eval is not installed: pip install 'mm-interleaved[lmms-eval]'")
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.slow
def test_a_local_task(checkpoint: Path, tmp_path: Path) -> None:
    from lmms_eval import evaluator
    from lmms_eval.models import MODEL_REGISTRY_V2
    from lmms_eval.tasks import TaskManager

    from mm_interleaved.integrations.lmms_eval import MANIFEST

    MODEL_REGISTRY_V2.register_manifest(MANIFEST, overwrite=True)  # what the entry point does once installed
    write_dataset("gqa", tmp_path / "gqa", Job(3, "val", 0, 48))
    asked = json.loads((tmp_path / "gqa/val_balanced_questions.json").read_text())
    rows = [{"image": str(tmp_path / f"gqa/images/{q['imageId']}.jpg"), "question": q["question"],
             "answer": q["answer"]} for q in asked.values()]  # fmt: skip
    (tmp_path / "task").mkdir()
    (tmp_path / "task/data.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "task/functions.py").write_text(FUNCTIONS)
    (tmp_path / "task/toy.yaml").write_text(TASK.format(data=tmp_path / "task/data.json"))
    found = evaluator.simple_evaluate(
        model="mm_interleaved",
        model_args=f"pretrained={checkpoint},style=vqa,device=cpu",
        tasks=["toy"],
        batch_size=2,
        task_manager=TaskManager(include_path=str(tmp_path / "task"), include_defaults=False),
        log_samples=True,
    )
    assert "exact_match,none" in found["results"]["toy"]
    samples = found["samples"]["toy"]
    assert len(samples) == len(rows)
    assert len({str(sample["filtered_resps"]) for sample in samples}) > 1


@pytest.mark.slow
def test_likelihoods(checkpoint: Path) -> None:
    """lmms-eval 0.7.3 makes text of them on their way back, so its tasks of several choices fail with every model."""
    from lmms_eval.api.instance import Instance

    from mm_interleaved.integrations.lmms_eval import MMInterleavedLmms

    lm = MMInterleavedLmms(str(checkpoint), device="cpu", batch_size="2")
    lm.task_dict = {"toy": {"test": [{"image": make_image(1), "answer": "cat"}]}}
    look = lambda doc: [doc["image"]]  # noqa: E731
    targets = [" cat", " cat cat cat", lambda doc: " " + doc["answer"]]
    about = {"task": "toy", "doc_id": 0, "repeats": 1}
    requests = [Instance("loglikelihood", ("What?", t, look, 0, "toy", "test"), 0, about) for t in targets]
    (short, _), (long, _), (same, _) = lm.loglikelihood(requests)
    assert short > long
    assert short == pytest.approx(same, abs=1e-4)
    with pytest.raises(ValueError, match="has no argument 'stile'"):
        MMInterleavedLmms(str(checkpoint), stile="vqa")
    with pytest.raises(NotImplementedError, match="several rounds"):
        lm.generate_until_multi_round(requests)

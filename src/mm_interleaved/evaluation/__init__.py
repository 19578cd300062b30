"""Run tasks over a model, on one process or many, stopped and continued, and score what it makes of them.

    config = load_config("configs/small/evaluate.yaml", EvaluateConfig)
    results = evaluate(config, model, processor, Path(config.output))
    results.tasks["vqav2"].metrics["vqa_accuracy"]["values"]

| module | what it does |
|---|---|
| `config` | settings |
| `predict` | batches of samples through the model, each sample with its own seed |
| `predictions` | the folder that grows while a run goes on, and refuses another run |
| `processes` | what several processes agree on |
| `scoring` | which metric is which class |
| `reported`, `report` | the paper's values, and the table |
| `run` | all of it in order |
"""

from __future__ import annotations

from .config import EvaluateConfig, EvaluationError, MetricConfig, TaskSuite
from .run import Results, evaluate

__all__ = ["EvaluateConfig", "EvaluationError", "MetricConfig", "Results", "TaskSuite", "evaluate"]

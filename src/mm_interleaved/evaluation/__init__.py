"""Evaluates a model on tasks, on one or more processes. An interrupted evaluation can be resumed.

    config = load_config("configs/small/evaluate.yaml", EvaluateConfig)
    results = evaluate(config, model, processor, Path(config.output))
    results.tasks["vqav2"].metrics["vqa_accuracy"]["values"]

| module | what it does |
|---|---|
| `config` | settings |
| `predict` | predictions for batches of samples, each sample with its own seed |
| `predictions` | the folder of predictions |
| `processes` | start of processes and exchange of results and errors |
| `scoring` | metrics of predictions |
| `reported`, `report` | the paper's values, and the table of results |
| `run` | the whole evaluation |
"""

from __future__ import annotations

from .config import EvaluateConfig, EvaluationError, MetricConfig, TaskSuite
from .run import Results, evaluate

__all__ = ["EvaluateConfig", "EvaluationError", "MetricConfig", "Results", "TaskSuite", "evaluate"]

"""Settings of an evaluation, read from YAML by `load_config`."""

from __future__ import annotations

from dataclasses import field, replace
from typing import Annotated, Literal

from pydantic import Field

from ..checkpoints.quantization import Quantization
from ..io import UserError
from ..tasks import TaskConfig
from ..validation import Count, Positive, Seed, Share, settings

HERE = "."  # the root of a task without one


class EvaluationError(UserError, ValueError):
    """An evaluation cannot run: what is wrong, where, and what to do."""


@settings
class MetricConfig:
    """Files that metrics need and that are not part of the package.

    Attributes:
        inception: file of the Inception weights, for FID.
        clip: folder of a CLIP model, for similarities and for choosing among several images.
        segmenter: folder of a segmentation model trained on ADE20K, for mIoU.
        cache: folder for cached statistics of reference images; None: they are computed each time.
        resamples: number of bootstrap samples for a confidence interval.
    """

    inception: str | None = None
    clip: str | None = None
    segmenter: str | None = None
    cache: str | None = None
    resamples: Positive = 1000


@settings
class TaskSuite:
    """Tasks and how they are run; the part of an evaluation that training uses as well.

    Attributes:
        tasks: the tasks.
        only: names of the tasks to run; empty: all.
        root: folder of the documented tree, for tasks without their own `root`.
        seed: seed of the evaluation; the seed of each sample is derived from it and the sample's id.
        batch_size: number of samples in a batch.
        option_batch_size: number of candidate answers that are scored together.
        max_unreadable: largest fraction of samples that may be unreadable; above it a task fails.
        compat: restore the original's quirks (docs/data_formats.md, "Quirks of the original's tasks") in every task.
        workers: number of threads that load samples.
        metrics: files that metrics need.
    """

    tasks: Annotated[list[TaskConfig], Field(min_length=1)]
    only: list[str] = field(default_factory=list)
    root: str = HERE
    seed: Seed = 0
    batch_size: Positive = 8
    option_batch_size: Positive = 32
    max_unreadable: Share = 0.01
    compat: bool = False
    workers: Positive = 4
    metrics: MetricConfig = field(default_factory=MetricConfig)

    def __post_init__(self) -> None:
        names = [task_name(task) for task in self.tasks]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two of 'tasks' are called '{name}'; give one of them another 'name'")
            if "/" in name or name.startswith("."):
                raise ValueError(f"the task's name '{name}' becomes a folder's; use no '/' and no '.' in front")
        for name in self.only:
            if name not in names:
                raise ValueError(f"'only' names '{name}', which is not among the tasks: {', '.join(names)}")

    def chosen(self) -> list[TaskConfig]:
        """The tasks to run, with the settings that they share."""
        return [
            replace(task, root=self.root if task.root == HERE else task.root, compat=task.compat or self.compat)
            for task in self.tasks
            if not self.only or task_name(task) in self.only
        ]


@settings(kw_only=True)
class EvaluateConfig(TaskSuite):
    """`mmi evaluate`: tasks for a model.

    Attributes:
        output: folder of the results.
        model: `small`, `debug`, or the folder of a checkpoint.
        adapters: folders of adapters for the model, whose updates are added.
        allow_other_base: accept adapters that were trained on another model with the same layers.
        dtype: type of the weights; None: their type in the checkpoint.
        quantization: int8, fp8, int4 or nf4 for the language model's large matrices; None: none.
        offload: copy each large part of the model to the GPU only while it is needed.
        gallery: number of samples in a task's gallery, half with the lowest scores, half spread over the rest; 0: none.
    """

    output: str
    model: str = "small"
    adapters: list[str] = field(default_factory=list)
    allow_other_base: bool = False
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    quantization: Quantization | None = None
    offload: bool = False
    gallery: Count = 200


def task_name(task: TaskConfig) -> str:
    """The name of a task in results."""
    return task.name or task.task

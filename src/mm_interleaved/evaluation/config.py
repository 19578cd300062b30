"""Settings of an evaluation, read from YAML by `load_config`."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from ..checkpoints.quantization import QUANTIZATIONS
from ..tasks import TASKS, TaskConfig
from ..validation import check_seed

DTYPES = ("float32", "bfloat16", "float16")
HERE = "."  # the root of a task that names none


class EvaluationError(ValueError):
    """An evaluation that cannot be carried out: what is wrong, where, and what to do about it."""


@dataclass
class MetricConfig:
    """What metrics need that does not come with the package.

    Attributes:
        inception: file of the Inception weights, for FID.
        clip: folder of a CLIP model, for similarities and for choosing among several images.
        segmenter: folder of a segmentation model trained on ADE20K, for mIoU.
        cache: folder in which statistics of reference images are kept; None: they are computed anew.
        resamples: bootstrap samples behind a confidence interval.
    """

    inception: str | None = None
    clip: str | None = None
    segmenter: str | None = None
    cache: str | None = None
    resamples: int = 1000

    def __post_init__(self) -> None:
        if self.resamples < 1:
            raise ValueError(f"'metrics.resamples' must be at least 1, not {self.resamples}")


@dataclass
class TaskSuite:
    """Tasks and how they are run; the part of an evaluation that training uses as well.

    Attributes:
        tasks: what is asked.
        only: names of the tasks to run; empty: all.
        root: folder of the documented tree, for tasks that do not name their own.
        seed: of all chance; each sample has its own seed, made of this one and its id.
        batch_size: samples that are read, written and drawn together.
        option_batch_size: candidate answers that are scored together.
        max_unreadable: largest share of samples that may be unreadable; above it a task fails.
        compat: restore the original's quirks (docs/data_formats.md, "Quirks of the original's tasks") in every task.
        workers: threads that load samples ahead.
        metrics: what metrics need.
    """

    tasks: list[TaskConfig]
    only: list[str] = field(default_factory=list)
    root: str = HERE
    seed: int = 0
    batch_size: int = 8
    option_batch_size: int = 32
    max_unreadable: float = 0.01
    compat: bool = False
    workers: int = 4
    metrics: MetricConfig = field(default_factory=MetricConfig)

    def __post_init__(self) -> None:
        for name in ("batch_size", "option_batch_size", "workers"):
            if getattr(self, name) < 1:
                raise ValueError(f"'{name}' must be at least 1, not {getattr(self, name)}")
        if not 0 <= self.max_unreadable <= 1:
            raise ValueError(f"'max_unreadable' is a share and must lie in [0, 1], not {self.max_unreadable}")
        self.seed = check_seed(self.seed)
        names = [task_name(task) for task in self.tasks]
        if not names:
            raise ValueError(f"'tasks' is empty; tasks are {', '.join(TASKS)}")
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


@dataclass(kw_only=True)
class EvaluateConfig(TaskSuite):
    """`mmi evaluate`: tasks for a model.

    Attributes:
        output: folder of the results.
        model: `small`, `debug`, or the folder of a checkpoint.
        dtype: type of the weights; None: as they are.
        quantization: int8 or fp8 for the language model's large matrices; None: none.
        gallery: samples that a task's gallery shows, half of them the worst, the others spread over the rest; 0: none.
    """

    output: str
    model: str = "small"
    dtype: str | None = None
    quantization: str | None = None
    gallery: int = 200

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dtype is not None and self.dtype not in DTYPES:
            raise ValueError(f"'dtype' must be one of {', '.join(DTYPES)}, not '{self.dtype}'")
        if self.quantization is not None and self.quantization not in QUANTIZATIONS:
            raise ValueError(f"'quantization' must be one of {', '.join(QUANTIZATIONS)}, not '{self.quantization}'")
        if self.gallery < 0:
            raise ValueError(f"'gallery' must not be negative, but is {self.gallery}")


def task_name(task: TaskConfig) -> str:
    """How results call a task."""
    return task.name or task.task

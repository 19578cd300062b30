"""What the paper reports (arXiv 2401.10208), to stand beside our figures.

None of these values was measured here. Those that later papers repeat in their tables are `checked`; the others were
noted from memory and may be wrong in a digit, so nothing may depend on them. Sets and protocols may differ as well: the
release's FID is of 64-pixel images, and its VQAv2 figure may be of another split.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Reported:
    """A value of the paper.

    Attributes:
        value: in the unit of our metrics.
        checked: found in a second source.
    """

    value: float
    checked: bool = False

    def __str__(self) -> str:
        return f"{self.value:g}" if self.checked else f"~{self.value:g}"


@dataclass(frozen=True)
class Row:
    """What is reported for a metric of a task.

    Attributes:
        metric: our name of the value.
        pretrained: zero-shot, of the released kind of model.
        finetuned: after supervised fine-tuning; never released.
    """

    metric: str
    pretrained: Reported | None = None
    finetuned: Reported | None = None


def _row(metric: str, pretrained: float | None, finetuned: float | None, checked: str = "") -> Row:
    """`checked`: "p" and "f" name the values that a second source has."""
    values = [None if v is None else Reported(v, letter in checked)
              for v, letter in ((pretrained, "p"), (finetuned, "f"))]  # fmt: skip
    return Row(metric, *values)


PAPER: dict[tuple[str, str], Row] = {  # task and phase
    ("coco_karpathy", "test"): _row("cider", 129.0, 140.5),
    ("flickr30k", "test"): _row("cider", 85.8, 93.0),
    ("nocaps", "val"): _row("cider", 106.4, 123.2),
    ("image2paragraph", "test"): _row("cider", 23.5, 30.3),
    ("vqav2", "val"): _row("accuracy_compat", 57.0, 80.2, "f"),
    ("okvqa", "val"): _row("accuracy_compat", 40.0, 51.7),
    ("gqa", "testdev"): _row("accuracy_compat", None, 60.5, "f"),
    ("vizwiz_vqa", "val"): _row("accuracy_compat", 40.8, 54.9, "f"),
    ("textvqa", "val"): _row("accuracy_compat", 37.2, 61.0, "pf"),
    ("visdial", "val"): _row("ndcg", 48.7, 53.7),
    ("coco", "val"): _row("fid_64", 7.90, None),
    ("lncoco", "val"): _row("fid_64", 23.88, None),
    ("refcoco", "val"): _row("accuracy", None, 89.92),
    ("refcoco", "testA"): _row("accuracy", None, 92.59),
    ("refcoco", "testB"): _row("accuracy", None, 86.54),
    ("refcoco+", "val"): _row("accuracy", None, 82.99),
    ("refcoco+", "testA"): _row("accuracy", None, 88.57),
    ("refcoco+", "testB"): _row("accuracy", None, 77.07),
    ("refcocog", "val"): _row("accuracy", None, 85.21),
    ("refcocog", "test"): _row("accuracy", None, 84.92),
    ("ade20k", "validation"): _row("miou", None, 44),
    ("pororo", "test"): _row("fid_64", None, 14.7),
    ("flintstones", "test"): _row("fid_64", None, 18.7),
}

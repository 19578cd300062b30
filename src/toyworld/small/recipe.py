"""The recipe of the small model: its shape and its stages, as `configs/small/recipe.yaml` has them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from .config import Arm, Shape
from .optimizer import OptimizerSettings
from .rows import Sizes
from .step import Weights


@dataclass(frozen=True)
class Phase:
    """A part of a stage's curriculum.

    Attributes:
        until: share of the stage's steps at which it ends.
        objects: the fewest and the most objects of a scene.
        mix: weights of the forms of documents, see `DocumentMix.of`.
    """

    until: float = 1.0
    objects: list[int] = field(default_factory=lambda: [1, 5])
    mix: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Stage:
    """One stage: what is learned, from what, and for how long.

    Attributes:
        name: of its folder.
        kind: "images" for the autoencoder, "documents" for everything else.
        steps: updates in all.
        optimizer: rates.
        warmup: steps until the full rate, again where an optimizer begins anew.
        cooldown: share of the steps in which the rate falls to 0, the last ones.
        images: of a batch of kind "images".
        sizes: of a batch of kind "documents".
        weights: of the losses.
        zero_snr: of the stage, in place of the shape's.
        asked: share of the steps after which the readers are not asked any more; their weight falls to 0 until then.
        phases: the curriculum; kind "documents" needs one at least.
    """

    name: str
    kind: str
    steps: int
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    warmup: int = 100
    cooldown: float = 0.3
    images: int = 256
    sizes: Sizes = field(default_factory=Sizes)
    weights: Weights = field(default_factory=Weights)
    zero_snr: bool | None = None
    asked: float = 1.0
    phases: list[Phase] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.kind not in ("images", "documents"):
            raise ValueError(f"stage '{self.name}': kind must be 'images' or 'documents', not '{self.kind}'")
        if self.kind == "documents" and (not self.phases or self.phases[-1].until < 1):
            raise ValueError(f"stage '{self.name}': the last of its phases must have until: 1")

    def rate(self, step: int, begun: int) -> float:
        """The learning rate of step number `step` from 0, with an optimizer that was new at step `begun`."""
        rising = min(1.0, (step - begun + 1) / max(self.warmup, 1))
        falling = min(1.0, (self.steps - step) / max(self.cooldown * self.steps, 1))
        return self.optimizer.rate * rising * falling

    def asking(self, step: int) -> float:
        """How much the readers' losses count at a step."""
        return max(0.0, 1 - step / max(self.asked * self.steps, 1)) if self.asked < 1 else 1.0

    def phase(self, step: int) -> Phase:
        """The phase of a step."""
        return next(phase for phase in self.phases if step < phase.until * self.steps)


@dataclass(frozen=True)
class Recipe:
    """All of it.

    Attributes:
        shape: of the model.
        seed: of weights, documents and noise; every part of a stage has one that follows from it.
        stages: in order.
        arm: the parts with MMFS: both, llm, unet or none.
        autoencoder: folder of a trained autoencoder; stages of kind "images" are left out.
    """

    shape: Shape = field(default_factory=Shape)
    seed: int = 0
    stages: list[Stage] = field(default_factory=list)
    arm: Arm = "both"
    autoencoder: Path | None = None

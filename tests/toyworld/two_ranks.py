"""One of several processes that train together: steps of a small network, or a run of a tiny recipe."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from toyworld.sampling import random_scene, scene_rng
from toyworld.small import run as small_run
from toyworld.small.compose import Composer
from toyworld.small.config import Shape
from toyworld.small.layers import Atlas, LayeredImages
from toyworld.small.optimizer import CapturableOptimizer, OptimizerSettings
from toyworld.small.ranks import Ranks
from toyworld.small.recipe import Phase, Recipe, Stage
from toyworld.small.rows import Sizes
from toyworld.small.step import Measures, TrainStep

SIZES = Sizes(rows=4, length=256, images=20, targets=8, samples=1, conditioning=6, context=240, labels=800)
TINY = Shape(
    vae=[16, 16, 16, 16], unet=[32, 32], crossing=[True, False], text=32, text_layers=4, text_inner=32, vision_layers=4,
    extractors=0, conditions=6, image_tokens=9,
)  # fmt: skip
MIX = {"rest": 0.0, "caption": 1.0, "draw": 2.0, "story": 1.0}
RECIPE = Recipe(TINY, 1, [
    Stage("autoencoder", "images", 2, images=4),
    Stage("documents", "documents", 3, sizes=SIZES, phases=[Phase(mix=MIX)]),
])  # fmt: skip


@dataclass
class Numbers:
    """Inputs of a network."""

    values: Tensor
    pictures: LayeredImages


class Squares(nn.Module):
    """A network that makes its outputs small."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(24, 40), nn.LayerNorm(40), nn.Linear(40, 8))

    def forward(self, batch: Numbers, pixels: Tensor) -> Measures:
        """The mean square of the outputs."""
        return {"loss": self.net(batch.values).square().mean()}


def stepped(ranks: Ranks) -> dict[str, Tensor]:
    """Weights after some steps on a process' part of each batch."""
    atlas, task = Atlas(64), Squares()
    pictures = LayeredImages.join([atlas.image(random_scene(scene_rng(1, "train", 0)))])
    generator = torch.Generator().manual_seed(3)
    whole = torch.randn(4, 16, 24, generator=generator)
    batches = [Numbers(part.chunk(ranks.world)[ranks.rank], pictures) for part in whole]
    optimizer = CapturableOptimizer(task, OptimizerSettings(clip=0.1))
    step = TrainStep(task, optimizer, Composer(atlas, ranks.device), batches[0], ranks)
    for batch in batches:
        step(batch, 1e-2)
    return task.state_dict()


def learned(ranks: Ranks, folder: Path) -> dict[str, Tensor]:
    """Originals of the weights of both stages at their ends."""
    found: dict[str, Tensor] = {}
    end = small_run.Run._end

    def kept(self: small_run.Run, part: dict[str, object], optimizer: CapturableOptimizer, *rest: object) -> None:
        found[str(part["stage"])] = optimizer.master.clone()
        end(self, part, optimizer, *rest)  # pyright: ignore[reportArgumentType]

    small_run.Run._end = kept  # pyright: ignore[reportAttributeAccessIssue]
    small_run.HELD_OUT = 1
    assert small_run.Run(RECIPE, folder, 1e6, ranks, workers=0).go()
    return found


def main() -> None:
    """`step` or `run`, and the folder."""
    what, folder = sys.argv[1], Path(sys.argv[2])
    with Ranks.joined("cpu") as ranks:
        found = stepped(ranks) if what == "step" else learned(ranks, folder)
    save_file(found, folder / f"{ranks.rank}.safetensors")


if __name__ == "__main__":
    main()

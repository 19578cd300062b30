"""The settings of an adapter."""

from __future__ import annotations

import re
from dataclasses import field
from typing import Literal

from ..validation import Decay, Positive, PositiveFloat, settings

Preset = Literal["llm", "image", "both", "mmfs", "all"]
RANK = 16


@settings
class AdapterSettings:
    """A LoRA adapter that a run trains in place of the model's own weights (Hu et al., arXiv 2106.09685).

    Attributes:
        preset: the layers with low-rank updates. "llm": attention and MLP of the language model. "image": attention and
            feed-forward layers of the UNet, and the image decoder's resampler. "both": these two. "mmfs": the
            synchronizers of both. "all": every linear layer and convolution that a loss trains.
        targets: further layers, as regular expressions that are searched for in the names of the model's modules.
        rank: rank of an update; None: 16, or that of `init_from`.
        alpha: an update is scaled by alpha / rank; None: twice the rank, or that of `init_from`.
        dropout: dropout of the inputs of updates.
        dora: learn the length of each row of a weight separately (DoRA, arXiv 2402.09353); None: no, or as `init_from`.
        rslora: scale by alpha / sqrt(rank) (rsLoRA, arXiv 2312.03732); None: no, or as `init_from`.
        init_from: folder of an adapter that is trained further; its layers and settings stay.
        allow_other_base: accept `init_from` although it was trained on another model.
    """

    preset: Preset | None = None
    targets: list[str] = field(default_factory=list)
    rank: Positive | None = None
    alpha: PositiveFloat | None = None
    dropout: Decay = 0.0
    dora: bool | None = None
    rslora: bool | None = None
    init_from: str | None = None
    allow_other_base: bool = False

    def __post_init__(self) -> None:
        if self.preset is None and not self.targets and self.init_from is None:
            raise ValueError("an adapter needs layers: give 'preset' (llm, image, both, mmfs, all), 'targets', or the "
                             "adapter to train further as 'init_from'")  # fmt: skip
        if self.allow_other_base and self.init_from is None:
            raise ValueError("'allow_other_base' is about the adapter in 'init_from', and there is none")
        for target in self.targets:
            try:
                re.compile(target)
            except re.error as error:
                raise ValueError(f"targets: '{target}' is not a regular expression: {error}") from None

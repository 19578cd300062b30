"""The recorder takes the inputs of the MMFS operator while a document is generated.

Each MMFS module has an attribute `recorder`, which `MMFS.mix` consults once before it calls the operator; it is None
except while a `Recorder` is attached.

Axes: G groups, Q queries of a group, N heads, R slots for images, V levels, P points.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from ..io import InputError
from ..model import MMInterleavedModel
from ..model.language_model import synchronizers
from ..model.mmfs import MMFS
from ..ops import MMFSInputs, sampling_points
from .records import Points
from .settings import InspectionSettings, chosen, chosen_cells, decoder_layers

MIB = 2**20


@dataclass
class ImagePass:
    """The images that are being generated together.

    Attributes:
        count: number of images.
        steps: denoising steps to collect.
        candidate, step: the candidate and the step that come next.
        taken: by place and step the points of all images, with the first axes [images, Q].
    """

    count: int
    steps: Sequence[int]
    candidate: int = 0
    step: int = 1
    taken: dict[int, dict[int, Points]] = field(default_factory=dict)


class Recorder:
    """Collects sampling points while it is attached to a model.

    Args:
        model: the model.
        settings: what to collect.

    Attributes:
        layers, heads, places: what is collected, by number.
        used: bytes of finished records.
        pending: bytes that are collected for texts and images in progress.

    Raises:
        InputError: the model has no such layer, head or place.
    """

    def __init__(self, model: MMInterleavedModel, settings: InspectionSettings) -> None:
        config, unet = model.config, model.image_decoder.unet
        self.model, self.settings = model, settings
        self.layers = chosen(settings.layers, decoder_layers(config), "layers")
        self.places = chosen(settings.places, range(len(unet.synchronizers)), "places")
        heads = min(config.mmfs.num_heads, config.image_decoder.mmfs.num_heads)
        self.heads = chosen(settings.heads, range(heads), "heads")
        self.used = self.pending = 0
        sides = {place: unet.synchronizers[place].side for place in self.places}
        self._cells = {place: self._numbers(side) for place, side in sides.items()}
        self._groups: list[int] = []
        self._layers: dict[int, Points] = {}
        self._images: ImagePass | None = None

    def _numbers(self, side: int) -> Tensor | None:
        """The numbers of the cells of a map that are collected; None: all."""
        rows = torch.tensor(chosen_cells(side, self.settings.cells))
        return None if len(rows) == side else (rows[:, None] * side + rows).flatten()

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Collect from the model's MMFS modules within the block.

        Raises:
            InputError: another recorder is attached, or the modules run the published form.
        """
        texts = [s.mmfs for s in synchronizers(self.model.language_model)]
        maps = [s.mmfs for s in self.model.image_decoder.unet.synchronizers]
        for mmfs in (*texts, *maps):
            if mmfs.recorder is not None:
                raise InputError("the model is inspected already", fix="Wait until the other inspection has ended")
            if mmfs.implementation != "fast":
                raise InputError("the model runs the reference implementation of MMFS, which is not inspected",
                                 "mmfs_implementation", "Set it to 'fast'")  # fmt: skip
        numbers = decoder_layers(self.model.config)
        attached: list[MMFS] = []
        try:
            for number, mmfs in zip(numbers, texts, strict=True):
                if number in self.layers:
                    mmfs.recorder = partial(self._take_tokens, number)
                    attached.append(mmfs)
            for place, mmfs in enumerate(maps):
                if place in self.places:
                    mmfs.recorder = partial(self._take_map, place)
                    attached.append(mmfs)
            yield
        finally:
            for mmfs in attached:
                mmfs.recorder = None

    # ---- texts

    @contextmanager
    def tokens(self, groups: Sequence[int]) -> Iterator[list[Points]]:
        """Collect from a pass of the language model.

        Args:
            groups: the tokens to collect, as numbers of groups of the pass.

        Yields:
            A list that holds, after the block, the points of each token with the first axis [layers]; it stays empty if
            no token of the pass sees an image.
        """
        found: list[Points] = []
        self._groups, self._layers = list(groups), {}
        try:
            yield found
        finally:
            layers, self._groups, self._layers = self._layers, [], {}
        if layers:
            together = Points.stack([layers[number][:, 0] for number in self.layers])
            found += [together[:, index] for index in range(len(groups))]

    def _take_tokens(self, layer: int, inputs: MMFSInputs) -> None:
        if self._groups:
            self._layers[layer] = self._points(inputs, self._groups)

    # ---- images

    @contextmanager
    def images(self, count: int, slots: int, steps: Sequence[int]) -> Iterator[ImagePass]:
        """Collect from the denoising steps of `count` images with up to `slots` earlier images.

        Raises:
            InputError: the arrays would take too much memory.
        """
        mmfs, maps = self.model.config.image_decoder.mmfs, self.model.image_decoder.unet.synchronizers
        cells = sum(len(chosen_cells(maps[place].side, self.settings.cells)) ** 2 for place in self.places)
        numbers = len(self.heads) * (slots * mmfs.num_points * (2 + len(mmfs.levels)) + 1)
        self._check(4 * count * len(steps) * cells * numbers)
        self._images = ImagePass(count, steps)
        try:
            yield self._images
        finally:
            self._images = None

    def _take_map(self, place: int, inputs: MMFSInputs) -> None:
        images = self._images
        if images is None or images.candidate or images.step not in images.steps:
            return
        total = len(inputs.images)  # with guidance the second half has the context
        groups = list(range(total - images.count, total))
        if (cells := self._cells[place]) is not None:
            cells = cells.to(inputs.offsets.device)
            inputs = replace(inputs, offsets=inputs.offsets[:, cells], logits=inputs.logits[:, cells],
                             reference=inputs.reference[:, cells])  # fmt: skip
        images.taken.setdefault(place, {})[images.step] = self._points(inputs, groups)

    # ---- both

    @torch.no_grad()
    def _points(self, inputs: MMFSInputs, groups: Sequence[int]) -> Points:
        """The points of some groups, with the first axes [groups, Q]."""
        index = torch.tensor(groups, device=inputs.images.device)
        reference = inputs.reference if len(inputs.reference) == 1 else inputs.reference[index]
        found = sampling_points(replace(inputs, offsets=inputs.offsets[index], logits=inputs.logits[index],
                                        reference=reference, images=inputs.images[index], routes=None))  # fmt: skip
        assert found.locations.shape[4] == 1  # levels are named by the sides of their maps, so they share locations
        parts = (found.locations[:, :, :, :, 0], found.weights, found.ignored)
        points = Points(*(part[:, :, self.heads].float().cpu().numpy() for part in parts))
        self._check(points.nbytes)
        self.pending += points.nbytes
        return points

    def _check(self, more: int) -> None:
        """Refuse to collect `more` bytes beyond the limit."""
        total = self.used + self.pending + more
        if total > self.settings.most_mib * MIB:
            raise InputError(
                f"the collected points take {total / MIB:.0f} MiB, and most_mib is {self.settings.most_mib}",
                fix="Choose fewer layers, heads, places, steps or cells, or allow more",
            )

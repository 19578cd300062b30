"""Muon and Adam over weights in bfloat16, whose float32 originals lie in a few large tensors.

Every number of the update (rates, steps, norms) is a tensor on the device, so that an update can be part of a captured
step. Matrices are padded with zeros to few sizes; Newton-Schulz iterations of a padded matrix are those of the matrix
(zero rows and columns stay zero), so all of one size are one batch: some ten launches instead of some thousand.

Muon: Jordan et al. 2024; the size of updates: Liu et al. 2025 (arXiv 2502.16982), eq. 4. Adam: arXiv 1412.6980, with
decoupled weight decay (arXiv 1711.05101).
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby

import torch
from torch import Tensor, nn

from mm_interleaved.training.muon import orthogonal

_MULTIPLE = 64  # of the sides of a padded matrix


@dataclass(frozen=True)
class Rule:
    """Rates of the parameters whose name a pattern fits; the first that fits counts.

    Attributes:
        pattern: regular expression, searched in the name.
        rate: factor of the learning rate.
        plain: whether Adam updates them, whatever they are.
        decay: factor of the weight decay.
    """

    pattern: str
    rate: float = 1.0
    plain: bool = False
    decay: float = 1.0


@dataclass(frozen=True)
class OptimizerSettings:
    """Settings of a stage.

    Attributes:
        rate: of Adam.
        muon: root mean square of a Muon update's numbers, in `rate`s.
        momentum: of Muon.
        betas, eps: of Adam.
        decay: weight decay of matrices.
        clip: largest norm of all gradients together.
        average: decay of the moving average of the weights.
        rules: exceptions.
    """

    rate: float = 1e-3
    muon: float = 0.4
    momentum: float = 0.95
    betas: list[float] = field(default_factory=lambda: [0.9, 0.99])
    eps: float = 1e-8
    decay: float = 0.02
    clip: float = 1.0
    average: float = 0.998
    rules: list[Rule] = field(default_factory=list)

    def rule(self, name: str) -> Rule:
        """What holds for a parameter."""
        return next((rule for rule in self.rules if re.search(rule.pattern, name)), Rule(""))


@dataclass(frozen=True)
class _Run:
    """Neighbouring parameters of one type: which they are, and where their numbers stand."""

    weights: slice
    numbers: slice
    dtype: torch.dtype


class CapturableOptimizer:
    """Updates weights of any type through float32 originals; keeps their moving average.

    Originals, gradients and momentum are one vector each: first all matrices that Muon updates, then the rest, and of
    both those of one type side by side, so that a few large copies take gradients in and weights out.

    Args:
        module: what is trained: its parameters that require gradients.
        settings: rates.

    Attributes:
        weights: the parameters, in the order of the vectors.
        rate: the learning rate, a tensor that the host fills before a step.
        gradient: float32, of all weights; processes that train together average it between `take` and `update`.
    """

    def __init__(self, module: nn.Module, settings: OptimizerSettings) -> None:
        self.settings = settings
        named = {name: p for name, p in module.named_parameters() if p.requires_grad}
        layers = [(prefix, m) for prefix, m in module.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
        hidden = {f"{prefix}.weight" if prefix else "weight" for prefix, _ in layers}
        rules = {name: settings.rule(name) for name in named}
        matrices = [name for name in named if name in hidden and not rules[name].plain]
        if not matrices:
            raise ValueError("no matrix is left for Muon: the module has none, or all are named by plain rules")
        matrices = sorted(matrices, key=lambda name: str(named[name].dtype))  # stable, so otherwise as they come
        rest = [name for name in named if name not in set(matrices)]
        order = [*matrices, *sorted(rest, key=lambda name: str(named[name].dtype))]
        self.weights = [named[name] for name in order]
        device = self.weights[0].device
        self.runs = _runs(self.weights)
        self.rate, self.steps = torch.zeros((), device=device), torch.zeros((), device=device)
        self.muon = sum(named[name].numel() for name in matrices)
        self.buckets, places, inverse = _padding([(len(named[n]), named[n][0].numel()) for n in matrices])
        self.places, self.inverse = places.to(device), inverse.to(device)
        self.rates = self._each([rules[name].rate for name in order])
        decays = [rules[name].decay * (p.dim() > 1) for name, p in zip(order, self.weights, strict=True)]
        self.decays = self._each(decays) * self.rates * settings.decay
        sizes = [settings.muon * max(len(named[n]), named[n][0].numel()) ** 0.5 for n in matrices]
        sizes += [1.0] * (len(order) - len(matrices))
        self.rates *= self._each(sizes)  # of what is subtracted: an orthogonal matrix, or Adam's ratio
        self.master = torch.cat([p.detach().float().flatten() for p in self.weights])
        self.average, self.momentum = self.master.clone(), torch.zeros_like(self.master)
        self.gradient = torch.zeros_like(self.master)
        self.second = torch.zeros_like(self.master[self.muon :])

    def _each(self, values: Sequence[float]) -> Tensor:
        """A vector like `master` with one value for each parameter."""
        return torch.cat([torch.full((p.numel(),), v) for p, v in zip(self.weights, values, strict=True)]).to(
            self.weights[0].device
        )

    def step(self, gradients: Sequence[Tensor | None]) -> Tensor:
        """Update the weights with gradients in the order of `weights`; the norm of all of them."""
        self.take(gradients)
        return self.update()

    @torch.no_grad()
    def take(self, gradients: Sequence[Tensor | None]) -> None:
        """Put gradients in the order of `weights` into `gradient`."""
        given = [torch.zeros_like(p) if g is None else g for p, g in zip(self.weights, gradients, strict=True)]
        for run in self.runs:
            self.gradient[run.numbers].copy_(torch.cat([g.flatten() for g in given[run.weights]]))

    @torch.no_grad()
    def update(self) -> Tensor:
        """Update the weights with `gradient`; its norm."""
        settings, cut = self.settings, self.muon
        norm = self.gradient.norm()
        self.gradient *= (settings.clip / (norm + 1e-6)).clamp(max=1.0)
        self.steps += 1
        self.momentum[:cut].lerp_(self.gradient[:cut], 1 - settings.momentum)
        self.momentum[cut:].lerp_(self.gradient[cut:], 1 - settings.betas[0])
        ahead = self.gradient[:cut].lerp(self.momentum[:cut], settings.momentum)  # Nesterov's
        update = torch.cat([self._orthogonal(ahead), self._adam(self.gradient[cut:])])
        self.master.mul_(1 - self.rate * self.decays).sub_(self.rate * self.rates * update)
        blend = torch.maximum(torch.full_like(self.steps, 1 - settings.average), 1 / self.steps)
        self.average.lerp_(self.master, blend)  # the first steps are not remembered for long
        self._write(self.master)
        return norm

    def _orthogonal(self, vector: Tensor) -> Tensor:
        """The orthogonal matrices nearest to those of `vector`; see `muon.orthogonal`."""
        padded = torch.cat([vector, vector.new_zeros(1)])[self.places]
        parts = padded.split([count * rows * columns for count, rows, columns in self.buckets])
        found = [orthogonal(part.view(bucket)).flatten() for part, bucket in zip(parts, self.buckets, strict=True)]
        return torch.cat(found)[self.inverse].float()

    def _adam(self, gradient: Tensor) -> Tensor:
        first, second = self.settings.betas
        self.second.lerp_(gradient.square(), 1 - second)
        mean = self.momentum[self.muon :] / (1 - first**self.steps)
        return mean / ((self.second / (1 - second**self.steps)).sqrt() + self.settings.eps)

    @torch.no_grad()
    def load_averages(self) -> None:
        """Give the weights the values of their averages."""
        self._write(self.average)

    def state(self) -> dict[str, Tensor]:
        """What goes on where it is loaded again: originals, moments, averages and the count of steps."""
        return {name: getattr(self, name) for name in ("master", "average", "momentum", "second", "steps")}

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on where `state` was taken; the weights are written as well."""
        for name, own in self.state().items():
            own.copy_(state[name])
        self._write(self.master)

    def _write(self, vector: Tensor) -> None:
        for run in self.runs:
            weights: list[Tensor] = [*self.weights[run.weights]]
            parts = vector[run.numbers].to(run.dtype).split([p.numel() for p in weights])
            torch._foreach_copy_(weights, [part.view_as(p) for part, p in zip(parts, weights, strict=True)])


def _runs(weights: Sequence[Tensor]) -> list[_Run]:
    found: list[_Run] = []
    first = begin = 0
    for dtype, group in groupby(weights, key=lambda p: p.dtype):
        own = list(group)
        last, end = first + len(own), begin + sum(p.numel() for p in own)
        found.append(_Run(slice(first, last), slice(begin, end), dtype))
        first, begin = last, end
    return found


def _padding(shapes: Sequence[tuple[int, int]]) -> tuple[list[tuple[int, int, int]], Tensor, Tensor]:
    """Batches of matrices padded to sides that are multiples of `_MULTIPLE`.

    Returns:
        The batches as (count, rows, columns); where each of their numbers stands in a vector of all matrices, its end
        for padding; and where each number of that vector stands in the batches.
    """
    batches: defaultdict[tuple[int, int], list[int]] = defaultdict(list)
    for number, sides in enumerate(shapes):
        rows, columns = (-(-side // _MULTIPLE) * _MULTIPLE for side in sides)
        batches[rows, columns].append(number)
    ends = torch.tensor([rows * columns for rows, columns in shapes]).cumsum(0)
    total = int(ends[-1])
    found = []
    for (rows, columns), numbers in batches.items():
        for number in numbers:
            own = torch.full((rows, columns), total)
            height, width = shapes[number]
            own[:height, :width] = (ends[number] - height * width + torch.arange(height * width)).view(height, width)
            found.append(own.flatten())
    places = torch.cat(found)
    real = (places < total).nonzero()[:, 0]
    inverse = torch.empty(total, dtype=torch.long)
    inverse[places[real]] = real
    return [(len(numbers), *sides) for sides, numbers in batches.items()], places, inverse

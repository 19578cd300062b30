"""What is collected during an inspection."""

from __future__ import annotations

from collections.abc import Sequence

from ..io import InputError
from ..model import MMInterleavedConfig
from ..validation import Count, Positive, settings


@settings
class InspectionSettings:
    """What is collected; all that is not collected takes neither time nor memory.

    Attributes:
        layers: decoder layers with MMFS, by their number in the language model; None: all; empty: no texts.
        heads: heads of MMFS; None: all.
        places: synchronizers of the UNet: 0, 1, ... for its skip connections, the last one for its middle; None: all;
            empty: no images.
        steps: denoising steps from 1; None: the first, the middle and the last one.
        cells: most cells of a side of a map of the UNet; of larger maps every second, third, ... cell is collected.
            None: all cells.
        most_mib: most memory of the collected arrays, in MiB.
    """

    layers: list[Count] | None = None
    heads: list[Count] | None = None
    places: list[Count] | None = None
    steps: list[Positive] | None = None
    cells: Positive | None = None
    most_mib: Positive = 512


def chosen_cells(side: int, most: int | None) -> list[int]:
    """The rows, and columns, of a map of `side` cells that are collected if `most` of them may be."""
    stride = 1 if most is None else -(-side // most)
    return list(range(stride // 2, side, stride))


def chosen(wanted: Sequence[int] | None, known: Sequence[int], name: str) -> list[int]:
    """`wanted` in the order of `known`; None: all.

    Raises:
        InputError: one of them is not known.
    """
    if wanted is None:
        return list(known)
    if strange := sorted(set(wanted) - set(known)):
        raise InputError(f"there is no {strange[0]}", name, f"There are {spans(known)}")
    return [number for number in known if number in wanted]


def spans(numbers: Sequence[int]) -> str:
    """Numbers as text, such as "0, 4, 8" or "0 to 15"."""
    if len(numbers) > 3 and list(numbers) == list(range(numbers[0], numbers[-1] + 1)):
        return f"{numbers[0]} to {numbers[-1]}"
    return ", ".join(map(str, numbers)) or "none"


def decoder_layers(config: MMInterleavedConfig) -> list[int]:
    """The decoder layers that have MMFS."""
    return list(range(0, config.text_config.num_hidden_layers, config.mmfs_every)) if config.mmfs.enabled else []


def shown_steps(wanted: Sequence[int] | None, total: int) -> list[int]:
    """The denoising steps to collect, of `total`.

    Raises:
        InputError: there are fewer steps.
    """
    usual = sorted({1, (total + 1) // 2, total})
    return usual if wanted is None else chosen(wanted, range(1, total + 1), "steps")

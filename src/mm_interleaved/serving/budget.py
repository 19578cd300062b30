"""What all requests together hold in memory: bytes of bodies, and pixels of decoded images."""

from __future__ import annotations

from dataclasses import dataclass, field

from .config import MIB, LimitConfig
from .engine import Overloaded

RETRY_AFTER = 5


@dataclass
class Held:
    """Amounts of bytes and pixels.

    Attributes:
        bytes, pixels: the amounts.
    """

    bytes: int = 0
    pixels: int = 0


@dataclass
class Budget:
    """What all requests together may hold.

    Attributes:
        limits: the limits.
        held: what is held now.
    """

    limits: LimitConfig
    held: Held = field(default_factory=Held)


@dataclass
class Share:
    """What one request holds. It is given back when the request has been answered.

    Attributes:
        budget: where it is taken from.
        held: what this request holds.
        kept: whether it is given back by somebody else than the connection: by the task of a background response.
    """

    budget: Budget
    held: Held = field(default_factory=Held)
    kept: bool = False

    def take(self, *, bytes: int = 0, pixels: int = 0) -> None:
        """Take some more.

        Raises:
            Overloaded: all requests together would hold too much.
        """
        limits, total = self.budget.limits, self.budget.held
        if total.bytes + bytes > limits.bodies_mib * MIB or total.pixels + pixels > limits.all_pixels:
            what = "bodies" if bytes else "images"
            raise Overloaded(f"the {what} of all requests take too much memory", RETRY_AFTER)
        for held in (total, self.held):
            held.bytes, held.pixels = held.bytes + bytes, held.pixels + pixels

    def give_back(self) -> None:
        """Give all of it back."""
        total = self.budget.held
        total.bytes, total.pixels = total.bytes - self.held.bytes, total.pixels - self.held.pixels
        self.held = Held()

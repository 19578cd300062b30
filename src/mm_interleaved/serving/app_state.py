"""What the routes of a server share."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from fastapi import Request

from .budget import Budget
from .config import ServeConfig
from .engine import Engine
from .images import PixelBudget
from .metrics import Metrics
from .remote import RemoteImages
from .store import ResponseStore


@dataclass
class Services:
    """The parts of a server.

    Attributes:
        budget: what all requests together hold in memory.
        ends_at: monotonic time at which the server must have ended; None: it was not asked to end.
    """

    config: ServeConfig
    engine: Engine
    store: ResponseStore
    remote: RemoteImages
    metrics: Metrics
    budget: Budget
    ends_at: float | None = None
    started: int = field(default_factory=lambda: int(time.time()))

    def pixel_budget(self, request: Request) -> PixelBudget:
        """The images that a request may have.

        Raises:
            Overloaded, Unavailable: the engine takes no requests, so its images are not read.
        """
        self.engine.check_room()
        return PixelBudget(self.config.limits, request.state.share)

    @property
    def rest_of_grace(self) -> float:
        """Seconds that running requests still have to finish when the server ends."""
        grace = self.config.grace_seconds
        return grace if self.ends_at is None else min(max(self.ends_at - time.monotonic(), 0.0), grace)


def services(request: Request) -> Services:
    """The parts of the server that handles a request."""
    return request.app.state.services

"""What the routes of a server share."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from fastapi import Request

from .config import ServeConfig
from .engine import Engine
from .images import PixelBudget
from .metrics import Metrics
from .remote import RemoteImages
from .store import ResponseStore


@dataclass
class Services:
    """The parts of a server."""

    config: ServeConfig
    engine: Engine
    store: ResponseStore
    remote: RemoteImages
    metrics: Metrics
    started: int = field(default_factory=lambda: int(time.time()))

    def pixel_budget(self) -> PixelBudget:
        """What a new request may have."""
        return PixelBudget(self.config.limits)


def services(request: Request) -> Services:
    """The parts of the server that handles a request."""
    return request.app.state.services

"""Stored responses, in memory: the oldest are forgotten when there are too many, or their images take too much."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import PIL.Image

from ..document import Image, Segment, Text
from .config import MIB, StoreConfig
from .errors import ApiError


@dataclass(eq=False)
class StoredResponse:
    """A response.

    Attributes:
        response: as clients get it; changes while it is in progress.
        input_items: the items of its request, as `GET .../input_items` lists them.
        segments: its document: everything given before and in its request, and what was generated.
        task: what generates it in the background; None: nothing does.
        items: what each generated item stands for, by its id.
        owner: number of the key whose clients may have it; None: the server has no keys.
        inspection: where MMFS looked, as the data of its page; None: it was not asked for, or is not finished.
    """

    response: dict[str, Any]
    input_items: list[dict[str, Any]] = field(default_factory=list)
    segments: list[Segment] = field(default_factory=list)
    task: asyncio.Task[None] | None = None
    items: dict[str, Segment] = field(default_factory=dict)
    owner: int | None = None
    inspection: str | None = None

    @property
    def size(self) -> int:
        """About how many bytes it takes."""
        texts = sum(len(s.text or "") for s in self.segments if isinstance(s, Text))
        sources = [s.source for s in self.segments if isinstance(s, Image)]
        pixels = sum(3 * i.width * i.height for i in sources if isinstance(i, PIL.Image.Image))
        texts += len(self.inspection or "")
        return texts + pixels + _characters(self.response["output"]) + _characters(self.input_items)


def _characters(value: Any) -> int:
    """The number of characters of all texts in JSON; nothing is copied."""
    if isinstance(value, dict):
        return sum(map(_characters, value.values()))
    if isinstance(value, list):
        return sum(map(_characters, value))
    return len(value) if isinstance(value, str) else 0


class ResponseStore:
    """The stored responses of a server.

    Args:
        config: how many, and how much memory.
    """

    def __init__(self, config: StoreConfig) -> None:
        self.config = config
        self._kept: OrderedDict[str, StoredResponse] = OrderedDict()
        self._sizes: dict[str, int] = {}
        self._total = 0

    def keep(self, stored: StoredResponse) -> None:
        """Keep a response, and forget old ones if need be; those in progress stay."""
        self._kept[stored.response["id"]] = stored
        self._measure(stored)

    def update(self, stored: StoredResponse) -> None:
        """Measure a response again after it has changed; nothing happens if it was forgotten meanwhile."""
        if stored.response["id"] in self._kept:
            self._kept.move_to_end(stored.response["id"])
            self._measure(stored)

    def _measure(self, stored: StoredResponse) -> None:
        name, size = stored.response["id"], stored.size
        self._total += size - self._sizes.get(name, 0)
        self._sizes[name] = size
        for old in list(self._kept):
            if len(self._kept) <= self.config.responses and self._total <= self.config.mib * MIB:
                return
            if self._kept[old].response["status"] not in ("queued", "in_progress"):
                self._forget(old)

    def _forget(self, name: str) -> None:
        del self._kept[name]
        self._total -= self._sizes.pop(name)

    def get(self, name: str, owner: int | None = None, param: str | None = None) -> StoredResponse:
        """A response by its id.

        Raises:
            ApiError: there is none, or it belongs to another key.
        """
        if name in self._kept and self._kept[name].owner == owner:
            return self._kept[name]
        code = "previous_response_not_found" if param == "previous_response_id" else "not_found"
        raise ApiError(f"Response with id '{name}' not found.", status=400 if param else 404, param=param, code=code)

    def delete(self, name: str, owner: int | None = None) -> StoredResponse:
        """Forget a response.

        Raises:
            ApiError: there is none, or it belongs to another key.
        """
        found = self.get(name, owner)
        self._forget(name)
        return found

    def item(self, name: str, owner: int | None, param: str) -> Segment:
        """What an item of a stored response stands for.

        Raises:
            ApiError: there is none, or it belongs to another key.
        """
        for stored in reversed(self._kept.values()):
            if name in stored.items and stored.owner == owner:
                return stored.items[name]
        raise ApiError(f"Item with id '{name}' not found.", status=404, param=param, code="item_not_found")

    def in_progress(self) -> Sequence[StoredResponse]:
        """The responses that are generated in the background."""
        return [s for s in self._kept.values() if s.task is not None and not s.task.done()]

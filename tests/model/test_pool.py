"""Recordings that are kept for the next time."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mm_interleaved.model.static import Pool


class Memory:
    """Room for one thing, which is free again when nobody holds on to it."""

    def __init__(self) -> None:
        self.things: list[str] = []

    def make(self, name: str) -> str:
        if self.things:
            raise torch.OutOfMemoryError("no room")
        self.things.append(name)
        return name


def test_what_is_kept_makes_room_for_what_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    owner, pool, memory = nn.Linear(1, 1), Pool(3), Memory()
    monkeypatch.setattr(torch.cuda, "empty_cache", memory.things.clear)
    with pool.borrow(owner, "a", (), lambda: memory.make("a")) as first:
        assert first == "a"
    with pool.borrow(owner, "a", (), lambda: memory.make("a")):  # the same one, nothing is made
        assert memory.things == ["a"]
    with pool.borrow(owner, "b", (), lambda: memory.make("b")) as second:
        assert second == "b"
        assert memory.things == ["b"]


def test_nothing_to_give_up_is_an_error() -> None:
    owner, pool, memory = nn.Linear(1, 1), Pool(3), Memory()
    memory.things.append("somebody else's")
    with pytest.raises(torch.OutOfMemoryError), pool.borrow(owner, "a", (), lambda: memory.make("a")):
        pass

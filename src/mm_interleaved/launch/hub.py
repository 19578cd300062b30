"""The first process of a run, which all others are connected to: it tells all of them what one reports; see `peers`."""

from __future__ import annotations

import asyncio
import hmac
import json
import os
import socket
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

CONNECT_SECONDS = 30.0
ANSWER_SECONDS = 3.0  # for processes to say what they do; operations of others time out meanwhile
KEEPALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4}  # a machine that is gone is noticed in 30 s
RESUME = "The same command goes on from the last complete checkpoint"


@dataclass
class Member:
    """A process as the first one knows it."""

    rank: int
    name: str
    writer: asyncio.StreamWriter
    place: str = "its start"
    doing: str = ""
    in_vain: bool = False  # a collective operation of its has timed out

    def describe(self) -> str:
        """Its name, where it was last, and what it does, if it has said so."""
        return f"{self.name}, last at {self.place}" + (f", in {self.doing}" if self.doing else "")

    def send(self, message: dict[str, Any]) -> None:
        if not self.writer.is_closing():
            self.writer.write(line(message))


@dataclass
class Hub:
    """Tells all processes what one of them reports. Runs in a thread of the first process."""

    count: int
    token: str
    members: dict[int, Member] = field(default_factory=dict)
    waiting: dict[str, set[int]] = field(default_factory=dict)  # barrier -> who has arrived
    timers: dict[str, asyncio.TimerHandle] = field(default_factory=dict)
    loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.new_event_loop)
    reported: bool = False

    def start(self) -> int:
        """Start listening; the port."""
        both = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if both else socket.AF_INET
        listener = socket.create_server(("", 0), family=family, backlog=self.count, dualstack_ipv6=both)
        listener.setblocking(False)
        forget_in_children(listener)
        threading.Thread(target=self._run, args=(listener,), daemon=True, name="peers-hub").start()
        return listener.getsockname()[1]

    def _run(self, listener: socket.socket) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.run_until_complete(self._accept(listener))

    async def _accept(self, listener: socket.socket) -> None:
        tasks = set()
        while True:
            connection, _ = await self.loop.sock_accept(listener)
            keep_alive(connection)
            forget_in_children(connection)
            tasks.add(self.loop.create_task(self._serve(connection)))

    async def _serve(self, connection: socket.socket) -> None:
        reader, writer = await asyncio.open_connection(sock=connection)
        member: Member | None = None
        left = False
        with suppress(OSError, TimeoutError, ValueError, KeyError):  # a connection that breaks, or of a stranger
            hello = json.loads(await asyncio.wait_for(reader.readline(), CONNECT_SECONDS))
            if hmac.compare_digest(str(hello["token"]), self.token):
                member = self.members[hello["rank"]] = Member(hello["rank"], hello["name"], writer)
                member.send({"kind": "hello"})
                while line := await reader.readline():
                    left = self._receive(member, json.loads(line))
                    if left:
                        break
        if member is not None and not left:
            self._tell(f"{member.name} has ended without a message (last at {member.place}): it was killed (its log "
                       f"says so if NCCL did it after a time-out), or its machine is gone. {RESUME}")  # fmt: skip
        if member is None:
            writer.close()

    def _receive(self, member: Member, message: dict[str, Any]) -> bool:
        """Handle a message; whether it was the last one."""
        kind, text = message["kind"], str(message.get("text", ""))
        if kind == "note":
            member.place = text
        elif kind == "doing":
            member.place, member.doing = text, str(message["doing"])
        elif kind == "where":
            self._where(member)
        elif kind == "meet":
            self._meet(member, text, float(message["seconds"]))
        elif kind == "failed":
            self._tell(text, but=member.rank)
        return kind in ("failed", "bye")

    def _meet(self, member: Member, barrier: str, seconds: float) -> None:
        member.place = f"'{barrier}'"
        arrived = self.waiting.setdefault(barrier, set())
        arrived.add(member.rank)
        if len(arrived) == 1:
            self.timers[barrier] = self.loop.call_later(seconds, self._late, barrier, seconds)
        if len(arrived) == self.count:
            self.timers.pop(barrier).cancel()
            del self.waiting[barrier]
            self._send_all({"kind": "met", "text": barrier})

    def _late(self, barrier: str, seconds: float) -> None:
        late = [m for rank, m in sorted(self.members.items()) if rank not in self.waiting.get(barrier, ())]

        def tell() -> None:
            self._tell(f"'{barrier}': {len(late)} of {self.count} processes did not arrive within {seconds:.0f} s: "
                       f"{_describe(late)}. {RESUME}")  # fmt: skip

        self._ask(late, tell)

    def _where(self, member: Member) -> None:
        """An operation of a process has timed out: ask the others what they do, and tell."""
        is_first = not any(m.in_vain for m in self.members.values())
        member.in_vain = True
        if not is_first:  # one answer serves all
            return

        def tell() -> None:
            text = self.places()
            for waiting in self.members.values():
                if waiting.in_vain:
                    waiting.in_vain = False
                    waiting.send({"kind": "where", "text": text})

        self._ask(list(self.members.values()), tell)

    def _ask(self, members: list[Member], then: Callable[[], object]) -> None:
        """Ask processes what they do, and call `then` when they had time to answer."""
        for member in members:
            member.doing = ""
            member.send({"kind": "ask"})
        self.loop.call_later(ANSWER_SECONDS, then)

    def _tell(self, problem: str, but: int | None = None) -> None:
        """Tell all processes of a problem; only of the first, because the others follow from it."""
        if not self.reported:
            self.reported = True
            self._send_all({"kind": "problem", "text": problem}, but)

    def _send_all(self, message: dict[str, Any], but: int | None = None) -> None:
        for member in self.members.values():
            if member.rank != but:
                member.send(message)

    def places(self) -> str:
        """What those do that did not wait in vain; if all did, the names of those that are not where most are."""
        others = [m for _, m in sorted(self.members.items()) if not m.in_vain]
        if others:
            return f"{len(others)} of {self.count} processes did not wait: {_describe(others)}"
        counts = Counter(member.place for member in self.members.values())
        (most, number), *_ = counts.most_common(1)
        others = [f"{m.name} at {m.place}" for _, m in sorted(self.members.items()) if m.place != most]
        return "; ".join([f"{number} of {self.count} processes are at {most}", *others[:4]])

    def finish(self, problem: str | None) -> None:
        """Say goodbye to all, or why the first process ends; returns when it is sent."""

        async def send() -> None:
            if problem is None:
                self.reported = True
                self._send_all({"kind": "bye"})
            else:
                self._tell(problem, but=0)
            for member in self.members.values():
                with suppress(OSError):
                    await member.writer.drain()

        with suppress(TimeoutError):  # a process that does not read is gone, too
            asyncio.run_coroutine_threadsafe(send(), self.loop).result(5)


def _describe(members: list[Member]) -> str:
    """Up to four of them."""
    more = f" and {len(members) - 4} more" if len(members) > 4 else ""
    return "; ".join(member.describe() for member in members[:4]) + more


# ---- connections


def line(message: dict[str, Any]) -> bytes:
    return json.dumps(message).encode() + b"\n"


def keep_alive(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in KEEPALIVE.items():
        if hasattr(socket, name):  # Linux
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def forget_in_children(connection: socket.socket) -> None:
    """Close a connection in processes that are forked (loaders of data), which would keep it open after our end."""
    os.register_at_fork(after_in_child=connection.close)

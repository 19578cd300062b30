"""What the processes of a run know of each other: who has ended, who is late, and where everyone is.

Every process has a connection to the first one. The operating system closes the connection of a process that ends, for
whatever reason, so its end is noticed at once, also while all others wait for it in a collective operation. The first
process tells the others, and they end, too, unless what started them ends them first (torchrun, `srun
--kill-on-bad-exit`). A barrier over these connections names the processes that do not arrive.

    connect()                         once the process group exists
    meet("checkpoint 20")             a barrier
    note("step 118")                  where this process is, for messages
    with explained(): ...             errors of collective operations say which process is missing
    disconnect(sys.exception())       at the end

Messages are lines of JSON. There is one `Peers` for a process group, as there is one default process group.
"""

from __future__ import annotations

import asyncio
import atexit
import hmac
import json
import logging
import os
import re
import secrets
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist

from ..io import UserError
from .exits import PEER_FAILED

CONNECT_SECONDS = 30.0
QUIET_SECONDS = 1.0  # before a process reports another's end: it may be about to end for the same reason
GRACE_SECONDS = 10.0  # then until it ends: torchrun and srun may do it
KEEPALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4}  # a machine that is gone is noticed in 30 s
RESUME = "The same command goes on from the last complete checkpoint"
log = logging.getLogger(__name__)


class PeerError(UserError, RuntimeError):
    """Another process of the run has ended, or is late."""

    status = PEER_FAILED


# ---- the first process


@dataclass
class _Member:
    """A process as the first one knows it."""

    rank: int
    name: str
    writer: asyncio.StreamWriter
    place: str = "its start"

    def send(self, message: dict[str, Any]) -> None:
        if not self.writer.is_closing():
            self.writer.write(_line(message))


@dataclass
class _Hub:
    """Tells all processes what one of them reports. Runs in a thread of the first process."""

    count: int
    token: str
    members: dict[int, _Member] = field(default_factory=dict)
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
        _forget_in_children(listener)
        threading.Thread(target=self._run, args=(listener,), daemon=True, name="peers-hub").start()
        return listener.getsockname()[1]

    def _run(self, listener: socket.socket) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.run_until_complete(self._accept(listener))

    async def _accept(self, listener: socket.socket) -> None:
        tasks = set()
        while True:
            connection, _ = await self.loop.sock_accept(listener)
            _keep_alive(connection)
            _forget_in_children(connection)
            tasks.add(self.loop.create_task(self._serve(connection)))

    async def _serve(self, connection: socket.socket) -> None:
        reader, writer = await asyncio.open_connection(sock=connection)
        member: _Member | None = None
        left = False
        with suppress(OSError, TimeoutError, ValueError, KeyError):  # a connection that breaks, or of a stranger
            hello = json.loads(await asyncio.wait_for(reader.readline(), CONNECT_SECONDS))
            if hmac.compare_digest(str(hello["token"]), self.token):
                member = self.members[hello["rank"]] = _Member(hello["rank"], hello["name"], writer)
                member.send({"kind": "hello"})
                while line := await reader.readline():
                    left = self._receive(member, json.loads(line))
                    if left:
                        break
        if member is not None and not left:
            self._tell(f"{member.name} has ended without a message (last at {member.place}): it was killed, or its "
                       f"machine is gone. {RESUME}")  # fmt: skip
        if member is None:
            writer.close()

    def _receive(self, member: _Member, message: dict[str, Any]) -> bool:
        """Handle a message; whether it was the last one."""
        kind, text = message["kind"], str(message.get("text", ""))
        if kind == "note":
            member.place = text
        elif kind == "where":
            member.send({"kind": "where", "text": self.places()})
        elif kind == "meet":
            self._meet(member, text, float(message["seconds"]))
        elif kind == "failed":
            self._tell(text, but=member.rank)
        return kind in ("failed", "bye")

    def _meet(self, member: _Member, barrier: str, seconds: float) -> None:
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
        names = "; ".join(f"{member.name}, last at {member.place}" for member in late[:4])
        more = f" and {len(late) - 4} more" if len(late) > 4 else ""
        self._tell(f"'{barrier}': {len(late)} of {self.count} processes did not arrive within {seconds:.0f} s: "
                   f"{names}{more}. {RESUME}")  # fmt: skip

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
        """Where the processes are, with the names of those that are not where most are."""
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


# ---- every process


class Peers:
    """The connection of this process to the first one.

    Args:
        rank: number of this process.
        address: host and port of the first process's hub.
        token: what the hub expects.
    """

    def __init__(self, rank: int, address: tuple[str, int], token: str) -> None:
        self.name = f"process {rank} ({os.getpid()} on {socket.gethostname()})"
        self.problem: str | None = None
        self._hub: _Hub | None = None
        self._leaving = False
        self._heard = threading.Condition()
        self._met: set[str] = set()
        self._places: str | None = None
        self._noted, self._place = 0.0, "its start"
        self._socket = socket.create_connection(address, CONNECT_SECONDS)
        _keep_alive(self._socket)
        _forget_in_children(self._socket)
        self._send({"token": token, "rank": rank, "name": self.name})
        self._lines = self._socket.makefile("rb")
        if b"hello" not in self._lines.readline():
            raise OSError("it does not answer")
        self._socket.settimeout(None)

    def listen(self) -> None:
        """Begin to listen to the first process."""
        threading.Thread(target=self._listen, daemon=True, name="peers").start()

    def meet(self, barrier: str, seconds: float) -> None:
        """Wait until every process is here.

        Raises:
            PeerError: some did not arrive in time, or one has ended; names them.
        """
        self._send({"kind": "meet", "text": barrier, "seconds": seconds})
        with self._heard:
            self._heard.wait_for(lambda: barrier in self._met or self.problem is not None)
            if self.problem is not None:
                raise PeerError(self.problem)
            self._met.remove(barrier)

    def note(self, place: str) -> None:
        """Say where this process is, at most once a second."""
        self._place, now = place, time.monotonic()
        if now - self._noted >= 1:
            self._noted = now
            self._send({"kind": "note", "text": place})

    def explain(self, error: BaseException) -> str:
        """Why a collective operation failed: a problem that the first process tells of, or where the processes are."""
        with self._heard:
            if self._heard.wait_for(lambda: self.problem is not None, 3):
                return str(self.problem)
        self._send({"kind": "where"})
        with self._heard:
            self._heard.wait_for(lambda: self._places is not None, 3)
        first = (str(error).splitlines() or [""])[0]
        return f"{self.name} waited in vain for others ({first}). {self._places or ''}".strip()

    def leave(self, error: BaseException | None = None) -> None:
        """Disconnect; others learn of the error, if there is one."""
        with self._heard:
            if self._leaving:
                return
            self._leaving = True
        problem = None
        if error is not None and not isinstance(error, SystemExit):
            kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
            problem = f"{self.name} failed at {self._place}: {kind}{(str(error).splitlines() or [''])[0]}"
        self._send({"kind": "bye"} if problem is None else {"kind": "failed", "text": problem})
        if self._hub is not None:
            self._hub.finish(problem)

    def _send(self, message: dict[str, Any]) -> None:
        with suppress(OSError):  # the listening thread notices and tells
            self._socket.sendall(_line(message))

    def _listen(self) -> None:
        with suppress(OSError, ValueError):
            for line in self._lines:
                message = json.loads(line)
                kind, text = message["kind"], message.get("text", "")
                if kind == "bye":
                    return
                with self._heard:
                    if kind == "met":
                        self._met.add(text)
                    elif kind == "where":
                        self._places = text
                    elif kind == "problem":
                        self.problem = text
                    self._heard.notify_all()
                if kind == "problem":
                    self._end()
                    return
        with self._heard:
            self.problem = f"process 0 has ended, which all others are connected to. {RESUME}"
            self._heard.notify_all()
        self._end()

    def _end(self) -> None:
        """End this process, unless it is about to end itself. Whatever it waits for will not come."""
        time.sleep(QUIET_SECONDS)
        if not self._leaving:
            print(f"{self.name}: {self.problem}", file=sys.stderr, flush=True)
            time.sleep(GRACE_SECONDS)
            os._exit(PEER_FAILED)


_current: Peers | None = None


def connect() -> None:
    """Connect the processes of the default process group; nothing if there is none or this process is alone.

    All of them must call it, and later `disconnect`. If one cannot connect, which is warned of, none is connected, and
    the run goes on.
    """
    global _current
    if _current is not None or not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return
    rank, hub = dist.get_rank(), None
    offer: list[Any] = [None]
    if rank == 0:
        hub = _Hub(dist.get_world_size(), secrets.token_hex(16))
        offer = [(os.environ.get("MASTER_ADDR", "127.0.0.1"), hub.start(), hub.token)]
    dist.broadcast_object_list(offer)
    host, port, token = offer[0]
    peers, problem = None, ""
    try:
        peers = Peers(rank, (host, port), token)
    except OSError as error:
        problem = f"process {rank} on {socket.gethostname()}: {error}"
    problems: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    if peers is None or any(problems):
        if rank == 0:
            log.warning("processes cannot reach the first one at %s:%d (%s): should one end, others may wait for it "
                        "until their time is out", host, port, next(filter(None, problems)))  # fmt: skip
        return
    peers._hub = hub
    peers.listen()
    _current = peers
    atexit.register(_leave_at_exit, peers)


def _leave_at_exit(peers: Peers) -> None:
    peers.leave(getattr(sys, "last_value", None))  # set by an error that nothing caught


def disconnect(error: BaseException | None = None) -> None:
    """Disconnect this process. Others end if there is an error."""
    global _current
    if _current is not None:
        _current.leave(error)
        _current = None


def meet(barrier: str, seconds: float = 1800) -> None:
    """Wait until every process is here; alone, nothing.

    Raises:
        PeerError: some did not arrive in time, or one has ended; names them.
    """
    if _current is not None:
        _current.meet(barrier, seconds)
    elif dist.is_available() and dist.is_initialized():
        dist.barrier()


def note(place: str) -> None:
    """Say where this process is, for messages about processes that are late."""
    if _current is not None:
        _current.note(place)


@contextmanager
def explained() -> Iterator[None]:
    """Raise errors of collective operations in the block as a `PeerError` that says which process is missing."""
    try:
        yield
    except RuntimeError as error:  # gloo has no class of its own
        is_collective = isinstance(error, dist.DistError) or re.search("gloo|NCCL", str(error))
        if _current is None or isinstance(error, UserError) or not is_collective:
            raise
        raise PeerError(_current.explain(error)) from error


# ---- connections


def _line(message: dict[str, Any]) -> bytes:
    return json.dumps(message).encode() + b"\n"


def _keep_alive(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in KEEPALIVE.items():
        if hasattr(socket, name):  # Linux
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _forget_in_children(connection: socket.socket) -> None:
    """Close a connection in processes that are forked (loaders of data), which would keep it open after our end."""
    os.register_at_fork(after_in_child=connection.close)

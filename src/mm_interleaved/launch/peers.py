"""What the processes of a run know of each other: who has ended, who is late, and where everyone is.

Every process has a connection to the first one. The operating system closes the connection of a process that ends, for
whatever reason, so its end is noticed at once, also while all others wait for it in a collective operation. The first
process tells the others, and they end, too, unless what started them ends them first (torchrun, `srun
--kill-on-bad-exit`). A barrier over these connections names the processes that do not arrive. When a collective
operation times out, the first process names those that do not wait in it, and says what they do instead: each has a
thread that answers for it.

    connect()                         once the process group exists
    meet("checkpoint 20")             a barrier
    note("step 118")                  where this process is, for messages
    with explained(): ...             errors of collective operations say which process is missing
    disconnect(sys.exception())       at the end

Messages are lines of JSON. There is one `Peers` for a process group, as there is one default process group.
"""

from __future__ import annotations

import atexit
import json
import logging
import os
import re
import secrets
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch.distributed as dist

from ..io import UserError
from . import hub
from .exits import PEER_FAILED

QUIET_SECONDS = 1.0  # before a process reports another's end: it may be about to end for the same reason
GRACE_SECONDS = 10.0  # then until it ends: torchrun and srun may do it
PACKAGE = os.path.dirname(os.path.dirname(__file__)) + os.sep
log = logging.getLogger(__name__)


class PeerError(UserError, RuntimeError):
    """Another process of the run has ended, or is late."""

    status = PEER_FAILED


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
        self._hub: hub.Hub | None = None
        self._leaving = False
        self._heard = threading.Condition()
        self._met: set[str] = set()
        self._places: str | None = None
        self._noted, self._place = 0.0, "its start"
        self._socket = socket.create_connection(address, hub.CONNECT_SECONDS)
        hub.keep_alive(self._socket)
        hub.forget_in_children(self._socket)
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
        self._place = f"'{barrier}'"
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
        """Why a collective operation failed: a problem that the first process tells of, or what the others do."""
        self._send({"kind": "where"})
        with self._heard:
            self._heard.wait_for(lambda: self.problem is not None or self._places is not None, 2 * hub.ANSWER_SECONDS)
            if self.problem is not None:
                return self.problem
        first = (str(error).splitlines() or [""])[0]
        where = _frames(traceback.extract_tb(error.__traceback__))
        found = f"{self.name}, last at {self._place}, waited in vain for others in {where} ({first})"
        return f"{found}. {self._places or ''}".strip()

    def leave(self, error: BaseException | None = None) -> None:
        """Disconnect; others learn of the error, if there is one."""
        with self._heard:
            if self._leaving:
                return
            self._leaving = True
        problem = None
        if isinstance(error, PeerError):
            problem = str(error)  # it says who it is about
        elif error is not None and not isinstance(error, SystemExit):
            kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
            problem = f"{self.name} failed at {self._place}: {kind}{(str(error).splitlines() or [''])[0]}"
        self._send({"kind": "bye"} if problem is None else {"kind": "failed", "text": problem})
        if self._hub is not None:
            self._hub.finish(problem)

    def _send(self, message: dict[str, Any]) -> None:
        with suppress(OSError):  # the listening thread notices and tells
            self._socket.sendall(hub.line(message))

    def _listen(self) -> None:
        with suppress(OSError, ValueError):
            for line in self._lines:
                message = json.loads(line)
                kind, text = message["kind"], message.get("text", "")
                if kind == "bye":
                    return
                if kind == "ask":
                    self._send({"kind": "doing", "text": self._place, "doing": _doing()})
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
            self.problem = f"process 0 has ended, which all others are connected to. {hub.RESUME}"
            self._heard.notify_all()
        self._end()

    def _end(self) -> None:
        """End this process, unless it is about to end itself. Whatever it waits for will not come."""
        time.sleep(QUIET_SECONDS)
        if not self._leaving:
            print(f"{self.name}: {self.problem}", file=sys.stderr, flush=True)
            time.sleep(GRACE_SECONDS)
            os._exit(PEER_FAILED)


def _doing() -> str:
    """What the main thread does."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    return "" if frame is None else _frames(traceback.extract_stack(frame))


def _frames(stack: traceback.StackSummary) -> str:
    """The innermost function of a stack, and the innermost of this package that leads to it."""
    inner = stack[-1]
    own = next((f for f in reversed(stack) if f.filename.startswith(PACKAGE) and f.filename != __file__), inner)
    shown = [inner] if own is inner else [inner, own]
    return " of ".join(f"{frame.name} ({os.path.basename(frame.filename)}:{frame.lineno})" for frame in shown)


_current: Peers | None = None


def connect() -> None:
    """Connect the processes of the default process group; nothing if there is none or this process is alone.

    All of them must call it, and later `disconnect`. If one cannot connect, which is warned of, none is connected, and
    the run goes on.
    """
    global _current
    if _current is not None or not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return
    rank, served = dist.get_rank(), None
    offer: list[Any] = [None]
    if rank == 0:
        served = hub.Hub(dist.get_world_size(), secrets.token_hex(16))
        offer = [(os.environ.get("MASTER_ADDR", "127.0.0.1"), served.start(), served.token)]
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
    peers._hub = served
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

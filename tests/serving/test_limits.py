"""Limits that hold for all clients together, and for clients that are slow: memory, deadlines, what is refused."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import httpx2
import PIL.Image
import pytest

from mm_interleaved.serving import images
from mm_interleaved.serving.config import LimitConfig, ServeConfig
from mm_interleaved.serving.stub import StubEngine

from .conftest import running
from .test_attacks import POST, raw


def post(server: str, path: str, body: Any = None, **options: Any) -> httpx2.Response:
    return httpx2.post(server + path, json=body, trust_env=False, timeout=30, **options)


def metric(server: str, name: str) -> float:
    lines = httpx2.get(f"{server}/metrics", trust_env=False).text.splitlines()
    return next(float(line.split()[-1]) for line in lines if line.startswith(f"{name} "))


def wait_for(true: Callable[[], bool], seconds: float = 10.0) -> None:
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until
        time.sleep(0.02)


@contextmanager
def unread(server: str, head: str, body: bytes) -> Iterator[socket.socket]:
    """A connection with a request whose answer is not read."""
    host, port = server.removeprefix("http://").split(":")
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect((host, int(port)))
        connection.sendall(head.replace("\n", "\r\n").encode() + body)
        yield connection


LONG = LimitConfig(output_tokens=10_000, write_seconds=0.5)


def long_request(**fields: Any) -> tuple[str, bytes]:
    body = json.dumps({"input": "hello", "tool_choice": "none", "max_output_tokens": 10_000, **fields}).encode()
    return POST + f"Content-Length: {len(body)}\n\n", body


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_does_not_read_is_cut_off(stream: bool) -> None:
    """In mid-stream, when its request is cancelled, and after all of an answer is written."""
    engine = StubEngine(words=10_000, delay=5e-4 if stream else 1e-6)
    with (
        running(engine, ServeConfig(limits=LONG), 8192) as server,
        unread(server, *long_request(stream=stream)) as connection,
    ):
        name = 'mmi_closed_connections_total{reason="write"}'
        assert metric(server, name) == 0
        wait_for(lambda: metric(server, name) == 1, 30)
        wait_for(lambda: (engine.load.running, engine.load.waiting) == (0, 0))
        assert engine.load.cancelled == stream
        connection.settimeout(5)
        with contextlib.suppress(ConnectionResetError):  # what was in the kernel's buffers, then the end
            while connection.recv(2**20):
                pass


def test_a_client_that_reads_slowly_gets_all_of_its_answer() -> None:
    with running(StubEngine(words=10_000), ServeConfig(limits=LONG), 8192) as server:
        with unread(server, *long_request(stream=False)) as connection:
            connection.settimeout(5)
            found, begun = b"", time.monotonic()
            while b'"user":null' not in found:
                found += connection.recv(2**20)
                time.sleep(0.02)
            assert found.count(b"HTTP/1.1 200") == 1
            assert time.monotonic() - begun > 0.5
        assert metric(server, 'mmi_closed_connections_total{reason="write"}') == 0


# ---- memory of all requests together


def image_url(side: int) -> str:
    file = io.BytesIO()
    PIL.Image.new("RGB", (side, side)).save(file, "png")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def with_image(url: str, **fields: Any) -> dict[str, Any]:
    content = [{"type": "input_text", "text": "see"}, {"type": "input_image", "image_url": url}]
    return {"input": [{"role": "user", "content": content}], "tool_choice": "none", **fields}


class Counted:
    """Counts decoded pixels that a server holds at a time, by the images that are not freed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = self.decoded = 0
        self._lock = threading.Lock()
        usual = images.load_image

        def counted(image: PIL.Image.Image) -> PIL.Image.Image:
            with self._lock:
                self.decoded += 1
            return usual(image)

        monkeypatch.setattr(images, "load_image", counted)


def test_images_are_not_decoded_when_the_queue_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    counted, engine = Counted(monkeypatch), StubEngine(delay=30, rows=1, queue=1)
    with running(engine) as server:
        url = image_url(64)
        with ThreadPoolExecutor(2) as pool:
            bodies = [with_image(url, background=True) for _ in range(2)]
            assert all(r.status_code == 200 for r in pool.map(lambda b: post(server, "/v1/responses", b), bodies))
        before = counted.decoded
        chat = {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]}
        for path, body in (("/v1/responses", with_image(url)), ("/v1/chat/completions", chat)):
            refused = post(server, path, body)
            assert (refused.status_code, refused.json()["error"]["code"]) == (429, "rate_limit_exceeded")
        assert counted.decoded == before


def test_images_of_all_requests_share_a_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 60 requests with a large image only those are decoded at a time that fit; afterwards all of it is free."""
    counted, engine = Counted(monkeypatch), StubEngine(delay=0.05, rows=100, queue=100)
    limits = LimitConfig(pixels=1_000_000, all_pixels=4_500_000)
    with running(engine, ServeConfig(limits=limits)) as server:
        url = image_url(1000)
        with ThreadPoolExecutor(60) as pool:
            asked = [pool.submit(post, server, "/v1/responses", with_image(url)) for _ in range(60)]
            codes = [one.result().status_code for one in asked]
        assert set(codes) == {200, 429}
        assert counted.decoded == codes.count(200) < 30
        for fields in ({}, {"background": True}, {"stream": True}, {}, {}):  # none of them leaves anything behind
            assert post(server, "/v1/responses", with_image(url, **fields)).status_code == 200
            wait_for(lambda: engine.load.running == 0)


def test_bodies_of_all_requests_share_a_budget() -> None:
    limits = LimitConfig(body_mib=2, bodies_mib=2)
    with running(StubEngine(delay=0.1), ServeConfig(limits=limits)) as server:
        body = json.dumps({"input": "a " * 700_000, "tool_choice": "none"}).encode()
        with ThreadPoolExecutor(4) as pool:
            codes = [r.status_code for r in pool.map(lambda _: httpx2.post(
                f"{server}/v1/responses", content=body, headers={"content-type": "application/json"},
                trust_env=False, timeout=30), range(4))]  # fmt: skip
        assert 429 in codes
        assert httpx2.post(f"{server}/v1/responses", json={"input": "a", "tool_choice": "none"}, trust_env=False,
                           timeout=30).status_code == 200  # fmt: skip


def test_limits_of_all_hold_at_least_one_request() -> None:
    for fields, words in (({"body_mib": 600}, "bodies_mib"), ({"all_pixels": 5}, "all_pixels")):
        with pytest.raises(ValueError, match=words):
            LimitConfig(**fields)


# ---- what would be ignored


@pytest.mark.parametrize(
    ("method", "path", "param"),
    [("POST", "/v1/responses?seed=3", "seed"), ("POST", "/v1/chat/completions?stream", "stream"),
     ("GET", "/v1/models?limit=3", "limit"), ("GET", "/v1/responses/{id}?starting_after=3", "starting_after"),
     ("GET", "/v1/responses/{id}/input_items?limt=3", "limt"), ("GET", "/health?a=1", "a"),
     ("GET", "/v1/responses/{id}/input_items?limit=3&limit=4", "limit"), ("DELETE", "/v1/responses/{id}?a", "a")],
)  # fmt: skip
def test_query_parameters_that_are_not_known(stub: str, method: str, path: str, param: str) -> None:
    name = post(stub, "/v1/responses", {"input": "a", "num_inference_steps": 1}).json()["id"]
    body = {"json": {"input": "a"}} if method == "POST" else {}
    refused = httpx2.request(method, stub + path.format(id=name), trust_env=False, **body)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, param)
    assert httpx2.get(f"{stub}/v1/responses/{name}/input_items?limit=3&order=asc", trust_env=False).status_code == 200


@pytest.mark.parametrize(
    ("headers", "word"),
    [({"content-type": "application/json; charset=latin-1"}, "latin-1"), ({"content-encoding": "gzip"}, "gzip"),
     ({"content-type": "application/json; charset=utf-16"}, "utf-16"), ({"content-encoding": "br, gzip"}, "br, gzip"),
     ({"content-type": "application/jsonx"}, "application/json"), ({"content-type": ""}, "application/json")],
)  # fmt: skip
def test_bodies_in_other_forms(stub: str, headers: dict[str, str], word: str) -> None:
    headers = {"content-type": "application/json", **headers}
    refused = httpx2.post(f"{stub}/v1/responses", content=b'{"input": "a"}', headers=headers, trust_env=False)
    assert (refused.status_code, refused.json()["error"]["code"]) == (415, "unsupported_media_type")
    assert word in refused.json()["error"]["message"]


@pytest.mark.parametrize("kind", ["application/json; charset=utf-8", 'Application/JSON; charset="UTF-8"'])
def test_bodies_that_say_that_they_are_utf_8(stub: str, kind: str) -> None:
    body = b'{"input": "a", "tool_choice": "none"}'
    headers = {"content-type": kind, "content-encoding": "identity"}
    assert httpx2.post(f"{stub}/v1/responses", content=body, headers=headers, trust_env=False).status_code == 200


def test_bodies_where_none_is_taken(stub: str) -> None:
    name = post(stub, "/v1/responses", {"input": "a", "num_inference_steps": 1}).json()["id"]
    for method, path in (("POST", "/cancel"), ("DELETE", ""), ("GET", "")):
        refused = httpx2.request(method, f"{stub}/v1/responses/{name}{path}", json={"force": True}, trust_env=False)
        assert refused.status_code == 400
        assert "takes no body" in refused.json()["error"]["message"]
    found, _ = raw(stub, f"DELETE /v1/responses/{name} HTTP/1.1\nHost: x\nConnection: close\nContent-Length: 2\n\n",
                   b"{}")  # fmt: skip
    assert b" 200 " in found.partition(b"\r\n")[0]

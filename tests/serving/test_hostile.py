"""Clumsy and hostile clients: odd connections, odd JSON, odd ids, and those of other keys."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest

from mm_interleaved.serving.config import LimitConfig, ServeConfig
from mm_interleaved.serving.stub import StubEngine

from .conftest import running
from .test_attacks import POST, check_alive, raw
from .test_limits import post, wait_for

BODY = b'{"input": "hello", "tool_choice": "none"}'
ASKED = POST + f"Content-Length: {len(BODY)}\n"


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with running(StubEngine(), ServeConfig(limits=LimitConfig(receipt_seconds=2.0))) as address:
        yield address


def status(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])


def error(answer: bytes) -> dict[str, Any]:
    return json.loads(answer.partition(b"\r\n\r\n")[2])["error"]


# ---- connections


@pytest.mark.parametrize(
    ("head", "body", "expected"),
    [(ASKED.replace("HTTP/1.1", "HTTP/1.0") + "\n", BODY, 200),
     (ASKED + "Connection: close\nUpgrade: websocket\n\n", BODY, 200),
     ("GET /v1/responses HTTP/1.1\nHost: x\nConnection: Upgrade, close\nUpgrade: websocket\n\n", b"", 405),
     ("HEAD /v1/responses HTTP/1.1\nHost: x\nConnection: close\n\n", b"", 405),
     ("OPTIONS * HTTP/1.1\nHost: x\nConnection: close\n\n", b"", 404),
     ("TRACE /v1/models HTTP/1.1\nHost: x\nConnection: close\n\n", b"", 405),
     ("CONNECT example.com:80 HTTP/1.1\nHost: x\nConnection: close\n\n", b"", 404),
     ("GET /v1/models HTTP/1.1\nHost: x\nConnection: close\nX-A: " + "a" * 700_000 + "\n\n", b"", 400),
     ("GET /" + "a" * 700_000 + " HTTP/1.1\nHost: x\n\n", b"", 400),
     ("GET /v1/models HTTP/1.1\nConnection: close\n\n", b"", 400),
     ("GET /v1/models HTTP/1.1\nHost: x\n Folded: 1\nConnection: close\n\n", b"", 421),
     (ASKED + "Transfer-Encoding: chunked\nConnection: close\n\n", b"0\r\n\r\n", 400),
     (POST + "Transfer-Encoding: gzip, chunked\n\n", b"0\r\n\r\n", 400),
     (POST + "Transfer-Encoding: chunked\nConnection: close\n\n", b"zz\r\n", 400),
     (ASKED + "Expect: 100-continue\nConnection: close\n\n", BODY, 200)],
    ids=range(15),
)  # fmt: skip
def test_odd_requests(server: str, head: str, body: bytes, expected: int) -> None:
    found, took = raw(server, head, body, 3.0)
    found = found.removeprefix(b"HTTP/1.1 100 Continue\r\n\r\n")
    assert status(found) == expected
    assert took < 2.9
    check_alive(server)


def test_requests_on_one_connection_are_answered_in_their_order(server: str) -> None:
    whole = (ASKED.replace("\n", "\r\n") + "\r\n").encode() + BODY
    last = whole.replace(b"Host: x", b"Host: x\r\nConnection: close")
    found, _ = raw(server, "GET /health HTTP/1.1\nHost: x\n\n", whole * 3 + last)
    assert found.count(b"HTTP/1.1 200") == 5
    assert found.index(b'"status":"ok"') < found.index(b'"object":"response"')
    assert found.count(b'"object":"response"') == 4


def test_clients_that_go_before_their_answer_free_the_engine() -> None:
    """They close their sending half, reset the connection, or leave in the middle of their body."""
    engine = StubEngine(delay=0.2, rows=3)
    with running(engine) as server:
        host, port = server.removeprefix("http://").split(":")
        whole = (ASKED.replace("\n", "\r\n") + "\r\n").encode() + BODY
        for leave in ("half", "reset", "close", "body"):
            with socket.create_connection((host, int(port)), timeout=5) as connection:
                connection.sendall(whole[:-5] if leave == "body" else whole)
                time.sleep(0.1)
                if leave == "half":
                    connection.shutdown(socket.SHUT_WR)
                elif leave == "reset":
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        wait_for(lambda: (engine.load.running, engine.load.waiting) == (0, 0), 1.5)
        assert engine.load.cancelled == 3


# ---- JSON


@pytest.mark.parametrize(
    ("body", "param"),
    [('{"input": "a", "input": "b"}', "input"),
     ('{"input": [{"role": "user", "content": [{"type": "input_text", "text": "a", "text": "b"}]}]}', "text"),
     ('{"input": "a", "metadata": {"x": "1", "x": "1"}}', "x"), ('{"input": "a", "temperature": 1e999}', None),
     ('{"input": "a", "temperature": -Infinity}', None), ('{"input": "a", "seed": 1e999}', None),
     ('{"input": "a", "seed": 1.5}', "seed"), ('{"input": "a", "seed": true}', "seed"),
     ('{"input": "a", "temperature": "1"}', "temperature"), ('{"input": "\\ud800"}', None),
     ('{"input": "a", "\\udc00": 1}', None), ('{"input": "a", "metadata": {"\\ud800": "x"}}', None),
     ('{"input": [{"role": "user", "content": [{"type": "output_text", "text": "a", "annotations": [1e999]}]}]}', None),
     ("\ufeff{}", None)],
)  # fmt: skip
def test_json_that_means_something_else_to_others(server: str, body: str, param: str | None) -> None:
    headers = {"content-type": "application/json"}
    refused = httpx2.post(f"{server}/v1/responses", content=body.encode(), headers=headers, trust_env=False)
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == param


# ---- ids


@pytest.mark.parametrize(
    "name",
    ["a/b", "a%2Fb", "%2e%2e", "..", "%2e%2e%2fmodels", "a%00b", "%ff", "a%0d%0ab", "resp_" + "a" * 300, "a b", "%",
     "😀", "resp_1?x=1", "resp_1;x", "*", "~"],
)  # fmt: skip
@pytest.mark.parametrize("method", ["GET", "DELETE"])
def test_odd_ids(server: str, name: str, method: str) -> None:
    target = "".join(c if ord(c) < 128 else "%F0%9F%98%80" for c in name).replace(" ", "%20")
    found, _ = raw(server, f"{method} /v1/responses/{target} HTTP/1.1\nHost: x\nConnection: close\n\n")
    assert status(found) in (400, 404, 405)
    assert set(error(found)) == {"message", "type", "param", "code"}


def test_responses_belong_to_their_key() -> None:
    with running(StubEngine(), ServeConfig(keys=["one", "two"])) as server:

        def ask(method: str, path: str, key: str, body: Any = None) -> httpx2.Response:
            headers = {"authorization": f"Bearer {key}"}
            return httpx2.request(method, f"{server}/v1/responses{path}", json=body, headers=headers, trust_env=False)

        mine = ask("POST", "", "one", {"input": "a", "tool_choice": {"type": "image_generation"},
                                       "num_inference_steps": 1}).json()  # fmt: skip
        name, item = mine["id"], mine["output"][0]["id"]
        for method, path, body in (
            ("GET", f"/{name}", None), ("GET", f"/{name}/input_items", None), ("DELETE", f"/{name}", None),
            ("POST", f"/{name}/cancel", None), ("GET", f"/{name}/inspection", None),
            ("POST", "", {"input": "b", "previous_response_id": name}),
            ("POST", "", {"input": [{"type": "item_reference", "id": item}]}),
            ("POST", "", {"input": [{"type": "image_generation_call", "id": item}]}),
        ):  # fmt: skip
            refused = ask(method, path, "two", body)
            assert refused.status_code in (400, 404)
            assert "not found" in refused.json()["error"]["message"]
        assert ask("POST", "", "one", {"input": "b", "previous_response_id": name}).status_code == 200
        assert ask("POST", "", "one", {"input": [{"type": "item_reference", "id": item}]}).status_code == 200
        assert ask("DELETE", f"/{name}", "one").status_code == 200


def test_a_response_that_is_deleted_while_it_runs() -> None:
    engine = StubEngine(delay=0.1)
    with running(engine) as server:
        running_one = post(server, "/v1/responses", {"input": "a", "background": True}).json()["id"]
        assert httpx2.delete(f"{server}/v1/responses/{running_one}", trust_env=False).status_code == 200
        wait_for(lambda: engine.load.running == 0, 0.5)
        assert httpx2.get(f"{server}/v1/responses/{running_one}", trust_env=False).status_code == 404

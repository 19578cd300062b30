"""Hostile requests, on every endpoint that takes images or bodies: refused soon, and the server goes on."""

from __future__ import annotations

import asyncio
import base64
import http.server
import io
import ipaddress
import json
import socket
import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import httpx2
import PIL.Image
import pytest

from mm_interleaved.serving.budget import Budget, Share
from mm_interleaved.serving.config import LimitConfig, ServeConfig
from mm_interleaved.serving.errors import ApiError
from mm_interleaved.serving.remote import RemoteImages, is_public
from mm_interleaved.serving.stub import StubEngine

from .conftest import running

SOON = 1.0
LIMITS = LimitConfig(body_mib=4, receipt_seconds=2.0, pixels=4_000_000, images=4, parts=20)


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with running(StubEngine(), ServeConfig(limits=LIMITS)) as address:
        yield address


def png(width: int, height: int, chunks: bytes = b"", data: bytes = b"") -> bytes:
    """A PNG file with this header, further chunks, and pixel data."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunks + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def saved(kind: str, frames: int = 1, size: tuple[int, int] = (8, 8)) -> bytes:
    file = io.BytesIO()
    images = [PIL.Image.new("RGB", size, (i % 256, i // 256 % 256, 0)) for i in range(frames)]
    more = {"save_all": True, "append_images": images[1:]} if frames > 1 else {}
    images[0].save(file, kind, **more)
    return file.getvalue()


def animated_png(frames: int) -> bytes:
    """A PNG that says it has so many frames, without making them."""
    body = struct.pack(">II", frames, 0)
    control = struct.pack(">I", len(body)) + b"acTL" + body + struct.pack(">I", zlib.crc32(b"acTL" + body))
    return png(8, 8, control, b"\0" * (8 * 25))


BAD_IMAGES: dict[str, Callable[[], bytes]] = {
    "decompression bomb": lambda: png(60_000, 60_000, data=b"\0" * 1000),
    "more pixels than allowed": lambda: png(3000, 3000, data=b"\0" * 1000),
    "one pixel wide": lambda: png(1, 4000, data=b"\0" * 16000),
    "long and thin": lambda: png(2, 4000, data=b"\0" * 28000),
    "animated PNG": lambda: animated_png(10_000),
    "animated GIF": lambda: saved("gif", 300),
    "animated WebP": lambda: saved("webp", 300),
    "GIF": lambda: saved("gif"),
    "TIFF": lambda: saved("tiff"),
    "PSD": lambda: b"8BPS\x00\x01" + b"\0" * 6 + struct.pack(">HIIHH", 3, 9999, 9999, 8, 3),
    "EPS": lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/etc/passwd) run\n",
    "SVG": lambda: b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
    "HTML": lambda: b"<html><script>alert(1)</script></html>",
    "truncated": lambda: saved("png", size=(64, 64))[:60],
    "damaged pixels": lambda: png(64, 64, data=b"\0" * 10),
    "zip in a text chunk": lambda: png(8, 8, _text_bomb(), b"\0" * 200),
    "empty": lambda: b"",
}


def _text_bomb() -> bytes:
    body = b"Comment\0\0" + zlib.compress(b"a" * 80_000_000, 9)
    return struct.pack(">I", len(body)) + b"zTXt" + body + struct.pack(">I", zlib.crc32(b"zTXt" + body))


def bodies(url: str) -> dict[str, tuple[str, dict[str, Any]]]:
    """The same image on every endpoint that takes images."""
    data = url.partition(",")[2]
    return {
        "responses": ("/v1/responses", {"input": [{"role": "user", "content": [
            {"type": "input_text", "text": "see"}, {"type": "input_image", "image_url": url}]}]}),
        "responses, a call": ("/v1/responses", {"input": [{"type": "image_generation_call", "result": data}]}),
        "chat": ("/v1/chat/completions", {"messages": [{"role": "user", "content": [
            {"type": "image_url", "image_url": {"url": url}}]}]}),
        "chat, an earlier image": ("/v1/chat/completions", {"messages": [
            {"role": "assistant", "content": "see", "images": [{"type": "image_url", "image_url": {"url": url}}]},
            {"role": "user", "content": "what is it?"}]}),
    }  # fmt: skip


ENDPOINTS = list(bodies("data:,"))


def check_refused(response: httpx2.Response, begun: float, soon: float = SOON) -> dict[str, Any]:
    assert time.monotonic() - begun < soon
    assert 400 <= response.status_code < 500, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    for secret in ("/home", "/tmp", "/usr", "0x", "Traceback", "BytesIO", "site-packages"):
        assert secret not in response.text
    return error


def check_alive(server: str) -> None:
    answer = httpx2.post(f"{server}/v1/responses", json={"input": "hello", "num_inference_steps": 1}, trust_env=False)
    assert answer.status_code == 200


@pytest.mark.parametrize("endpoint", ENDPOINTS)
@pytest.mark.parametrize("name", BAD_IMAGES)
def test_bad_images(server: str, name: str, endpoint: str) -> None:
    url = "data:image/png;base64," + base64.b64encode(BAD_IMAGES[name]()).decode()
    path, body = bodies(url)[endpoint]
    begun = time.monotonic()
    response = httpx2.post(server + path, json=body, trust_env=False)
    if response.status_code == 413:
        return  # its file alone is larger than a body may be
    check_refused(response, begun)
    check_alive(server)


@pytest.mark.parametrize("endpoint", ["responses", "chat", "chat, an earlier image"])
@pytest.mark.parametrize(
    "url",
    ["file:///etc/passwd", "/etc/passwd", "C:\\x.png", "ftp://example.com/a.png", "gopher://127.0.0.1:25/x",
     "http://127.0.0.1/a.png", "http://localhost/a.png", "https://example.com/a.png", "http://169.254.169.254/latest",
     "http://[::1]/a.png", "http://2130706433/", "http://0x7f.1/", "http://0177.0.0.1/", "http://127.1/",
     "http://[::ffff:127.0.0.1]/", "http://a@127.0.0.1/", "http://example.com\\@127.0.0.1/",
     "http://example.com#@127.0.0.1/", "data:image/svg+xml;base64,PHN2Zy8+", "data:image/png,notbase64",
     "data:image/png;base64,####", "data:", "javascript:1",
     "http://127.0.0.1:\t80/", "http:///a", "http://", "HTTP://LOCALHOST/"],
)  # fmt: skip
def test_addresses_that_are_not_fetched(server: str, url: str, endpoint: str) -> None:
    path, body = bodies(url)[endpoint]
    begun = time.monotonic()
    error = check_refused(httpx2.post(server + path, json=body, trust_env=False), begun)
    assert error["code"] in ("invalid_image_url", "invalid_base64_image", "unsupported_image_media_type")


# ---- images of other hosts


class Site(http.server.BaseHTTPRequestHandler):
    """A host with an image, redirects and a file without an end."""

    hits: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        Site.hits.append(self.path)
        if self.path.startswith("/to/"):
            self.send_response(302)
            self.send_header("Location", self.path.removeprefix("/to/"))
            self.end_headers()
            return
        self.send_response(200)
        self.end_headers()
        body = saved("png")
        while self.path == "/endless":
            try:
                self.wfile.write(b"x" * 100_000)
            except OSError:
                return
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture(scope="module")
def site() -> Iterator[int]:
    """The port of a host at 127.0.0.1."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Site) as found:
        threading.Thread(target=found.serve_forever, daemon=True).start()
        yield found.server_address[1]
        found.shutdown()


def fetch(images: RemoteImages, url: str) -> bytes:
    return asyncio.run(images.fetch(url, "image_url", Share(Budget(LimitConfig()))))


def test_an_image_of_a_listed_host(site: int) -> None:
    images = RemoteImages([f"localhost:{site}"], 10**6, allowed=lambda address: True)
    assert fetch(images, f"http://localhost:{site}/a.png") == saved("png")
    assert fetch(images, f"http://localhost:{site}/to//a.png") == saved("png")  # a redirect inside the host


@pytest.mark.parametrize(
    ("path", "code"),
    [("/to/http://127.0.0.1:1/", "invalid_image_url"), ("/to/file:///etc/passwd", "invalid_image_url"),
     ("/to/http://localhost:{site}/to/http://localhost:{site}/to/http://localhost:{site}/to/http://localhost:{site}/a",
      "failed_to_download_image"), ("/endless", "image_file_too_large")],
)  # fmt: skip
def test_every_redirect_is_checked(site: int, path: str, code: str) -> None:
    images = RemoteImages([f"localhost:{site}"], 10**6, allowed=lambda address: True)
    with pytest.raises(ApiError) as caught:
        fetch(images, f"http://localhost:{site}" + path.format(site=site))
    assert caught.value.code == code


def test_a_listed_host_with_a_private_address_is_not_contacted(site: int) -> None:
    Site.hits.clear()
    with pytest.raises(ApiError) as caught:
        fetch(RemoteImages([f"localhost:{site}"], 10**6), f"http://localhost:{site}/a.png")
    assert caught.value.code == "invalid_image_url"
    assert not Site.hits


def test_an_address_that_changes_after_the_check_is_not_contacted(site: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rebinding: the name is resolved once, and that address is contacted."""
    answers = iter(["127.0.0.1", "10.0.0.1", "10.0.0.1"])

    async def resolve(self: Any, host: str, port: int, **_: Any) -> list[Any]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (next(answers), port))]

    monkeypatch.setattr(asyncio.base_events.BaseEventLoop, "getaddrinfo", resolve)
    images = RemoteImages([f"rebinding.example:{site}"], 10**6, allowed=lambda a: str(a) == "127.0.0.1")
    assert fetch(images, f"http://rebinding.example:{site}/a.png") == saved("png")


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "0.0.0.0", "100.64.0.1", "224.0.0.1",
     "255.255.255.255", "192.0.2.1", "198.18.0.1", "240.0.0.1", "::1", "::", "fe80::1", "fc00::1", "ff02::1",
     "::ffff:127.0.0.1", "::ffff:8.8.8.8", "64:ff9b::7f00:1", "2002:7f00:1::", "2001:0:7f00:1::", "2001:db8::1",
     "fd00:ec2::254"],
)  # fmt: skip
def test_addresses_that_are_not_public(address: str) -> None:
    assert not is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize("address", ["8.8.8.8", "1.1.1.1", "2606:4700:4700::1111"])
def test_public_addresses(address: str) -> None:
    assert is_public(ipaddress.ip_address(address))


# ---- bodies


def raw(server: str, head: str, body: bytes = b"", seconds: float = 5.0) -> tuple[bytes, float]:
    """Send bytes as they are; the answer until the server closes or falls silent, and how long it took."""
    host, port = server.removeprefix("http://").split(":")
    begun = time.monotonic()
    with socket.create_connection((host, int(port)), timeout=seconds) as connection:
        connection.sendall(head.replace("\n", "\r\n").encode() + body)
        found = b""
        try:
            while piece := connection.recv(65536):
                found += piece
        except (TimeoutError, ConnectionResetError):
            pass
    return found, time.monotonic() - begun


POST = "POST /v1/responses HTTP/1.1\nHost: x\nContent-Type: application/json\n"


def test_a_long_body_with_its_length(server: str) -> None:
    found, took = raw(server, POST + f"Content-Length: {100 * 2**20}\n\n", b"{")
    assert b" 413 " in found
    assert took < SOON
    check_alive(server)


def test_a_long_body_without_its_length(server: str) -> None:
    piece = b"10000\r\n" + b"a" * 0x10000 + b"\r\n"
    found, took = raw(server, POST + "Transfer-Encoding: chunked\n\n", b'2\r\n{"\r\n' + piece * 100)
    assert not found or b" 413 " in found  # or the connection was closed while it was being sent
    assert took < 2 * SOON
    check_alive(server)


@pytest.mark.parametrize(
    ("name", "body"),
    [("deep", b"[" * 100_000 + b"]" * 100_000), ("deep objects", b'{"a":' * 5000 + b"1" + b"}" * 5000),
     ("nan", b'{"input": NaN}'),
     ("surrogate", b'{"input": "\\ud83d"}'), ("latin", b'{"input": "\xe9"}'), ("none", b""), ("number", b"1"),
     ("list", b"[]"), ("half", b'{"input": "a'), ("twice", b'{"input": "a"} {}'),
     ("digits", b'{"seed": ' + b"9" * 5000 + b"}"), ("null byte", b'{"input": "a", "model": "\\u0000"}'),
     ("quotes without an end", b'{"input": "' + b'\\"' * 2**20), ("a backslash at the end", b'{"input": "\\'),
     ("a million values", b'{"input": [' + b"1," * 2**20 + b"1]}"), ("a million lists", b"[]," * 2**20),
     ("wrong values", b'{"input": [' + b"1," * 30_000 + b"1]}"),
     ("long name", b'{"' + b"a" * 2**20 + b'": 1}'),
     ("long value", b'{"input": [{"role": "user", "content": [{"type": "' + b"a" * 2**20 + b'"}]}]}')],
)  # fmt: skip
def test_odd_json(server: str, name: str, body: bytes) -> None:
    begun = time.monotonic()
    headers = {"content-type": "application/json"}
    response = httpx2.post(f"{server}/v1/responses", content=body, headers=headers, trust_env=False)
    check_refused(response, begun)
    assert len(response.content) < 2000
    check_alive(server)


def test_many_parts(server: str) -> None:
    begun = time.monotonic()
    content = [{"type": "input_text", "text": "a"}] * 10_000
    body = {"input": [{"role": "user", "content": content}]}
    assert (
        check_refused(httpx2.post(f"{server}/v1/responses", json=body, trust_env=False), begun)["code"]
        == "too_many_parts"
    )


def test_other_kinds_of_bodies(server: str) -> None:
    """A form cannot be sent by another web page without being asked, and has no file names here."""
    for kind in ("text/plain", "multipart/form-data; boundary=x", "application/x-www-form-urlencoded"):
        body = b'--x\r\nContent-Disposition: form-data; name="a"; filename="../../etc/passwd"\r\n\r\n1\r\n--x--'
        begun = time.monotonic()
        response = httpx2.post(f"{server}/v1/responses", content=body, headers={"content-type": kind}, trust_env=False)
        assert check_refused(response, begun)["code"] == "unsupported_media_type"


def test_slow_senders_do_not_stop_others(server: str) -> None:
    """Headers that never end, a body that never ends, and no byte at all; others are served meanwhile."""
    host, port = server.removeprefix("http://").split(":")
    heads = [
        b"",
        b"POST /v1/responses HTTP/1.1\r\nHost: x\r\n",
        (POST.replace("\n", "\r\n") + "Content-Length: 99\r\n\r\n{").encode(),
    ]
    slow = []
    for head in heads * 20:
        connection = socket.create_connection((host, int(port)), timeout=10)
        connection.sendall(head)
        slow.append(connection)
    begun = time.monotonic()
    check_alive(server)
    assert time.monotonic() - begun < SOON
    for connection in slow:
        try:
            while connection.recv(65536):
                pass
        except ConnectionResetError:
            pass
        connection.close()
    assert LIMITS.receipt_seconds - 0.5 < time.monotonic() - begun < LIMITS.receipt_seconds + 3
    check_alive(server)


def test_what_is_not_http_gets_an_error_in_the_one_form(server: str) -> None:
    for head in (POST + "Content-Length: x\n\n", POST + "Content-Length: 1\nContent-Length: 2\n\n", "GET\n\n"):
        found, took = raw(server, head)
        head, _, body = found.partition(b"\r\n\r\n")
        assert b" 400 " in head.partition(b"\r\n")[0]
        assert set(json.loads(body)["error"]) == {"message", "type", "param", "code"}
        assert took < SOON


def test_keys() -> None:
    with running(StubEngine(), ServeConfig(keys=["secret-1", "secret-2"])) as server:
        for path in ("/v1/models", "//v1/models", "/v1/models/", "/V1/models", "/v1/./models", "/health/../v1/models",
                     "/metrics", "/openapi.json", "/v1/responses/x", "/%761/models", "/health/"):  # fmt: skip
            for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "Basic secret-1"},
                            {"authorization": "secret-1"}, {"authorization": "Bearer "}):  # fmt: skip
                found, _ = raw(server, f"GET {path} HTTP/1.1\nHost: x\nConnection: close\n"
                               + "".join(f"{k}: {v}\n" for k, v in headers.items()) + "\n")  # fmt: skip
                assert b" 401 " in found.partition(b"\r\n")[0], path
        for key in ("secret-1", "secret-2"):
            headers = {"authorization": f"Bearer {key}"}
            assert httpx2.get(f"{server}/v1/models", headers=headers, trust_env=False).status_code == 200
        assert httpx2.get(f"{server}/health", trust_env=False).status_code == 200


OWN_HOSTS = [
    "127.0.0.1",
    "127.0.0.1:8000",
    "localhost:8000",
    "mmi",
    "mmi:80",
    "[::1]:8000",
    "page.localhost",
    "LOCALHOST.",
]
OTHER_HOSTS = [
    "example.com", "example.com:8000", "127.0.0.1.example.com", "localhost.example.com", "a@127.0.0.1", "127.0.0.1/x",
    "[::1].example.com", "1.2.3", "256.1.1.1", "", "a b", "127.0.0.1, example.com",
]  # fmt: skip


@pytest.mark.parametrize("path", ["/", "/health", "/v1/models"])
def test_a_server_without_keys_answers_to_its_own_names_only(path: str) -> None:
    """A page of `example.com` that resolves to 127.0.0.1 (DNS rebinding) reaches nothing."""
    with running(StubEngine(), ServeConfig(server_names=["mmi.example.com"])) as url:
        for host in [*OWN_HOSTS, "mmi.example.com", "MMI.Example.com.:8000"]:
            answer, _ = raw(url, f"GET {path} HTTP/1.1\nHost: {host}\nConnection: close\n\n")
            assert answer.startswith(b"HTTP/1.1 200 "), (host, answer)
        for host in OTHER_HOSTS:
            answer, _ = raw(url, f"GET {path} HTTP/1.1\nHost: {host}\nConnection: close\n\n")
            assert answer.startswith((b"HTTP/1.1 421 ", b"HTTP/1.1 400 ")), (host, answer)
            assert b'"error":' in answer


def test_a_server_with_keys_answers_to_any_name() -> None:
    """Other pages do not have the key."""
    with running(StubEngine(), ServeConfig(keys=["secret"])) as url:
        head = "GET /v1/models HTTP/1.1\nHost: mmi.example.com\nConnection: close\n"
        assert raw(url, f"{head}Authorization: Bearer secret\n\n")[0].startswith(b"HTTP/1.1 200 ")
        assert raw(url, f"{head}\n")[0].startswith(b"HTTP/1.1 401 ")


def test_health_without_a_body(server: str) -> None:
    """Monitors ask with HEAD."""
    answer = httpx2.head(f"{server}/health", trust_env=False)
    assert (answer.status_code, answer.content) == (200, b"")


def test_other_pages_get_no_permission(server: str) -> None:
    origin = {"origin": "https://evil.example"}
    response = httpx2.get(f"{server}/v1/models", headers=origin, trust_env=False)
    assert "access-control-allow-origin" not in response.headers
    asking = {"access-control-request-method": "POST", "access-control-request-headers": "content-type"}
    asked = httpx2.options(f"{server}/v1/responses", trust_env=False, headers={**origin, **asking})
    assert "access-control-allow-origin" not in asked.headers


def test_special_tokens_of_users_are_text(server: str) -> None:
    body = {"input": "<s><|image|></s> hello", "seed": 1, "num_inference_steps": 1}
    assert httpx2.post(f"{server}/v1/responses", json=body, trust_env=False).status_code == 200


def test_the_log_has_no_images_and_no_paths(server: str, caplog: pytest.LogCaptureFixture, capfd: Any) -> None:
    url = "data:image/png;base64," + base64.b64encode(BAD_IMAGES["truncated"]()).decode()
    for path, body in bodies(url).values():
        httpx2.post(server + path, json=body, trust_env=False)
    text = caplog.text + "".join(capfd.readouterr())
    assert url[30:60] not in text
    assert json.dumps(url)[:40] not in text

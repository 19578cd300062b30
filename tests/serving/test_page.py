"""The files of the web page: types, caching, policy, keys, and names that must not be found."""

from __future__ import annotations

import http.client
import re
from collections.abc import Iterator
from importlib.resources import files

import httpx2
import pytest

from mm_interleaved.serving import page
from mm_interleaved.serving.config import ServeConfig
from mm_interleaved.serving.stub import StubEngine

from .conftest import running

NAMES = sorted(page.read_files())


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with running(StubEngine(), ServeConfig(keys=["secret"])) as address:
        yield address


def get(address: str, **headers: str) -> httpx2.Response:
    return httpx2.get(address, headers=headers, trust_env=False)


def test_the_page_needs_no_key_but_the_api_does(server: str) -> None:
    found = get(f"{server}/")
    assert found.status_code == 200
    assert found.headers["content-type"] == "text/html; charset=utf-8"
    assert get(f"{server}/web/main.js").status_code == 200
    for path in ("/v1/models", "/openapi.json", "/webs", "/web"):
        assert get(server + path).status_code == 401, path


@pytest.mark.parametrize("name", NAMES)
def test_each_file_has_its_type_and_is_checked_anew(server: str, name: str) -> None:
    found = get(f"{server}/web/{name}")
    kind = {"js": "text/javascript", "css": "text/css", "html": "text/html", "svg": "image/svg+xml", "png": "image/png"}
    assert found.headers["content-type"].startswith(kind[name.rpartition(".")[2]])
    assert found.headers["cache-control"] == "no-cache"
    assert found.headers["x-content-type-options"] == "nosniff"
    assert found.content == (files(page.__package__ or "") / "web" / name).read_bytes()
    again = get(f"{server}/web/{name}", **{"If-None-Match": found.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    assert get(f"{server}/web/{name}", **{"If-None-Match": '"other"'}).status_code == 200


def test_head(server: str) -> None:
    found = httpx2.head(f"{server}/", trust_env=False)
    assert (found.status_code, found.content) == (200, b"")
    assert int(found.headers["content-length"]) == len(get(f"{server}/").content)


@pytest.mark.parametrize(
    "path",
    ["/web/", "/web/../page.py", "/web/%2e%2e/page.py", "/web/..%2fpage.py", "/web//etc/passwd", "/web/examples",
     "/web/examples/../../page.py", "/web/%00", "/web/main.js/", "/web/nothing.js", "/web/__init__.py"],
)  # fmt: skip
def test_nothing_else_is_served(server: str, path: str) -> None:
    connection = http.client.HTTPConnection(server.removeprefix("http://"))
    connection.request("GET", path)  # as it is: other clients would resolve the dots
    answer = connection.getresponse()
    assert answer.status in (401, 404)
    assert b"def " not in answer.read()
    connection.close()


def test_the_policy_forbids_what_the_page_does_not_use(server: str) -> None:
    policy = get(f"{server}/").headers["content-security-policy"]
    assert "default-src 'self'" in policy
    assert "unsafe" not in policy
    frame = get(f"{server}/web/frame.html").headers["content-security-policy"]
    assert frame.startswith("sandbox allow-scripts;")  # without allow-same-origin: an origin of its own
    assert "default-src 'none'" in frame
    assert "connect-src" not in frame


def test_nothing_is_inline_or_from_elsewhere() -> None:
    for name, file in page.read_files().items():
        if name.rpartition(".")[2] == "png":
            continue
        text = file.content.decode()
        assert not re.search(r"innerHTML|insertAdjacentHTML|outerHTML\s*=|\beval\(|new Function", text), name
        assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)|//cdn", text), name
        if name.endswith(".html"):
            assert not re.search(r"<script(?![^>]*\bsrc=)|<style|\son\w+=|\sstyle=|javascript:", text), name


def test_it_can_be_left_out() -> None:
    with running(StubEngine(), ServeConfig(page=False)) as address:
        assert get(f"{address}/").status_code == 404
        assert get(f"{address}/web/main.js").status_code == 404
        assert get(f"{address}/health").status_code == 200

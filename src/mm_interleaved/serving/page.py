"""The web page: static files of `web/` at `/` and `/web/`, with a strict content security policy.

The page holds no data and needs no key; it calls the API with the key that its user enters. The files are read once,
so a name that is not among them, such as one with `..`, is simply not found.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib.resources import files
from importlib.resources.abc import Traversable

from fastapi import APIRouter, Request
from starlette.exceptions import HTTPException
from starlette.responses import Response

TYPES = {
    "html": "text/html; charset=utf-8", "css": "text/css; charset=utf-8", "js": "text/javascript; charset=utf-8",
    "json": "application/json", "svg": "image/svg+xml", "png": "image/png",
}  # fmt: skip
POLICY = (
    "default-src 'self'; img-src 'self' data: blob:; object-src 'none'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)
FRAME = "frame.html"
# The inspection of a response is a page with scripts of its own. It runs in this frame, which has an origin of its
# own (sandbox) and no network, so its scripts reach neither the page nor the API.
FRAME_POLICY = (
    "sandbox allow-scripts; default-src 'none'; script-src 'self' 'unsafe-inline'; style-src 'unsafe-inline'; "
    "img-src data: blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'self'"
)


@dataclass(frozen=True)
class PageFile:
    """A file of the page.

    Attributes:
        content: its bytes.
        headers: of every answer with it.
    """

    content: bytes
    headers: dict[str, str]


def read_files() -> dict[str, PageFile]:
    """The files of the page by their path below `web/`."""
    found: dict[str, PageFile] = {}

    def visit(folder: Traversable, prefix: str) -> None:
        for entry in folder.iterdir():
            if entry.is_dir():
                visit(entry, f"{prefix}{entry.name}/")
            elif (kind := entry.name.rpartition(".")[2]) in TYPES:
                found[f"{prefix}{entry.name}"] = _page_file(prefix + entry.name, entry.read_bytes(), TYPES[kind])

    visit(files(__package__ or "") / "web", "")
    return found


def _page_file(name: str, content: bytes, kind: str) -> PageFile:
    return PageFile(content, {
        "Content-Type": kind, "ETag": f'"{hashlib.sha256(content).hexdigest()[:32]}"', "Cache-Control": "no-cache",
        "Content-Security-Policy": FRAME_POLICY if name == FRAME else POLICY, "Referrer-Policy": "no-referrer",
    })  # fmt: skip


def page_router() -> APIRouter:
    """The routes of the page."""
    found = read_files()
    router = APIRouter(include_in_schema=False)

    def answer(request: Request, name: str) -> Response:
        file = found.get(name)
        if file is None:
            raise HTTPException(404, "there is no such file")
        known = [tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")]
        if file.headers["ETag"] in known or known == ["*"]:
            return Response(status_code=304, headers=file.headers)
        return Response(file.content, headers=file.headers)

    @router.api_route("/", methods=["GET", "HEAD"])
    async def index(request: Request) -> Response:
        return answer(request, "index.html")

    @router.api_route("/web/{name:path}", methods=["GET", "HEAD"])
    async def static(request: Request, name: str) -> Response:
        return answer(request, name)

    return router

"""A model hub of one's own: the few requests that huggingface_hub makes, answered from a folder."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class FakeHub:
    """Serves `root/owner/name/...`. Use as a context manager.

    Args:
        root: folder of repositories.
        licence: of all of them.

    Attributes:
        sent: for each file, the byte ranges (first, count) that were sent, in order.
        break_after: for each file, after how many bytes its next transfer breaks off, once.
        wrong: files that arrive with other bytes than the hub says they have.
        public: repositories that everybody sees.
        refuse: the status that the hub answers to a commit; 0: it takes it.
    """

    def __init__(self, root: Path, licence: str = "apache-2.0") -> None:
        self.root, self.licence = root, licence
        self.sent: dict[str, list[tuple[int, int]]] = {}
        self.break_after: dict[str, int] = {}
        self.wrong: set[str] = set()
        self.public: set[str] = set()
        self.refuse = 0
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.address = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> FakeHub:
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.server.shutdown()
        self.server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_POST(self) -> None:
        """The requests of a push: a new repository, how files are sent (here all of them inline), and a commit."""
        data = self.rfile.read(int(self.headers["Content-Length"]))
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        if parts == ["api", "repos", "create"]:
            self._create(json.loads(data))
        elif parts[4] == "preupload":
            files = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None}
                     for f in json.loads(data)["files"]]  # fmt: skip
            self._send(200, json.dumps({"files": files}).encode(), {"Content-Type": "application/json"})
        elif self.hub.refuse:
            self._send(self.hub.refuse, b"{}", {})
        else:
            self._commit(self.hub.root / parts[2] / parts[3], data)

    def _create(self, asked: dict[str, object]) -> None:
        name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else str(asked["name"])
        folder = self.hub.root / name
        status = 409 if folder.is_dir() else 200
        if status == 200:
            folder.mkdir(parents=True)
            if asked.get("visibility") != "private" and not asked.get("private"):  # former versions say the latter
                self.hub.public.add(name)
        url = {"url": f"{self.hub.address}/{name}"}
        self._send(status, json.dumps(url).encode(), {"Content-Type": "application/json"})

    def _commit(self, folder: Path, data: bytes) -> None:
        for line in map(json.loads, data.splitlines()):
            if line["key"] == "file":
                path = folder / line["value"]["path"]
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(base64.b64decode(line["value"]["content"]))
        name = folder.relative_to(self.hub.root)
        found = {"success": True, "commitOid": COMMIT, "commitUrl": f"{self.hub.address}/{name}/commit/{COMMIT}"}
        self._send(200, json.dumps(found).encode(), {"Content-Type": "application/json"})

    def _answer(self, body: bool) -> None:
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        if parts[:2] == ["api", "models"] and "tree" in parts[4:5]:  # what snapshot_download asks for
            self._tree(self.hub.root / parts[2] / parts[3])
        elif parts[:2] == ["api", "models"]:
            self._model(self.hub.root / parts[2] / parts[3], "/".join(parts[2:4]))
        else:  # owner/name/resolve/revision/file
            self._file(self.hub.root / parts[0] / parts[1] / "/".join(parts[4:]), body)

    def _model(self, folder: Path, name: str) -> None:
        if not folder.is_dir():
            self._missing("RepoNotFound")
            return
        files = []
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            data = path.read_bytes()
            entry = {"rfilename": str(path.relative_to(folder)), "size": len(data), "blobId": "0" * 40}
            if path.suffix in (".bin", ".safetensors"):
                entry["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 100}
            files.append(entry)
        card = {"license": self.hub.licence}
        info = {"id": name, "modelId": name, "sha": COMMIT, "siblings": files, "cardData": card, "tags": [],
                "downloads": 0, "likes": 0, "private": name not in self.hub.public,
                "createdAt": "2024-01-01T00:00:00.000Z"}  # fmt: skip
        self._send(200, json.dumps(info).encode(), {"Content-Type": "application/json"})

    def _tree(self, folder: Path) -> None:
        files = []
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            data = path.read_bytes()
            entry = {"type": "file", "path": str(path.relative_to(folder)), "size": len(data), "oid": "0" * 40}
            if path.suffix in (".bin", ".safetensors"):
                entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 100}
            files.append(entry)
        self._send(200, json.dumps(files).encode(), {"Content-Type": "application/json"})

    def _file(self, path: Path, body: bool) -> None:
        if not path.is_file():
            self._missing("EntryNotFound")
            return
        data = path.read_bytes()
        headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        first, status = 0, 200
        if ranges := self.headers.get("Range"):
            first = int(ranges.removeprefix("bytes=").split("-")[0])
            status = 206
            headers["Content-Range"] = f"bytes {first}-{len(data) - 1}/{len(data)}"
        if path.name in self.hub.wrong:
            data = bytes(len(data))
        if not body:
            self._send(status, b"", headers, len(data) - first)
            return
        cut = self.hub.break_after.pop(path.name, None)
        rest = data[first:] if cut is None else data[first : first + cut]
        self.hub.sent.setdefault(path.name, []).append((first, len(rest)))
        self._send(status, rest, headers, len(data) - first)
        if cut is not None:
            self.close_connection = True

    def _missing(self, code: str) -> None:
        self._send(404, b"{}", {"X-Error-Code": code})

    def _send(self, status: int, data: bytes, headers: dict[str, str], length: int | None = None) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data) if length is None else length))
        self.end_headers()
        self.wfile.write(data)

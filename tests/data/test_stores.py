"""Sources whose files lie in a store: in memory, and behind a server of HTTP."""

from __future__ import annotations

import functools
import http.server
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest

from mm_interleaved.data import DataConfig, DataError, SourceConfig, build_loader, stores
from mm_interleaved.data.config import StoreConfig
from mm_interleaved.data.stores import Store, StoreError
from mm_interleaved.processor import MMInterleavedProcessor

from .world import loader, mmc4, numbers, pairs_source, png, write_images, write_lines, write_pairs, write_tar

NUMBER = 12


@pytest.fixture
def memory() -> Iterator[Any]:
    """The file system of fsspec in memory."""
    found = fsspec.filesystem("memory")
    yield found
    found.store.clear()
    found.pseudo_dirs[:] = [""]


@pytest.fixture
def settings(tmp_path: Path) -> StoreConfig:
    return StoreConfig(cache=str(tmp_path / "cache"), tries=3, wait=0.01)


def upload(memory: Any, folder: Path, name: str) -> str:
    memory.put(str(folder), f"/{name}", recursive=True)
    return f"memory://{name}"


class Server(http.server.SimpleHTTPRequestHandler):
    """Serves a folder; `faults` are the answers to the next requests in place of files, 0 for half of a file."""

    faults: ClassVar[list[int]] = []
    asked: ClassVar[Counter[str]] = Counter()

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.asked[self.path] += 1
        fault = self.faults.pop(0) if self.faults else None
        if fault:
            self.send_error(fault)
        elif fault == 0:
            data = Path(self.translate_path(self.path)).read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data[: len(data) // 2])
            self.close_connection = True
        else:
            super().do_GET()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """The URL of a server of `tmp_path/served`."""
    pytest.importorskip("aiohttp")
    (tmp_path / "served").mkdir()
    Server.faults, Server.asked = [], Counter()
    handler = functools.partial(Server, directory=str(tmp_path / "served"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        thread = threading.Thread(target=running.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()
        thread.join()


def tars(folder: Path, shards: int = 3) -> None:
    folder.mkdir(exist_ok=True)
    for shard in range(shards):
        files = {f"{n}.{kind}": png(n) if kind == "png" else b"Words" for n in range(shard, NUMBER, shards)
                 for kind in ("png", "txt")}  # fmt: skip
        write_tar(folder / f"{shard}.tar", files)


def archives(url: str, shards: list[str], store: StoreConfig, **options: Any) -> SourceConfig:
    defaults = {"batch_size": 1, "max_length": 24, "keep_remainder": True, "root": url}
    return SourceConfig("webdataset", shards=shards, store=store, **{**defaults, **options})


def test_every_kind_of_files_can_be_in_a_store(
    memory: Any, settings: StoreConfig, tmp_path: Path, processor: MMInterleavedProcessor
) -> None:
    write_pairs(tmp_path / "pairs", NUMBER, 2)
    tars(tmp_path / "tars")
    names = write_images(tmp_path / "mmc4/docs_shard_7_v2", NUMBER)
    records = [mmc4(["One.", "Two."], [(name, 0, 0.9)]) for name in names]
    write_lines(tmp_path / "mmc4/docs_shard_7_v2.jsonl.zip", records)
    write_images(tmp_path / "documents/images", NUMBER)
    documents = [{"segments": [{"text": "Words."}, {"image": f"images/{n}.png"}]} for n in range(NUMBER)]
    write_lines(tmp_path / "documents/all.jsonl.gz", documents)
    shared: dict[str, Any] = {"batch_size": 1, "max_length": 24, "keep_remainder": True, "store": settings}
    sources = {
        "pairs": pairs_source(Path("."), ["{0..1}.jsonl"], store=settings,
                              root=upload(memory, tmp_path / "pairs", "a")),
        "webdataset": archives(upload(memory, tmp_path / "tars", "b"), ["*.tar"], settings),
        "mmc4": SourceConfig("mmc4", root=upload(memory, tmp_path / "mmc4", "c"), single_image_prob=0.0,
                             shards=["docs_shard_{7..7}_v2.jsonl"], **shared),
        "documents": SourceConfig("documents", root=upload(memory, tmp_path / "documents", "d"),
                                  shards=["all.jsonl"], **shared),
    }  # fmt: skip
    for name, source in sources.items():
        read = loader(processor, source)
        assert sorted(numbers(read)) == list(range(NUMBER)), (name, read.report().to_dict())


def test_the_folder_of_all_sources_can_be_a_url(
    memory: Any, settings: StoreConfig, tmp_path: Path, processor: MMInterleavedProcessor
) -> None:
    tars(tmp_path / "tars")
    upload(memory, tmp_path / "tars", "bucket/tars")
    config = DataConfig([archives("tars", ["0.tar"], settings)], root="memory://bucket", pin_memory=False)
    assert sorted(numbers(build_loader(config, processor))) == list(range(0, NUMBER, 3))


def test_names_in_records_stay_in_their_folder(
    memory: Any, settings: StoreConfig, tmp_path: Path, processor: MMInterleavedProcessor
) -> None:
    write_images(tmp_path / "secret", 1)
    names = [
        "../secret/0.png",
        "/secret/0.png",
        "memory://secret/0.png",
        "file:///etc/passwd",
        "gone.png",
        "a/../../secret/0.png",
    ]
    write_images(tmp_path / "data", 1)
    write_lines(tmp_path / "data/0.jsonl", [{"image": name, "caption": "words"} for name in ["0.png", *names]])
    upload(memory, tmp_path / "secret", "secret")
    url = upload(memory, tmp_path / "data", "data")
    read = loader(processor, pairs_source(Path("."), ["0.jsonl"], root=url, store=settings))
    assert numbers(read) == [0]
    rejected = read.report().rejected("pairs")
    assert rejected == {"image outside its folder": 3, "image is a URL": 2, "image missing": 1}


def test_what_is_missing_or_damaged_is_counted_as_in_local_files(
    memory: Any, settings: StoreConfig, tmp_path: Path, processor: MMInterleavedProcessor
) -> None:
    tars(tmp_path / "tars")
    (tmp_path / "tars/1.tar").write_bytes(b"no archive" * 100)
    source = archives(upload(memory, tmp_path / "tars", "data"), ["{0..3}.tar"], settings)
    read = loader(processor, source)
    assert set(range(0, NUMBER, 3)) <= set(numbers(read))
    rejected = read.report().rejected("webdataset")
    assert (rejected["shard missing"], rejected["shard damaged"]) == (1, 1)
    assert "memory://data/3.tar" in read.report().examples("webdataset")["shard missing"]


def test_the_cache_is_bounded_and_files_that_it_lost_are_fetched_again(
    memory: Any, tmp_path: Path, processor: MMInterleavedProcessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    tars(tmp_path / "tars", 6)
    size = (tmp_path / "tars/0.tar").stat().st_size
    small = StoreConfig(cache=str(tmp_path / "cache"), cache_gib=2.5 * size / 2**30, tries=1)
    monkeypatch.setattr(stores, "_IN_USE", -1.0)
    source = archives(upload(memory, tmp_path / "tars", "data"), ["{0..5}.tar"], small)  # all in one window
    read = loader(processor, source)
    assert sorted(numbers(read)) == list(range(NUMBER))
    assert len(list((tmp_path / "cache").glob("*/*.tar"))) <= 2
    tiny = StoreConfig(cache=str(tmp_path / "cache"), cache_gib=0.5 * size / 2**30)
    with pytest.raises(StoreError, match=r"the cache holds.*Set a larger 'store.cache_gib'"):
        list(loader(processor, archives("memory://data", ["0.tar"], tiny)))


def test_a_file_that_changes_in_use_ends_the_run(memory: Any, settings: StoreConfig, tmp_path: Path) -> None:
    memory.pipe("/data/a.txt", b"before")
    store = Store("memory://data", settings)
    copy = store.fetch("a.txt")
    assert copy is not None
    assert copy.read_bytes() == b"before"
    copy.unlink()
    time.sleep(0.01)
    memory.pipe("/data/a.txt", b"and after")
    with pytest.raises(StoreError, match="has changed since it was first read"):
        store.fetch("a.txt")
    anew = Store("memory://data", settings).fetch("a.txt")
    assert anew is not None
    assert anew.read_bytes() == b"and after"


def test_a_server_of_http(
    server: str, settings: StoreConfig, tmp_path: Path, processor: MMInterleavedProcessor
) -> None:
    """Errors that pass are tried again; a file is asked for once by all processes that share the cache."""
    tars(tmp_path / "served")
    Server.faults = [503, 0]
    source = archives(server, ["{0..2}.tar"], settings, shuffle=0, shuffle_shards=False)
    read = loader(processor, source)
    assert sorted(numbers(read)) == list(range(NUMBER))
    assert min(read.take_seconds().values()) > 0
    assert max(read.take_seconds().values()) == 0
    assert Server.asked["/0.tar"] == 3
    assert sorted(numbers(loader(processor, source, num_workers=2))) == list(range(NUMBER))
    assert Server.asked == {"/0.tar": 3, "/1.tar": 1, "/2.tar": 1}
    with pytest.raises(DataError, match=r"which servers of HTTP do not give.*\{0..99\}"):
        loader(processor, archives(server, ["*.tar"], settings))


@pytest.mark.parametrize(
    ("faults", "words"),
    [
        ([500] * 3, "did not answer in 3 tries"),
        ([0] * 3, "did not answer in 3 tries"),
        ([403], "no access.*Give credentials"),
        ([400], "the server refuses it.*Check the URL"),
    ],
)
def test_a_store_that_does_not_serve_ends_the_run(
    server: str, settings: StoreConfig, tmp_path: Path, processor: MMInterleavedProcessor, faults: list[int], words: str
) -> None:
    tars(tmp_path / "served", 1)
    Server.faults = faults
    with pytest.raises(StoreError, match=words):
        list(loader(processor, archives(server, ["0.tar"], settings)))
    assert not list((tmp_path / "cache").glob("*/*.tar"))
    assert not list((tmp_path / "cache").glob("*/.*.part"))


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("nothing://x", "cannot be opened"),
        ("simplecache::memory://x", "is a chain"),
        ("memory://gone", "shard missing"),
    ],
)
def test_a_url_that_cannot_be_used(
    settings: StoreConfig, processor: MMInterleavedProcessor, url: str, words: str
) -> None:
    with pytest.raises(DataError, match=words):
        list(loader(processor, archives(url, ["0.tar"], settings)))


def test_sources_that_need_local_files_say_so(settings: StoreConfig, processor: MMInterleavedProcessor) -> None:
    source = SourceConfig("imagefolder", root="memory://data", store=settings)
    with pytest.raises(DataError, match="'imagefolder' reads local folders only"):
        loader(processor, source)

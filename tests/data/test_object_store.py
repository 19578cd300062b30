"""Sources in an S3 bucket, which moto's server serves on this machine.

They need `pip install 'moto[s3]' s3fs flask flask-cors`, some forty packages that nothing else needs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mm_interleaved.data import SourceConfig
from mm_interleaved.data.config import StoreConfig
from mm_interleaved.data.stores import Store, StoreError
from mm_interleaved.processor import MMInterleavedProcessor

from .test_stores import NUMBER, archives, tars
from .world import loader, mmc4, numbers, write_images, write_lines

s3fs: Any = pytest.importorskip("s3fs")
pytest.importorskip("moto")
server: Any = pytest.importorskip("moto.server", reason="moto's server needs flask and flask-cors")
BUCKET = "training"


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """The URL of the server."""
    running = server.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    yield f"http://{host}:{port}"
    running.stop()


@pytest.fixture
def settings(address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StoreConfig:
    """The store's settings, with credentials in the environment, where its own tools take them."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    return StoreConfig(cache=str(tmp_path / "cache"), tries=2, wait=0.01, options={"endpoint_url": address})


@pytest.fixture
def bucket(settings: StoreConfig) -> Iterator[Any]:
    """The file system of an empty bucket."""
    found = s3fs.S3FileSystem(**settings.options)
    found.mkdir(BUCKET)
    yield found
    found.rm(BUCKET, recursive=True)


def test_archives_are_read_once_by_all_processes_and_workers(
    bucket: Any, settings: StoreConfig, tmp_path: Path, processor: MMInterleavedProcessor
) -> None:
    """Also when a run goes on with another number of processes."""
    tars(tmp_path / "tars")
    bucket.put(f"{tmp_path}/tars/", f"{BUCKET}/laion", recursive=True)
    source = archives(f"s3://{BUCKET}/laion", ["*.tar"], settings)
    assert sorted(numbers(loader(processor, source, num_workers=2))) == list(range(NUMBER))
    before = [loader(processor, source, rank=rank, world_size=2, num_workers=1) for rank in range(2)]
    read = [number for one in before for _, batch in zip(range(2), one, strict=False) for number in numbers([batch])]
    states = [one.state_dict() for one in before]
    for rank in range(3):
        after = loader(processor, source, rank=rank, world_size=3)
        after.load_states(states)
        read += numbers(after)
    assert sorted(read) == list(range(NUMBER))
    assert len(list((tmp_path / "cache").glob("*/*.tar"))) == 3


def test_lines_name_images_beside_them(
    bucket: Any, settings: StoreConfig, tmp_path: Path, processor: MMInterleavedProcessor
) -> None:
    names = write_images(tmp_path / "mmc4/images", NUMBER)
    write_lines(tmp_path / "mmc4/docs_shard_7_v2.jsonl.zip", [mmc4(["One.", "Two."], [(n, 0, 0.9)]) for n in names[1:]])
    bucket.put(f"{tmp_path}/mmc4/", f"{BUCKET}/mmc4", recursive=True)
    bucket.rm(f"{BUCKET}/mmc4/images/{names[-1]}")
    source = SourceConfig(
        "mmc4", root=f"s3://{BUCKET}/mmc4", image_root=f"s3://{BUCKET}/mmc4/images", single_image_prob=0.0,
        shards=["docs_shard_{7..8}_v2.jsonl"], batch_size=1, max_length=24, keep_remainder=True, store=settings,
    )  # fmt: skip
    read = loader(processor, source)
    assert sorted(numbers(read)) == list(range(1, NUMBER - 1))
    assert read.report().rejected("mmc4") == {"shard missing": 1, "image missing": 1, "no image left": 1}


def test_an_object_that_changes_in_use_ends_the_run(bucket: Any, settings: StoreConfig) -> None:
    bucket.pipe(f"{BUCKET}/a.txt", b"before")
    store = Store(f"s3://{BUCKET}", settings)
    copy = store.fetch("a.txt")
    assert copy is not None
    assert copy.read_bytes() == b"before"
    copy.unlink()
    bucket.pipe(f"{BUCKET}/a.txt", b"behind")
    with pytest.raises(StoreError, match="has changed since it was first read"):
        store.fetch("a.txt")


def test_no_credentials_and_no_server_end_the_run(
    settings: StoreConfig, processor: MMInterleavedProcessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    nowhere = replace(settings, options={"endpoint_url": "http://127.0.0.1:9"})
    with pytest.raises(StoreError, match="did not answer in 2 tries"):
        list(loader(processor, archives(f"s3://{BUCKET}", ["0.tar"], nowhere)))
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nowhere")
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(StoreError, match=r"no access.*Give credentials"):
        list(loader(processor, archives(f"s3://{BUCKET}", ["0.tar"], settings)))

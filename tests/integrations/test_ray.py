"""Ray Data and Ray Serve on this machine. Needs the extras `ray` and `serve`."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ray")
pytest.importorskip("httpx2")

import httpx2
import ray

from mm_interleaved.integrations.ray_data import generate_with_ray
from mm_interleaved.integrations.ray_serve import deploy
from mm_interleaved.io import InputError

pytestmark = pytest.mark.slow
SETTINGS = {"num_inference_steps": 2, "max_new_tokens": 4, "seed": 5}


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"
    ray.init(num_cpus=2, include_dashboard=False, object_store_memory=100 * 2**20)
    yield
    ray.shutdown()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_data(cluster: None, tmp_path: Path) -> None:
    """Two actors give what one gives; a shard that is lost is made again, the others are kept."""
    source = tmp_path / "stories.jsonl"
    source.write_text("".join(json.dumps({"id": n, "segments": [{"text": f"{n} cats."}, {"image": None}]}) + "\n"
                              for n in map(str, range(6))))  # fmt: skip
    work: dict[str, Any] = {"model": "debug", "shard_size": 2, "settings": SETTINGS, "num_cpus": 0.5}
    results = generate_with_ray(source, tmp_path / "two", concurrency=2, **work)
    assert [json.loads(line)["id"] for line in results.read_text().splitlines()] == list("012345")
    whole = contents(tmp_path / "two")
    results.unlink()
    (tmp_path / "two/shards/00001/results.jsonl").unlink()
    generate_with_ray(source, tmp_path / "two", concurrency=1, **work)
    assert contents(tmp_path / "two") == whole
    with pytest.raises(InputError, match="unknown setting 'steps'"):
        generate_with_ray(source, tmp_path / "bad", settings={"steps": 2})


def test_serve(cluster: None) -> None:
    from ray import serve

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    serve.run(deploy(stub=True, name="small", cpus=0.5, settings={"keys": ["secret"]}))
    try:
        client = httpx2.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=60)
        assert client.get("/v1/models").json()["error"]["code"] == "invalid_api_key"
        client.headers["authorization"] = "Bearer secret"
        body = {"model": "small", "input": "hello", "num_inference_steps": 2, "seed": 1}
        whole = client.post("/v1/responses", json=body).json()
        assert whole["status"] == "completed"
        streamed = client.post("/v1/responses", json={**body, "stream": True}).text
        last = json.loads(streamed.strip().split("\n\n")[-1].split("data: ", 1)[1])
        assert last["type"] == "response.completed"
        assert [i["type"] for i in last["response"]["output"]] == [i["type"] for i in whole["output"]]
        assert client.post("/v1/responses", json={"input": "x", "sed": 1}).status_code == 400
    finally:
        serve.shutdown()

"""The server as a Ray Serve deployment: the same application, with an engine in each replica.

    ray.serve.run(deploy(model="models/release", replicas=4, gpus=1))

Needs the extras `ray` and `serve`.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # read when Ray starts

import ray  # pyright: ignore[reportMissingImports] -- an optional extra
from fastapi import FastAPI
from ray import serve  # pyright: ignore[reportMissingImports] -- an optional extra

from ..configuration import make_config
from ..serving.app import create_app
from ..serving.config import ServeConfig
from ..serving.engine import Engine


def make_engine(model: str, name: str | None, stub: bool, config: ServeConfig) -> Engine:
    """The engine of a replica, on its GPU if it has one."""
    if stub:
        from ..serving.stub import StubEngine

        return StubEngine(name or "stub", rows=config.rows, queue=config.waiting)
    from ..pretrained import load
    from ..serving.model import make_engine as make_model_engine

    loaded = load(model, device="cuda" if ray.get_gpu_ids() else "cpu")
    return make_model_engine(loaded, name or Path(model).name, config)


def deploy(
    *, model: str = "small", name: str | None = None, replicas: int = 1, cpus: float = 1.0, gpus: float = 0.0,
    stub: bool = False, settings: dict[str, Any] | None = None,
) -> serve.Application:  # fmt: skip
    """The deployment.

    Args:
        model: a model of the package, or the folder of a checkpoint, which all nodes must see.
        name: its name for clients; None: that of the folder.
        replicas: number of replicas; each has a model and its own stored responses.
        cpus, gpus: what each of them has.
        stub: serve a stub without a model.
        settings: settings of `ServeConfig`; `host` and `port` are Ray's.

    Raises:
        ConfigError: a setting is not allowed.
    """
    chosen = dict(settings or {})
    config = make_config(chosen, ServeConfig)
    most = config.rows + config.waiting  # the server itself refuses more, with status 429

    def build() -> FastAPI:
        return create_app(make_engine(model, name, stub, make_config(chosen, ServeConfig)), config)

    deployment = serve.deployment(
        serve.ingress(build)(), name="mm-interleaved", num_replicas=replicas, max_ongoing_requests=most + 16,
        ray_actor_options={"num_cpus": cpus, "num_gpus": gpus},
    )  # fmt: skip
    return deployment.bind()

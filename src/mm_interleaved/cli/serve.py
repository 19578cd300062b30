"""`mmi serve`: an HTTP server with OpenAI's protocols."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .console import console
from .errors import UsageError
from .models import ModelOptions, note_random_weights
from .options import Adapters, AllowOtherBase, Device, Dtype, ModelName, Offload, QuantizationName

if TYPE_CHECKING:
    from ..serving.config import ServeConfig
    from ..serving.engine import Engine

NEEDED = {"fastapi": "fastapi", "uvicorn": "uvicorn", "prometheus_client": "prometheus-client", "httpx2": "httpx2"}


def serve(
    settings: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE...", help="Settings of the server, such as rows=16 limits.output_tokens=256."
        ),
    ] = None,
    *,
    model: ModelName = "small",
    adapter: Adapters = None,
    choice: Annotated[
        list[str] | None,
        typer.Option(
            "--choice", metavar="NAME=FOLDER", help="Adapter that requests choose by this name as their model."
        ),
    ] = None,
    allow_other_base: AllowOtherBase = False,
    config_file: Annotated[Path | None, typer.Option("--config", help="YAML file of settings.")] = None,
    name: Annotated[str | None, typer.Option(help="The model's name for clients; default: that of its folder.")] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen at; default: this machine only.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen at; default: 8000.", min=0, max=65535)] = None,
    device: Device = "auto",
    dtype: Dtype = None,
    quantization: QuantizationName = None,
    offload: Offload = False,
    no_page: Annotated[bool, typer.Option("--no-page", help="Serve the API without the web page at /.")] = False,
    stub: Annotated[bool, typer.Option("--stub", help="Serve a stub without a model, to test clients.")] = False,
) -> None:
    """Serve a model over HTTP: /v1/responses, /v1/chat/completions, /v1/images/generations, /v1/completions.

    API keys come from the setting `keys`, or from the environment variable MMI_API_KEYS (separated by commas).
    """
    missing = [package for module, package in NEEDED.items() if find_spec(module) is None]
    if missing:
        raise UsageError(f"mmi serve needs {', '.join(missing)}", fix="pip install 'mm-interleaved[serve]'")
    chosen = _settings(config_file, settings or [], host, port)
    chosen = replace(chosen, page=chosen.page and not no_page)
    options = ModelOptions(model, device, dtype, quantization, adapter, allow_other_base, offload)
    if stub:
        from ..serving.stub import StubEngine

        engine: Engine = StubEngine(name or "stub", rows=chosen.rows, queue=chosen.waiting)
    else:
        from ..adapters.loading import load_choices
        from ..serving.model import make_engine

        loaded = options.load()
        note_random_weights(loaded)
        if offload and chosen.rows > 1:  # else parts would be copied whenever one request writes and another draws
            console.print("[yellow]note:[/] requests are answered one after the other with --offload")
            chosen = replace(chosen, rows=1)
        choices = _choices(choice or [], name or Path(model).name, bool(adapter))
        switches = load_choices(loaded.model, choices, loaded.processor, allow_other_base)
        engine = make_engine(loaded, name or Path(model).name, chosen, {key: switches[key] for key in choices},
                             switches[None])  # fmt: skip
        limits, size = engine.limits, f"{engine.row_bytes / 2**20:,.0f} MiB"
        console.print(f"{engine.load.rows} rows of {limits.context} tokens and {limits.images} images, {size} each")
    _run(engine, chosen)


def _choices(pairs: list[str], model: str, has_adapter: bool) -> dict[str, Path]:
    """The folders of `--choice` by their names."""
    found: dict[str, Path] = {}
    for pair in pairs:
        key, sign, folder = pair.partition("=")
        if not sign or not key or not folder:
            raise UsageError(f"--choice '{pair}' must be NAME=FOLDER")
        if key == model or key in found:
            raise UsageError(f"--choice: the name '{key}' is taken", fix="Choose another one")
        found[key] = Path(folder)
    if found and has_adapter:
        raise UsageError(
            "--choice and --adapter exclude each other", fix="Merge the adapter that always acts: mmi convert"
        )
    return found


def _settings(path: Path | None, pairs: list[str], host: str | None, port: int | None) -> ServeConfig:
    """The settings of a file with the changes of the command line and of the environment."""
    import os

    from ..configuration import load_config, make_config, read_overrides
    from ..serving.config import ServeConfig

    changes = [*pairs, *([f"host={host}"] if host is not None else []), *([f"port={port}"] if port is not None else [])]
    if path is None:
        chosen = make_config(read_overrides(changes), ServeConfig)
    else:
        chosen = load_config(path, ServeConfig, changes)
    keys = [key for key in os.environ.get("MMI_API_KEYS", "").split(",") if key]
    if keys:
        chosen = replace(chosen, keys=[*chosen.keys, *keys])
    return chosen


def _run(engine: Engine, config: ServeConfig) -> None:
    """Serve until the process is asked to end."""
    import socket

    from ..serving.app import create_app
    from ..serving.server import make_server

    server = make_server(create_app(engine, config), config)
    try:
        listener = socket.create_server((config.host, config.port), backlog=2048, reuse_port=False)
    except OSError as error:
        raise UsageError(f"cannot listen at {config.host}:{config.port}: {error.strerror}",
                         fix="Choose another --port") from None  # fmt: skip
    host, port = listener.getsockname()[:2]
    console.print(f"serving '{engine.model}' at http://{host}:{port}/v1 (end with Ctrl+C)")
    if config.page:
        console.print(f"the page to write with: http://{host}:{port}/")
    if not config.keys and host not in ("127.0.0.1", "::1"):
        console.print("[yellow]note:[/] other machines can reach this server, and no key is needed; see 'keys'")
    server.run(sockets=[listener])

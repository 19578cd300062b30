"""`mmi info`: the parts, memory and cost of a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from ..io import close_name
from .console import console, output
from .errors import UsageError

if TYPE_CHECKING:
    from ..model import MMInterleavedConfig
    from ..model.cost import Cost


TYPES = {"float32": 4, "bfloat16": 2}  # bytes of a number


def info(
    model: Annotated[
        str, typer.Argument(help="release, small, debug, or the folder of a checkpoint or of an adapter.")
    ],
    images: Annotated[int, typer.Option(help="Visible images in the cost of a token.", min=1)] = 5,
    steps: Annotated[int, typer.Option(help="Denoising steps in the cost of an image.", min=1)] = 30,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show parameters by part, memory by type, and the cost of a token and of an image; or what an adapter is."""
    from ..adapters.folder import is_adapter
    from ..model.cost import measure

    if is_adapter(Path(model)):
        _show_adapter(Path(model), as_json)
        return

    config = _config(model)
    if images >= config.mmfs.max_images:
        raise UsageError(
            f"--images must be at most {config.mmfs.max_images - 1}, the most that this model distinguishes"
        )
    with console.status("counting"):
        cost = measure(config, images, steps)
        weights = _weight_bytes(config)
    if as_json:
        print(json.dumps({**vars(cost), "weight_bytes": weights}, default=vars, indent=2))
        return
    output.print(_parts_table(model, cost))
    output.print(_memory_table(cost, weights))
    output.print(_cost_table(config, cost))


def _show_adapter(folder: Path, as_json: bool) -> None:
    from ..adapters.folder import describe_adapter, read_adapter

    about = describe_adapter(read_adapter(folder))
    if as_json:
        print(json.dumps(about, indent=2, ensure_ascii=False))
        return
    table = Table(title=f"{folder}: a LoRA adapter", title_justify="left", show_header=False)
    for name, value in about.items():
        table.add_row(name, escape(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)))
    output.print(table)


def _config(model: str) -> MMInterleavedConfig:
    from ..model import MMInterleavedConfig
    from ..model.config import PRESETS

    if model in PRESETS:
        return MMInterleavedConfig.preset(model)
    if not (Path(model) / "config.json").is_file():
        presets = ", ".join(PRESETS)
        raise UsageError(
            f"'{model}' is neither a preset ({presets}) nor a folder with a config.json", fix=close_name(model, PRESETS)
        )
    try:
        return MMInterleavedConfig.from_pretrained(model)
    except (ValueError, OSError) as error:
        raise UsageError(f"the model '{model}' cannot be used: {error}") from None


def _parts_table(model: str, cost: Cost) -> Table:
    table = Table(title=f"{model}: parameters", title_justify="left")
    table.add_column("part")
    for name in ("total", "trainable", "share"):
        table.add_column(name, justify="right")
    whole = cost.parts[0].total
    for part in cost.parts:
        table.add_row(part.name, f"{part.total:,}", f"{part.trainable:,}", f"{part.total / whole:.1%}")
    return table


def _weight_bytes(config: MMInterleavedConfig) -> dict[str, int | None]:
    """Bytes of all weights by type and by quantization (with everything else in bfloat16); None: not possible."""
    import torch

    from ..checkpoints.quantization import QUANTIZATIONS, weight_bytes
    from ..model import MMInterleavedModel

    with torch.device("meta"):
        model = MMInterleavedModel(config)
    found = {name: weight_bytes(model, size) for name, size in TYPES.items()}
    return found | {kind: weight_bytes(model, TYPES["bfloat16"], kind) for kind in QUANTIZATIONS}


def _memory_table(cost: Cost, weights: dict[str, int | None]) -> Table:
    table = Table(title="memory", title_justify="left", caption="int8, fp8, int4, nf4: --quantization, in bfloat16",
                  caption_justify="left")  # fmt: skip
    table.add_column("")
    for name in ("weights", "keys and values,\n1000 tokens", "MMFS values,\none image"):
        table.add_column(name, justify="right")
    for name, size in weights.items():
        caches = (count * TYPES.get(name, TYPES["bfloat16"]) for count in (1000 * cost.cache_per_token,
                                                                           cost.cache_per_image))  # fmt: skip
        table.add_row(name, "-" if size is None else _bytes(size), *map(_bytes, caches))
    return table


def _cost_table(config: MMInterleavedConfig, cost: Cost) -> Table:
    table = Table(title="cost", title_justify="left")
    table.add_column("of")
    table.add_column("multiply-accumulates", justify="right")
    size, pixels = config.vision_config.image_size, config.image_decoder.image_size
    table.add_row("a token, no image visible", _macs(cost.token))
    table.add_row(f"a token, {cost.images} images visible", _macs(cost.token_with_images))
    table.add_row(f"encoding an image ({size} px)", _macs(cost.encode_image))
    table.add_row("a denoising step with guidance", _macs(cost.draw_step))
    table.add_row(f"generating an image ({pixels} px, {cost.steps} steps)", _macs(cost.draw_image))
    return table


def _bytes(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.1f} {unit}"
        count /= 1024
    return ""


def _macs(count: float) -> str:
    for unit in ("", "K", "M", "G", "T"):
        if count < 1000 or unit == "T":
            return f"{count:.2f} {unit}"
        count /= 1000
    return ""

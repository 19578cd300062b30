"""`mmi convert` and `mmi assemble`: conversion of checkpoints, and new models from base components."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import Progress

from ..io import atomic_folder, close_name, read_json
from .console import console, output
from .errors import UsageError
from .models import ModelOptions, find_dtype
from .options import DTYPES, AllowOtherBase

if TYPE_CHECKING:
    import torch

    from ..model import MMInterleavedConfig
    from ..processor import MMInterleavedTokenizer


def convert(
    source: Annotated[
        Path, typer.Argument(help="The original's folder or file; with --to-original one of ours.", metavar="[SOURCE]")
    ],
    target: Annotated[
        Path | None, typer.Argument(help="The folder to write; must not exist yet.", metavar="TARGET")
    ] = None,
    config: Annotated[
        str, typer.Option(help="release, small, debug, or a JSON file: our config.json or the original's settings.")
    ] = "release",
    tokenizer: Annotated[
        Path | None, typer.Option(help="SentencePiece model, or a folder with tokenizer.model (Vicuna's).")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help=f"{', '.join(DTYPES)}; default: as they are.")] = None,
    image_upscale: Annotated[
        float | None, typer.Option(help="Enlarge the images that the model sees by this factor.")
    ] = None,
    to_original: Annotated[
        bool, typer.Option("--to-original", help="Convert one of ours to the original's format.")
    ] = False,
    merge: Annotated[
        list[Path] | None, typer.Option(help="Folder of an adapter to merge into --model; several are added up.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="With --merge: the base of the adapters.")] = None,
    allow_other_base: AllowOtherBase = False,
) -> None:
    """Convert the original release's checkpoint, tensor by tensor, or write one of ours as the original's.

    mmi convert --merge ADAPTER --model BASE TARGET writes a model with the adapter's updates in its weights.
    """
    if merge:
        if target is not None or to_original or tokenizer is not None or image_upscale is not None:
            raise UsageError("--merge takes --model, --dtype and one folder, the one to write")
        if model is None:
            raise UsageError("--merge needs the base of the adapters: --model small, or --model FOLDER")
        _merge(merge, model, source, dtype, allow_other_base)
        return
    if model is not None or allow_other_base:
        raise UsageError("--model and --allow-other-base belong to --merge")
    if target is None:
        raise UsageError("name the folder to write: mmi convert SOURCE TARGET")
    if to_original and (image_upscale is not None or tokenizer is not None):
        raise UsageError("--to-original takes neither --image-upscale nor --tokenizer")
    from ..checkpoints.checkpoint import convert_to_original

    kind = find_dtype(dtype) if dtype else None
    if image_upscale is not None and image_upscale <= 0:
        raise UsageError(f"--image-upscale must be positive, not {image_upscale}")
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("checking", total=None)

        def report(what: str, done: int, total: int) -> None:
            progress.update(task, description=what, completed=done, total=total)

        if to_original:
            convert_to_original(source, target, kind, report)
        else:
            words = None if tokenizer is None else _read_tokenizer(tokenizer)
            _from_original(source, target, read_config(config), words, kind, image_upscale, report)
    output.print(f"written: {target}")
    if not to_original and tokenizer is None:
        console.print("[yellow]note:[/] without --tokenizer the folder holds no processor; add one before generating")


def _from_original(
    source: Path, target: Path, config: MMInterleavedConfig, tokenizer: MMInterleavedTokenizer | None,
    dtype: torch.dtype | None, image_upscale: float | None, report: Callable[[str, int, int], None],
) -> None:  # fmt: skip
    """Convert the original's checkpoint, with a processor if there is a tokenizer.

    Raises:
        CheckpointError: it cannot be converted, or the tokenizer does not fit the model.
    """
    from ..checkpoints.checkpoint import CheckpointError, convert_from_original
    from ..processor import MMInterleavedProcessor

    def finish(folder: Path, written: MMInterleavedConfig) -> None:
        if tokenizer is not None:
            MMInterleavedProcessor.for_model(written, tokenizer).save_pretrained(folder)

    try:
        if tokenizer is not None:
            MMInterleavedProcessor.for_model(config, tokenizer)  # before anything is written
        convert_from_original(source, target, config, dtype, image_upscale, report, finish)
    except ValueError as error:
        raise CheckpointError(str(error)) from None


def _merge(adapters: list[Path], base: str, target: Path, dtype: str | None, allow_other_base: bool) -> None:
    """Write the model `base` with adapters in its weights."""
    from ..adapters.loading import load_adapters, merge_adapters

    with atomic_folder(target) as folder:
        loaded = ModelOptions(base, "cpu").load()
        with console.status("merging"):
            load_adapters(loaded.model, adapters, loaded.processor, allow_other_base, keep_float32=True)
            merge_adapters(loaded.model)
            if dtype is not None:
                loaded.model.to(find_dtype(dtype))
                loaded.model.image_decoder.vae.float()  # it always computes in float32
            loaded.model.save_pretrained(folder)
            loaded.processor.save_pretrained(folder)
    output.print(f"written: {target}")


def read_config(name: str) -> MMInterleavedConfig:
    """A preset, our `config.json`, or the original's settings.

    Raises:
        UsageError: it is none of these.
    """
    from ..checkpoints.original import config_from_original
    from ..model import MMInterleavedConfig
    from ..model.config import PRESETS

    if name in PRESETS:
        return MMInterleavedConfig.preset(name)
    path = Path(name) / "config.json" if Path(name).is_dir() else Path(name)
    if not path.is_file():
        presets = ", ".join(PRESETS)
        raise UsageError(f"--config '{name}' is neither a preset ({presets}) nor a file", fix=close_name(name, PRESETS))
    try:
        data = read_json(path, dict)
        return config_from_original(data) if "model" in data else MMInterleavedConfig.from_dict(data)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"--config '{name}' cannot be used: {error}") from None


def _read_tokenizer(path: Path) -> MMInterleavedTokenizer:
    from ..processor import MMInterleavedTokenizer

    try:
        return MMInterleavedTokenizer.from_vocab(path)
    except (FileNotFoundError, RuntimeError, OSError) as error:
        raise UsageError(f"--tokenizer: {error}") from None


def assemble(
    target: Annotated[Path, typer.Argument(help="The folder to write; must not exist yet.")],
    llm: Annotated[Path, typer.Option(help="Folder of a language model (Llama, Mistral, Qwen2, Qwen3).")],
    clip: Annotated[Path, typer.Option(help="Folder of a CLIP.")],
    diffusion: Annotated[Path, typer.Option(help="Folder of a Stable Diffusion.")],
    tokenizer: Annotated[Path | None, typer.Option(help="SentencePiece model; default: the language model's.")] = None,
    config: Annotated[str | None, typer.Option(help="Sizes of the new parts; default: the release's, adapted.")] = None,
    dtype: Annotated[str, typer.Option(help=f"Type of the weights: {', '.join(DTYPES)}.")] = "float32",
) -> None:
    """Combine base components into a new model for training."""
    from ..checkpoints.checkpoint import CheckpointError
    from ..checkpoints.components import config_from_components, from_components
    from ..generation import MMInterleaved
    from ..processor import MMInterleavedProcessor
    from ..processor.tokenizer import add_image_tokens

    kind = find_dtype(dtype)
    for name, folder in (("--llm", llm), ("--clip", clip), ("--diffusion", diffusion)):
        if not folder.is_dir():
            raise UsageError(f"{name}: '{folder}' is not a folder")
    words = _component_tokenizer(tokenizer or llm)
    ids, vocab_size = _special_ids(words), add_image_tokens(words)[1] + 1
    with console.status("assembling"):
        chosen = read_config(config) if config else None
        try:
            chosen = chosen or config_from_components(llm, clip, diffusion, vocab_size, **ids)
            processor = MMInterleavedProcessor.for_model(chosen, words)
            model = from_components(chosen, llm, clip, diffusion, kind, MMInterleaved)
        except (ValueError, OSError, KeyError) as error:
            raise CheckpointError(str(error)) from None
        with atomic_folder(target) as folder:
            model.save_pretrained(folder)
            processor.save_pretrained(folder)
    output.print(f"written: {target}")


def _component_tokenizer(path: Path):
    """The SentencePiece model of a folder if it has one, else its transformers tokenizer."""
    if path.is_file() or (path / "tokenizer.model").is_file():
        return _read_tokenizer(path)
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path)
    except (ValueError, OSError) as error:
        raise UsageError(f"no tokenizer in '{path}': {str(error).splitlines()[0]}") from None


def _special_ids(tokenizer) -> dict[str, int]:
    """The special ids of the tokenizer. If it has no `<s>`, documents start with the end token."""
    if tokenizer.bos_token is None:
        tokenizer.bos_token = tokenizer.eos_token
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return {key: getattr(tokenizer, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}

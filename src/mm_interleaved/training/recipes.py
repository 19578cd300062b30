"""Recipes: settings for fine-tuning a model on a task or on documents of one's own.

A recipe is a file of `mmi train` without a model. Its first line is a comment that describes it. A file of one's own
may extend a recipe of the package by its name. `_base.yaml` has what all recipes share; `_lora.yaml` and `_small.yaml`
have what changes with an adapter, and with the small model.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..configuration import list_keys, load_config, read_overrides
from ..io import InputError, nearest_name
from ..pretrained import FOLDER as PACKAGED
from ..pretrained import MODELS
from .config import TrainConfig
from .recipe_list import FOLDER, list_recipes

ENDINGS = (".yaml", ".yml")


def find_recipe(name: str) -> Path:
    """The file of a recipe of the package, or the file of that path.

    Raises:
        InputError: there is none.
    """
    known = list_recipes()
    if name in known:
        return FOLDER / f"{name}.yaml"
    if name.endswith(ENDINGS) and Path(name).is_file():
        return Path(name)
    raise InputError(f"there is no recipe '{name}', and no YAML file of this name", fix=nearest_name(name, known))


def load_recipe(
    name: str,
    model: str | None = None,
    lora: str | None = None,
    output: str | None = None,
    overrides: Sequence[str] = (),
) -> TrainConfig:
    """The settings of a run by a recipe.

    Args:
        name: a recipe of the package, or a file.
        model: `small`, `debug`, the name of a plug-in's model, or the folder of a checkpoint; None: the recipe or an
            override says it.
        lora: preset of an adapter; None: all parts are trained that `freeze` does not name.
        output: folder of the run; None: `runs/finetune/NAME`, or that of the recipe's file.
        overrides: `key=value`, which replace settings.

    Raises:
        InputError: the recipe or the model does not exist, or a setting cannot be used.
    """
    path, named = find_recipe(name), read_overrides(overrides)
    given = [] if model is None else [_model(model)]
    if not given and "model" not in [*named, *list_keys(path, FOLDER)]:
        raise InputError(
            "no model is given", fix="Add --model small, or --model FOLDER with the folder of a checkpoint"
        )
    is_packaged = model is not None and model in MODELS and MODELS[model].parent == PACKAGED
    over: list[Path | dict[str, Any]] = [FOLDER / "_small.yaml"] if is_packaged else []
    # A recipe has one of the two, and an override of the other replaces it.
    over += [{other: None} for one, other in (("steps", "epochs"), ("epochs", "steps")) if named.get(one) is not None]
    if lora is not None:
        over.append(FOLDER / "_lora.yaml")
        given.append(f"adapter.preset={lora}")
    if output is not None:
        given.append(f"output={output}")
    elif path.parent == FOLDER:
        given.append(f"output=runs/finetune/{path.stem}")
    return load_config(path, TrainConfig, [*given, *overrides], over=over, library=FOLDER)


def _model(name: str) -> str:
    """The override that names the origin of the weights.

    Raises:
        InputError: there is no such model.
    """
    folder = MODELS[name] if name in MODELS else Path(name)
    if (folder / "config.json").is_file():
        return f"model.init_from.checkpoint={folder}"
    if folder.parent == PACKAGED:  # a preset without weights
        return f"model.init_from.preset={name}"
    if folder.is_dir():
        raise InputError(f"model '{name}' has no config.json in '{folder}'", fix="Give the folder of a checkpoint")
    unknown = MODELS.unknown(name)
    raise InputError(f"{unknown.problem}, and no folder has this name", fix=unknown.fix)

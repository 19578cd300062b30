"""The settings of a run as transformers' `TrainingArguments`, also those under `trainer:`."""

from __future__ import annotations

import os
from datetime import timedelta
from enum import Enum
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_type_hints

import torch
from accelerate import PartialState
from pydantic import ConfigDict, TypeAdapter, ValidationError
from transformers import Trainer, TrainingArguments
from transformers.integrations import get_available_reporting_integrations
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames

from ..io import InputError, nearest_name, read_json, sentences
from ..validation import ConfigError, short
from .config import RunConfig

SCHEDULERS = {"cosine": "cosine_with_min_lr", "constant": "constant_with_warmup", "linear": "linear"}

# Names of TrainingArguments that have a setting of their own here.
OWNED = {
    "output_dir": "output", "max_steps": "steps", "num_train_epochs": "epochs", "learning_rate": "optimizer.lr",
    "per_device_train_batch_size": "batch_size of each source in data.sources", "warmup_steps": "schedule.warmup_steps",
    "warmup_ratio": "schedule.warmup_steps", "weight_decay": "optimizer.weight_decay",
    "adam_beta1": "optimizer.betas", "adam_beta2": "optimizer.betas", "adam_epsilon": "optimizer.eps",
    "gradient_accumulation_steps": "accumulation", "max_grad_norm": "optimizer.max_grad_norm", "bf16": "precision",
    "fp16": "precision", "tf32": "tf32", "logging_steps": "log_every", "logging_strategy": "log_every",
    "save_strategy": "save_every", "save_steps": "save_every", "save_total_limit": "keep_checkpoints",
    "load_best_model_at_end": "early_stopping, whose link 'best' is the best checkpoint",
    "metric_for_best_model": "early_stopping.metric", "greater_is_better": "early_stopping.mode",
    "resume_from_checkpoint": "resume", "ignore_data_skip": "resume", "seed": "seed", "data_seed": "data.seed",
    "use_cpu": "--device cpu", "fsdp": "fsdp", "fsdp_config": "fsdp", "deepspeed": "deepspeed",
    "parallelism_config": "fsdp", "accelerator_config": "data", "train_sampling_strategy": "data",
    "group_by_length": "data.group_by_length", "average_tokens_across_devices": "losses.scale",
    "push_to_hub": "push_to_hub",
}  # fmt: skip
_OWNED_PREFIXES = {
    "gradient_checkpointing": "gradient_checkpointing", "activation_checkpointing": "gradient_checkpointing",
    "torch_compile": "compile", "eval_": "eval_every, evaluate_every", "save_": "save_every",
    "dataloader_": "data (num_workers, prefetch_factor, pin_memory)", "hub_": "push_to_hub", "ddp_find": "ddp",
    "ddp_bucket": "ddp", "ddp_broadcast": "ddp", "ddp_static": "ddp",
}  # fmt: skip
# Names without an effect here: what they act on is not part of a run of documents.
IDLE = {
    "do_train", "do_eval", "do_predict", "prediction_loss_only", "per_device_eval_batch_size", "label_names",
    "length_column_name", "remove_unused_columns", "include_for_metrics", "batch_eval_metrics",
    "label_smoothing_factor", "auto_find_batch_size", "include_num_input_tokens_seen", "use_cache", "disable_tqdm",
    "bf16_full_eval", "fp16_full_eval", "use_liger_kernel", "liger_kernel_config", "logging_nan_inf_filter",
    "restore_callback_states_from_checkpoint", "local_rank", "enable_jit_checkpoint",
}  # fmt: skip
# Schedulers that need a metric in every step, and optimizers that make their own groups of parameters.
_WITH_METRIC = ("reduce_lr_on_plateau", "greedy")
_OWN_GROUPS = ("galore", "apollo", "lomo", "layerwise")


def training_arguments(config: RunConfig, device: str | None = None) -> TrainingArguments:
    """The Trainer's own settings for a run. With `epochs`, `max_steps` is 1 until the epochs are counted.

    Raises:
        ValueError: a setting under `trainer` cannot be used; or DeepSpeed is asked for, and is not installed.
    """
    if config.deepspeed:
        zero_stage(config)
        if find_spec("deepspeed") is None:
            raise ValueError(
                "'deepspeed' is set, but DeepSpeed is not installed: pip install 'mm-interleaved[deepspeed]'"
            )
    _check_further(config)
    options: dict[str, Any] = {}
    if config.ddp.static_graph:
        if "ddp_static_graph" not in TrainingArguments.__dataclass_fields__:
            raise ValueError("'ddp.static_graph' needs a newer transformers")
        options["ddp_static_graph"] = True
    values = _own_arguments(config, device) | options | config.trainer
    if values["use_cpu"]:
        _join_on_cpu(values)
    args = TrainingArguments(**values)
    if args.n_gpu > 1:  # without torchrun the Trainer would use DataParallel over all devices
        args._n_gpu = 1
    if "optim" in config.trainer:
        try:
            Trainer.get_optimizer_cls_and_kwargs(args)
        except (ImportError, ValueError) as error:
            raise ConfigError(f"trainer.optim '{config.trainer['optim']}' cannot be used here: {error}") from None
    return args


def _join_on_cpu(values: dict[str, Any]) -> None:
    """Make the process group of several processes, because the Trainer ignores `ddp_timeout` on a CPU."""
    seconds = values.get("ddp_timeout", TrainingArguments.ddp_timeout)
    PartialState(cpu=True, backend=values.get("ddp_backend"), timeout=timedelta(seconds=seconds))


def _own_arguments(config: RunConfig, device: str | None) -> dict[str, Any]:
    first, second = config.optimizer.betas
    return {
        "output_dir": config.output,
        "max_steps": config.steps or 1,
        "gradient_accumulation_steps": config.accumulation,
        "max_grad_norm": config.optimizer.max_grad_norm,
        "learning_rate": config.optimizer.lr,
        "adam_beta1": first,
        "adam_beta2": second,
        "adam_epsilon": config.optimizer.eps,
        "lr_scheduler_type": SCHEDULERS[config.schedule.kind],
        "lr_scheduler_kwargs": {"min_lr_rate": config.schedule.min_share} if _is_plain_cosine(config) else {},
        "warmup_steps": config.schedule.warmup_steps,
        "bf16": config.precision == "bfloat16",
        "fp16": config.precision == "float16",
        "logging_steps": config.log_every,
        "logging_nan_inf_filter": False,  # it synchronises in every step
        "save_strategy": "steps" if config.save_every else "no",
        "save_steps": config.save_every or 1,
        "eval_strategy": "no",  # a callback requests it
        "report_to": [],
        "disable_tqdm": True,
        "ignore_data_skip": True,  # the pipeline restores its own position
        "remove_unused_columns": False,
        "seed": config.seed,
        "use_cpu": device == "cpu" or not torch.accelerator.is_available(),
        "ddp_find_unused_parameters": config.ddp.find_unused_parameters,
        "ddp_bucket_cap_mb": config.ddp.bucket_cap_mb,
        "ddp_broadcast_buffers": False,
        "deepspeed": config.deepspeed,
        "fsdp": "full_shard" if divides(config) else None,
        "fsdp_config": config.fsdp if divides(config) else None,
        "accelerator_config": {"even_batches": False, "dispatch_batches": False},
    }


def zero_stage(config: RunConfig) -> int:
    """What the DeepSpeed configuration of a run divides: 1 the optimizer's state, 2 gradients, too, 3 also the weights.

    0 without DeepSpeed.

    Raises:
        ConfigError: the file cannot be read, divides nothing, or contradicts the settings of the run.
    """
    if not config.deepspeed:
        return 0
    where = f"deepspeed: '{config.deepspeed}'"
    if not Path(config.deepspeed).is_file():
        raise ConfigError(f"{where} does not exist")
    try:
        settings = read_json(Path(config.deepspeed), dict)
    except InputError as error:
        raise ConfigError(f"deepspeed: {error}") from None
    zero = settings.get("zero_optimization")
    stage = zero.get("stage") if isinstance(zero, dict) else None
    if stage not in (1, 2, 3):
        raise ConfigError(f"{where} has no 'zero_optimization.stage' of 1, 2 or 3; without one every process holds all "
                          "of it, as it does without DeepSpeed")  # fmt: skip
    for name in ("optimizer", "scheduler"):
        if name in settings:
            own = "schedule" if name == "scheduler" else name
            raise ConfigError(f"{where} has '{name}', which is '{own}' here; set that and leave it out of the file")
    if stage == 3 and not zero.get("stage3_gather_16bit_weights_on_model_save"):
        raise ConfigError(f"{where} needs 'stage3_gather_16bit_weights_on_model_save: true' with stage 3; without it "
                          "'final' has no weights")  # fmt: skip
    if stage == 3 and (config.sample_every or getattr(config, "evaluate_every", 0)):
        raise ConfigError(f"{where} divides the weights (stage 3), which 'sample_every' and 'evaluate_every' need "
                          "whole; set them to 0, or take 'fsdp'")  # fmt: skip
    return stage


def divides(config: RunConfig) -> bool:
    """Whether FSDP divides the weights: it is set, and there are several processes."""
    return bool(config.fsdp) and int(os.environ.get("WORLD_SIZE", "1")) > 1


def _is_plain_cosine(config: RunConfig) -> bool:
    return config.schedule.kind == "cosine" and "lr_scheduler_type" not in config.trainer


# ---- the settings under `trainer`


def _check_further(config: RunConfig) -> None:
    """Check names and values under `trainer`.

    Raises:
        ConfigError: a name is unknown, has a setting of its own, or has no effect; or a value is not possible.
    """
    hints = get_type_hints(TrainingArguments)
    known = [name for name in TrainingArguments.__dataclass_fields__ if not _owner(name) and name not in IDLE]
    for name, value in config.trainer.items():
        if own := _owner(name):
            raise ConfigError(f"trainer.{name} is '{own}' here; set that and leave it out of 'trainer'")
        if name in IDLE:
            raise ConfigError(f"trainer.{name} has no effect on runs of this package; leave it out")
        if name not in known:
            raise ConfigError(sentences(f"unknown key '{name}' in trainer", nearest_name(name, known)))
        _check_value(name, value, hints[name])
    _check_choices(config)


def _owner(name: str) -> str:
    """The setting of this package that a name of `TrainingArguments` stands for; "": none."""
    return OWNED.get(name) or next((own for prefix, own in _OWNED_PREFIXES.items() if name.startswith(prefix)), "")


def _check_value(name: str, value: Any, kind: Any) -> None:
    choices: dict[str, type[Enum]] = {"optim": OptimizerNames, "lr_scheduler_type": SchedulerType}
    if name in choices:
        names = [str(choice.value) for choice in choices[name]]
        if value not in names:
            raise ConfigError(
                sentences(f"trainer.{name}: unknown value {short(value)}", nearest_name(str(value), names))
            )
        return
    try:
        TypeAdapter(kind, config=ConfigDict(strict=True, arbitrary_types_allowed=True)).validate_python(value)
    except ValidationError as error:
        raise ConfigError(f"trainer.{name}: {error.errors()[0]['msg']}, not {short(value)}") from None


def _check_choices(config: RunConfig) -> None:
    """Check what the values need: packages, and settings that they replace."""
    given = config.trainer
    trackers = given.get("report_to") or []
    trackers = [trackers] if isinstance(trackers, str) else trackers
    for tracker in trackers:
        if tracker == "tensorboard":
            raise ConfigError("trainer.report_to: TensorBoard files are written by 'tensorboard: true'; leave it out")
        if tracker not in ("all", "none", *get_available_reporting_integrations()):
            raise ConfigError(f"trainer.report_to: '{tracker}' is no tracker that is installed here; for wandb: pip "
                              "install wandb; without one, leave it out (log.jsonl has all values)")  # fmt: skip
    optim, schedule = str(given.get("optim", "")), given.get("lr_scheduler_type")
    if optim and config.optimizer.kind != "adamw":
        raise ConfigError(f"trainer.optim and 'optimizer.kind: {config.optimizer.kind}' both name an optimizer; "
                          "leave one out")  # fmt: skip
    if any(part in optim for part in _OWN_GROUPS):
        raise ConfigError(f"trainer.optim '{optim}' makes its own groups of parameters, and 'optimizer.groups' gives "
                          "each group its rate here; choose another optimizer")  # fmt: skip
    if schedule in _WITH_METRIC:
        raise ConfigError(f"trainer.lr_scheduler_type '{schedule}' follows a metric of the Trainer's evaluation, which "
                          "is not used here; choose another schedule, or use early_stopping")  # fmt: skip
    if schedule and config.schedule.min_share:
        raise ConfigError("trainer.lr_scheduler_type replaces 'schedule.kind', so 'schedule.min_share' has no effect; "
                          "leave it out")  # fmt: skip

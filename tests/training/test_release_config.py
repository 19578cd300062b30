"""`configs/release.yaml` key by key: every setting of the original's pre-training, and what became of it here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from mm_interleaved.configuration import load_config
from mm_interleaved.evaluation import EvaluateConfig
from mm_interleaved.training.config import TrainConfig
from mm_interleaved.validation import ConfigError

CONFIGS = Path(__file__).parents[2] / "configs"


class Setting(NamedTuple):
    """A setting of the original.

    Attributes:
        name: its name there.
        original: its value there.
        here: where it is in the configuration; "": nowhere.
        value: what it is here, if that differs.
        why: the reason for a difference or for its absence; "": it is equal.
    """

    name: str
    original: Any
    here: str = ""
    value: Any = None
    why: str = ""


SETTINGS = [
    Setting("max_steps", 15000, "steps"),
    Setting("warmup_steps", 1000, "schedule.warmup_steps"),
    Setting("lr_scheduler_type", "cosine", "schedule.kind"),
    Setting("learning_rate", 1e-4, "optimizer.lr"),
    Setting("adam_beta1, adam_beta2", [0.9, 0.995], "optimizer.betas"),
    Setting("adam_epsilon", 1e-6, "optimizer.eps"),
    Setting("weight_decay", 0.05, "optimizer.weight_decay"),
    Setting("max_grad_norm", 1.0, "optimizer.max_grad_norm"),
    Setting("llama_cross_attn.gate lr, wd", [1e-4, 0.0], "optimizer.groups[0]"),
    Setting("sampling_offsets lr, wd", [1e-5, 0.0], "optimizer.groups[1]"),
    Setting("llama_cross_attn lr, wd", [1e-4, None], "optimizer.groups[2]"),
    Setting("image_decoder.decoder.unet lr, wd", [1e-5, None], "optimizer.groups[3]"),
    Setting("fp16", "float16", "precision", "bfloat16", "needs no loss scale; precision=float16 is theirs"),
    Setting("tf32", True, "tf32"),
    Setting("seed", 32, "seed"),
    Setting("gradient_accumulation_steps", 1, "accumulation"),
    Setting("gradient_checkpointing", True, "gradient_checkpointing"),
    Setting("logging_steps", 10, "log_every"),
    Setting("save_steps", 1000, "save_every"),
    Setting("save_total_limit", 5, "keep_checkpoints"),
    Setting("eval_steps", 1000, "evaluate_every"),
    Setting("resume", True, "resume", "auto", "the same"),
    Setting("ddp_find_unused_parameters", False, "ddp.find_unused_parameters"),
    Setting("loss_txt_weight", 1.0, "losses.text"),
    Setting("loss_img_weight", 10.0, "losses.image"),
    Setting("vae dtype", "float32", "losses.vae_dtype"),
    Setting("dataloader_num_workers", 8, "data.num_workers"),
    Setting("data seed", 0, "data.seed"),
    Setting("sampling_type", "longest", "data.sampling"),
    Setting("probs", [1, 1, 1, 2], "data.probabilities"),
    Setting("dataset_names", ["blip2", "laion_en", "laion_coco", "mmc4"], "data.sources[:].name"),
    Setting("per-device batches of the datasets", [2, 2, 2, 4], "data.sources[:].batch_size"),
    Setting("max_length", [2048] * 4, "data.sources[:].max_length"),
    Setting("max_images_per_sequence", [30, 30, 30, 15], "data.sources[:].max_images_per_sequence"),
    Setting("truncation", ["document", "document", "document", "image"], "data.sources[:].cut"),
    Setting("image placed first", [0.5] * 4, "data.sources[:].image_first_prob"),
    Setting("dataset_to_ignore_noimage_cond_loss", [False, True, True, False],
            "data.sources[:].ignore_text_before_image"),
    Setting("few_shot_merge probability", 0.25, "data.sources[0].few_shot_merge_prob"),
    Setting("similarity threshold", 0.24, "data.sources[3].sim_threshold"),
    Setting("most images of a document", 6, "data.sources[3].max_images"),
    Setting("fewest images of a document", 1, "data.sources[3].min_images"),
    Setting("single-image documents dropped", 0.5, "data.sources[3].single_image_prob"),
    Setting("mmc4 shards", ["data/docs_shard_*_v2.jsonl.zip"], "data.sources[3].shards"),
    Setting("laion shards", ["*.txt"], "data.sources[1].shards"),
    Setting("shuffle buffer of samples", [5000] * 4, "data.sources[:].shuffle"),
    Setting("sd_base_seed", 30000, "evaluation.seed"),
    Setting("per_device_eval_batch_size", 2, "evaluation.batch_size"),
    Setting("data sets of the validation", ["coco_karpathy", "coco", "okvqa", "textvqa"], "evaluation.tasks[:].task"),
    Setting("coco_karpathy mode generate_both", "captions, then images", why="two tasks here: coco_karpathy and coco"),
    Setting("per_device_train_batch_size", 4, why="only counts the length of an epoch there; sources have their own"),
    Setting("num_samples", "an estimate", why="rows are counted as they are read"),
    Setting("shard shuffle buffers 2000, 500", "seeded", why="shuffled as a whole, seeded by the epoch"),
    Setting("RNG of the sample shuffle", "unseeded", why="seeded, so that a run can resume; compat: unseeded_order"),
]  # fmt: skip


@pytest.fixture(scope="module")
def config() -> TrainConfig:
    return load_config(CONFIGS / "release.yaml", TrainConfig)


def find(config: TrainConfig, path: str) -> Any:
    """`a.b[0].c`, or of all items of a list `a[:].c`; a parameter group as its learning rate and weight decay."""
    value: Any = config
    for part in path.replace("[", ".[").split("."):
        if part == "[:]":
            rest = path.partition("[:].")[2]
            return [getattr(item, rest) for item in value]
        value = value[int(part[1:-1])] if part.startswith("[") else getattr(value, part)
    return [value.lr, value.weight_decay] if hasattr(value, "pattern") else value


@pytest.mark.parametrize("setting", SETTINGS, ids=[s.name.replace(" ", "-") for s in SETTINGS])
def test_every_setting_of_the_original(setting: Setting, config: TrainConfig) -> None:
    assert setting.here or setting.why, "neither a counterpart nor a reason"
    if setting.here:
        expected = setting.original if setting.value is None else setting.value
        assert find(config, setting.here) == expected
        assert (setting.value is None) == (setting.why == "")


def test_the_mixture_has_the_published_share_of_sequences(config: TrainConfig) -> None:
    weights = config.data.probabilities
    rows = sum(w * s.batch_size for w, s in zip(weights, config.data.sources, strict=True)) / sum(weights)
    assert rows == pytest.approx(2.8)


def test_deepspeed_has_the_original_values(config: TrainConfig) -> None:
    found = json.loads((CONFIGS.parent / str(config.deepspeed)).read_text())
    assert found["fp16"] | {"initial_scale_power": 16, "loss_scale_window": 250, "min_loss_scale": 1} == found["fp16"]
    stage = {"stage": 1, "allgather_partitions": True, "reduce_scatter": False, "overlap_comm": True,
             "contiguous_gradients": True, "ignore_unused_parameters": True, "allgather_bucket_size": 10**9,
             "reduce_bucket_size": 10**9}  # fmt: skip
    assert found["zero_optimization"] == stage
    assert found["prescale_gradients"]


def test_the_evaluation_computes_in_the_precision_of_the_original() -> None:
    """Its flag says fp16, but outside DeepSpeed nothing casts, so that it generates in float32."""
    assert load_config(CONFIGS / "release_tasks.yaml", EvaluateConfig).dtype == "float32"


def test_a_loss_without_data_to_compute_it_on_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"eval_every.*needs held-out data"):
        load_config(CONFIGS / "release.yaml", TrainConfig, ["eval_every=10"])

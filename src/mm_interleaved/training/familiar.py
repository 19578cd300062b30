"""Settings of other trainers and what they are called here, for the message about an unknown key.

The names are those of transformers, LLaMA-Factory, axolotl, ms-swift and Unsloth.
"""

from __future__ import annotations

from collections.abc import Mapping

_SOURCE = "data.sources[0]"
_NAMES: dict[str, str] = {  # ours: theirs
    "model.init_from.checkpoint": "model_name_or_path model_name base_model model_id pretrained_model_name_or_path",
    "model.tokenizer": "tokenizer_name tokenizer_name_or_path",
    "output": "output_dir",
    "seed": "random_seed",
    "data.seed": "data_seed",
    # Adapters
    "adapter.preset": "finetuning_type train_type tuner_type peft use_lora use_peft lora_enable lora",
    "adapter.rank": "lora_rank lora_r r",
    "adapter.alpha": "lora_alpha",
    "adapter.dropout": "lora_dropout",
    "adapter.targets": "lora_target lora_target_modules target_modules lora_target_linear",
    "adapter.dora": "use_dora peft_use_dora",
    "adapter.rslora": "use_rslora peft_use_rslora",
    "adapter.init_from": "adapter_name_or_path lora_model_dir adapters resume_from_adapter",
    "model.quantize": "load_in_8bit load_in_4bit quantization_bit quant_bits quantization quant_method qlora",
    # Frozen parts
    "freeze=[vision]": "freeze_vit freeze_vision_tower freeze_vision freeze_vision_encoder freeze_aligner "
    "freeze_multi_modal_projector freeze_visual_tokenizer",
    "freeze=[llm]": "freeze_llm freeze_language_model freeze_backbone",
    "freeze=[image_decoder]": "freeze_unet freeze_diffusion",
    # Data
    "data.sources": "dataset datasets train_dataset train_file train_files data_path",
    "data.root": "dataset_dir data_dir root",
    f"{_SOURCE}.image_root": "media_dir image_folder image_dir",
    "data.max_length": "cutoff_len max_seq_length max_seq_len sequence_len model_max_length max_length",
    f"{_SOURCE}.packing": "packing sample_packing",
    f"{_SOURCE}.attention": "neat_packing",
    f"{_SOURCE}.too_long": "truncation_strategy excess_length_strategy",
    f"{_SOURCE}.augment": "augmentation augmentations",
    f"{_SOURCE}.options.limit": "max_samples max_train_samples",
    "data.group_by_length": "group_by_length",
    "data.batch_size": "per_device_train_batch_size micro_batch_size train_batch_size batch_size",
    "data.num_workers": "dataloader_num_workers preprocessing_num_workers dataset_num_proc num_workers",
    "data.prefetch_factor": "dataloader_prefetch_factor",
    "data.pin_memory": "dataloader_pin_memory",
    "data.pad_to_max_length": "pad_to_sequence_len pad_to_max_length",
    "data.sampling": "mix_strategy stopping_strategy",
    "data.probabilities": "interleave_probs dataset_prob",
    "eval_data": "val_size val_set_size split_dataset_ratio eval_dataset val_dataset validation_file test_datasets",
    "eval_data.batch_size": "per_device_eval_batch_size eval_batch_size",
    # Length and optimizer
    "epochs": "num_train_epochs num_epochs n_epochs",
    "steps": "max_steps train_steps total_steps",
    "accumulation": "gradient_accumulation_steps grad_accum accumulate_grad_batches",
    "optimizer.lr": "learning_rate lr",
    "optimizer.groups": "vit_lr aligner_lr mm_projector_lr vision_tower_lr lr_groups",
    "optimizer.betas": "adam_beta1 adam_beta2 betas",
    "optimizer.eps": "adam_epsilon adam_eps",
    "optimizer.weight_decay": "weight_decay",
    "optimizer.max_grad_norm": "max_grad_norm gradient_clipping gradient_clip_val",
    "schedule.kind": "lr_scheduler_type lr_scheduler scheduler",
    "schedule.warmup_steps": "warmup_steps warmup_ratio num_warmup_steps",
    "precision": "bf16 fp16 pure_bf16 mixed_precision torch_dtype dtype",
    "gradient_checkpointing": "use_gradient_checkpointing activation_checkpointing",
    "compile": "torch_compile",
    # During the run
    "log_every": "logging_steps",
    "save_every": "save_steps save_strategy saves_per_epoch",
    "keep_checkpoints": "save_total_limit",
    "eval_every": "eval_steps eval_strategy evaluation_strategy evals_per_epoch",
    "evaluate_every": "predict_with_generate",
    "sample_every": "sample_steps validation_epochs num_validation_images",
    "samples.documents": "validation_prompt validation_prompts",
    "resume": "resume_from_checkpoint overwrite_output_dir",
    "early_stopping.patience": "early_stopping_patience",
    "early_stopping.metric": "metric_for_best_model load_best_model_at_end",
    "trainer.report_to": "report_to wandb_project",
    "trainer.run_name": "run_name wandb_name wandb_run_id",
    "trainer.optim": "optim",
    "trainer.hub_model_id": "hub_model_id",
    # Losses
    "losses.image": "image_loss_weight diffusion_loss_weight",
    "losses.text": "text_loss_weight",
}  # fmt: skip
FAMILIAR: Mapping[str, str] = {
    **{name: f"Here it is '{ours}'" for ours, theirs in _NAMES.items() for name in theirs.split()},
    **dict.fromkeys(
        ("image_max_pixels", "image_min_pixels", "image_resolution", "max_pixels", "min_pixels", "resolution"),
        "The model has one size of images; it is part of its configuration, and 'model.overrides' can change it",
    ),
    **dict.fromkeys(
        ("template", "chat_template", "conversation_template"),
        f"Here it is '{_SOURCE}.options.prompt' of a task; messages have the template of the document forms",
    ),
    **dict.fromkeys(
        ("train_on_prompt", "mask_history", "train_on_inputs", "completion_only_loss", "assistant_only_loss"),
        "Only answers have a loss; a message with 'loss': false has none either",
    ),
    **dict.fromkeys(("stage", "do_train", "task_type"), "The recipe says what is trained; leave it out"),
    **dict.fromkeys(
        ("flash_attn", "flash_attention", "attn_impl", "attn_implementation", "sdp_attention", "trust_remote_code"),
        "Nothing has to be set; leave it out",
    ),
}


def suggest(name: str) -> str:
    """Return a sentence with our name for a setting of another trainer; "": it is unknown."""
    return FAMILIAR.get(name.strip("-").replace("-", "_").lower(), "")

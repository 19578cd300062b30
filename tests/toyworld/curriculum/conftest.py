"""Settings of a run of a part that takes a second."""

from __future__ import annotations

from ...training.conftest import ROOT, _one_thread, logged, whole_model

__all__ = ["PART", "ROOT", "_one_thread", "logged", "whole_model"]

PART = [
    "model.init_from.preset=debug", "precision=float32", "tensorboard=false", "steps=6", "save_every=3", "log_every=1",
    "eval_every=0", "eval_batches=1", "schedule.warmup_steps=0", "schedule.kind=constant", "optimizer.lr=3e-3",
    "data={batch_size: 4, num_workers: 0, count: 64}", "eval_data={batch_size: 4, num_workers: 0, count: 8}",
]  # fmt: skip  # a run of a part that takes a second

"""The model in other people's training loops: transformers' Trainer, accelerate, PEFT."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from peft import LoraConfig, PeftModelForCausalLM, get_peft_model
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments

from mm_interleaved import Batch, Document, Image, MMInterleaved, MMInterleavedProcessor, Text
from mm_interleaved.training.counting import CountingTrainer

from ..conftest import make_image

ALIKE = [Document([Text(f"{color} house"), Image(make_image(i)), Text("night")]) for i, color in enumerate("abcd")]
UNEQUAL = [
    Document([Text("a red house"), Image(make_image(1)), Text("and the same at night"), Image(make_image(2))]),
    Document([Image(make_image(3)), Text("a boat")]),
    Document([Text("no image here, but a long text about it")]),
    Document([Text("b"), Image(make_image(4))]),
]


class Collator:
    """Batches with the same noise for the same document, however documents are put together."""

    def __init__(self, model: MMInterleaved, processor: MMInterleavedProcessor, documents: list[Document]) -> None:
        self.processor, self.documents = processor, documents
        self.noise = [
            model.image_decoder.sample_noise(len(d.images), torch.Generator().manual_seed(i))
            for i, d in enumerate(documents)
        ]

    def __call__(self, documents: Sequence[Document]) -> Batch:
        batch = self.processor(documents, training=True)
        own = [self.noise[next(i for i, d in enumerate(self.documents) if d is given)] for given in documents]
        joined = {name: torch.cat([getattr(noise, name) for noise in own]) for name in vars(own[0])}
        batch["noise_samples"] = type(own[0])(**joined)
        return batch


class Gradients(TrainerCallback):
    """Keeps the gradients of the last step."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        self.found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    return TrainingArguments(
        **{
            "output_dir": str(folder), "max_steps": 1, "learning_rate": 0.0, "max_grad_norm": 0.0, "logging_steps": 1,
            "report_to": [], "disable_tqdm": True, "save_strategy": "no", "use_cpu": True, **changes,
        }
    )  # fmt: skip


def step(
    trainer_class: type[Trainer], model: MMInterleaved, collator: Any, documents: list[Document], folder: Path,
    batch: int, accumulation: int,
) -> tuple[float, dict[str, Tensor]]:  # fmt: skip
    """Loss and gradients of one optimizer step of the Trainer."""
    gradients = Gradients()
    settings = arguments(folder, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation)
    trainer = trainer_class(
        copy.deepcopy(model), settings, data_collator=collator, train_dataset=documents, callbacks=[gradients]
    )
    trainer.train()
    return trainer.state.log_history[0]["loss"], gradients.found


@pytest.mark.parametrize(("trainer_class", "documents"), [(Trainer, ALIKE), (CountingTrainer, UNEQUAL)])
def test_accumulation_changes_no_loss_and_no_gradient(
    model: MMInterleaved, processor: MMInterleavedProcessor, tmp_path: Path, trainer_class: type, documents: list
) -> None:
    """The stock Trainer where documents are alike in numbers of labels and images; counting images, for all."""
    collator = Collator(model, processor, documents)
    loss, gradients = step(trainer_class, model, collator, documents, tmp_path, 4, 1)
    again, accumulated = step(trainer_class, model, collator, documents, tmp_path, 1, 4)
    with torch.no_grad():
        expected = model.train()(**collator(documents))
    model.eval()
    assert loss == pytest.approx(float(expected.loss), rel=1e-4)  # one micro-batch: the release's means
    assert again == pytest.approx(loss, rel=1e-4)
    assert accumulated.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(accumulated[name], gradient, rtol=1e-3, atol=1e-5, msg=name)


def test_the_processor_as_collator_learns_evaluates_and_saves(
    model: MMInterleaved, processor: MMInterleavedProcessor, tmp_path: Path
) -> None:
    trainer = Trainer(
        copy.deepcopy(model),
        arguments(
            tmp_path, max_steps=6, learning_rate=3e-3, per_device_train_batch_size=2, gradient_checkpointing=True
        ),
        data_collator=lambda documents: processor(documents, training=True),
        train_dataset=UNEQUAL,
        eval_dataset=UNEQUAL[:2],
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before
    predicted = trainer.predict(UNEQUAL[:2])
    assert predicted.metrics["test_loss"] > 0
    trainer.save_model(str(tmp_path / "saved"))
    saved = MMInterleaved.from_pretrained(tmp_path / "saved")
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(saved.get_parameter(name), parameter), name


def test_predictions_are_logits_on_request(
    model: MMInterleaved, processor: MMInterleavedProcessor, tmp_path: Path
) -> None:
    def collate(documents: list[Document]) -> dict[str, Any]:
        return {**processor(documents, training=True), "return_logits": True}

    settings = arguments(tmp_path, per_device_eval_batch_size=2)
    predicted = Trainer(model, settings, data_collator=collate).predict(UNEQUAL)
    longest = processor(UNEQUAL, training=True).input_ids.shape[1]
    assert predicted.predictions.shape == (4, longest, model.config.vocab_size)
    assert predicted.label_ids.shape == (4, longest)


def test_a_loop_of_accelerate(model: MMInterleaved, processor: MMInterleavedProcessor) -> None:
    """Accumulation and autocast to bfloat16."""
    AcceleratorState._reset_state(reset_partial_state=True)  # of other tests in this process
    accelerator = Accelerator(cpu=True, mixed_precision="bf16", gradient_accumulation_steps=2)
    own = copy.deepcopy(model).train()
    loader = DataLoader(UNEQUAL, batch_size=2, collate_fn=lambda documents: processor(documents, training=True))
    optimizer = torch.optim.AdamW([p for p in own.parameters() if p.requires_grad], lr=3e-3)
    own, optimizer, loader = accelerator.prepare(own, optimizer, loader)
    losses, steps = [], 0
    for _ in range(6):
        for batch in loader:
            assert isinstance(batch, Batch)
            with accelerator.accumulate(own):
                out = own(**batch, generator=torch.Generator().manual_seed(0))
                accelerator.backward(out.loss)
                optimizer.step()
                optimizer.zero_grad()
                steps += accelerator.sync_gradients
            losses.append(out.loss_txt.item())
    assert steps == 6
    assert losses[-1] + losses[-2] < losses[0] + losses[1]


def test_lora_for_causal_language_models(
    model: MMInterleaved, processor: MMInterleavedProcessor, tmp_path: Path
) -> None:
    config = LoraConfig(r=4, task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj", "up_proj"])
    adapted = get_peft_model(copy.deepcopy(model), config)
    assert isinstance(adapted, PeftModelForCausalLM)
    frozen = {name: p.clone() for name, p in adapted.named_parameters() if not p.requires_grad}
    trainer = Trainer(
        adapted,
        arguments(tmp_path, max_steps=6, learning_rate=1e-2, per_device_train_batch_size=4),
        data_collator=lambda documents: processor(documents, training=True),
        train_dataset=UNEQUAL,
        eval_dataset=UNEQUAL,
    )
    assert trainer.model_accepts_loss_kwargs
    batch = processor(UNEQUAL, training=True)
    with torch.no_grad():
        before = adapted(**batch, loss_image_weight=0.0).loss
    trainer.train()
    with torch.no_grad():
        adapted.eval()
        assert adapted(**batch, loss_image_weight=0.0).loss < before
    for name, parameter in adapted.named_parameters():
        assert not name.endswith("lora_B.default.weight") or parameter.any(), name
        assert parameter.requires_grad or torch.equal(parameter, frozen[name]), name


@torch.no_grad()
def test_a_lora_model_generates(model: MMInterleaved, processor: MMInterleavedProcessor) -> None:
    base = copy.deepcopy(model)
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    adapted = get_peft_model(base, config).eval()
    prompts = processor(UNEQUAL[:2], padding_side="left")
    settings = {"max_new_tokens": 4, "num_beams": 1}
    found = adapted.generate(prompts, **settings)
    assert torch.equal(found, base.generate(prompts, **settings))
    with adapted.disable_adapter():
        assert torch.equal(adapted.generate(prompts, **settings), model.generate(prompts, **settings))

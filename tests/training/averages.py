"""Run by torchrun: gradients of captured steps, averaged over two processes, and what they are averages of."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from mm_interleaved.document import Document, Image, Text
from mm_interleaved.pretrained import load
from mm_interleaved.training import graphs
from mm_interleaved.training.config import LossConfig, ShapesConfig
from mm_interleaved.training.graphs import CapturedStep
from mm_interleaved.training.pipeline import prepare_documents

from ..conftest import make_image


def main() -> None:
    """The first process fits the capture, the second does in every other step."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    loaded = load("debug")
    model = DistributedDataParallel(loaded.model, find_unused_parameters=True)
    shapes = ShapesConfig(1, images=3, targets=2, conditioning=2, context=60, labelled=90, visible=3, graph=True)
    step, prepare = CapturedStep(shapes, 2), prepare_documents(loaded.model, LossConfig(), shapes)
    parameters = [p for p in loaded.model.parameters() if p.requires_grad]
    graphs.capture = lambda step, device: step  # run again instead of replayed, on a CPU
    for number in range(4):
        count = 2 if rank == 0 or number % 2 else 1
        images = [Image(make_image(number + n + 5 * rank)) for n in range(count)]
        batch = loaded.processor(Document([Text("a red house"), *images]), training=True)
        fill = {"input_ids": loaded.processor.tokenizer.pad_token_id, "attention_mask": 0, "labels": -100}
        for name, value in fill.items():
            row = batch[name]
            batch[name] = torch.nn.functional.pad(row, (0, 60 - row.shape[1]), value=value)
        inputs = prepare(batch, number, torch.device("cpu"))
        inputs.pop("stats")
        loaded.model.zero_grad()
        loaded.model(**inputs).loss.backward()
        own = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])
        both = [torch.zeros_like(own) for _ in range(2)]
        dist.all_gather(both, own)
        assert not torch.equal(*both)
        loaded.model.zero_grad()
        outputs = step(model, inputs)
        outputs.loss.backward()
        found = torch.cat([p.grad.flatten() for p in parameters])
        torch.testing.assert_close(found, (both[0] + both[1]) / 2, rtol=1e-6, atol=1e-9)
    assert (step.replayed, step.uncaptured) == ((4, 0) if rank == 0 else (2, 2))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

"""The model in lmms-eval.

    pip install 'mm-interleaved[lmms-eval]'
    python -m lmms_eval --model mm_interleaved --model_args pretrained=FOLDER,style=vqa --tasks mme --batch_size 8

lmms-eval finds it by the entry point `lmms_eval.models` of this package. Arguments: `pretrained` (`small`, `debug` or
a folder), `style` (the format of questions; see `answering.to_document`), `dtype`, `seed`, `device`, `batch_size`.
"""

from __future__ import annotations

from typing import Any

import torch
from lmms_eval.api.instance import Instance  # pyright: ignore[reportMissingImports] -- an optional extra
from lmms_eval.api.model import lmms  # pyright: ignore[reportMissingImports] -- an optional extra
from lmms_eval.models.registry_v2 import ModelManifest  # pyright: ignore[reportMissingImports] -- an optional extra

from ..evaluation.processes import start_processes
from ..pretrained import load
from .answering import STYLES, Answerer, cut, to_document, to_settings

DTYPES = ("float32", "bfloat16", "float16")
MANIFEST = ModelManifest("mm_interleaved", simple_class_path=f"{__name__}.MMInterleavedLmms")


class MMInterleavedLmms(lmms):
    """The model class of lmms-eval: `generate_until` and `loglikelihood`, but no questions of several rounds."""

    is_simple = True

    def __init__(
        self,
        pretrained: str = "small",
        style: str = "plain",
        dtype: str | None = None,
        seed: int = 0,
        batch_size: int | str = 1,
        device: str | None = None,
        **others: Any,
    ) -> None:
        super().__init__()
        if others:
            raise ValueError(f"the model has no argument '{next(iter(others))}'; it has pretrained, style, dtype, seed")
        if style not in STYLES or dtype not in (None, *DTYPES):
            raise ValueError(f"style must be one of {', '.join(STYLES)}, dtype one of {', '.join(DTYPES)}")
        if not str(batch_size).isdigit():
            raise ValueError(f"batch_size must be a number, not '{batch_size}'")
        state = start_processes(cpu=device == "cpu" or not torch.cuda.is_available())
        self._rank, self._world_size, self.style = state.process_index, state.num_processes, style
        loaded = load(pretrained, getattr(torch, dtype) if dtype else None, state.device)
        self.answerer = Answerer(loaded, int(batch_size), int(seed))

    def _images(self, doc_to_visual: Any, doc_id: int, task: str, split: str) -> list[Any]:
        found = doc_to_visual(self.task_dict[task][split][doc_id])
        return list(found) if isinstance(found, (list, tuple)) else [found]

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Generate answers. Requests with equal settings form a batch."""
        answers: dict[int, str] = {}
        groups: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(repr(sorted(request.args[1].items())), []).append(index)
        for indices in groups.values():
            documents, ids = [], []
            for index in indices:
                context, _, doc_to_visual, doc_id, task, split = requests[index].args
                documents.append(to_document(context, self._images(doc_to_visual, doc_id, task, split), self.style))
                ids.append(f"{task}/{doc_id}")
            arguments = requests[indices[0]].args[1]
            written = self.answerer.write(documents, to_settings(arguments), ids)
            for index, text in zip(indices, written, strict=True):
                answers[index] = cut(text, arguments.get("until"))
                self.cache_hook.add_partial("generate_until", requests[index].args[:2], answers[index])
        return [answers[index] for index in range(len(requests))]

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """(log-probability, whether greedy search would generate it) of every continuation."""
        documents, texts = [], []
        for request in requests:
            context, target, *rest = request.args
            images = self._images(*rest) if rest else []
            doc_id, task, split = rest[1:] if rest else (0, "", "")
            texts.append(target(self.task_dict[task][split][doc_id]) if callable(target) else target)
            documents.append(to_document(context, images, self.style))
        return list(self.answerer.score(documents, texts))

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Not supported.

        Raises:
            NotImplementedError: always; these tasks have their own functions for further rounds.
        """
        raise NotImplementedError("mm_interleaved does not answer tasks of several rounds; leave them out of --tasks")

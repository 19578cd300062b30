"""The adapter of a training run: attached to the frozen base, saved alone, and loaded again to resume."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from ..adapters.folder import AdapterInfo, package_versions, processor_info, read_adapter
from ..adapters.loading import (
    adapter_bytes,
    base_digest,
    lora_layers,
    save_adapter,
    save_settings,
    set_weights,
    start_adapter,
)
from ..generation import MMInterleaved
from ..io import InputError
from ..processor import MMInterleavedProcessor
from .config import TrainConfig


def attach_adapter(model: MMInterleaved, config: TrainConfig, frozen: Collection[str] = ()) -> MMInterleaved:
    """Add the adapter of the settings to the model, in place; only its weights are trainable then.

    Args:
        model: the base.
        config: settings of the run; without `adapter` the model does not change.
        frozen: names of the layers of the parts in `freeze`, which get no update.

    Raises:
        InputError: no layer is selected, or `adapter.init_from` cannot be used.
    """
    if config.adapter is not None:
        start_adapter(model, config.adapter, config.seed, frozen)
    return model


@dataclass
class TrainedAdapter:
    """The adapter of a run as files.

    Attributes:
        model: the model that has it.
        info: what it is trained on.
    """

    model: MMInterleaved
    info: AdapterInfo

    @classmethod
    def of(cls, config: TrainConfig, model: MMInterleaved, processor: MMInterleavedProcessor) -> TrainedAdapter | None:
        """The adapter that `attach_adapter` added to the model; None: there is none."""
        if config.adapter is None:
            return None
        tasks = [str(source.options.get("task", source.type)) for source in config.training_data.sources]
        info = AdapterInfo(
            base=base_digest(model), base_path=str(config.model.init_from.checkpoint),
            base_quantization=config.model.quantize, processor=processor_info(processor), tasks=tasks,
            preset=config.adapter.preset, seed=config.seed, versions=package_versions(),
        )  # fmt: skip
        return cls(model, info)

    def save(self, folder: Path) -> None:
        """Write it into an existing folder."""
        save_adapter(self.model, folder, self.info)

    def save_info(self, folder: Path) -> None:
        """Write its settings, and what it was trained on, into a folder; sharded checkpoints have no more of it."""
        save_settings(self.model, folder, self.info)

    def load(self, folder: Path) -> None:
        """Give it the weights of a checkpoint of the run.

        Raises:
            InputError: the folder has none, or the base has changed since.
        """
        files = read_adapter(folder)
        if files.info is not None and files.info.base != self.info.base:
            raise InputError(f"its base had the weights {files.info.base[:16]}..., and '{self.info.base_path}' now has "
                             f"{self.info.base[:16]}...", f"checkpoint '{folder}'",
                             "Restore the base, or start a new run")  # fmt: skip
        set_weights(self.model, files)

    def describe(self) -> str:
        """Its number of layers and its size."""
        size = adapter_bytes(self.model) / 2**20
        return f"an adapter of {size:.1f} MiB on {len(lora_layers(self.model))} layers; all else is frozen"

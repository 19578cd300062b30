"""A base and an adapter of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mm_interleaved import MMInterleaved, MMInterleavedConfig
from mm_interleaved.pretrained import load

from ..cli.conftest import mmi
from ..conftest import awaken

__all__ = ["mmi"]


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a debug model, every part of which is awake."""
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    awaken(MMInterleaved(MMInterleavedConfig.preset("debug"))).save_pretrained(folder)
    load("debug").processor.save_pretrained(folder)
    return folder

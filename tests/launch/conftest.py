"""The cluster that tests of this folder share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from .slurm import Cluster, missing


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Slurm on this machine."""
    if reason := missing():
        pytest.skip(reason)
    with Cluster(tmp_path_factory.mktemp("slurm") / "cluster") as cluster:
        yield cluster

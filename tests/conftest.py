"""Options, fixtures and the table of golden errors."""

from __future__ import annotations

import hashlib
import json
import lzma
import os
import sys
import tempfile
import tomllib
from importlib.metadata import entry_points
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is fetched; the download test brings its own hub
# diffusers imports torchao if it is there, and on a CPU that takes five lines on what cannot be loaded
os.environ.setdefault("TORCHAO_FORCE_SKIP_LOADING_SO_FILES", "1")
os.environ.setdefault("TORCH_LOGS", "-torch.utils._pytree")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of other programs: threads of tiny models wait for each other

import numpy as np
import PIL.Image
import pytest
import torch
from hypothesis import settings

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is imported; only tests of kernels choose Triton

from mm_interleaved import MMInterleaved, MMInterleavedConfig, MMInterleavedProcessor, MMInterleavedTokenizer
from mm_interleaved.model.mmfs import VisibleImages
from mm_interleaved.pretrained import TOKENIZER

# The same examples every time, so that what fails is what was changed; HYPOTHESIS_PROFILE=explore tries new ones.
settings.register_profile("same", deadline=None, derandomize=True)
settings.register_profile("explore", deadline=None, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))


def provide_entry_points(folder: Path) -> None:
    """Make the entry points of this checkout known, here and in other processes, if none or others are installed."""
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    groups: dict[str, dict[str, str]] = project["entry-points"]
    wanted = {(group, name, value) for group, points in groups.items() for name, value in points.items()}
    if wanted <= {(point.group, point.name, point.value) for group in groups for point in entry_points(group=group)}:
        return
    info = folder / f"mm_interleaved-{project['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    lines = [f"[{group}]\n" + "".join(f"{n} = {v}\n" for n, v in points.items()) for group, points in groups.items()]
    (info / "entry_points.txt").write_text("\n".join(lines))
    sys.path.insert(0, str(folder))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))


_installed = tempfile.TemporaryDirectory()  # removed at the end of the process
provide_entry_points(Path(_installed.name))

GOLDEN_DATA = Path(__file__).parent / "golden" / "data"
GOLDEN_ERRORS = Path(__file__).parent / "golden" / "errors.json"


def golden_bytes(path: Path) -> bytes:
    """The content of a golden set's file, which may be stored compressed, as `NAME.xz`."""
    return path.read_bytes() if path.exists() else lzma.decompress(path.with_name(f"{path.name}.xz").read_bytes())


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--golden-dir", default=str(GOLDEN_DATA), help="folder of golden tensors (tests/golden/README.md)")
    parser.addoption("--write-golden-errors", action="store_true", help="write tests/golden/errors.json anew")


def golden_identity(folder: Path) -> str:
    """A digest that tells a golden set from others."""
    return hashlib.sha256(b"".join(golden_bytes(folder / name) for name in ("config.json", "cases.json"))).hexdigest()


def write_errors(folder: Path, rows: list[tuple[str, str, float, float, float | None]]) -> Path:
    """Write the largest error of every tensor of a set, as measured now."""
    errors: dict[str, dict[str, float]] = {}
    for case, name, error, _, _ in rows:
        of_case = errors.setdefault(case, {})
        of_case[name] = max(of_case.get(name, 0.0), float(f"{error:.3e}"))
    GOLDEN_ERRORS.write_text(json.dumps({"set": golden_identity(folder), "errors": errors}, indent=1) + "\n")
    return GOLDEN_ERRORS


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)  # the models are tiny; more threads only wait for each other


def pytest_sessionstart() -> None:
    if "PYTEST_XDIST_WORKER" in os.environ:  # many tests follow; for a single one it would take longer than the test
        from .programs import start_server

        start_server()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if any(m.kwargs.get("reason") == "Triton is not installed" for m in item.iter_markers("skipif")):
            item.add_marker("kernels")
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    reports = [r for kind in ("", "passed", "failed") for r in terminalreporter.stats.get(kind, [])]
    rows = sorted(
        row for r in reports for name, rows in r.user_properties if name == "golden" for row in map(tuple, rows)
    )
    if not rows:
        return
    terminalreporter.section("golden parity: largest error of every tensor")
    terminalreporter.write_line(f"{'case':44} {'tensor':52} {'error':>9} {'allowed':>9} {'float32 noise':>13}")
    for case, name, error, allowed, noise in rows:
        floor = "-" if noise is None else f"{noise:.1e}"
        terminalreporter.write_line(f"{case:44} {name:52} {error:9.1e} {allowed:9.1e} {floor:>13}")
    if config.getoption("--write-golden-errors"):
        terminalreporter.write_line(f"written: {write_errors(Path(config.getoption('--golden-dir')), rows)}")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def awaken(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Give every parameter that starts at zero a value, so that gates, offsets and zero convolutions matter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.fixture(scope="session")
def debug_config() -> MMInterleavedConfig:
    return MMInterleavedConfig.preset("debug")


@pytest.fixture(scope="session")
def tokenizer() -> MMInterleavedTokenizer:
    return MMInterleavedTokenizer.from_vocab(TOKENIZER)


@pytest.fixture(scope="session")
def processor(debug_config: MMInterleavedConfig, tokenizer: MMInterleavedTokenizer) -> MMInterleavedProcessor:
    return MMInterleavedProcessor.for_model(debug_config, tokenizer)


@pytest.fixture(scope="session")
def model(debug_config: MMInterleavedConfig) -> MMInterleaved:
    """A debug model, every part of it awake. Shared: leave its weights alone."""
    torch.manual_seed(0)
    return awaken(MMInterleaved(debug_config)).eval()


def make_image(seed: int = 0, size: tuple[int, int] = (90, 60)) -> PIL.Image.Image:
    """An image with some structure in it."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (6, 9, 3), dtype=np.uint8)
    return PIL.Image.fromarray(coarse).resize(size, PIL.Image.Resampling.BICUBIC)


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    """Three image files in a folder of their own."""
    paths = [tmp_path / f"{i}.png" for i in range(3)]
    for i, path in enumerate(paths):
        make_image(i).save(path)
    return paths


def visible_in_mask(mask: torch.Tensor) -> VisibleImages:
    """Visible images of a dense mask [B, Q, n], 1 = visible, where row b has the images b * n to b * n + n - 1.

    There are B * Q groups of one query each.
    """
    batch, queries, n = mask.shape
    newest_first = mask.bool().flip(-1).view(batch * queries, n)
    slots = max(int(newest_first.sum(-1).max()), 0) if newest_first.numel() else 0
    order = torch.argsort(newest_first.int(), dim=-1, descending=True, stable=True)[:, :slots]
    first = (torch.arange(batch, device=mask.device) * n).repeat_interleave(queries)[:, None]
    images = torch.where(newest_first.gather(1, order), first + n - 1 - order, -1)
    return VisibleImages.build(images, batch * n)

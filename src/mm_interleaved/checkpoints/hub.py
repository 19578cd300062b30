"""Fetching the release and its base components from the model hub: what there is, how large, under which licence."""

from __future__ import annotations

import fnmatch
import hashlib
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled

from .checkpoint import CheckpointError


@dataclass(frozen=True)
class Component:
    """Something to fetch.

    Attributes:
        name: folder it goes to; "": straight into the folder that was named.
        repository: where it is on the hub.
        patterns: which files.
        purpose: what it is for.
        prefix: what their names begin with on the hub and not here.
    """

    name: str
    repository: str
    patterns: tuple[str, ...]
    purpose: str
    prefix: str = ""


_FAILURES = (HTTPError, OfflineModeIsEnabled, OSError)  # HTTPError: no connection, broken off, or refused by the hub
_SMALL = ("*.json", "*.model", "*.txt", "LICENSE*", "README.md")
RELEASE = [
    Component(
        "mm-interleaved",
        "OpenGVLab/MM-Interleaved",
        ("mm_interleaved_pretrain/*", "LICENSE*", "README.md"),
        "the released weights",
        "mm_interleaved_pretrain/",
    ),
    Component("vicuna-13b-v1.3-tokenizer", "lmsys/vicuna-13b-v1.3", _SMALL, "the tokenizer"),
]
BASE = [
    Component("vicuna-13b-v1.3", "lmsys/vicuna-13b-v1.3", ("*.bin", "*.safetensors", *_SMALL), "the language model"),
    Component(
        "clip-vit-large-patch14", "openai/clip-vit-large-patch14", ("model.safetensors", *_SMALL), "the vision tower"
    ),
    Component(
        "stable-diffusion-2-1-base",
        "stabilityai/stable-diffusion-2-1-base",
        (
            *(
                f"{part}/{name}"
                for part in ("unet", "vae")
                for name in ("*.json", "diffusion_pytorch_model.safetensors")
            ),
            *("text_encoder/*.json", "text_encoder/model.safetensors", "scheduler/*", "tokenizer/*", *_SMALL),
        ),
        "the image decoder",
    ),
]
ANNOTATIONS = [
    Component("", "OpenGVLab/MM-Interleaved", ("assets/datasets/*",), "annotations of the tasks", "assets/datasets/")
]
SETS = {"release": RELEASE, "base": BASE, "all": RELEASE + BASE, "annotations": ANNOTATIONS}
PARTIAL = ".incomplete"  # folder of what is on its way, beside what has arrived


@dataclass(frozen=True)
class RemoteFile:
    """A file on the hub: its name, size in bytes, and SHA-256 where the hub knows it."""

    name: str
    size: int
    sha256: str | None


@dataclass(frozen=True)
class Offer:
    """What the hub has of a component."""

    component: Component
    revision: str
    licence: str
    files: list[RemoteFile]

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)


def ask(component: Component, revision: str = "main") -> Offer:
    """What the hub offers.

    Raises:
        CheckpointError: the hub cannot be reached, or has no such files.
    """
    try:
        info = HfApi().model_info(component.repository, revision=revision, files_metadata=True)
    except _FAILURES as error:
        raise CheckpointError(
            f"the hub does not answer for {component.repository}: {str(error).splitlines()[0]}"
        ) from None
    chosen = [s for s in info.siblings or [] if any(fnmatch.fnmatch(s.rfilename, p) for p in component.patterns)]
    names = {s.rfilename for s in chosen}
    # Weights that exist as safetensors are not fetched a second time as pickles.
    chosen = [s for s in chosen if not (s.rfilename.endswith(".bin") and _safetensors_name(s.rfilename) in names)]
    if not chosen:
        raise CheckpointError(f"{component.repository} has none of the files {', '.join(component.patterns)}")
    files = [RemoteFile(s.rfilename, s.size or 0, s.lfs.sha256 if s.lfs else None) for s in chosen]
    licence = (info.card_data or {}).get("license") or "not stated"
    return Offer(component, info.sha or revision, licence, files)


def _safetensors_name(name: str) -> str:
    """What the same weights are called as safetensors: transformers drops `pytorch_` then, diffusers does not."""
    folder, slash, file = name.rpartition("/")
    return f"{folder}{slash}{file.removeprefix('pytorch_').removesuffix('.bin')}.safetensors"


def fetch(offer: Offer, folder: Path, progress: Callable[[RemoteFile], None] = lambda file: None) -> Path:
    """Fetch a component into `folder` / its name; what is there already and right is kept, what is partial is resumed.

    Args:
        offer: what to fetch.
        folder: where to.
        progress: called after each file.

    Raises:
        CheckpointError: a file does not arrive, or its checksum is wrong (it is removed then).
    """
    target, partial = folder / offer.component.name, folder / offer.component.name / PARTIAL
    for file in offer.files:
        path = target / file.name.removeprefix(offer.component.prefix)
        if not (path.is_file() and path.stat().st_size == file.size and _is_intact(path, file)):
            try:
                fetched = hf_hub_download(
                    offer.component.repository, file.name, revision=offer.revision, local_dir=partial
                )
            except _FAILURES as error:
                raise CheckpointError(
                    f"fetching {file.name} of {offer.component.repository} failed: {str(error).splitlines()[0]}. "
                    "Run the same command again to go on"
                ) from None
            if not _is_intact(Path(fetched), file):
                Path(fetched).unlink()
                raise CheckpointError(f"{file.name} arrived damaged and was removed. Run the same command again")
            path.parent.mkdir(parents=True, exist_ok=True)
            Path(fetched).replace(path)
        progress(file)
    shutil.rmtree(partial, ignore_errors=True)
    return target


def _is_intact(path: Path, file: RemoteFile) -> bool:
    """Whether a file has the checksum that the hub gives; True where it gives none."""
    return file.sha256 is None or _sha256(path) == file.sha256


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()

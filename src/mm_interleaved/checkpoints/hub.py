"""The model hub: fetching the release and its base components, and pushing a trained model."""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, get_token, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, OfflineModeIsEnabled
from huggingface_hub.hf_api import RepoSibling
from huggingface_hub.utils import filter_repo_objects, validate_repo_id

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
class Offer:
    """What the hub has of a component."""

    component: Component
    revision: str
    licence: str
    files: list[RepoSibling]

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size or 0 for file in self.files)


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
    chosen = list(filter_repo_objects(info.siblings or [], allow_patterns=list(component.patterns),
                                      key=lambda file: file.rfilename))  # fmt: skip
    names = {file.rfilename for file in chosen}
    # Weights that exist as safetensors are not fetched a second time as pickles.
    chosen = [f for f in chosen if not (f.rfilename.endswith(".bin") and _safetensors_name(f.rfilename) in names)]
    if not chosen:
        raise CheckpointError(f"{component.repository} has none of the files {', '.join(component.patterns)}")
    licence = (info.card_data or {}).get("license") or "not stated"
    return Offer(component, info.sha or revision, licence, chosen)


def _safetensors_name(name: str) -> str:
    """What the same weights are called as safetensors: transformers drops `pytorch_` then, diffusers does not."""
    folder, slash, file = name.rpartition("/")
    return f"{folder}{slash}{file.removeprefix('pytorch_').removesuffix('.bin')}.safetensors"


def fetch(offer: Offer, folder: Path) -> Path:
    """Fetch a component into `folder` / its name; what is there already and right is kept, what is partial is resumed.

    Args:
        offer: what to fetch.
        folder: where to.

    Raises:
        CheckpointError: a file does not arrive, or its checksum is wrong (it is removed then).
    """
    part, target = offer.component, folder / offer.component.name
    partial = target / PARTIAL
    places = [(file, target / file.rfilename.removeprefix(part.prefix)) for file in offer.files]
    wanted = [(file, place) for file, place in places if not _is_intact(place, file)]
    try:
        names = [file.rfilename for file, _ in wanted]
        if names:
            snapshot_download(part.repository, revision=offer.revision, local_dir=partial, allow_patterns=names)
    except _FAILURES as error:
        raise CheckpointError(f"fetching from {part.repository} failed: {str(error).splitlines()[0]}. "
                              "Run the same command again to go on") from None  # fmt: skip
    for file, place in wanted:
        if not _is_intact(partial / file.rfilename, file):
            (partial / file.rfilename).unlink()
            raise CheckpointError(f"{file.rfilename} arrived damaged and was removed. Run the same command again")
        place.parent.mkdir(parents=True, exist_ok=True)
        (partial / file.rfilename).replace(place)
    shutil.rmtree(partial, ignore_errors=True)
    return target


def _is_intact(path: Path, file: RepoSibling) -> bool:
    """Whether a file is there, with the size and checksum that the hub gives, as far as it gives them."""
    if not path.is_file() or path.stat().st_size != file.size:
        return False
    if file.lfs is None:
        return True
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest() == file.lfs.sha256


def check_push(repository: str) -> None:
    """Check what can be checked before there is a model to push.

    Raises:
        CheckpointError: the name is no name of a repository, or nobody is logged in.
    """
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise CheckpointError(f"push_to_hub.repo: {str(error).splitlines()[0]}") from None
    if get_token() is None:
        raise CheckpointError("push_to_hub needs an account of the hub: log in with `hf auth login`, or set HF_TOKEN")


def push(folder: Path, repository: str, private: bool) -> str:
    """Push the files of a model's folder as one commit. Returns the address of the repository.

    Args:
        folder: folder of the model.
        repository: `OWNER/NAME`; created if it does not exist.
        private: whether only its owner sees it.

    Raises:
        CheckpointError: the hub cannot be reached or refuses; or the repository is public and should be private.
    """
    api = HfApi()
    try:
        address = api.create_repo(repository, private=private, exist_ok=True)
        if private and not api.model_info(repository).private:
            raise CheckpointError(f"the repository {repository} is public, and push_to_hub.private is true; make it "
                                  "private, or set push_to_hub.private: false")  # fmt: skip
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Upload the trained model")
    except (*_FAILURES, HfHubHTTPError) as error:
        raise CheckpointError(f"{repository}: {(str(error).splitlines() or [type(error).__name__])[0]}") from None
    return str(address)

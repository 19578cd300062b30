"""The final model is pushed to a hub, here one of our own; a failed push changes nothing in the folder of the run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from mm_interleaved.pretrained import TOKENIZER, load
from mm_interleaved.training.config import TrainingError
from mm_interleaved.training.run import train

from ..cli.fake_hub import FakeHub
from .stand_in import Colors


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    monkeypatch.setenv("HF_TOKEN", "hf_of_this_test")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    with FakeHub(tmp_path / "hub") as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.address)
        yield hub


PUSH = ("steps=1", "save_every=1", "push_to_hub.repo=me/toy")


@pytest.mark.slow
def test_the_final_model_is_pushed_once(settings, tmp_path: Path, hub: FakeHub, capsys) -> None:
    train(settings(*PUSH), TOKENIZER, "cpu", Colors)
    pushed = hub.root / "me/toy"
    own = {p.name: p.read_bytes() for p in (tmp_path / "run/final").iterdir()}
    assert {p.name: p.read_bytes() for p in pushed.iterdir()} == own
    assert load(pushed).trained
    assert not hub.public
    assert f"pushed: {hub.address}/me/toy" in " ".join(capsys.readouterr().err.split())
    (pushed / "config.json").unlink()
    train(settings(*PUSH), TOKENIZER, "cpu", Colors)  # the repository has it
    assert not (pushed / "config.json").exists()
    train(settings(*PUSH, "steps=2"), TOKENIZER, "cpu", Colors)  # other weights
    assert (pushed / "config.json").exists()


def test_a_public_repository_is_one_that_was_asked_for(settings, tmp_path: Path, hub: FakeHub) -> None:
    (hub.root / "me/toy").mkdir(parents=True)
    hub.public.add("me/toy")
    with pytest.raises(TrainingError, match=r"saved in '.*final', but was not pushed: .*me/toy is public"):
        train(settings(*PUSH), TOKENIZER, "cpu", Colors)
    assert not list((hub.root / "me/toy").iterdir())
    train(settings(*PUSH, "push_to_hub.private=false"), TOKENIZER, "cpu", Colors)
    assert (hub.root / "me/toy/config.json").is_file()


def test_a_failed_push_leaves_the_run_whole(settings, tmp_path: Path, hub: FakeHub, capsys) -> None:
    hub.refuse = 403
    with pytest.raises(TrainingError, match=r"was not pushed: me/toy: .*403.*The same command pushes it again"):
        train(settings(*PUSH), TOKENIZER, "cpu", Colors)
    assert load(tmp_path / "run/final").trained
    assert not list((hub.root / "me/toy").iterdir())
    hub.refuse = 0
    train(settings(*PUSH), TOKENIZER, "cpu", Colors)
    assert "done already" in capsys.readouterr().err
    assert (hub.root / "me/toy/model.safetensors").is_file()


@pytest.mark.parametrize(
    ("token", "repo", "message"),
    [("hf_x", "me/my toy", "push_to_hub.repo: "), (None, "me/toy", "log in with `hf auth login`, or set HF_TOKEN")],
)
def test_what_is_known_before_training(settings, tmp_path: Path, monkeypatch, token, repo: str, message: str) -> None:
    monkeypatch.setattr("mm_interleaved.checkpoints.hub.get_token", lambda: token)
    with pytest.raises(ValueError, match=message):
        train(settings(*PUSH[:2], f"push_to_hub.repo={repo}"), TOKENIZER, "cpu", Colors)
    assert not (tmp_path / "run").exists()

"""FID: the closed form, an independent implementation, pre-processing, cache, and the Inception network's file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torchmetrics.image.fid import _compute_fid

from mm_interleaved.metrics.images import FID, Statistics, frechet_distance, prepared
from mm_interleaved.metrics.inception import FEATURES, FIDInception
from tests.conftest import make_image


def covariance(rng: np.random.Generator, size: int, rank: int) -> np.ndarray:
    factor = rng.normal(size=(size, rank))
    return factor @ factor.T


class Colors(torch.nn.Module):
    """Six features: mean and spread of each colour."""

    calls = 0

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.calls += len(images)
        return torch.cat([images.mean((2, 3)), images.std((2, 3))], 1)


class TestDistance:
    def test_closed_form_of_diagonal_gaussians(self) -> None:
        mu1, mu2 = np.array([0.0, 1.0, 2.0]), np.array([1.0, 1.0, 0.0])
        spread1, spread2 = np.array([1.0, 4.0, 9.0]), np.array([4.0, 0.0, 1.0])
        expected = 5 + ((np.sqrt(spread1) - np.sqrt(spread2)) ** 2).sum()
        assert frechet_distance(mu1, np.diag(spread1), mu2, np.diag(spread2)) == pytest.approx(expected)

    @settings(max_examples=25)
    @given(st.integers(0, 2**32), st.integers(1, 8), st.integers(1, 8))
    def test_symmetric_not_negative_and_zero_for_the_same(self, seed: int, size: int, rank: int) -> None:
        rng = np.random.default_rng(seed)
        a, b = covariance(rng, size, rank), covariance(rng, size, size)
        mu, nu = rng.normal(size=(2, size))
        assert frechet_distance(mu, a, mu, a) == pytest.approx(0, abs=1e-9)
        distance = frechet_distance(mu, a, nu, b)
        assert distance >= ((mu - nu) ** 2).sum() - 1e-9
        assert distance == pytest.approx(frechet_distance(nu, b, mu, a))
        turn = np.linalg.qr(rng.normal(size=(size, size)))[0]  # turning the space changes nothing
        turned = frechet_distance(turn @ mu, turn @ a @ turn.T, turn @ nu, turn @ b @ turn.T)
        assert turned == pytest.approx(distance, rel=1e-6, abs=1e-6)

    def test_it_agrees_with_torchmetrics(self) -> None:
        rng = np.random.default_rng(0)
        a, b = covariance(rng, 16, 20), covariance(rng, 16, 20)
        mu, nu = rng.normal(size=(2, 16))
        theirs = _compute_fid(*(torch.from_numpy(part) for part in (mu, a, nu, b)))
        assert frechet_distance(mu, a, nu, b) == pytest.approx(float(theirs), rel=1e-9)


class TestPreparation:
    def test_the_middle_square_at_64_pixels(self) -> None:
        wide = PIL.Image.new("RGB", (300, 100), "red")
        wide.paste("blue", (100, 0, 200, 100))
        small, native = prepared(wide, 64), prepared(wide, None)
        assert small.shape == (3, 64, 64)
        assert native.shape == (3, 100, 100)
        assert (native == torch.tensor([0.0, 0.0, 1.0]).view(3, 1, 1)).all()
        assert small[:, :, 8:56].mean((1, 2)).tolist() == pytest.approx([0, 0, 1], abs=1e-6)

    @pytest.mark.parametrize("size", [(1, 1), (3, 500), (64, 64), (65, 64)])
    def test_any_size_and_mode(self, size: tuple[int, int]) -> None:
        for mode in ("L", "RGBA", "P"):
            ready = prepared(PIL.Image.new(mode, size), 64)
            assert ready.shape == (3, 64, 64)
            assert 0 <= ready.min() <= ready.max() <= 1

    def test_files_are_read_and_bad_ones_named(self, tmp_path: Path) -> None:
        make_image().save(tmp_path / "a.png")
        assert (prepared(tmp_path / "a.png", 64) == prepared(make_image(), 64)).all()
        (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes()[:200])
        for name, words in (("b.png", "is damaged"), ("none.png", "does not exist")):
            with pytest.raises(ValueError, match=rf"{name}' {words}"):
                prepared(tmp_path / name, 64)


class TestMetric:
    @pytest.fixture
    def images(self) -> dict[int, PIL.Image.Image]:
        return {i: make_image(i, (80 + i % 2 * 10, 70)) for i in range(8)}

    def test_identical_sets_are_at_zero_and_others_are_not(self, images: dict) -> None:
        metric = FID(extractor=Colors(), batch=3)
        same = metric(images, images)
        assert same.values == pytest.approx({"fid_64": 0, "fid_native": 0}, abs=1e-9)
        assert same.per_sample == {}
        dark = {i: PIL.Image.eval(one, lambda v: v // 4) for i, one in images.items()}
        apart = metric(dark, images)
        assert apart.values["fid_64"] > 0.05
        assert apart.values["fid_64"] != pytest.approx(apart.values["fid_native"], rel=1e-4)
        shuffled = dict(zip(images, list(images.values())[::-1], strict=True))
        assert metric(shuffled, images).values == pytest.approx(same.values, abs=1e-9)

    def test_batches_do_not_matter(self, images: dict) -> None:
        chosen = list(images.values())
        one, many = (FID(extractor=Colors(), batch=n).features(chosen, None) for n in (1, 5))
        np.testing.assert_allclose(one, many, rtol=1e-6)

    def test_references_are_read_once_and_the_cache_knows_what_it_was_made_from(
        self, images: dict, tmp_path: Path
    ) -> None:
        files = {}
        for i, one in images.items():
            files[i] = tmp_path / f"{i}.png"
            one.save(files[i])
        network, cache = Colors(), tmp_path / "cache"
        metric = FID(extractor=network, name="colors", cache=cache, resolutions=(64,))
        first = metric(images, files)
        assert network.calls == 16
        assert metric(images, files).values == first.values
        assert network.calls == 24
        assert len(list(cache.iterdir())) == 1
        make_image(99).save(files[0])
        assert metric(images, files).values["fid_64"] > 1e-6
        assert len(list(cache.iterdir())) == 2

    def test_a_cache_of_something_else_is_refused(self, tmp_path: Path) -> None:
        made = Statistics.of(np.random.default_rng(0).normal(size=(5, 3)))
        path = tmp_path / "a.npz"
        made.save(path, "here")
        again = Statistics.load(path, "here")
        np.testing.assert_array_equal(again.sigma, made.sigma)
        assert again.count == 5
        with pytest.raises(ValueError, match="made from other images"):
            Statistics.load(path, "elsewhere")
        path.write_bytes(b"not a file of arrays")
        with pytest.raises(ValueError, match="not a file of FID statistics"):
            Statistics.load(path, "here")
        np.savez(path, mu=np.array([{}], dtype=object), sigma=0, count=0, key="here")
        with pytest.raises(ValueError, match="allow_pickle"):
            Statistics.load(path, "here")

    def test_one_image_has_no_covariance(self) -> None:
        result = FID(extractor=Colors())({1: make_image()}, {1: make_image()})
        assert result.skipped == "FID needs two images or more, got 1"


class TestInception:
    def test_weights_come_back_from_both_kinds_of_file(self, tmp_path: Path) -> None:
        net = FIDInception().eval()
        state = net.state_dict() | {"fc.weight": torch.zeros(2, 2)}
        state = {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}
        save_file(state, tmp_path / "w.safetensors")
        torch.save(state, tmp_path / "w.pth")
        images = torch.rand(2, 3, 64, 64)
        with torch.inference_mode():
            expected = net(images)
            assert expected.shape == (2, FEATURES)
            for name in ("w.safetensors", "w.pth"):
                torch.testing.assert_close(FIDInception.load(tmp_path / name)(images), expected)

    def test_other_weights_are_refused(self, tmp_path: Path) -> None:
        save_file({"a": torch.zeros(1)}, tmp_path / "w.safetensors")
        (tmp_path / "w.pth").write_bytes(b"not weights")
        for name in ("w.safetensors", "w.pth"):
            with pytest.raises(ValueError, match=f"{name}: not the Inception weights"):
                FIDInception.load(tmp_path / name)

    @pytest.mark.parametrize("name", [None, "nowhere.pth"])
    def test_no_weights_are_said(self, name: str | None, tmp_path: Path) -> None:
        images = {i: make_image(i) for i in range(2)}
        result = FID(tmp_path / name if name else None)(images, images)
        assert "weight file" in result.skipped
        assert "pt_inception-2015-12-05-6726825d.pth" in result.fix

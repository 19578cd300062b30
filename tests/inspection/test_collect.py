"""Inspected generation against ordinary generation, and what it collects against the operator's results."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mm_interleaved import (
    Document,
    DocumentFinished,
    GenerationSettings,
    Image,
    ImageProgress,
    ImageSettings,
    MMInterleaved,
    MMInterleavedConfig,
    MMInterleavedPipeline,
    MMInterleavedProcessor,
    Text,
    TextSettings,
)
from mm_interleaved.generation import InterleavedGenerator
from mm_interleaved.inspection import (
    InspectedGenerator,
    Inspection,
    InspectionSettings,
    Points,
    heat_map,
    inspect,
    inspect_documents,
    load_inspection,
    region_units,
)
from mm_interleaved.inspection.page import page_data
from mm_interleaved.inspection.recorder import Recorder
from mm_interleaved.io import InputError
from mm_interleaved.model import mmfs as mmfs_module
from mm_interleaved.model.language_model import synchronizers
from mm_interleaved.model.weights import state_of, why_not_captured
from mm_interleaved.ops import deformable_attention_reference

from ..conftest import awaken, make_image

SETTINGS = GenerationSettings(
    TextSettings(max_new_tokens=5, min_new_tokens=2, num_beams=1), ImageSettings(num_inference_steps=4)
)
BEAMS = replace(SETTINGS, text=replace(SETTINGS.text, num_beams=3))
SAMPLED = replace(SETTINGS, text=replace(SETTINGS.text, do_sample=True), image=replace(SETTINGS.image, seed=3))
UNGUIDED = replace(SETTINGS, image=ImageSettings(num_inference_steps=3, guidance_scale=1.0, num_candidates=2))
BLIND = replace(SETTINGS, image=ImageSettings(num_inference_steps=2, unconditional_sees_images=False, batch_size=1))


def documents() -> list[Document]:
    """Rows with two images, one and none before their slots."""
    return [
        Document([Image(make_image(1)), Text("a red"), Image(make_image(2)), Text(), Image(), Text("b"), Text()]),
        Document([Text("a red house"), Image(), Text()]),
        Document([Text("a b c"), Text(), Text("d"), Image(), Text("e")]),
    ]


def made(document: Document) -> list[Any]:
    return [s.generated.ids if isinstance(s, Text) else np.asarray(s.source).tolist() for s in document.generated]


@pytest.fixture
def pipe(model: MMInterleaved, processor: MMInterleavedProcessor) -> MMInterleavedPipeline:
    return MMInterleavedPipeline(model, processor, SETTINGS)


@pytest.mark.parametrize(
    "settings", [SETTINGS, BEAMS, SAMPLED, UNGUIDED, BLIND],
    ids=["greedy, guided", "beams", "sampled", "unguided, two candidates", "blind half, one at a time"],
)  # fmt: skip
def test_tokens_and_images_are_those_of_ordinary_generation(
    model: MMInterleaved, processor: MMInterleavedProcessor, settings: GenerationSettings
) -> None:
    plain = InterleavedGenerator(model, processor, settings)
    ends = {e.document: e.result for e in plain.run(documents()) if isinstance(e, DocumentFinished)}
    found = inspect_documents(MMInterleavedPipeline(model, processor, settings), documents())
    assert [made(one.document) for one in found] == [made(ends[i]) for i in range(3)]
    assert [len(one.texts) for one in found] == [2, 1, 1]
    assert [len(one.images) for one in found] == [1, 1, 1]
    assert all(s.mmfs.recorder is None for s in synchronizers(model.language_model))
    for one in found:
        assert [one.document.segments[r.segment].generated.ids for r in one.texts] == [tuple(r.ids) for r in one.texts]
    assert [r.images for r in found[0].texts] == [[1, 0], [2, 1, 0]]
    assert (found[0].images[0].image, found[0].images[0].images) == (2, [1])
    assert [one.images[0].images for one in found[1:]] == [[], []]
    assert [one.texts[0].images for one in found[1:]] == [[0], []]


def parts_of(found: Inspection) -> list[Points]:
    return [r.points for r in found.texts] + [m.points for r in found.images for m in r.maps]


def test_shapes_and_sums(pipe: MMInterleavedPipeline, debug_config: MMInterleavedConfig) -> None:
    found = inspect(pipe, documents()[0], InspectionSettings(steps=[2, 4]))
    text, image = found.texts[0], found.images[0]
    config, decoder = debug_config.mmfs, debug_config.image_decoder.mmfs
    shape = (len(text.ids), len(text.layers), config.num_heads, 2)
    assert text.points.locations.shape == (*shape, config.num_points, 2)
    assert text.points.weights.shape == (*shape, len(config.levels), config.num_points)
    assert text.points.ignored.shape == shape[:3]
    assert (image.steps, image.total) == ([2, 4], 4)
    assert [m.side for m in image.maps] == [side for _, side in debug_config.image_decoder.skip_shapes()]
    for one in image.maps:
        cells = (2, one.side**2, decoder.num_heads, 1)
        assert one.points.locations.shape == (*cells, decoder.num_points, 2)
        assert one.points.weights.shape == (*cells, len(decoder.levels), decoder.num_points)
    for points in parts_of(found):
        total = points.weights.sum((-1, -2, -3)) + points.ignored
        np.testing.assert_allclose(total, 1, atol=1e-6)
        assert points.weights.min() >= 0


class Calls:
    """What the operator got and gave, for every call."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[Any, torch.Tensor, torch.Tensor]] = []
        inner = mmfs_module.mmfs_output

        def outer(inputs, ignore, *rest, **more):
            out = inner(inputs, ignore, *rest, **more)
            self.calls.append((inputs, ignore, out))
            return out

        monkeypatch.setattr(mmfs_module, "mmfs_output", outer)


def attend(points: Points, values: list[torch.Tensor], shapes, ignore: torch.Tensor) -> torch.Tensor:
    """The output [Q, N, D] from recorded points [Q, ...] and the values [S, N, D] of each earlier image."""
    total = torch.from_numpy(points.ignored)[..., None] * ignore
    for slot, value in enumerate(values):
        where = torch.from_numpy(points.locations[..., slot, :, :])[None, :, :, None]
        weights = torch.from_numpy(points.weights[..., slot, :, :])[None]
        total = total + deformable_attention_reference(value[None], shapes, where, weights)[0].view_as(total)
    return total


def test_outputs_follow_from_what_was_collected(pipe: MMInterleavedPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """The operator's output, computed again from the collected points and weights, within 1e-5."""
    calls = Calls(monkeypatch)
    document = Document([Image(make_image(1)), Text("a"), Image(make_image(2)), Text("b"), Text(), Image()])
    found = inspect(pipe, document, InspectionSettings(steps=[1, 3]))
    text, image = found.texts[0], found.images[0]
    layers, maps = len(text.layers), len(image.maps)
    first = layers * (1 + len(text.ids) - 1)  # the prompt, and a decode step for every token but the last
    for token in range(len(text.ids)):
        for layer in range(layers):
            inputs, ignore, out = calls.calls[token * layers + layer]
            values = [inputs.values[i] for i in inputs.images[-1].tolist()]
            again = attend(text.points[token, layer : layer + 1], values, inputs.shapes, ignore)
            torch.testing.assert_close(again, out[-1], atol=1e-5, rtol=1e-5)
    unet = [call for call in calls.calls[first:] if call[0].offsets.shape[1] > 1]
    assert len(unet) == 4 * maps
    for place, step in enumerate(image.steps):
        for number, one in enumerate(image.maps):
            inputs, ignore, out = unet[(step - 1) * maps + number]
            values = [inputs.values[i] for i in inputs.images[-1].tolist()]
            again = attend(one.points[place], values, inputs.shapes, ignore)
            torch.testing.assert_close(again, out[-1], atol=1e-5, rtol=1e-5)


def test_offsets_are_relative_to_the_centre_and_to_the_own_cell(pipe: MMInterleavedPipeline) -> None:
    found = inspect(pipe, documents()[0], InspectionSettings(steps=[1]))
    one = found.images[0].maps[0]
    np.testing.assert_allclose(found.texts[0].offsets, found.texts[0].points.locations - 0.5)
    assert one.reference[1].tolist() == pytest.approx([1.5 / one.side, 0.5 / one.side])
    moved = one.offsets[0, 1] + one.reference[1]
    np.testing.assert_allclose(moved, one.points.locations[0, 1], atol=1e-6)


def test_choices(pipe: MMInterleavedPipeline) -> None:
    everything = inspect(pipe, documents()[0])
    few = InspectionSettings(layers=everything.texts[0].layers[:1], heads=[1], places=[2], steps=[4])
    some = inspect(pipe, documents()[0], few)
    np.testing.assert_array_equal(some.texts[0].points.weights, everything.texts[0].points.weights[:, :1, 1:2])
    (one,) = some.images[0].maps
    assert everything.images[0].steps == [1, 2, 4]
    np.testing.assert_array_equal(one.points.weights, everything.images[0].maps[2].points.weights[2:, :, 1:2])
    assert inspect(pipe, documents()[0], InspectionSettings(layers=[])).texts == []
    no_maps = inspect(pipe, documents()[0], InspectionSettings(places=[]))
    assert no_maps.images == []
    made = [s for s in page_data(no_maps)["segments"] if s["kind"] == "image" and not s["given"]]
    assert [s["record"] for s in made] == [None]  # shown as generated, although nothing was collected of it
    for wrong in ({"layers": [1]}, {"heads": [64]}, {"places": [99]}, {"steps": [5]}):
        (name,) = wrong
        with pytest.raises(InputError, match=f"^{name}: there is no .* There are "):
            inspect(pipe, documents()[0], InspectionSettings(**wrong))


def test_too_much_is_refused_before_an_image_begins(pipe: MMInterleavedPipeline, model: MMInterleaved) -> None:
    many = InspectionSettings(layers=[], most_mib=1, steps=list(range(1, 41)))
    with pytest.raises(InputError, match=r"most_mib is 1\. Choose fewer layers, heads, places, steps or cells"):
        inspect(pipe, documents()[0], many, num_inference_steps=40)
    assert all(s.mmfs.recorder is None for s in model.image_decoder.unet.synchronizers)
    assert inspect(pipe, documents()[0], InspectionSettings(layers=[], places=[], most_mib=1)).nbytes == 0


def test_one_inspection_at_a_time_and_only_of_the_fast_form(pipe: MMInterleavedPipeline, debug_config) -> None:
    layers = [s.mmfs for s in synchronizers(pipe.model.language_model)]
    layers[-1].recorder = print
    with pytest.raises(InputError, match="inspected already"):
        inspect(pipe, documents()[1])
    assert layers[0].recorder is None
    layers[-1].recorder = None
    model = awaken(MMInterleaved(debug_config)).eval()
    synchronizers(model.language_model)[0].mmfs.implementation = "reference"
    with pytest.raises(InputError, match="mmfs_implementation"):
        inspect(MMInterleavedPipeline(model, pipe.processor, SETTINGS), documents()[1])


def test_files(pipe: MMInterleavedPipeline, tmp_path: Path) -> None:
    found = inspect(pipe, documents()[0])
    found.save(tmp_path / "saved")
    again = load_inspection(tmp_path / "saved")
    for a, b in zip(parts_of(found), parts_of(again), strict=True):
        np.testing.assert_array_equal(a.locations, b.locations)
        np.testing.assert_array_equal(a.weights, b.weights)
        np.testing.assert_array_equal(a.ignored, b.ignored)
    assert [replace(r, points=None) for r in found.texts] == [replace(r, points=None) for r in again.texts]
    assert [replace(r, maps=[]) for r in found.images] == [replace(r, maps=[]) for r in again.images]
    assert [np.asarray(a).tolist() for a in found.views] == [np.asarray(b).tolist() for b in again.views]
    assert [getattr(s, "text", None) for s in again.document.segments] == [
        getattr(s, "text", None) for s in found.document.segments
    ]
    (tmp_path / "saved" / "arrays.npz").write_bytes(b"PK")
    with pytest.raises(InputError, match=r"arrays\.npz: the arrays cannot be read"):
        load_inspection(tmp_path / "saved")


def test_fast_paths_are_the_same_before_during_and_after(pipe: MMInterleavedPipeline) -> None:
    """A recorder is no hook: derived weights are used with it, too, and captured graphs stay valid."""
    model = pipe.model
    parts = (model.language_model, model.image_decoder.unet)
    layers = synchronizers(model.language_model)
    before = state_of(*parts)
    with Recorder(model, InspectionSettings()).attached():
        assert all(s.mmfs.recorder is not None for s in layers)
        assert all(s.derive() is not None for s in layers)
        assert all(d.query is not None and d.output is not None for d in model.image_decoder.unet.derive())
        assert state_of(*parts) == before
        assert why_not_captured(*parts) is None
    assert all(s.mmfs.recorder is None for s in layers)
    assert state_of(*parts) == before


def test_what_happens_between_two_events_is_not_collected(pipe: MMInterleavedPipeline) -> None:
    """As in a server, where other requests take their steps then."""
    expected = inspect(pipe, documents()[0])
    generator = InspectedGenerator(pipe.model, pipe.processor, pipe.settings)
    for event in generator.run(documents()[:1]):
        if isinstance(event, ImageProgress) and event.step == 2:
            pipe([Image(make_image(3)), "a", Text(), Image()], num_inference_steps=1)
        if isinstance(event, DocumentFinished):
            found = generator.inspection_of(0, event)
    for a, b in zip(parts_of(found), parts_of(expected), strict=True):
        np.testing.assert_array_equal(a.weights, b.weights)


def test_levels_and_regions_of_heat_maps(pipe: MMInterleavedPipeline) -> None:
    """The sum of a heat map is the weight within the image, and levels add up."""
    found = inspect(pipe, documents()[0], InspectionSettings(cells=4))
    text = found.texts[0]
    points = text.points
    inside = ((points.locations > 0.3) & (points.locations < 0.7)).all(-1)[..., None, :]
    points.weights[:] = points.weights * inside  # far from the edges, where bilinear samples lose weight
    whole = heat_map(points, 0, text.levels)
    assert whole.sum() == pytest.approx(points.weights[..., 0, :, :].sum((-1, -2)).mean(), rel=0.05)
    single = [heat_map(points, 0, text.levels, only=[level]) for level in text.levels]
    np.testing.assert_allclose(sum(single), whole, atol=1e-6)
    (quarter,) = region_units(found.images[0], [(0, 0, 0.5, 0.5)])
    for one, chosen in zip(found.images[0].maps, quarter.points, strict=True):
        expected = one.points[:, [k for k, (x, y) in enumerate(one.reference) if x < 0.5 and y < 0.5]]
        np.testing.assert_array_equal(chosen.weights, expected.weights)
    (tiny,) = region_units(found.images[0], [(0.49, 0.49, 0.5, 0.5)])
    assert all(points.weights.shape[1] == 1 for points in tiny.points)

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import PIL.Image
import pytest

from mm_interleaved.document import Document, Image, Text
from mm_interleaved.document.boxes import SCALE
from mm_interleaved.tasks.ade20k import colored
from toyworld.documents import (
    FORM_NAMES,
    FORMS,
    DocumentMix,
    Painter,
    random_document,
    toy_document,
)
from toyworld.draw import LABELS, boxes, draw, label_map
from toyworld.kinds import KINDS
from toyworld.language import grounded, region_question, score_caption, unanswerable
from toyworld.redraw import redrawn
from toyworld.sampling import random_scene, scene_rng
from toyworld.scene import GLYPHS, Scene

from .finding import COLOR, PART, SIZE, TEXTURE, cell_of, find

SIZE_PX = 48


def only(form: str) -> DocumentMix:
    return DocumentMix(**{name: float(name == form) for name in FORM_NAMES})


def documents(form: str, count: int = 12) -> list[Document]:
    return [toy_document(3, "train", i, size=SIZE_PX, mix=only(form)) for i in range(count)]


def shape(document: Document) -> str:
    """A letter for each segment: T and I are learned, t and i are given."""
    letters = ("T" if isinstance(s, Text) else "I" for s in document.segments)
    return "".join(x if s.supervise else x.lower() for x, s in zip(letters, document.segments, strict=True))


def pixels(document: Document) -> list[bytes]:
    return [i.source.tobytes() for i in document.images]


@pytest.mark.parametrize(
    ("form", "pattern"),
    [
        ("caption", "i?t?iT|itT"), ("draw", "TI"), ("paragraph", "it?T"), ("draw_paragraph", "TI"),
        ("vqa", "(it|tit)T(tT){0,5}"), ("dialogue", "it(tT){2,8}"), ("story", "T[Ii](TI){1,5}"),
        ("story_image_first", "(iT){2,6}"), ("refer", "itT"), ("segmentation", "iTI"), ("redraw", "i(tI){1,2}"),
        ("region", "itT"), ("grounded", "itT"),
    ],
)  # fmt: skip
def test_forms(form: str, pattern: str) -> None:
    for document in documents(form):
        assert re.fullmatch(pattern, shape(document)), shape(document)
        assert all(isinstance(i.source, PIL.Image.Image) for i in document.images)
        assert all(i.source.size == (SIZE_PX, SIZE_PX) and i.source.mode == "RGB" for i in document.images)
        assert document.id.endswith(form)


def test_every_form_is_in_the_mixture() -> None:
    assert tuple(FORMS) == FORM_NAMES
    seen = {toy_document(0, "train", i, size=48).id.split("-")[-1] for i in range(200)}
    assert seen == set(FORM_NAMES)


def test_documents_are_the_same_for_the_same_numbers() -> None:
    one, two = (toy_document(1, "val", 5, size=SIZE_PX) for _ in range(2))
    assert pixels(one) == pixels(two)
    assert [s.text for s in one.segments if isinstance(s, Text)] == [
        s.text for s in two.segments if isinstance(s, Text)
    ]
    others = {tuple(pixels(toy_document(seed, split, i, size=SIZE_PX)))
              for seed in (1, 2) for split in ("val", "test") for i in (5, 6)}  # fmt: skip
    assert len(others) == 8


def test_a_mixture_keeps_its_ratios() -> None:
    mix, rng = DocumentMix(**dict.fromkeys(FORM_NAMES, 0.0) | {"draw": 3.0, "vqa": 1.0}), np.random.default_rng(0)
    drawn = [mix.choose(rng) for _ in range(4000)]
    assert set(drawn) == {"draw", "vqa"}
    assert abs(drawn.count("draw") / 4000 - 0.75) < 0.03


def test_a_mixture_of_named_forms_only() -> None:
    assert DocumentMix.of({"rest": 0, "vqa": 2}) == replace(only("vqa"), vqa=2.0)
    assert DocumentMix.of({"vqa": 2}) == DocumentMix(vqa=2)
    assert DocumentMix.of({"rest": 1, "draw": 0}) == DocumentMix(**dict.fromkeys(FORM_NAMES, 1) | {"draw": 0})
    with pytest.raises(TypeError, match="vqas"):
        DocumentMix.of({"rest": 1, "vqas": 1})


@pytest.mark.parametrize(("objects", "most"), [((1, 1), 1), ((2, 4), 4)])
def test_scenes_have_as_many_things_as_asked_for(objects: tuple[int, int], most: int) -> None:
    """Captions name every object, and each kind by itself or in the plural."""
    seen = []
    for index in range(40):
        drawn = toy_document(0, "train", index, size=SIZE_PX, mix=only("draw"), objects=objects)
        scene = random_scene(scene_rng_after_choice(index), objects=objects, split="train")
        assert drawn.segments[1].source.tobytes() == draw(scene, SIZE_PX).tobytes()
        seen.append(len(scene.objects))
    assert {min(seen), max(seen)} == {objects[0], most}


def scene_rng_after_choice(index: int) -> np.random.Generator:
    """As `toy_document` has it when it begins with the scene."""
    rng = scene_rng(0, "train", index)
    rng.random()
    return rng


@pytest.mark.parametrize("weights", [{"vqa": -1.0}, {"vqa": float("nan")}, dict.fromkeys(FORM_NAMES, 0.0)])
def test_impossible_mixtures_are_refused(weights: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="weights of documents"):
        DocumentMix(**weights)


def test_tiny_images_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 48"):
        random_document(np.random.default_rng(0), size=47)


def test_prompts_are_those_of_the_evaluation() -> None:
    prompts = {s.text for d in documents("caption", 20) for s in d.segments if isinstance(s, Text) and not s.supervise}
    assert prompts == {"a photo of"}
    for document in documents("vqa", 20):
        text = "<" + ">".join(s.text for s in document.segments if isinstance(s, Text))
        assert re.match(r"<Question: .*\? Short answer:>|<Based on the image, please answer the question\.>.*\? "
                        r"(When the provided information is insufficient, respond with 'Unanswerable'\. )?"
                        r"Please provide an accurate answer within one word\. The answer is:>", text)  # fmt: skip
    for document in documents("region", 20):
        asks, box = document.segments[1].text, r"<ref>region</ref><box>\(\d{3},\d{3}\)\(\d{3},\d{3}\)</box>\."
        prompts = f"Provide a short description for this {box}|Answer this question according to the {box} .*\\?"
        assert re.fullmatch(prompts, asks)
    assert {d.segments[1].text for d in documents("grounded", 4)} == {"Generate the caption with grounding."}


def test_what_cannot_be_answered_is_not_there() -> None:
    seen = set()
    for index in range(60):
        scene = random_scene(scene_rng(9, "train", index), split="train")
        asked = unanswerable(scene, np.random.default_rng(index))
        kind = re.search(r"the ([a-z ]+?)( have| big or small)?\?$", asked.question)[1]
        assert kind in KINDS
        assert kind not in {obj.attributes.kind for obj in scene.objects}
        assert set(asked.answers) == {asked.answer} == {"unanswerable"}
        seen.add(kind)
    assert len(seen) > 20


def test_questions_about_a_region_are_about_the_thing_in_it() -> None:
    types = set()
    for index in range(160):
        rng = scene_rng(9, "train", index)
        scene = random_scene(rng, split="train")
        number = index % len(scene.objects)
        obj = scene.objects[number]
        asked = region_question(scene, number, rng)
        value = obj.size if asked.type == "size" else getattr(obj.attributes, asked.type)
        assert asked.answer == value.lower() != "none"
        assert obj.attributes.kind not in asked.question
        types.add(asked.type)
    assert types == {"kind", "color", "texture", "part", "glyph", "size"}


def test_grounded_captions_have_each_thing_with_its_box() -> None:
    for index in range(20):
        rng = scene_rng(9, "train", index)
        scene = random_scene(rng, split="train")
        text = grounded(scene, [f"[{i}]" for i in range(len(scene.objects))], rng)
        told, caption = re.fullmatch(r"(<ref>.*</box>): (.*)", text).groups()
        tagged = re.findall(r"<ref>(.*?)</ref><box>\[(\d)\]</box>", told)
        assert [int(i) for _, i in tagged] == list(range(len(scene.objects)))
        assert all(scene.objects[int(i)].attributes.kind in phrase for phrase, i in tagged)
        score = score_caption(caption, scene)
        assert score.right == score.stated > 0


def test_boxes_are_those_of_the_thing_that_is_meant() -> None:
    for index in range(40):
        rng = scene_rng(3, "train", index)
        scene = random_scene(rng, split="train")
        _, prompt, answer = FORMS["refer"](scene_rng(3, "train", index), "train", Painter(100), (1, 5))
        prompt = prompt.text
        assert prompt.startswith("Provide the bounding box coordinate of the region this sentence describes. the ")
        assert prompt.endswith("<box>")
        assert answer.attached
        numbers = [int(n) for n in re.fullmatch(r"\((\d{3}),(\d{3})\)\((\d{3}),(\d{3})\)</box>", answer.text).groups()]
        assert numbers in [[int(v / 100 * SCALE) for v in box] for box in boxes(scene, 100)]
        assert numbers[0] < numbers[2] <= SCALE
        assert numbers[1] < numbers[3] <= SCALE


def test_the_colours_of_label_maps() -> None:
    labels = np.array([[0, 1, 2], [7, 37, 150]])
    expected = [[(0, 0, 0), (255, 255, 255), (255, 255, 213)], [(255, 213, 255), (213, 255, 255), (87, 255, 45)]]
    assert [[tuple(v) for v in row] for row in np.array(colored(labels)).tolist()] == expected
    assert len({colored(np.array([[v]])).getpixel((0, 0)) for v in LABELS.values()}) == len(LABELS)


def test_a_label_map_belongs_to_the_image_after_it() -> None:
    for index in range(5):
        scene = random_scene(scene_rng(3, "train", index), split="train")
        shown, _, learned = FORMS["segmentation"](scene_rng(3, "train", index), "train", Painter(SIZE_PX), (1, 5))
        assert isinstance(shown, Image)
        assert shown.source.tobytes() == colored(label_map(scene, SIZE_PX)).tobytes()
        assert learned.source.tobytes() == draw(scene, SIZE_PX).tobytes()


def test_instructions_say_what_changes() -> None:
    kinds = set()
    for index in range(400):
        rng = scene_rng(4, "train", index)
        scene = random_scene(rng, objects=(1, 3))
        if any(t.place != "cell" for t in scene.objects):
            continue
        text, after = redrawn(scene, rng)
        kinds.add(checked(scene, text, after))
    assert kinds == {"same", "ground", "gone", "only", "color", "texture", "part", "glyph", "size", "cell"}


def checked(scene: Scene, text: str, after: Scene) -> str:
    """What an instruction changes, after checking that its words say so."""
    words = re.findall(r"\w+", text)
    if after == scene:
        assert re.search("same picture|copy", text, re.IGNORECASE)
        return "same"
    if after.ground != scene.ground:
        assert after.objects == scene.objects
        return "ground"
    if len(after.objects) < len(scene.objects):
        gone = [i for i, t in enumerate(scene.objects) if t not in after.objects]
        if "only" in words:
            (left,) = after.objects
            assert find(scene, re.search(r"the \w+", text)[0]) == [
                i for i, t in enumerate(scene.objects) if t.attributes == left.attributes
            ]
            assert left.cell == cell_of(text)
            return "only"
        assert len(gone) == 1
        assert scene.objects[gone[0]].attributes.kind in words
        return "gone"
    (index,) = [i for i, t in enumerate(scene.objects) if t != after.objects[i]]
    before, now = scene.objects[index], after.objects[index]
    assert now.attributes.kind in words
    for name, table in (("color", COLOR), ("texture", TEXTURE)):
        if getattr(before.attributes, name) != getattr(now.attributes, name):
            assert getattr(now.attributes, name) in [table[w] for w in words if w in table]
            return name
    if before.attributes.part != now.attributes.part:
        assert (now.attributes.part if now.attributes.part != "none" else before.attributes.part) in [
            w for w in words if w in PART
        ]
        return "part"
    if before.attributes.glyph != now.attributes.glyph:
        assert now.attributes.glyph in [w for w in words if w in GLYPHS]
        return "glyph"
    if before.size != now.size:
        assert now.size in [SIZE[w] for w in words if w in SIZE]
        return "size"
    assert now.cell != before.cell
    return "cell"

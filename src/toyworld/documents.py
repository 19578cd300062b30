"""Documents of the toy world: scenes and stories as text and images, in every form that a model is trained on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields

import numpy as np
import PIL.Image

from mm_interleaved.document import Box, Document, Image, Segment, Text
from mm_interleaved.tasks import captions, grounding, render, visdial, vqa
from mm_interleaved.tasks.ade20k import colored
from mm_interleaved.tasks.base import Value

from .draw import boxes, draw, label_map
from .language import (
    Caption,
    caption,
    dialogue,
    grounded,
    paragraph,
    questions,
    referring,
    region_question,
    unanswerable,
)  # fmt: skip
from .language.words import chance
from .redraw import redrawn
from .sampling import Split, check_objects, random_scene, scene_rng
from .scene import Scene
from .stories import story

Count = tuple[int, int]
SMALLEST = 48  # pixels; below, small objects vanish


@dataclass(frozen=True)
class DocumentMix:
    """How often each form of document comes, relative to the others; 0 for never.

    Attributes:
        caption: an image and its caption.
        draw: a caption and its image.
        paragraph: an image and all there is to say about it.
        draw_paragraph: the same, text first.
        vqa: an image and 1 to 6 questions with answers, or one that may have none.
        dialogue: an image, a caption, and questions that refer to each other.
        story: text and image in turn; looks that no text tells must be taken from earlier images.
        story_image_first: image and text in turn.
        refer: an image, an expression, and the box of what it means.
        region: an image, a box, and an expression for what is there or a question about it with its answer.
        grounded: an image and a caption with boxes.
        segmentation: a coloured label map, a caption and the image.
        redraw: an image and instructions that change it.
    """

    caption: float = 3.0
    draw: float = 3.0
    paragraph: float = 1.0
    draw_paragraph: float = 1.0
    vqa: float = 3.0
    dialogue: float = 1.0
    story: float = 4.0
    story_image_first: float = 1.0
    refer: float = 1.0
    segmentation: float = 1.0
    redraw: float = 2.0
    region: float = 1.0
    grounded: float = 0.5

    def __post_init__(self) -> None:
        weights = asdict(self)
        bad = [name for name, weight in weights.items() if not weight >= 0]
        if bad or not sum(weights.values()):
            raise ValueError(
                f"weights of documents must be at least 0 and not all 0; look at {', '.join(bad) or 'all'}"
            )

    @classmethod
    def of(cls, weights: Mapping[str, float]) -> DocumentMix:
        """A mixture by the names of forms; `rest` is the weight of those that are not named, else their own default.

        Raises:
            TypeError: there is no such form.
            ValueError: the weights make no mixture.
        """
        named = dict(weights)
        rest = {} if (weight := named.pop("rest", None)) is None else dict.fromkeys(FORM_NAMES, weight)
        return cls(**{**rest, **named})

    def choose(self, rng: np.random.Generator) -> str:
        """The name of a form, by the weights."""
        weights = np.cumsum(list(asdict(self).values()))
        return FORM_NAMES[int(np.searchsorted(weights, rng.random() * weights[-1], side="right"))]


FORM_NAMES = tuple(f.name for f in fields(DocumentMix))


class Painter:
    """Makes the images of documents.

    Args:
        size: their side in pixels.

    Raises:
        ValueError: less than `SMALLEST` pixels.
    """

    def __init__(self, size: int = 256) -> None:
        if size < SMALLEST:
            raise ValueError(f"size={size}: images are at least {SMALLEST} pixels wide")
        self.size = size

    def scene(self, scene: Scene, caption: Caption | None = None) -> PIL.Image.Image | str:
        """The source of a scene's image; `caption` is what the document says of it before, with its facts."""
        return draw(scene, self.size)

    def labels(self, scene: Scene) -> PIL.Image.Image | str:
        """The source of a scene's coloured label map."""
        return colored(label_map(scene, self.size))


def toy_document(seed: int, split: Split, index: int, *, size: int = 256, mix: DocumentMix | None = None,
                 objects: Count = (1, 5)) -> Document:  # fmt: skip
    """Document number `index` of a split; always the same for the same arguments.

    Args:
        seed: of the whole set.
        split: of `sampling.SPLITS`; the scenes of different splits are disjoint.
        index: at least 0.
        size: side of the images in pixels.
        mix: how often each form comes.
        objects: the fewest and the most objects of a scene; stories have their own.
    """
    document = random_document(scene_rng(seed, split, index), split=split, size=size, mix=mix, objects=objects)
    document.id = f"{split}-{seed}-{index}-{document.id}"
    return document


def random_document(rng: np.random.Generator, *, split: Split | None = None, size: int | Painter = 256,
                    mix: DocumentMix | None = None, objects: Count = (1, 5)) -> Document:  # fmt: skip
    """A document by chance; its `id` is its form. `size` is the side of its images, or what makes them.

    Raises:
        ValueError: images of less than `SMALLEST` pixels, or `objects` is not a range within 1 to 9.
    """
    check_objects(objects)
    painter = size if isinstance(size, Painter) else Painter(size)
    form = (mix or DocumentMix()).choose(rng)
    return Document(FORMS[form](rng, split, painter, objects), id=form)


def _box(box: tuple[int, ...], size: int) -> str:
    """Return a box in pixels of a square image as the prompts of grounding write it."""
    return str(Box.from_pixels(box, (size, size)))


def _given(scene: Scene, painter: Painter) -> Image:
    return Image(painter.scene(scene), supervise=False)


def _caption(rng: np.random.Generator, split: Split | None, painter: Painter, objects: Count) -> list[Segment]:
    scene = random_scene(rng, objects=objects, split=split)
    if chance(rng, 0.5):
        return [*render(captions.PROMPT, {"image": _given(scene, painter)}), Text(caption(scene, rng, bare=True).text)]
    return [_given(scene, painter), Text(caption(scene, rng).text)]


def _draw(rng: np.random.Generator, split: Split | None, painter: Painter, objects: Count) -> list[Segment]:
    scene = random_scene(rng, objects=objects, split=split)
    text = caption(scene, rng, bare=chance(rng, 0.3))
    return [Text(text.text), Image(painter.scene(scene, text))]


def _paragraph(rng: np.random.Generator, split: Split | None, painter: Painter, objects: Count) -> list[Segment]:
    scene = random_scene(rng, objects=objects, split=split)
    if chance(rng, 0.5):
        text = paragraph(scene, rng, bare=True).text
        return [*render(captions.PARAGRAPH_PROMPT, {"image": _given(scene, painter)}), Text(text)]
    return [_given(scene, painter), Text(paragraph(scene, rng).text)]


def _draw_paragraph(rng: np.random.Generator, split: Split | None, painter: Painter, objects: Count) -> list[Segment]:
    scene = random_scene(rng, objects=objects, split=split)
    text = paragraph(scene, rng)
    return [Text(text.text), Image(painter.scene(scene, text))]


def _vqa(rng: np.random.Generator, split: Split | None, painter: Painter, objects: Count) -> list[Segment]:
    scene = random_scene(rng, objects=objects, split=split)
    if chance(rng, 0.15):
        return _vqa_unsure(scene, rng, painter)
    first, *others = questions(scene, rng, 1 + int(rng.random() * 6))
    image = _given(scene, painter)
    if chance(rng, 0.5):
        segments = render(vqa.PROMPT, {"image": image, "question": first.question})
    else:
        segments = [image, _prompt(vqa.SHORT_PROMPT, first.question)]
    segments.append(Text(first.answer))
    for asked in others:
        segments += [_prompt(vqa.SHORT_PROMPT, asked.question), Text(asked.answer)]
    return segments


def _prompt(template: str, question: str) -> Text:
    """Return the prompt of a question without an image."""
    return Text(template.format(question=question), supervise=False)


def _vqa_unsure(scene: Scene, rng: np.random.Generator, painter: Painter) -> list[Segment]:
    asked = unanswerable(scene, rng) if chance(rng, 0.3) else questions(scene, rng, 1)[0]
    prompt = render(vqa.VIZWIZ_PROMPT, {"image": _given(scene, painter), "question": asked.question})
    return [*prompt, Text(asked.answer)]


def _dialogue(rng: np.random.Generator, split: Split | None, painter: Painter, objects: Count) -> list[Segment]:
    scene = random_scene(rng, objects=objects, split=split)
    conversation = dialogue(scene, rng, 2 + int(rng.random() * 7))
    fields: dict[str, Value] = {"image": _given(scene, painter), "caption": conversation.caption.text.removesuffix(".")}
    segments = render(f"{{image}}{visdial.CAPTION_PROMPT}", fields)
    for turn in conversation.rounds:
        segments += [_prompt(visdial.ROUND_PROMPT, turn.question.removesuffix("?")), Text(f"{turn.answer}.")]
    return segments


def _story(rng: np.random.Generator, split: Split | None, painter: Painter, objects: Count) -> list[Segment]:
    """A first image that its text does not determine is given, not learned."""
    segments: list[Segment] = []
    for frame in story(rng, split=split).frames:
        learned = bool(segments) or not frame.unsaid
        segments += [Text(frame.text), Image(painter.scene(frame.scene), supervise=learned)]
    return segments


def _story_image_first(
    rng: np.random.Generator, split: Split | None, painter: Painter, objects: Count
) -> list[Segment]:
    """No text tells what the next image shows, so the images are given."""
    segments: list[Segment] = []
    for frame in story(rng, split=split).frames:
        segments += [_given(frame.scene, painter), Text(frame.text)]
    return segments


def _refer(rng: np.random.Generator, split: Split | None, painter: Painter, objects: Count) -> list[Segment]:
    scene = random_scene(rng, objects=objects, split=split)
    meant = referring(scene, rng)
    prompt = render(grounding.GROUNDING, {"image": _given(scene, painter), "caption": meant.text})
    return [*prompt, Text(f"{_box(boxes(scene, painter.size)[meant.index], painter.size)}</box>", attached=True)]


def _region(rng: np.random.Generator, split: Split | None, painter: Painter, objects: Count) -> list[Segment]:
    scene = random_scene(rng, objects=objects, split=split)
    meant = referring(scene, rng)
    fields: dict[str, Value] = {
        "image": _given(scene, painter),
        "box": _box(boxes(scene, painter.size)[meant.index], painter.size),
    }
    if chance(rng, 0.5):
        asked = region_question(scene, meant.index, rng)
        return [*render(grounding.REGION_VQA, {**fields, "question": asked.question}), Text(asked.answer)]
    return [*render(grounding.REFERRING, fields), Text(meant.text)]


def _grounded(rng: np.random.Generator, split: Split | None, painter: Painter, objects: Count) -> list[Segment]:
    scene = random_scene(rng, objects=objects, split=split)
    text = grounded(scene, [_box(box, painter.size) for box in boxes(scene, painter.size)], rng)
    return [*render(grounding.GROUNDED_CAPTION, {"image": _given(scene, painter)}), Text(text)]


def _segmentation(rng: np.random.Generator, split: Split | None, painter: Painter, objects: Count) -> list[Segment]:
    scene = random_scene(rng, objects=objects, split=split)
    shown = Image(painter.labels(scene), supervise=False)
    text = caption(scene, rng)
    return [shown, Text(text.text), Image(painter.scene(scene, text))]


def _redraw(rng: np.random.Generator, split: Split | None, painter: Painter, objects: Count) -> list[Segment]:
    few = min(objects[0], 3), min(objects[1], 3)
    scene = random_scene(rng, objects=few, split=split)
    while any(t.place != "cell" for t in scene.objects):
        scene = random_scene(rng, objects=few, split=split)
    segments: list[Segment] = [_given(scene, painter)]
    for _ in range(2 if chance(rng, 0.4) else 1):
        text, scene = redrawn(scene, rng)
        segments += [Text(text, supervise=False), Image(painter.scene(scene))]
    return segments


FORMS: dict[str, Callable[[np.random.Generator, Split | None, Painter, Count], list[Segment]]] = {
    "caption": _caption, "draw": _draw, "paragraph": _paragraph, "draw_paragraph": _draw_paragraph, "vqa": _vqa,
    "dialogue": _dialogue, "story": _story, "story_image_first": _story_image_first, "refer": _refer,
    "segmentation": _segmentation, "redraw": _redraw, "region": _region, "grounded": _grounded,
}  # fmt: skip

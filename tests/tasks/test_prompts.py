"""Golden prompts: the strings of docs/data_formats.md, "Task files", and their ids by the segment-wise rule."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from mm_interleaved import MMInterleavedConfig, MMInterleavedProcessor, MMInterleavedTokenizer
from mm_interleaved.document import Box, Document, Image, Text
from mm_interleaved.io import InputError
from mm_interleaved.processor.tokenizer import IMAGE_TOKEN, SOI_TOKEN, encode_text
from mm_interleaved.tasks import TASKS, Sample, Task, grounding, render, visdial

from .conftest import FILES, first

ToyTask = Callable[..., Task]
VQA = (
    "Based on the image, please answer the question. IMG{question} Please provide an accurate answer within one word. "
    "The answer is:"
)
GOLDEN = {
    "coco_karpathy": "IMG a photo of",
    "flickr30k": "IMG a photo of",
    "nocaps": "IMG a photo of",
    "textcaps": "IMG a photo of",
    "image2paragraph": "IMGPlease describe the image in detail. The image depicts",
    "vqav2": VQA,
    "okvqa": VQA,
    "textvqa": VQA,
    "gqa": VQA,
    "vizwiz_vqa": "Based on the image, please answer the question. IMG{question} When the provided information is "
    "insufficient, respond with 'Unanswerable'. Please provide an accurate answer within one word. The answer is:",
    "refcoco": "IMGProvide the bounding box coordinate of the region this sentence describes. {caption}<box>",
    "refcoco+": "IMGProvide the bounding box coordinate of the region this sentence describes. {caption}<box>",
    "refcocog": "IMGProvide the bounding box coordinate of the region this sentence describes. {caption}<box>",
    "grit_grounding": "IMGProvide the bounding box coordinate of the region this sentence describes. {caption}<box>",
    "region_caption": "IMGProvide a short description for this <ref>region</ref><box>{box}</box>.",
    "region_vqa": "IMGAnswer this question according to the <ref>region</ref><box>{box}</box>. {question}",
    "grounded_caption": "IMGGenerate the caption with grounding.",
    "flickr30k_entities": "IMGGenerate the caption with grounding.",
    "grit": "IMGGenerate the caption with grounding.",
    "flickr30k_phrases": "IMGProvide the bounding box coordinate of the region this sentence describes. {caption}<box>",
    "coco": "{caption} IMG",
    "lncoco": "{caption} IMG",
    "ade20k": "IMG{caption}.IMG",
    "vist": "{0}IMG {1}IMG {2}IMG {3}IMG {4}IMG",
    "vist_text": "{0}IMG {1}IMG {2}IMG {3}IMG IMG",
    "pororo": "{0}IMG {1}IMG {2}IMG {3}IMG {4}IMG",
    "flintstones": "{0}IMG {1}IMG {2}IMG {3}IMG {4}IMG",
    "llava_instruct": VQA,
    **dict.fromkeys(
        ("chartqa", "docvqa", "infovqa", "st_vqa", "est_vqa", "ocrvqa", "dvqa"),
        "Based on the image, please answer the question. IMG{question} The answer is:",
    ),
}
IMAGE = SOI_TOKEN + 64 * IMAGE_TOKEN


def written_out(sample: Sample) -> Document:
    """With an image in every image slot, and no text slot: what the model reads, and where images are drawn."""
    segments = [Image("x") if isinstance(s, Image) else s for s in sample.document.segments if s != Text()]
    return Document(segments)


def ids_of(sample: Sample, processor: MMInterleavedProcessor) -> list[int]:
    return processor.encode(written_out(sample).segments).ids.tolist()


@pytest.fixture(scope="module")
def release(tokenizer: MMInterleavedTokenizer) -> MMInterleavedProcessor:
    return MMInterleavedProcessor(tokenizer, num_image_tokens=64)


def box_text(sample: Sample) -> str:
    x1, y1, x2, y2 = sample.meta.get("box", (0, 0, 0, 0))
    return f"({x1:03d},{y1:03d})({x2:03d},{y2:03d})"


@pytest.mark.parametrize("name", GOLDEN)
def test_prompt(name: str, toy_task: ToyTask, release: MMInterleavedProcessor) -> None:
    task = toy_task(name)
    for sample, _ in zip(task.samples(), range(3), strict=False):
        told = {key: value for key, value in sample.meta.items() if key in ("question", "caption")}
        text = GOLDEN[name].format(*sample.meta.get("captions", ()), box=box_text(sample), **told)
        golden = [1, *encode_text(release.tokenizer, text.replace("IMG", IMAGE))]
        assert ids_of(sample, release) == golden


def test_every_task_has_a_golden_prompt() -> None:
    conversations = {"visdial", "llava_conversations", "llava_665k", "llavar", "vg_regions"}
    assert set(GOLDEN) | conversations == set(FILES) == set(TASKS)


def test_visdial(toy_task: ToyTask, release: MMInterleavedProcessor) -> None:
    for compat in (False, True):
        for sample in toy_task("visdial", compat=compat).samples():
            image, text, slot = sample.document.segments
            assert isinstance(image, Image)
            assert slot == Text()
            rounds = text.text.split("question: ")
            assert text.text.startswith("caption: ")
            assert text.text.endswith("? answer:")
            assert rounds[-1] == f"{sample.meta['question']}? answer:"
            target = sample.meta["round"] - 1
            assert len(rounds) - 2 == (max(target - 1, 0) if compat else target)
            golden = [1, *encode_text(release.tokenizer, f"{IMAGE} {text.text}")]
            assert ids_of(sample, release) == golden


def test_the_ids_of_a_caption_prompt(toy_task: ToyTask, release: MMInterleavedProcessor) -> None:
    """Conformance test 1: nothing but `<s>`, the image, and pieces that begin words."""
    ids = ids_of(first(toy_task("coco_karpathy")), release)
    assert ids[:2] == [1, 2048]
    assert ids[2:66] == [2049] * 64
    pieces = release.tokenizer.convert_ids_to_tokens(ids[66:])
    assert pieces[0].startswith("▁")
    assert "".join(pieces) == "▁a▁photo▁of"


def test_two_prompts_word_for_word() -> None:
    """VisDial and a box, word for word."""
    fields = {"image": Image("x"), "caption": "a dog", "history": "question: is it big? answer: no. ",
              "question": "what color is it"}  # fmt: skip
    assert render(visdial.PROMPT, fields)[1].text == (
        "caption: a dog. question: is it big? answer: no. question: what color is it? answer:"
    )
    assert render(grounding.GROUNDING, fields)[1].text.endswith("describes. a dog<box>")
    assert grounding.thousandths(Box.from_pixels((8, 10.2, 640, 480), (640, 480))) == [12, 21, 999, 999]


SETTINGS = {
    ("coco_karpathy", "flickr30k", "nocaps"): (20, 7, 5, 1.0, 1.0),
    ("image2paragraph",): (90, 89, 5, 1.0, 1.2),
    ("vqav2", "okvqa", "textvqa", "vizwiz_vqa", "gqa"): (10, 0, 3, 0.0, 1.0),
    ("refcoco", "refcocog", "refcoco+"): (30, 7, 5, 1.0, 1.0),
}


@pytest.mark.parametrize(("name", "wanted"), [(name, v) for names, v in SETTINGS.items() for name in names])
def test_settings(name: str, wanted: tuple, toy_task: ToyTask) -> None:
    text = toy_task(name).settings.text
    found = (text.max_new_tokens, text.min_new_tokens, text.num_beams, text.length_penalty, text.repetition_penalty)
    assert found == wanted
    assert not text.do_sample


@pytest.mark.parametrize(("name", "candidates", "select"), [("coco", 8, "clip"), ("lncoco", 1, "first")])
def test_image_settings(name: str, candidates: int, select: str, toy_task: ToyTask) -> None:
    task = toy_task(name)
    image = task.settings.image
    assert (image.num_inference_steps, image.guidance_scale, image.num_candidates) == (250, 3.5, candidates)
    assert task.select == select
    assert toy_task("ade20k").settings.image.guidance_scale is None  # the model's own
    assert MMInterleavedConfig.preset("release").image_decoder.guidance_scale == 7.5


def test_settings_are_merged_over_the_defaults(toy_task: ToyTask) -> None:
    """Naming one setting does not forget the others."""
    text = toy_task("image2paragraph", generation={"num_beams": 2}).settings.text
    assert (text.num_beams, text.max_new_tokens, text.repetition_penalty) == (2, 90, 1.2)


def test_a_prompt_of_ones_own(toy_task: ToyTask) -> None:
    sample = first(toy_task("vqav2", prompt="{image} Q: {question} A:"))
    assert [type(s) for s in sample.document.segments] == [Image, Text, Text]
    assert sample.document.segments[1].text == f"Q: {sample.meta['question']} A:"
    with pytest.raises(InputError, match=r"field \{quest\}; there is image, question"):
        first(toy_task("vqav2", prompt="{image}{quest}"))
    with pytest.raises(InputError, match="no template"):
        first(toy_task("vqav2", prompt="{image"))


def test_post_processing(toy_task: ToyTask) -> None:
    assert toy_task("coco_karpathy").post(" a red fox. It sits. ") == "a red fox"
    assert toy_task("nocaps").post(" a red fox. It sits. ") == "a red fox. It sits."
    assert toy_task("vqav2").post(" red\n") == "red"


def test_boxes_need_whole_images(toy_task: ToyTask) -> None:
    squashed = {name for name in FILES if toy_task(name).crop == "squash"}
    assert squashed == {"refcoco", "refcoco+", "refcocog", "grit_grounding", "region_caption", "region_vqa",
                        "grounded_caption", "vg_regions", "grit", "flickr30k_entities",
                        "flickr30k_phrases"}  # fmt: skip


# ---- few shots


def shots_of(sample: Sample) -> str:
    return "".join("IMG" if isinstance(s, Image) else s.text or "" for s in sample.document.segments)


def test_examples_are_drawn_once_and_for_all(toy_task: ToyTask, written: Callable) -> None:
    train = str(written("vqav2", "train"))
    settings = {"shots": 2, "shot_images": train, "shot_annotations": train}
    one, again = (list(toy_task("vqav2", **settings).samples()) for _ in range(2))
    other = list(toy_task("vqav2", seed=1, **settings).samples())
    assert [shots_of(s) for s in one] == [shots_of(s) for s in again] != [shots_of(s) for s in other]
    answers = {s.meta["question"]: s.answer[0].text for s in toy_task("vqav2", "train").samples()}
    for sample in one:
        text = shots_of(sample)
        examples = text.split("Based on the image")[0].split("Question: ")[1:]
        assert len(examples) == 2
        for example in examples:
            question, answer = example.strip().split(" Short answer: ")
            assert answers[question] == answer
        assert len(sample.document.images) == 1  # the template has no image


def test_neighbours_stand_last_first(toy_task: ToyTask, tmp_path: Path) -> None:
    train = [s.id for s in toy_task("coco_karpathy", "train").samples()]
    samples = list(toy_task("coco_karpathy").samples())
    lists = {s.id: [train[i % 4], train[(i + 1) % 4], train[(i + 2) % 4]] for i, s in enumerate(samples)}
    path = tmp_path / "neighbours.json"
    path.write_text(json.dumps(lists))
    source = toy_task("coco_karpathy", "train")
    settings = {"shots": 2, "shot_images": source.config.images, "shot_annotations": source.config.annotations,
                "neighbours": str(path), "shot_template": "{image}Caption: {caption}"}  # fmt: skip
    images = {s.id: s.document.images[0].source for s in source.samples()}
    for sample in toy_task("coco_karpathy", **settings).samples():
        near = lists[sample.id]
        assert [i.source for i in sample.document.images[:2]] == [images[near[1]], images[near[0]]]
        assert len(sample.document.images) == 3
    path.write_text(json.dumps({samples[0].id: ["nobody", train[0]]}))
    with pytest.raises(InputError, match="no example 'nobody'"):
        list(toy_task("coco_karpathy", **settings).samples())


def test_too_few_examples(toy_task: ToyTask, written: Callable) -> None:
    train = str(written("vqav2", "train"))
    with pytest.raises(InputError, match="100 examples are wanted"):
        list(toy_task("vqav2", shots=100, shot_images=train, shot_annotations=train).samples())
    with pytest.raises(InputError, match="no few-shot examples"):
        toy_task("visdial", shots=2)

"""Small files in the official layouts of data sets that the toy world does not write, in all their phases."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import PIL.Image

COUNT = 4
SIDE = 24
COLORS = ("red", "green", "blue", "white")


def image(path: Path, color: str = "red", size: tuple[int, int] = (SIDE, SIDE)) -> None:
    """Write an image of one color."""
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.new("RGB", size, color).save(path)


def write(path: Path, data: Any) -> None:
    """Write JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data))


def cases() -> Iterable[tuple[int, str]]:
    return enumerate(COLORS[:COUNT])


def chartqa(folder: Path) -> None:
    for phase in ("train", "val", "test"):
        for subset, colors in (("human", COLORS[:2]), ("augmented", COLORS[2:])):
            for color in colors:
                image(folder / phase / "png" / f"{color}.png", color)
            records = [{"imgname": f"{c}.png", "query": f"How high is the {c} bar?", "label": "12.5"} for c in colors]
            write(folder / phase / f"{phase}_{subset}.json", records)


def docvqa(folder: Path) -> None:
    for start, phase in ((0, "train"), (100, "val"), (200, "test")):
        records = []
        for i, color in cases():
            image(folder / phase / "documents" / f"{color}{i}_1.png", color)
            records.append({
                "questionId": start + i, "question": f"What is the {color} date?", "question_types": ["handwritten"],
                "image": f"documents/{color}{i}_1.png", "docId": 7, "ucsf_document_id": f"{color}{i}",
                "ucsf_document_page_no": "1", "answers": ["2 May 1970", "May 2, 1970"], "data_split": phase,
            })  # fmt: skip
        _without_answers(phase, records)
        write(folder / f"{phase}_v1.0.json", {
            "dataset_name": "docvqa", "dataset_version": "1.0", "dataset_split": phase, "data": records,
        })  # fmt: skip


def infovqa(folder: Path) -> None:
    for start, phase in ((0, "train"), (100, "val"), (200, "test")):
        records = []
        for i, color in cases():
            image(folder / "infographicsvqa_images" / f"{start + i}.jpeg", color)
            records.append({
                "questionId": start + i, "question": f"How many are {color}?", "image_local_name": f"{start + i}.jpeg",
                "image_url": f"https://example.org/{i}", "ocr_output_file": f"{start + i}.json", "answers": ["3"],
                "data_split": phase,
            })  # fmt: skip
        _without_answers(phase, records)
        name = "infographicsVQA_val_v1.0_withQT.json" if phase == "val" else f"infographicsVQA_{phase}_v1.0.json"
        write(folder / name, {"dataset_name": "infographicVQA", "dataset_split": phase, "data": records})


def _without_answers(phase: str, records: list[dict[str, Any]]) -> None:
    for record in records if phase == "test" else ():
        del record["answers"]


def st_vqa(folder: Path) -> None:
    for start, phase in ((0, "train"), (100, "test")):
        records = []
        for i, color in cases():
            image(folder / "coco-text" / f"COCO_{phase}_{i}.jpg", color)
            records.append({
                "question_id": start + i, "question": f"What does the {color} sign say?", "answers": ["stop", "STOP"],
                "file_path": f"coco-text/COCO_{phase}_{i}.jpg", "file_name": f"COCO_{phase}_{i}.jpg",
                "dataset": "coco-text", "set_name": phase,
            })  # fmt: skip
        _without_answers(phase, records)
        write(folder / f"{phase}_task_3.json", {"dataset_name": "st_vqa", "version": "1.0", "data": records})


def est_vqa(folder: Path) -> None:
    records = []
    for i, color in cases():
        image(folder / "images/train" / f"{i}.jpg", color)
        asked = "这家店的名字是什么?" if i % 2 else f"What's written in {color}?"
        found = {"question": asked, "answer": "LOVE", "evidence": ["1", "2", "3", "2", "3", "4", "1", "4"]}
        records.append({"image": f"{i}.jpg", "annotation": [found]})
    write(folder / "annotations/train.json", records)


def ocrvqa(folder: Path) -> None:
    books = {}
    for split in (1, 2, 3):
        for i, color in cases():
            extension = ".gif" if i == 0 else ".jpg"
            key = f"{split}0000{i}"
            image(folder / "images" / f"{key}{extension}", color)
            books[key] = {
                "imageURL": f"http://ecx.images-amazon.com/images/I/5{i}{extension}", "title": f"The {color} book",
                "questions": ["Who wrote this book?", f"Is this book about {color}?"], "answers": ["Ann Lee", "Yes"],
                "authorName": "Ann Lee", "genre": "Travel", "split": split,
            }  # fmt: skip
    write(folder / "dataset.json", books)


def dvqa(folder: Path) -> None:
    for phase in ("train", "val_easy", "val_hard"):
        records = []
        for i, color in cases():
            image(folder / "images" / f"bar_{phase}_{i:08d}.png", color)
            records.append({
                "image": f"bar_{phase}_{i:08d}.png", "question": f"What is the value of {color}?", "answer": "7",
                "question_type": "data", "bbox_answer": [], "question_id": i,
            })  # fmt: skip
        write(folder / f"{phase}_qa.json", records)


def textcaps(folder: Path) -> None:
    for phase in ("train", "val", "test"):
        records = []
        for i, color in cases():
            name = f"{phase}{i}a"
            image(folder / ("test_images" if phase == "test" else "train_images") / f"{name}.jpg", color)
            captions = [f"A {color} sign that says {n}" for n in range(5)]
            about = {"image_id": name, "image_path": f"{phase}/{name}.jpg", "set_name": phase}
            told = {} if phase == "test" else {"reference_strs": captions}
            records += [about] if phase == "test" else [
                about | told | {"caption_id": 5 * i + n, "caption_str": text} for n, text in enumerate(captions)
            ]  # fmt: skip
        write(folder / f"TextCaps_0.1_{phase}.json", {"dataset_name": "textcaps", "data": records})


def vg_regions(folder: Path) -> None:
    images, regions = [], []
    for i, color in cases():
        place = f"VG_100K{'_2' if i % 2 else ''}/{i + 1}.jpg"
        image(folder / "images" / place, color, (40, 20))
        images.append({"image_id": i + 1, "url": f"https://cs.stanford.edu/people/rak248/{place}", "width": 40,
                       "height": 20, "coco_id": None, "flickr_id": None})  # fmt: skip
        found = [{"region_id": 10 * i + n, "x": 4 * n, "y": n, "width": 8, "height": 10, "phrase": f"{color} thing {n}",
                  "image_id": i + 1} for n in range(6)]  # fmt: skip
        regions.append({"id": i + 1, "regions": found})
    write(folder / "image_data.json", images)
    write(folder / "region_descriptions.json", regions)


GRIT_CAPTION = "a dog in a field of flowers"


def grit(folder: Path) -> None:
    """Two shards, as img2dataset writes them."""
    folder.mkdir(parents=True, exist_ok=True)
    for shard, colors in enumerate((COLORS[:2], COLORS[2:])):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as archive:
            for n, color in enumerate(colors):
                picture = io.BytesIO()
                PIL.Image.new("RGB", (SIDE, SIDE), color).save(picture, "JPEG")
                about = {
                    "caption": GRIT_CAPTION, "key": f"{shard:05d}{n:04d}", "width": SIDE, "height": SIDE, "id": n,
                    "status": "success", "clip_similarity_vitb32": 0.35,
                    "noun_chunks": [[0, 5, 0.25, 0.5, 0.5, 1.0, 0.9], [9, 16, 0, 0.5, 1, 1, 0.7]],
                    "ref_exps": [[0, 27, 0.25, 0.5, 0.5, 1.0, 0.9], [9, 27, 0, 0.5, 1, 1, 0.6]],
                }  # fmt: skip
                files = {"jpg": picture.getvalue(), "txt": GRIT_CAPTION.encode(), "json": json.dumps(about).encode()}
                for extension, content in files.items():
                    member = tarfile.TarInfo(f"{about['key']}.{extension}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))


ENTITIES = """<annotation>
 <filename>{n}.jpg</filename> <size><width>50</width><height>100</height><depth>3</depth></size>
 <object><name>1</name><name>4</name><bndbox><xmin>6</xmin><ymin>11</ymin><xmax>26</xmax><ymax>51</ymax></bndbox></object>
 <object><name>1</name><bndbox><xmin>21</xmin><ymin>41</ymin><xmax>31</xmax><ymax>91</ymax></bndbox></object>
 <object><name>2</name><bndbox><xmin>1</xmin><ymin>3</ymin><xmax>51</xmax><ymax>101</ymax></bndbox></object>
 <object><name>3</name><scene>1</scene><nobndbox>0</nobndbox></object>
</annotation>"""


def flickr30k_entities(folder: Path) -> None:
    for start, phase in ((0, "train"), (100, "val"), (200, "test")):
        for i, color in cases():
            image(folder / "flickr30k-images" / f"{start + i}.jpg", color, (50, 100))
            for kind in ("Sentences", "Annotations"):
                (folder / kind).mkdir(exist_ok=True)
            (folder / "Annotations" / f"{start + i}.xml").write_text(ENTITIES.format(n=start + i))
            captions = [f"[/EN#1/people Two {color} men] see [/EN#2/other a {n}] in [/EN#3/scene a park] at "
                        "[/EN#0/notvisual night] ." for n in ("kite", "ball", "hat", "dog", "car")]  # fmt: skip
            (folder / "Sentences" / f"{start + i}.txt").write_text("\n".join(captions) + "\n")
        (folder / f"{phase}.txt").write_text("".join(f"{start + i}\n" for i in range(COUNT)))


def conversations(name: str) -> Callable[[Path], None]:
    """Conversations in LLaVA's form, one of them without an image."""

    def write_file(folder: Path) -> None:
        records = []
        for i, color in cases():
            place = ("coco/train2017/1.jpg", "gqa/images/2.jpg", "ocr_vqa/images/3.jpg", "vg/VG_100K/4.jpg")[i]
            image(folder / place, color)
            turns = [{"from": "human", "value": f"<image>\nWhat is {color}?"}, {"from": "gpt", "value": "It."},
                     {"from": "human", "value": "All?"}, {"from": "gpt", "value": "Yes."}]  # fmt: skip
            records.append({"id": f"{i}", "image": place, "conversations": turns})
        records.append({"id": "t", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]})
        write(folder / name, records)

    return write_file


# For each task: what writes its files, where its images lie, and the phase to test.
OFFICIAL: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "chartqa": (chartqa, "", "val"), "docvqa": (docvqa, "", "val"), "infovqa": (infovqa, "", "val"),
    "st_vqa": (st_vqa, "", "train"), "est_vqa": (est_vqa, "", "train"), "ocrvqa": (ocrvqa, "", "val"),
    "dvqa": (dvqa, "", "val_easy"), "textcaps": (textcaps, "train_images", "val"),
    "vg_regions": (vg_regions, "images", "train"), "grit": (grit, "", "train"),
    "flickr30k_entities": (flickr30k_entities, "flickr30k-images", "val"),
    "flickr30k_phrases": (flickr30k_entities, "flickr30k-images", "val"),
    "llava_665k": (conversations("llava_v1_5_mix665k.json"), "", "train"),
    "llavar": (conversations("llava_instruct_150k_llavar_20k.json"), "", "train"),
}  # fmt: skip

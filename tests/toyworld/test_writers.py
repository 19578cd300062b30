from __future__ import annotations

import io
import json
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import PIL.Image
import pytest

from mm_interleaved.document import load_documents
from toyworld.language import score_caption
from toyworld.sampling import random_scene, scene_rng
from toyworld.scene import Scene
from toyworld.writers import FORMATS, WriteError, write_dataset
from toyworld.writers.base import Format, Job

JOB = Job(count=9, split="train", seed=2, size=48)


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several shards from few samples."""
    for name in ("mmc4", "pairs", "webdataset"):
        monkeypatch.setattr(f"toyworld.writers.{name}.BATCH", 4)
    smaller = {f.name: Format(f.name, f.description, f.write, f.finish, 4) for f in FORMATS.values()}
    for name, form in smaller.items():
        monkeypatch.setitem(FORMATS, name, form)


def write(name: str, folder: Path, job: Job = JOB) -> Path:
    write_dataset(name, folder / name, job)
    return folder / name


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def opened(path: Path) -> PIL.Image.Image:
    image = PIL.Image.open(path)
    image.load()
    assert image.size == (48, 48)
    return image


def scenes(job: Job = JOB) -> Iterator[Scene]:
    for index in range(job.count):
        yield random_scene(scene_rng(job.seed, job.split, index), split=job.split)


def says_the_truth(caption: str, scene: Scene) -> bool:
    score = score_caption(caption, scene)
    return score.stated == score.right and score.mentioned == score.objects


def test_mmc4(tmp_path: Path) -> None:
    folder = write("mmc4", tmp_path)
    shards = sorted((folder / "data").iterdir())
    assert [s.name for s in shards] == [f"docs_shard_{i}_v2.jsonl.zip" for i in range(3)]
    used = set()
    for shard in shards:
        with zipfile.ZipFile(shard) as archive:
            assert archive.namelist() == [shard.name.removesuffix(".zip")]
            records = [json.loads(line) for line in archive.read(archive.namelist()[0]).decode().splitlines()]
        for record in records:
            texts, matrix = record["text_list"], record["similarity_matrix"]
            assert all(isinstance(t, str) and t for t in texts)
            assert len(matrix) == len(record["image_info"]) > 0
            places = [info["matched_text_index"] for info in record["image_info"]]
            assert len(set(places)) == len(places)
            for info, row in zip(record["image_info"], matrix, strict=True):
                assert len(row) == len(texts)
                assert info["matched_sim"] == row[info["matched_text_index"]] == max(row) >= 0.24
                assert "/" not in info["image_name"]
                opened(folder / "images" / info["image_name"])
                used.add(info["image_name"])
    assert used == {p.name for p in (folder / "images").iterdir()}


def test_pairs(tmp_path: Path) -> None:
    folder = write("pairs", tmp_path)
    lists = sorted(folder.glob("*.txt"))
    assert [p.name for p in lists] == ["0000000.txt", "0000001.txt", "0000002.txt"]
    records = [json.loads(line) for p in lists for line in p.read_text().splitlines()]
    assert len(records) == JOB.count
    for record, scene in zip(records, scenes(), strict=True):
        assert set(record) == {"image", "caption"}
        opened(folder / "images" / record["image"])
        assert says_the_truth(record["caption"], scene)
        assert says_the_truth(record["caption"].lower(), scene)  # as pre-training reads it


def test_webdataset(tmp_path: Path) -> None:
    folder = write("webdataset", tmp_path)
    shards = sorted(folder.glob("*.tar"))
    assert [p.name for p in shards] == ["00000.tar", "00001.tar", "00002.tar"]
    found = {}
    for shard in shards:
        with tarfile.open(shard) as archive:
            for member in archive:
                found[member.name] = archive.extractfile(member).read()
    for index, scene in enumerate(scenes()):
        record = json.loads(found.pop(f"{index:09d}.json"))
        assert says_the_truth(record["caption"], scene)
        assert PIL.Image.open(io.BytesIO(found.pop(f"{index:09d}.jpg"))).size == (48, 48)
    assert not found


@pytest.mark.parametrize(("split", "part"), [("train", "train2014"), ("val", "val2014"), ("test", "val2014")])
def test_coco(tmp_path: Path, split: str, part: str) -> None:
    job = Job(5, split, 0, 48)
    folder = write("coco", tmp_path, job)
    karpathy = json.loads((folder / f"annotations/coco_karpathy_{split}.json").read_text())
    scorer = json.loads((folder / f"annotations/coco_karpathy_{split}_gt.json").read_text())
    official = json.loads((folder / f"annotations/captions_{part}.json").read_text())
    assert official["annotations"] == scorer["annotations"]
    by_image: dict[int, list[str]] = {}
    for annotation in scorer["annotations"]:
        by_image.setdefault(annotation["image_id"], []).append(annotation["caption"])
    assert len({a["id"] for a in scorer["annotations"]}) == 5 * job.count
    assert [i["id"] for i in scorer["images"]] == list(by_image)
    for entry, image, scene in zip(karpathy, official["images"], scenes(job), strict=True):
        number = int(Path(entry["image"]).stem.rsplit("_", 1)[1])
        assert entry["image"] == f"{part}/COCO_{part}_{number:012d}.jpg" == f"{part}/{image['file_name']}"
        assert by_image[number] == entry["caption"]
        assert len(entry["caption"]) == 5
        assert all(says_the_truth(text, scene) for text in entry["caption"])
        assert opened(folder / entry["image"]).size == (image["width"], image["height"])


def test_documents(tmp_path: Path) -> None:
    folder = write("documents", tmp_path)
    read = load_documents(folder / "documents.jsonl")
    assert len(read) == JOB.count
    assert len({d.id for d in read}) == JOB.count
    used = {Path(i.source) for d in read for i in d.images}
    assert {p.resolve() for p in (folder / "images").iterdir()} == used
    assert all(opened(path) for path in used)


@pytest.mark.parametrize("name", list(FORMATS))
def test_what_it_is_stands_beside(tmp_path: Path, name: str) -> None:
    about = json.loads((write(name, tmp_path) / "toyworld.json").read_text())
    assert about == {"toyworld": 1, "format": name, "count": 9, "split": "train", "seed": 2, "size": 48}
    assert [p.name for p in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("name", list(FORMATS))
def test_another_seed_or_split_other_data(tmp_path: Path, name: str) -> None:
    one = files(write(name, tmp_path / "a"))
    assert one == files(write(name, tmp_path / "b"))
    for number, other in enumerate((Job(9, "train", 3, 48), Job(9, "val", 2, 48))):
        assert not set(one.values()) & set(files(write(name, tmp_path / str(number), other)).values())


def test_progress_counts_samples(tmp_path: Path) -> None:
    told: list[int] = []
    write_dataset("pairs", tmp_path / "x", JOB, progress=told.append)
    assert told == [4, 4, 1]


def test_an_empty_folder_is_filled_and_an_occupied_one_left_alone(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    write_dataset("pairs", tmp_path / "empty", JOB)
    assert (tmp_path / "empty" / "toyworld.json").exists()
    with pytest.raises(WriteError, match="exists and is not empty"):
        write_dataset("coco", tmp_path / "empty", JOB)
    assert not (tmp_path / "empty" / "annotations").exists()


def test_nothing_half_written_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(job: Job, results: list, folder: Path) -> None:
        raise OSError(28, "No space left on device")

    form = FORMATS["coco"]
    monkeypatch.setitem(FORMATS, "coco", Format("coco", "", form.write, fails, 4))
    with pytest.raises(OSError, match="No space"):
        write_dataset("coco", tmp_path / "x", JOB)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "job", "workers", "message"),
    [
        ("cocoa", JOB, 1, "formats are mmc4"),
        ("coco", Job(0, "train", 0, 48), 1, "samples: 0"),
        ("coco", Job(1, "training", 0, 48), 1, "splits are train, val, test"),
        ("coco", Job(1, "train", -1, 48), 1, "seed: -1"),
        ("coco", Job(1, "train", 0, 7), 1, "images of 7 pixels"),
        ("coco", Job(1, "train", 0, 100_000), 1, "images of 100000 pixels"),
        ("coco", JOB, 0, "workers: 0"),
    ],
)
def test_bad_requests_say_what_is_possible(tmp_path: Path, name: str, job: Job, workers: int, message: str) -> None:
    with pytest.raises(WriteError, match=message):
        write_dataset(name, tmp_path / "x", job, workers=workers)
    assert not list(tmp_path.iterdir())


def test_a_format_is_one_small_file() -> None:
    package = Path(write_dataset.__code__.co_filename).parent
    modules = [p for p in package.glob("*.py") if p.stem not in ("__init__", "base")]
    written_by = {getattr(form.write, "func", form.write).__module__.rsplit(".", 1)[1] for form in FORMATS.values()}
    assert {p.stem for p in modules} == written_by
    assert all(len(p.read_text().splitlines()) < 150 for p in modules)

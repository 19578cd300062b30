"""MMC4: zipped JSON lines, `data/docs_shard_<i>_v2.jsonl.zip`, and `images/` flat beside them.

A document is a story, or a page of captioned images with sentences between them.
"""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from ..language import caption
from ..language.words import chance
from ..sampling import random_scene
from ..scene import Scene
from ..stories import story
from .base import Format, Job, json_lines, nothing_more, write_image

BATCH = 500
EPOCH = (1980, 1, 1, 0, 0, 0)  # of files in archives: the same data make the same bytes


def write(job: Job, indices: range, folder: Path) -> None:
    """One shard."""
    records = [_record(job, index, folder / "images") for index in indices]
    name = f"docs_shard_{indices.start // BATCH}_v2.jsonl"
    path = folder / "data" / f"{name}.zip"
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(zipfile.ZipInfo(name, EPOCH), json_lines(records), zipfile.ZIP_DEFLATED)


def _record(job: Job, index: int, images: Path) -> dict[str, Any]:
    rng = job.rng(index)
    page = _story(job, rng) if chance(rng, 0.5) else _page(job, rng)
    texts = [text for text, _ in page]
    places = [place for place, (_, scene) in enumerate(page) if scene is not None]
    similarity = np.round(rng.uniform(0.05, 0.2, (len(places), len(texts))), 4)
    info = []
    for row, place in enumerate(places):
        similarity[row, place] = round(float(rng.uniform(0.28, 0.4)), 4)
        name = f"{job.split}-{job.seed}-{index:08d}-{row}.jpg"
        scene = page[place][1]
        assert scene is not None
        write_image(job, scene, images / name)
        info.append({"image_name": name, "raw_url": f"https://toyworld.invalid/{name}", "matched_text_index": place,
                     "matched_sim": float(similarity[row, place])})  # fmt: skip
    return {
        "url": f"https://toyworld.invalid/{job.split}/{job.seed}/{index}",
        "text_list": texts,
        "image_info": info,
        "similarity_matrix": similarity.tolist(),
        "could_have_url_duplicate": 0,
    }


def _story(job: Job, rng: np.random.Generator) -> list[tuple[str, Scene | None]]:
    return [(frame.text, frame.scene) for frame in story(rng, split=job.split).frames]


def _page(job: Job, rng: np.random.Generator) -> list[tuple[str, Scene | None]]:
    """One to four captioned images; some sentences have no image."""
    page: list[tuple[str, Scene | None]] = []
    for _ in range(1 + int(rng.random() * 4)):
        scene = random_scene(rng, split=job.split)
        page.append((caption(scene, rng).text, scene))
        if chance(rng, 0.3):
            page.append((caption(random_scene(rng, split=job.split), rng).text, None))
    return page


FORMAT = Format("mmc4", "pages of text and images, as zipped JSON lines", write, nothing_more, BATCH)

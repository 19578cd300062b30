"""Write the example images of the web page: `python scripts/make_page_examples.py`.

They are scenes of the toy world's test split, as PNG files with a palette of a few kB. The texts that go with them are
in `src/mm_interleaved/serving/web/examples.js`.
"""

from __future__ import annotations

from pathlib import Path

import PIL.Image

from mm_interleaved.document import Image
from toyworld.documents import FORM_NAMES, DocumentMix, toy_document

FOLDER = Path(__file__).parents[1] / "src/mm_interleaved/serving/web/examples"
SIDE, SEED, COLORS = 128, 7, 128
EXAMPLES = {  # name: (form of the document, its number); the first image is written
    "story": ("story", 2), "caption": ("vqa", 12), "question": ("vqa", 11), "dialogue": ("vqa", 2),
    "labels": ("segmentation", 12), "find": ("vqa", 22),
}  # fmt: skip


def main() -> None:
    """Write the files."""
    FOLDER.mkdir(exist_ok=True)
    for name, (form, number) in EXAMPLES.items():
        mix = DocumentMix(**{other: float(other == form) for other in FORM_NAMES})
        document = toy_document(SEED, "test", number, size=SIDE, mix=mix, objects=(2, 3))
        image = next(segment.source for segment in document.segments if isinstance(segment, Image))
        assert isinstance(image, PIL.Image.Image)
        image.quantize(COLORS).save(FOLDER / f"{name}.png", optimize=True)
        print(name, (FOLDER / f"{name}.png").stat().st_size, "bytes")


if __name__ == "__main__":
    main()

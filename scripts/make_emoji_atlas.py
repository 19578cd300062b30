"""Draw the emoji that the toy world uses into one image, so that the font need not be installed.

python scripts/make_emoji_atlas.py --font /usr/share/fonts/truetype/noto/NotoColorEmoji.ttf

The font is Noto Color Emoji (Debian: fonts-noto-color-emoji), under the SIL Open Font License 1.1, assets/OFL.txt.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from toyworld.kinds import KINDS
from toyworld.sprites import ATLAS, ATLAS_COLUMNS, TILE

STRIKE = 109  # the one size, in pixels, that the font's bitmaps have


def tile(emoji: str, font: ImageFont.FreeTypeFont) -> Image.Image:
    """One emoji, cut to its outline, as large as a tile allows, in its middle."""
    drawn = Image.new("RGBA", (160, 160))
    ImageDraw.Draw(drawn).text((8, 8), emoji, font=font, embedded_color=True)
    box = drawn.getchannel("A").point(lambda a: 255 * (a > 24)).getbbox()
    if box is None:
        raise SystemExit(f"the font has no image of {emoji!r}")
    cut = drawn.crop(box)
    scale = TILE / max(cut.size)
    cut = cut.resize((max(1, round(cut.width * scale)), max(1, round(cut.height * scale))), Image.Resampling.LANCZOS)
    out = Image.new("RGBA", (TILE, TILE))
    out.paste(cut, ((TILE - cut.width) // 2, (TILE - cut.height) // 2))
    return out


def main() -> None:
    """Write the atlas."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--font", type=Path, default=Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"))
    parser.add_argument("--output", type=Path, default=ATLAS)
    options = parser.parse_args()
    font = ImageFont.truetype(str(options.font), STRIKE)
    drawn = {kind.name: kind.emoji for kind in KINDS.values() if kind.emoji}
    rows = -(-len(drawn) // ATLAS_COLUMNS)
    atlas = Image.new("RGBA", (ATLAS_COLUMNS * TILE, rows * TILE))
    for i, character in enumerate(drawn.values()):
        atlas.paste(tile(character, font), (i % ATLAS_COLUMNS * TILE, i // ATLAS_COLUMNS * TILE))
    names = PngInfo()
    names.add_text("kinds", " ".join(drawn))
    atlas.save(options.output, optimize=True, pnginfo=names)
    print(f"{options.output}: {len(drawn)} emoji, {options.output.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main()

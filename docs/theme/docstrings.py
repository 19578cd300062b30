"""A Griffe extension for this project's docstrings: an entry of a section may name several parameters.

    width, height: sides in pixels.

Griffe reads one name an entry, so such an entry becomes one for each name, with the same text.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

_SECTION = re.compile(r"^(?P<head>(?:Args|Attributes):\n)(?P<body>(?:[ ]{4}.*\n|\n)*)", re.MULTILINE)
_ENTRY = re.compile(
    r"^    (?P<names>\*{0,2}\w+(?:, \*{0,2}\w+)+):(?P<text>.*\n(?:[ ]{5,}.*\n|\n(?=[ ]{5,}))*)", re.MULTILINE
)


class GroupedNames(griffe.Extension):
    """Splits entries that name several parameters or attributes."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite the docstring of an object."""
        if obj.docstring is not None:
            value = _SECTION.sub(lambda m: m["head"] + _ENTRY.sub(_split, m["body"]), obj.docstring.value + "\n")
            obj.docstring.value = value.rstrip("\n")


def _split(entry: re.Match[str]) -> str:
    return "".join(f"    {name}:{entry['text']}" for name in entry["names"].split(", "))

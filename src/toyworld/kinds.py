"""What there is in the world: figures that we draw, and objects from an emoji font."""

from __future__ import annotations

from dataclasses import dataclass

GROUPS = ("figure", "animal", "plant", "building", "vehicle", "food", "person")


@dataclass(frozen=True)
class Kind:
    """A kind of object.

    Attributes:
        name: as written in text.
        plural: more of them, as written in text.
        group: of `GROUPS`.
        emoji: the character that it is drawn from; "" for a figure drawn by `figures.py`.
        hollow: whether it has a hole in which a small object is seen.
    """

    name: str
    plural: str
    group: str
    emoji: str = ""
    hollow: bool = False


_FIGURES = "circle square triangle star heart diamond cross moon ring frame gear"
_HOLLOW = {"ring", "frame", "gear"}
_EMOJI = {
    "animal": "fox 🦊 cat 🐈 dog 🐕 rabbit 🐇 bear 🐻 elephant 🐘 lion 🦁 frog 🐸 penguin 🐧 owl 🦉 fish 🐟 whale 🐳 "
    "turtle 🐢 crab 🦀 butterfly 🦋 snail 🐌 duck 🦆 horse 🐎 octopus 🐙 giraffe 🦒",
    "plant": "tree 🌳 palm 🌴 pine 🌲 sunflower 🌻 tulip 🌷 cactus 🌵 mushroom 🍄",
    "building": "house 🏠 castle 🏰 tent ⛺ tower 🗼",
    "vehicle": "car 🚗 bus 🚌 train 🚂 tractor 🚜 boat ⛵ rocket 🚀 plane ✈ helicopter 🚁",
    "food": "apple 🍎 banana 🍌 cake 🎂 pizza 🍕 carrot 🥕 grape 🍇 coffee ☕ burger 🍔 pineapple 🍍",
    "person": "girl 👧 robot 🤖 ghost 👻 clown 🤡 alien 👽",
}
_PLURALS = {"butterfly": "butterflies", "fish": "fish"}


def _plural(name: str) -> str:
    return _PLURALS.get(name, name + ("es" if name.endswith(("s", "x", "ch", "sh")) else "s"))


def _kinds() -> dict[str, Kind]:
    found = [Kind(name, _plural(name), "figure", hollow=name in _HOLLOW) for name in _FIGURES.split()]
    for group, listed in _EMOJI.items():
        words = listed.split()
        found += [Kind(name, _plural(name), group, emoji) for name, emoji in zip(words[::2], words[1::2], strict=True)]
    return {kind.name: kind for kind in found}


KINDS: dict[str, Kind] = _kinds()
"""Every kind by its name, in the order of the label map's ids."""

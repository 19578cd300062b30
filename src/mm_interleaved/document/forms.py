"""The three JSON forms of a document: segments, chat messages, and the original's record."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, cast

from ..io import InputError, check_list, check_strings, check_type
from .boxes import Box
from .checks import check_fields, listed, positive
from .folder import Folder
from .segments import ROLES, Image, Segment, Text

SEGMENT_FIELDS = ("text", "image", "supervise", "role", "attached", "target", "boxes")
MESSAGE_FIELDS = ("role", "content", "loss")
DOCUMENT_FIELDS = ("segments", "id", "max_turns", "forced_texts", "stop_at_eos")
RECORD_FIELDS = (
    "sentences", "images", "sentence_ixs", "image_first", "generate_mode", "num_iter", "multiround_context", "id",
)  # fmt: skip
ORIGINAL_TURNS = 2  # the original's default number of turns of a record
# The original's names for the kind of segment that is generated first.
_MODES = {
    "generate_texts": "text", "generate_images": "image", "generate_vqa": "text", "generate_grounding": "text",
    "generate_segm": "image",
}  # fmt: skip


log = logging.getLogger(__name__)
Fields = dict[str, Any]  # of a `Document`, by its attributes' names


def read_form(data: Any, folder: Folder) -> Fields:
    """The arguments of `Document` for a JSON document in any of the forms (see `Document.from_dict`)."""
    data = check_type(data, dict, "document", 'Write {"segments": [{"text": ...}, {"image": "path"}]}')
    check_strings(data)
    for key, reader in (("segments", _from_segments), ("messages", _from_messages), ("sentences", _from_record)):
        if key in data:
            return reader(data, folder)
    raise InputError(
        f"none of the fields 'segments', 'messages' and 'sentences' is there, only {listed(data)}",
        fix='Write {"segments": [{"text": ...}, {"image": "path"}]}',
    )


def _name(data: dict[str, Any]) -> str | None:
    """The `id` of a document as a string; it may be a number."""
    name = data.get("id")
    return str(name) if isinstance(name, int | float) else None if name is None else check_type(name, str, "id")


def _from_segments(data: dict[str, Any], folder: Folder) -> Fields:
    check_fields(data, DOCUMENT_FIELDS)
    segments: list[Segment] = []
    for index, item in enumerate(check_type(data["segments"], list, "segments")):
        where = f"segments[{index}]"
        check_fields(check_type(item, dict, where, 'Write {"text": ...} or {"image": ...}'), SEGMENT_FIELDS, where)
        if ("text" in item) == ("image" in item):
            raise InputError("a segment has either 'text' or 'image'", where)
        supervise = check_type(item.get("supervise", True), bool, f"{where}.supervise")
        role = _check_role(item.get("role"), f"{where}.role")
        if "text" in item:
            text = item["text"] if item["text"] is None else check_type(item["text"], str, f"{where}.text")
            attached = check_type(item.get("attached", False), bool, f"{where}.attached")
            boxes = _boxes(item.get("boxes", []), f"{where}.boxes")
            try:
                segments.append(Text(text, supervise, role, attached, boxes=boxes))
            except InputError as error:
                raise error.at(where) from None
            continue
        source, target = (
            None if item.get(key) is None else folder.image(item[key], f"{where}.{key}") for key in ("image", "target")
        )
        segments.append(Image(source, supervise, role, target))
    if not segments:
        raise InputError("a document needs at least one segment", "segments")
    turns, stop = data.get("max_turns"), data.get("stop_at_eos")
    return {
        "segments": segments,
        "id": _name(data),
        "max_turns": None if turns is None else positive(turns, "max_turns"),
        "forced_texts": check_list(data.get("forced_texts", []), str, "forced_texts"),
        "stop_at_eos": None if stop is None else check_type(stop, bool, "stop_at_eos"),
    }


def _boxes(value: Any, where: str) -> tuple[tuple[int, Box], ...]:
    """The boxes of a text: [{"at": first character, "box": [x1, y1, x2, y2], "image": its number}]."""
    found: list[tuple[int, Box]] = []
    for index, item in enumerate(check_type(value, list, where)):
        place = f"{where}[{index}]"
        check_fields(check_type(item, dict, place), ("at", "box", "image"), place)
        sides = check_list(item.get("box"), float, f"{place}.box")
        if len(sides) != 4:
            raise InputError(f"a box has 4 sides, not {len(sides)}", f"{place}.box", "Write [x1, y1, x2, y2]")
        start, image = (check_type(item.get(key, 0), int, f"{place}.{key}") for key in ("at", "image"))
        try:
            found.append((start, Box(*sides, image=image)))
            found[-1][1].check_area()
        except InputError as error:
            raise error.at(place) from None
    return tuple(found)


def _check_role(role: Any, where: str) -> str | None:
    if role is not None and check_type(role, str, where) not in ROLES:
        raise InputError(f"unknown role {role!r}", where, f"Roles are {', '.join(ROLES)}")
    return role


def _from_messages(data: dict[str, Any], folder: Folder) -> Fields:
    check_fields(data, ("messages", "id"))
    segments: list[Segment] = []
    for index, message in enumerate(check_type(data["messages"], list, "messages")):
        where = f"messages[{index}]"
        check_fields(check_type(message, dict, where), MESSAGE_FIELDS, where)
        role = _check_role(check_type(message.get("role"), str, f"{where}.role"), f"{where}.role")
        learned = _is_learned(message.get("loss"), role, f"{where}.loss")
        content = message.get("content")
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        for part_index, part in enumerate(check_type(parts, list, f"{where}.content")):
            place = f"{where}.content[{part_index}]"
            segments.append(_from_part(check_type(part, dict, place), role, learned, folder, place))
    if not segments:
        raise InputError("a conversation needs at least one message", "messages")
    return {"segments": segments, "id": _name(data)}


def _is_learned(loss: Any, role: str | None, where: str) -> bool:
    """Whether a message is learned: what the assistant says is, unless its `loss` is false."""
    speaks = role == "assistant"
    if loss is None:
        return speaks
    if check_type(loss, bool, where) and not speaks:
        raise InputError(f"a message of the {role} cannot be learned", where, "Only the assistant's messages can")
    return loss


def _from_part(part: dict[str, Any], role: str | None, supervise: bool, folder: Folder, where: str) -> Segment:
    kind = check_type(part.get("type"), str, f"{where}.type", "Kinds are text, image and image_url")
    if kind == "text":
        return Text(check_type(part.get("text"), str, f"{where}.text"), supervise, role)
    if kind == "image_url":
        url = part.get("image_url")
        url = cast(dict[str, Any], url).get("url") if isinstance(url, dict) else url
        return Image(folder.image(url, f"{where}.image_url"), supervise, role)
    if kind == "image":
        for key in ("path", "image", "url"):
            if key in part:
                source = part[key]
                if isinstance(source, str) or source is None:
                    source = folder.image(source, f"{where}.{key}")
                try:
                    return Image(source, supervise, role)
                except InputError as error:
                    raise error.at(f"{where}.{key}") from None
        raise InputError("an image part needs 'path', 'image' or 'url'", where)
    raise InputError(f"unknown kind of content {kind!r}", f"{where}.type", "Kinds are text, image and image_url")


def _from_record(data: dict[str, Any], folder: Folder) -> Fields:
    """The original's record: images attached to sentences by number (docs/data_formats.md, "Original records")."""
    if unknown := [key for key in data if key not in RECORD_FIELDS]:
        log.warning("a record has fields that are not used: %s", listed(unknown))
    missing = [key for key in RECORD_FIELDS[:4] if key not in data]
    if missing:
        raise InputError(f"the record lacks {listed(missing)}")
    sentences = check_list(data["sentences"], str, "sentences")
    places, first = (
        check_list(data["sentence_ixs"], int, "sentence_ixs"),
        check_list(data["image_first"], bool, "image_first"),
    )
    paths = check_type(data["images"], list, "images")
    if not paths:
        raise InputError("a record needs at least one image", "images", "Use the 'segments' form for text alone")
    if not len(paths) == len(places) == len(first):
        raise InputError(f"images, sentence_ixs and image_first have {len(paths)}, {len(places)} and {len(first)} "
                         "entries", fix="Give one of each for every image")  # fmt: skip
    for index, place in enumerate(places):
        if not 0 <= place < len(sentences):
            raise InputError(f"there is no sentence {place}", f"sentence_ixs[{index}]",
                             f"Sentences are numbered 0 to {len(sentences) - 1}")  # fmt: skip
    order = [(place, not before) for place, before in zip(places, first, strict=True)]
    for index in range(1, len(order)):
        if order[index] < order[index - 1]:
            raise InputError(f"image {index} stands before image {index - 1}", f"images[{index}]",
                             "List the images in the order in which they stand in the text")  # fmt: skip

    mode = data.get("generate_mode", "generate_texts")
    if check_type(mode, str, "generate_mode") not in _MODES:
        raise InputError(f"unknown mode '{mode}'", "generate_mode", f"Modes are {', '.join(_MODES)}")
    draws_last = _MODES[mode] == "image"
    images = [
        Image() if draws_last and i == len(paths) - 1 else Image(folder.image(p, f"images[{i}]"))
        for i, p in enumerate(paths)
    ]
    segments = _trimmed(interleave(sentences, list(zip(order, images, strict=True))))
    turns = data.get("num_iter")
    return {
        "segments": segments,
        "id": _name(data),
        "max_turns": ORIGINAL_TURNS if turns is None else positive(turns, "num_iter"),
        "forced_texts": check_list(data.get("multiround_context", []), str, "multiround_context"),
        "stop_at_eos": False,
        "record": data,
    }


def interleave(sentences: Sequence[str], placed: Sequence[tuple[tuple[int, bool], Image]]) -> list[Segment]:
    """Sentences joined by one space, with images at (sentence, whether after it), as in MMC4 and original records.

    White space next to an image is removed, and texts that are then empty are left out.
    """
    segments: list[Segment] = []
    run: list[str] = []

    def close() -> None:
        if (text := " ".join(run)).strip():
            segments.append(Text(text))
        run.clear()

    for number, sentence in enumerate(sentences):
        for after in (False, True):
            for image in (image for spot, image in placed if spot == (number, after)):
                close()
                segments.append(image)
            if not after:
                run.append(sentence)
    close()
    return segments


def _trimmed(segments: list[Segment]) -> list[Segment]:
    """Texts without surrounding white space: a record has none next to images or at its ends. It may hold `<s>`."""
    return [
        Text(s.text.strip(), control_tokens=True) if isinstance(s, Text) and s.text is not None else s for s in segments
    ]

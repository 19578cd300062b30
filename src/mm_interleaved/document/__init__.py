"""Documents: text and images in the order in which one reads them. Plain data; no tensors.

    Document([Text("A cat."), Image("cat.png"), Text("The same cat asleep:"), Image()])

A segment without content is an open slot, which generation fills. Documents come from JSON in three forms; a file holds
one document, a list of them, or one a line:

    {"segments": [{"text": "A cat."}, {"image": "cat.png"}, {"text": "The same cat asleep:"}, {"image": null}]}
    {"messages": [{"role": "user", "content": [{"type": "image", "path": "a.png"}, {"type": "text", "text": "Who?"}]}]}
    {"sentences": [...], "images": [...], "sentence_ixs": [...], "image_first": [...], ...}     the original's record

Paths are relative to the file and may not lead out of its folder; `data:image/...;base64,` URLs carry an image inline.
"""

from ..io import InputError
from .document import Document
from .files import load_documents
from .folder import Folder
from .forms import ORIGINAL_TURNS, SEGMENT_FIELDS, interleave
from .segments import ROLES, Generated, Image, Segment, Text

DocumentError = InputError  # its name in version 0.1

__all__ = [
    "ORIGINAL_TURNS", "ROLES", "SEGMENT_FIELDS", "Document", "DocumentError", "Folder", "Generated",
    "Image", "Segment", "Text", "interleave", "load_documents",
]  # fmt: skip

"""Documents: text and images in reading order. Plain data; no tensors.

    Document([Text("A cat."), Image("cat.png"), Text("The same cat asleep:"), Image()])

A segment without content is an open slot, which generation fills. Documents are read from JSON in three forms. A file
holds one document, a list of documents, or one document per line:

    {"segments": [{"text": "A cat."}, {"image": "cat.png"}, {"text": "The same cat asleep:"}, {"image": null}]}
    {"messages": [{"role": "user", "content": [{"type": "image", "path": "a.png"}, {"type": "text", "text": "Who?"}]}]}
    {"sentences": [...], "images": [...], "sentence_ixs": [...], "image_first": [...], ...}     the original's record

Paths are relative to the file and must stay in its folder. `data:image/...;base64,` URLs hold an image inline.
"""

from ..io import InputError
from .boxes import Box
from .document import Document
from .files import load_documents
from .folder import Folder
from .forms import ORIGINAL_TURNS, SEGMENT_FIELDS, interleave
from .segments import ROLES, Generated, Image, Segment, Text, place_boxes
from .transform import Transform

DocumentError = InputError  # its name in version 0.1

__all__ = [
    "ORIGINAL_TURNS", "ROLES", "SEGMENT_FIELDS", "Box", "Document", "DocumentError", "Folder", "Generated",
    "Image", "Segment", "Text", "Transform", "interleave", "load_documents", "place_boxes",
]  # fmt: skip

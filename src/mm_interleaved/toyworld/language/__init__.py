"""What is said about scenes, with what it states as data; and a parser that reads it back."""

from .captions import Caption, caption, paragraph
from .parsing import CaptionScore, read_facts, score_caption
from .phrases import Fact, holds

__all__ = ["Caption", "CaptionScore", "Fact", "caption", "holds", "paragraph", "read_facts", "score_caption"]

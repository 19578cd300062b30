"""What is said about scenes, with what it states as data; and a parser that reads it back."""

from .captions import Caption, caption, paragraph
from .dialogues import Dialogue, Round, dialogue
from .parsing import CaptionScore, read_facts, score_caption
from .phrases import Fact, holds
from .questions import Question, questions
from .referring import Referring, referring

__all__ = [
    "Caption", "CaptionScore", "Dialogue", "Fact", "Question", "Referring", "Round", "caption", "dialogue", "holds",
    "paragraph", "questions", "read_facts", "referring", "score_caption",
]  # fmt: skip

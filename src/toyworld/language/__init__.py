"""What is said about scenes, with what it states as data; and a parser that reads it back."""

from .captions import Caption, caption, paragraph
from .dialogues import Dialogue, Round, dialogue
from .parsing import CaptionScore, read_facts, score_caption
from .phrases import Fact, holds
from .questions import UNANSWERABLE, Question, questions, region_question, unanswerable
from .referring import Referring, grounded, referring

__all__ = [
    "UNANSWERABLE", "Caption", "CaptionScore", "Dialogue", "Fact", "Question", "Referring", "Round", "caption",
    "dialogue", "grounded", "holds", "paragraph", "questions", "read_facts", "referring", "region_question",
    "score_caption", "unanswerable",
]  # fmt: skip

"""Measurements of speed and memory, beside reference implementations and the machine's bounds (`mmi bench`)."""

from .run import LINES, Bench, Row, run_lines

__all__ = ["LINES", "Bench", "Row", "run_lines"]

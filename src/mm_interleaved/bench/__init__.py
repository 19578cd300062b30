"""What everything costs, measured beside what the machine allows and beside the plain references (`mmi bench`)."""

from .run import LINES, Bench, Row, run_lines

__all__ = ["LINES", "Bench", "Row", "run_lines"]

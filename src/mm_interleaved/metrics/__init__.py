"""Scores of predictions against references. A metric takes plain data, knows no model, and says when it cannot run."""

from .result import Metric, MetricResult, MissingRequirement, aligned, confidence_interval, reports_missing

__all__ = [
    "Metric", "MetricResult", "MissingRequirement", "aligned", "confidence_interval", "reports_missing",
]  # fmt: skip

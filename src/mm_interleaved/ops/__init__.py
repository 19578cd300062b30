"""Numerical operators of the project, each with a plain twin it is tested against."""

from .deformable import deformable_attention, deformable_attention_reference, promote

__all__ = ["deformable_attention", "deformable_attention_reference", "promote"]

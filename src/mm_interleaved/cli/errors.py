"""The error of commands."""

from __future__ import annotations

from ..io import InputError


class UsageError(InputError):
    """A command whose arguments cannot be used."""

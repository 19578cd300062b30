"""What a command says when it cannot be carried out."""

from __future__ import annotations

from ..io import InputError


class UsageError(InputError):
    """A command that cannot be carried out as it was given."""

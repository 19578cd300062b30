"""Registers the model's classes with the Auto classes of transformers as soon as transformers is imported."""

from __future__ import annotations

import traceback
from importlib import import_module
from types import ModuleType

import wrapt


def register_when_imported() -> None:
    """Register now if transformers is imported already, otherwise when it is imported."""
    wrapt.register_post_import_hook(_register, "transformers")


def _register(_: ModuleType) -> None:
    """Register, unless a module of this package is being imported now, whose classes do not exist yet."""
    frames = (frame for frame, _ in traceback.walk_stack(None) if frame.f_code.co_name == "<module>")
    if not any(str(frame.f_globals.get("__name__")).startswith("mm_interleaved.") for frame in frames):
        register()


def register() -> None:
    """Import the packages that register the classes of the model, the processor and the configuration."""
    for package in ("generation", "processor"):
        import_module(f"mm_interleaved.{package}")

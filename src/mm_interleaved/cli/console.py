"""Where commands speak: progress and messages on the error stream, results on the output."""

from __future__ import annotations

from rich.console import Console

console = Console(stderr=True, soft_wrap=True)
output = Console(soft_wrap=True)

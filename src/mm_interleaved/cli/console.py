"""The consoles of commands: progress and messages go to stderr, results to stdout."""

from __future__ import annotations

from rich.console import Console

console = Console(stderr=True, soft_wrap=True)
output = Console(soft_wrap=True)

"""`python -m mm_interleaved`: the command line."""

from .cli import main

main()

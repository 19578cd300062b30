"""`python -m mm_interleaved.cli`, for torchrun."""

from . import main

main()

"""The console of the command line."""

from __future__ import annotations

import os

from rich.console import Console

PIPED_WIDTH = 150  # tables in a file or a log need not fit a terminal


def console() -> Console:
    """Return a console as wide as the terminal, or wide enough for the tables where there is none."""
    plain = Console(highlight=False)
    if plain.is_terminal or "COLUMNS" in os.environ:
        return plain
    return Console(highlight=False, width=PIPED_WIDTH)

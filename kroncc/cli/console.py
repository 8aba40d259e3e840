"""The console of the command line."""

from __future__ import annotations

import os

from rich.console import Console

PIPED_WIDTH = 150  # tables in a file or a log need not fit a terminal
LEAST_WIDTH = 60  # a narrower terminal wraps the lines, which loses no figure


def console() -> Console:
    """Return a console as wide as the terminal; the tables choose the layout that fits."""
    plain = Console(highlight=False)
    if plain.is_terminal or "COLUMNS" in os.environ:
        return Console(highlight=False, width=max(plain.width, LEAST_WIDTH))
    return Console(highlight=False, width=PIPED_WIDTH)

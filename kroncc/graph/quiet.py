"""Silence of the libraries underneath while they do work that the user did not ask to hear of."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr


@contextmanager
def quiet() -> Iterator[None]:
    """Drop log records, warnings and stderr inside the block: what matters comes back as an error."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        # The exporter prints the graph so far when it fails.
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)

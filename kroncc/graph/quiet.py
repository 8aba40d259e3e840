"""Silence of the libraries underneath while they do work that the user did not ask to hear of."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

NOISY = ("transformers", "torch.export", "torch._export", "torch.fx", "torch._dynamo")


@contextmanager
def quiet() -> Iterator[None]:
    """Raise the level of noisy loggers to CRITICAL and ignore warnings inside the block; restore both after."""
    loggers = [logging.getLogger(name) for name in NOISY]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)

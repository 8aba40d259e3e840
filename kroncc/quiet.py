"""Keep the noise of libraries from the user, and give everything back on leaving.

Our own messages say what a user needs; load reports, missing C++ extensions and deprecations inside a library
are for its developers.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

QUIET_ENVIRONMENT = {  # read by the libraries when they are imported
    "TRANSFORMERS_VERBOSITY": "error",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
}
LOGGERS = ("torchao", "transformers", "datasets", "huggingface_hub", "accelerate", "torch", "filelock")
LIBRARIES = (
    r"(torch|torchao|transformers|datasets|huggingface_hub|accelerate|multiprocess|dill|tokenizers)(\.|$)"
)


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Silence the libraries while the body runs; meant for a whole command. Imports none of them.

    Warnings that a library raises about itself, logs below errors and progress bars are left out. What the
    user has set in the environment wins.
    """
    with ExitStack() as stack:
        stack.enter_context(_environment())
        stack.enter_context(_loggers())
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", module=LIBRARIES)
        warnings.filterwarnings("ignore", message=r".*(pytree|torchao|treespec|LeafSpec).*")
        if "transformers" in sys.modules:
            stack.enter_context(quiet_transformers())
        if "datasets" in sys.modules:
            stack.enter_context(_quiet_datasets())
        yield


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers' load reports and progress bars while the body runs."""
    from transformers.utils import logging as hf_logging

    level, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity(max(level, logging.ERROR))
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(level)
        if bars:
            hf_logging.enable_progress_bar()


@contextmanager
def _quiet_datasets() -> Iterator[None]:
    import datasets

    bars = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if bars:
            datasets.enable_progress_bars()


@contextmanager
def _environment() -> Iterator[None]:
    added = [name for name in QUIET_ENVIRONMENT if name not in os.environ]
    os.environ.update({name: QUIET_ENVIRONMENT[name] for name in added})
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


@contextmanager
def _loggers() -> Iterator[None]:
    levels = {name: logging.getLogger(name).level for name in LOGGERS}
    for name in LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)

"""What went wrong in a stage, in words for the user: memory, disk, Ctrl-C."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from kroncc.errors import KronccError, RunError
from kroncc.plan.stages import Stage
from kroncc.run.files import disk_error
from kroncc.run.store import RunStore

NO_MEMORY = ("can't allocate memory", "CUDA out of memory", "cannot allocate memory", "not enough memory")


@contextmanager
def explained(stage: Stage, store: RunStore) -> Iterator[None]:
    """Turn what a user can mend into `RunError`: K803 disk full, K810 interrupted, K813 out of memory.

    Everything else is a fault of the program and passes as it is.
    """
    try:
        yield
    except KronccError:
        raise
    except KeyboardInterrupt as error:
        raise interrupted(stage) from error
    except Exception as error:
        known = _memory_error(error, stage) or disk_error(error, store.directory)
        if known is None:
            raise
        raise known from error


def interrupted(stage: Stage) -> RunError:
    """Return the error of Ctrl-C outside training."""
    return RunError(
        f"interrupted in step {stage.name!r}",
        code="K810",
        remedy="run the same command again; finished steps are kept, this one starts again",
    )


def _memory_error(error: Exception, stage: Stage) -> RunError | None:
    short = isinstance(error, MemoryError | torch.OutOfMemoryError)
    if not short and not any(words in str(error) for words in NO_MEMORY):
        return None
    return RunError(
        f"out of memory in step {stage.name!r} ({stage.kind})",
        code="K813",
        remedy=_less_memory(stage),
    )


def _less_memory(stage: Stage) -> str:
    size = stage.options.get("batch_size")
    batch = f"batch_size (now {size})" if size else "batch_size"
    match stage.kind:
        case "train":
            return (
                f"lower {batch} and raise accumulate by the same factor, lower max_length of the data, "
                "or train in bf16"
            )
        case "calibrate":
            size = stage.options["calibrate"]["batch_size"]
            return f"lower calibrate.batch_size (now {size}), or max_length of the data"
        case "reconstruct" | "evaluate":
            return f"lower {batch}, or max_length of the data"
    return "free memory, or run on a machine that has more"

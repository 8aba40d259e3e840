"""How a stage gets its `Accelerator`: each with its own precision, all in the same process group."""

from __future__ import annotations

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DistributedDataParallelKwargs, parse_flag_from_env

from kroncc.errors import RunError


def make_accelerator(precision: str) -> Accelerator:
    """Return a fresh accelerator; `RunError` K815 where this machine cannot train in `precision`."""
    state()
    # accelerate keeps one precision a process; the process group (PartialState) stays
    AcceleratorState._reset_state(reset_partial_state=False)
    GradientState._reset_state()
    # a loss may leave parts of the model without a gradient (a pooler, a head)
    unused = DistributedDataParallelKwargs(find_unused_parameters=True)
    try:
        accelerator = Accelerator(
            mixed_precision={"fp32": "no"}.get(precision, precision),
            cpu=_on_cpu(),
            kwargs_handlers=[unused],
        )
    except ValueError as error:
        raise _unavailable(precision, str(error)) from error
    if precision == "fp16" and accelerator.device.type == "cpu":
        raise _unavailable(precision, "on a CPU its small gradients vanish")
    return accelerator


def _unavailable(precision: str, why: str) -> RunError:
    return RunError(
        f"precision {precision} cannot be had here: {why}",
        code="K815",
        remedy="use precision: fp32 or bf16",
    )


def state() -> PartialState:
    """Return the group of processes that this one belongs to, joining it on the first call."""
    return PartialState(cpu=_on_cpu())


def is_main_process() -> bool:
    """Say whether this process is the one that writes and reports."""
    return bool(state().is_main_process)


def wait_for_everyone() -> None:
    """Wait until all processes have come here."""
    state().wait_for_everyone()


def _on_cpu() -> bool:
    # unless told so, accelerate does not join processes on a machine that has nothing but CPUs
    return parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()

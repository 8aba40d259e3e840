"""The modules that factorisations take apart: linear maps and tables, however they store a weight."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from kroncc.api import PassError, Site

DENSE: tuple[type[nn.Module], ...] = (nn.Linear, nn.Embedding, Conv1D)
UNTREATED = ("max_norm", "scale_grad_by_freq", "sparse")  # options of nn.Embedding that act on whole rows


def unsupported(module: nn.Module, kind: str) -> str:
    """Return why the pass `kind` cannot factor `module`, or nothing."""
    if type(module) not in DENSE:
        return f"is a {type(module).__name__}; {kind} treats Linear, Conv1D and Embedding, not subclasses"
    used = [name for name in UNTREATED if getattr(module, name, None)]
    return f"is an embedding with {used[0]}, which acts on whole rows" if used else ""


def weight_of(module: nn.Module) -> Tensor:
    """Return the weight as [out, in] (tokens x width of an embedding); Conv1D stores it as [in, out]."""
    return out_by_in(module, module.get_parameter("weight"))


def out_by_in(module: nn.Module, like_weight: Tensor) -> Tensor:
    """Return a matrix that is laid out as the weight of `module` is, as [out, in]."""
    return like_weight.t() if isinstance(module, Conv1D) else like_weight


def bias_of(module: nn.Module) -> nn.Parameter | None:
    """Return the bias Parameter itself, which the new module takes over."""
    bias = getattr(module, "bias", None)
    return bias if isinstance(bias, nn.Parameter) else None


def located(site: Site, error: PassError) -> PassError:
    """Return `error` with the module's name in front of each message."""
    problems = [replace(problem, message=f"{site.fqn}: {problem.message}") for problem in error.problems]
    return PassError(problems=problems)

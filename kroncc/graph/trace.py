"""Trace a model on meta with torch.export, watching how every module is called."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram
from torch.fx.experimental.symbolic_shapes import ConstraintViolationError, GuardOnDataDependentSymNode
from torch.overrides import TorchFunctionMode

from kroncc.errors import CaptureError
from kroncc.graph.inputs import dynamic_shapes
from kroncc.graph.quiet import quiet

Reshape = Callable[[nn.Module], None]

GIVE_INPUTS = (
    "pass the inputs that the model needs: capture(model, [names]) or capture(model, {name: tensor})"
)

BRANCH = (
    "the module branches on the values of a tensor: use torch.where or torch.cond; "
    "if it drops whole layers at random, set its layerdrop to 0 in the config"
)


@dataclass
class Calls:
    """What the trace saw of module calls: where it is, and which modules take one tensor and return one."""

    path: list[str] = field(default_factory=list)
    plain: dict[str, bool] = field(default_factory=dict)

    def enter(self, fqn: str) -> None:
        """Note that a module starts; the root starts a fresh path."""
        self.path = [*self.path, fqn] if fqn else [fqn]

    def leave(self, fqn: str, module: nn.Module, args: tuple[Any, ...], kwargs: Any, output: Any) -> None:
        """Note that a module ended without an error, and whether the call was one tensor in, one out."""
        self.path.pop()
        plain = isinstance(output, torch.Tensor) and _one_tensor(module, args, kwargs)
        self.plain[fqn] = plain and self.plain.get(fqn, True)


def _one_tensor(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Tell whether the call means the same as `module(tensor)`."""
    given = {name: value for name, value in kwargs.items() if value is not None}
    if args:
        return not given and isinstance(args[0], torch.Tensor) and all(value is None for value in args[1:])
    first = list(inspect.signature(type(module).forward).parameters)[1:2]
    return list(given) == first and all(isinstance(value, torch.Tensor) for value in given.values())


@dataclass(frozen=True)
class Trace:
    """An exported program, the meta model it was made from, and what was seen of module calls."""

    program: ExportedProgram
    skeleton: nn.Module
    calls: Calls


def skeleton_of(model: Any, reshape: Reshape | None = None) -> Any:
    """Return a meta model of the same class, config and dtypes, in train mode, without a cache.

    `reshape` changes the fresh tree as that of `model` was changed.
    """
    config = copy.deepcopy(model.config)
    for part in (config, *(getattr(config, key, None) for key in config.sub_configs)):
        if part is not None:
            part.use_cache = False
    # A compressed model rebuilds its own modules; the graph is that of the architecture.
    config.__dict__.pop("quantization_config", None)
    if config._attn_implementation not in ("eager", "sdpa"):
        config._attn_implementation = "sdpa"
    with torch.device("meta"):
        skeleton = type(model)._from_config(config, dtype=model.dtype)
        if reshape is not None:
            reshape(skeleton)
    _align_dtypes(skeleton, model)
    return skeleton.train()


def _align_dtypes(skeleton: nn.Module, model: nn.Module) -> None:
    """Give each parameter the dtype it has in `model`: some stay in float32 in a half-precision model."""
    dtypes = {name: tensor.dtype for name, tensor in model.named_parameters(remove_duplicate=False)}
    for name, parameter in skeleton.named_parameters():
        dtype = dtypes.get(name, parameter.dtype)
        if parameter.is_floating_point() and dtype.is_floating_point:
            parameter.data = parameter.data.to(dtype)


class _KeepConstants(TorchFunctionMode):
    """Make tensors of Python values on the CPU, where they keep them, and move them where they are wanted."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.new_tensor:
            like, args = args[0], args[1:]
            func, kwargs = torch.tensor, {"dtype": like.dtype, "device": like.device, **kwargs}
        device = kwargs.get("device")
        if (
            func not in (torch.tensor, torch.as_tensor)
            or device is None
            or torch.device(device).type != "meta"
        ):
            return func(*args, **kwargs)
        return func(*args, **{**kwargs, "device": "cpu"}).to(device)


@contextmanager
def _watched(model: nn.Module) -> Iterator[Calls]:
    calls = Calls()
    handles = []
    for fqn, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(lambda _m, _a, fqn=fqn: calls.enter(fqn)))
        handles.append(
            module.register_forward_hook(
                lambda m, args, kwargs, out, fqn=fqn: calls.leave(fqn, m, args, kwargs, out), with_kwargs=True
            )
        )
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def place(fqn: str) -> str:
    """Return how messages call a module."""
    return f"module {fqn!r}" if fqn else "the model's own forward"


def trace(model: Any, examples: Mapping[str, torch.Tensor], reshape: Reshape | None = None) -> Trace:
    """Export a meta copy of `model` with symbolic batch and length. Raises CaptureError (K300 to K303)."""
    with quiet():
        skeleton = skeleton_of(model, reshape)
        with _watched(skeleton) as calls, _KeepConstants():
            try:
                program = torch.export.export(
                    skeleton, (), dict(examples), dynamic_shapes=dynamic_shapes(examples), strict=False
                )
            except Exception as error:
                raise _failure(model, calls, error) from error
    return Trace(program, skeleton, calls)


def _failure(model: nn.Module, calls: Calls, error: Exception) -> CaptureError:
    """Say in which module the trace stopped, why, and what to do."""
    where = calls.path[-1] if calls.path else ""
    kind = type(model.get_submodule(where)).__name__ if where else type(model).__name__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    cause = f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
    code, remedy = _diagnose(error)
    return CaptureError(
        f"{type(model).__name__} cannot be captured: {place(where)} ({kind}) failed with {cause}",
        code=code,
        expected="a forward whose control flow depends on shapes and config only, for any batch and length",
        remedy=remedy,
    )


def _diagnose(error: Exception) -> tuple[str, str]:
    text = str(error)
    if isinstance(error, GuardOnDataDependentSymNode) or "data-dependent" in text:
        return "K301", BRANCH
    if isinstance(error, ConstraintViolationError) or "Constraints violated" in text:
        return "K302", "the module fixes a batch or a length: make its shapes follow its input"
    if isinstance(error, TypeError | KeyError) or "specify" in text:
        return "K303", GIVE_INPUTS
    return "K300", f"mend the module, or {GIVE_INPUTS}"

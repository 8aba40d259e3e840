"""What calls of modules say of dimensions: maps, tables, norms, attention, and what acts on each feature."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import torch
from torch import fx, nn
from transformers.pytorch_utils import Conv1D

from kroncc.graph.atoms import (
    Extent,
    Shape,
    extent_size,
    fresh,
    leaves,
    pin,
    pin_static,
    quotient,
    size_of,
    tensors_of,
    unify,
)
from kroncc.graph.modules import Attention
from kroncc.graph.ops import kind_of, module_of

if TYPE_CHECKING:
    from kroncc.graph.axes import Axes

MOST = 2**20  # features that a module is tried on


def module_shapes(axes: Axes, node: fx.Node) -> list[Shape]:
    """Return the dimensions of what a `call_module` node gives, after relating those of what it reads."""
    module = module_of(node)
    assert module is not None
    if isinstance(module, Attention):
        return _attention(axes, node, module)
    operands = [axes.parts(operand)[0] for operand in node.all_input_nodes if axes.parts(operand)]
    made = _of_one(axes, node, module, operands[0]) if len(operands) == 1 else None
    if made is not None:
        return [made]
    tensors: Iterable[torch.Tensor] = [*module.parameters(), *module.buffers()]
    return axes.unknown(node, type(module).__name__, tensors)


def _of_one(axes: Axes, node: fx.Node, module: nn.Module, given: Shape) -> Shape | None:
    """Return the dimensions of the result of a module that takes one tensor; None where it is not known."""
    held = dict(module.named_parameters())
    where = str(node.target)
    if isinstance(module, (nn.Linear, Conv1D)) and held.keys() <= {"weight", "bias"}:
        return _map(axes, where, module, given)
    if isinstance(module, nn.Embedding) and held.keys() == {"weight"} and module.max_norm is None:
        rows, columns = axes.tensor(module.weight)
        pin([rows], f"rows are looked up in {where}")
        return [*given, columns]
    if isinstance(module, nn.Conv2d) and module.groups == 1:
        return _convolution(axes, node, module, given)
    if next(module.buffers(), None) is not None:
        return None
    if kind_of(node) == "norm" and _ignores_order(module, given):
        return _feature_wise(axes, where, module, given, statistic=True)
    if kind_of(node) in ("elementwise", "identity") and _ignores_others(module, given):
        return _feature_wise(axes, where, module, given, statistic=False)
    return None


def _map(axes: Axes, where: str, module: nn.Linear | Conv1D, given: Shape) -> Shape:
    rows, columns = axes.tensor(module.weight)
    inside, outside = (columns, rows) if isinstance(module, nn.Linear) else (rows, columns)
    unify(given[-1], inside, f"{where} reads what is laid out in other ways")
    if module.bias is not None:
        unify(axes.tensor(module.bias)[0], outside, f"{where} shares its bias")
    return [*given[:-1], outside]


def _convolution(axes: Axes, node: fx.Node, module: nn.Conv2d, given: Shape) -> Shape:
    outside, inside, *kernel = axes.tensor(module.weight)
    where = str(node.target)
    pin(kernel, f"it is the kernel of {where}")
    unify(given[-3], inside, f"{where} reads what is laid out in other ways")
    if module.bias is not None:
        unify(axes.tensor(module.bias)[0], outside, f"{where} shares its bias")
    places = [fresh(size_of(size)) for size in tensors_of(node)[0].shape[-2:]]
    pin_static([*given[-2:], *places], f"{where} moves its kernel along it")
    return [*given[:-3], outside, *places]


def _feature_wise(
    axes: Axes, where: str, module: nn.Module, given: Shape, *, statistic: bool
) -> Shape | None:
    """A norm over the last dimensions, or a function of each feature; its vectors lie along the features."""
    held = [axes.tensor(parameter) for parameter in module.parameters() if parameter.numel() > 1]
    rank = len(module.normalized_shape) if isinstance(module, (nn.LayerNorm, nn.RMSNorm)) else 1
    for shape in held:
        if len(shape) != rank:
            return None
        for mine, other in zip(given[-rank:], shape, strict=True):
            unify(mine, other, f"{where} scales what is laid out in other ways")
    for atom in (atom for extent in given[-rank:] for atom in leaves(extent) if statistic):
        atom.statistics[f"{where} normalises over it"] = None
    return list(given)


def _ignores_order(module: nn.Module, given: Shape) -> bool:
    """Say whether permuted features give permuted results: true of every norm."""
    return _probed(module, given, lambda x: x.flip(-1))


def _ignores_others(module: nn.Module, given: Shape) -> bool:
    """Say whether fewer features give what those gave among all."""
    return _probed(module, given, lambda x: x[..., ::2])


def _probed(module: nn.Module, given: Shape, change: Callable[[torch.Tensor], torch.Tensor]) -> bool:
    """Run a copy of a module on some features and on changed ones, its vectors changed alike."""
    if isinstance(module, nn.LayerNorm | nn.RMSNorm):
        return True
    width = _width(given[-1] if given else [], next(module.parameters(), None) is None)
    if not 1 <= width <= MOST:
        return False
    with torch.device("cpu"), torch.no_grad():
        whole = copy.deepcopy(module).to_empty(device="cpu").float().eval()
        for number, parameter in enumerate(whole.parameters()):
            parameter.copy_(torch.linspace(0.5, 1.5 + number, parameter.numel()).view_as(parameter))
        part = copy.deepcopy(whole)
        for parameter in part.parameters():
            parameter.data = change(parameter.data) if parameter.numel() > 1 else parameter.data
        x = 3 * torch.sin(torch.arange(2.0 * width)).reshape(1, 2, width) + 0.5
        try:
            return torch.allclose(change(whole(x)), part(change(x)), rtol=1e-4, atol=1e-5)
        except Exception:  # a module that cannot be probed is not understood; nothing is lost but a cut
            return False


def _width(extent: Extent, any_width: bool) -> int:
    """Return the number of features to try; 0 where it must be known and is not."""
    size = extent_size(extent)
    if any_width:
        return 8
    return size if isinstance(size, int) else 0


def _attention(axes: Axes, node: fx.Node, module: Attention) -> list[Shape]:
    """Scaled dot-product attention: q [..., heads, L, d], k and v [..., heads or groups of them, S, d]."""
    names = ("q", "k", "v", "mask")
    given = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    q, k, v = (axes.parts(given[name])[0] for name in names[:3])  # type: ignore[arg-type]
    where = str(node.target)
    reason = f"{where} joins what is laid out in other ways"
    for one, other in ((q[-1], k[-1]), (k[-2], v[-2])):
        unify(one, other, reason)
    pin([q[-1], v[-1]], f"it is the size of a head in {where}")
    for keys in (k, v):
        _join_heads(q[:-2], keys[:-2], reason, module.enable_gqa)
    mask = given.get("mask")
    masked = axes.parts(mask)[0] if isinstance(mask, fx.Node) else []
    scores = [*q[:-1], k[-2]]
    for one, other in zip(reversed(scores), reversed(masked), strict=False):
        if one and other:
            unify(one, other, reason)
    return [[*q[:-1], v[-1]]]


def _join_heads(queries: Shape, keys: Shape, reason: str, grouped: bool) -> None:
    """Make the leading dimensions one; of grouped queries, consecutive heads share one head of keys."""
    for place, (one, other) in enumerate(zip(queries, keys, strict=True)):
        last = grouped and place == len(queries) - 1
        times = quotient(extent_size(one), extent_size(other)) if last else 1
        if times is not None and times != 1:
            unify(one, [*other, *fresh(times)], reason)
        elif one and other:
            unify(one, other, reason)

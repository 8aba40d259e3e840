"""What functions of the graph say of dimensions: which of what they read is which of what they give."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import fx

from kroncc.graph import axis_views as views
from kroncc.graph.atoms import Shape, extent_size, fresh, leaves, pin, pin_static, pinned, unify, unrelated
from kroncc.graph.axis_call import Call, broadcast
from kroncc.graph.ops import op_name

if TYPE_CHECKING:
    from kroncc.graph.axes import Axes


def function_shapes(axes: Axes, node: fx.Node) -> list[Shape]:
    """Return the dimensions of what a `call_function` node gives, after relating those of what it reads."""
    name = op_name(node)
    if name == "getitem":
        return [axes.parts(node.args[0])[node.args[1]]]  # type: ignore[arg-type,index]
    if not isinstance(node.target, torch._ops.OpOverload):
        return axes.unknown(node, name or str(node.target))
    call = Call(axes, node)
    rule = _RULES.get(name)
    if name in ("min", "max") and call.shape("other") is None:
        rule = None
    if rule is None and torch.Tag.pointwise in node.target.tags:
        rule = _pointwise
    made = rule(call) if rule is not None else None
    return axes.unknown(node, name) if made is None else made


def _pointwise(call: Call) -> list[Shape]:
    return [broadcast(call.operands(), call.sizes[0], f"{call.reason} joins what is laid out in other ways")]


def _same(call: Call) -> list[Shape]:
    return [list(call.input())]


def _constant(call: Call) -> list[Shape]:
    return unrelated(call.node)


def _counted(call: Call) -> list[Shape]:
    return pinned(call.node, f"{call.reason} counts along it")


def _matmul(call: Call) -> list[Shape] | None:
    left, right = call.operands()[:2] if len(call.operands()) == 2 else ([], [])
    if len(left) < 2 or len(right) < 2:
        return None
    unify(left[-1], right[-2], f"{call.reason} multiplies what is laid out in other ways")
    sizes = call.sizes[0]
    batch = broadcast([left[:-2], right[:-2]], sizes[:-2], f"{call.reason} joins other layouts")
    return [[*batch, left[-2], right[-1]]]


def _linear(call: Call) -> list[Shape] | None:
    given, weight, bias = call.input(), call.shape("weight"), call.shape("bias")
    if weight is None or len(weight) != 2:
        return None
    unify(given[-1], weight[1], f"{call.reason} reads what is laid out in other ways")
    if bias is not None:
        unify(weight[0], bias[-1], call.reason)
    return [[*given[:-1], weight[0]]]


def _addmm(call: Call) -> list[Shape] | None:
    bias, left, right = call.shape("self"), call.shape("mat1"), call.shape("mat2")
    if bias is None or left is None or right is None:
        return None
    unify(left[-1], right[-2], f"{call.reason} multiplies what is laid out in other ways")
    return [broadcast([[left[0], right[1]], bias], call.sizes[0], call.reason)]


def _embedding(call: Call) -> list[Shape] | None:
    weight, index = call.shape("weight"), call.shape("indices")
    if weight is None or index is None:
        return None
    pin([weight[0]], f"rows are looked up in {call.reason}")
    return [[*index, weight[1]]]


def _along(call: Call) -> list[Shape]:
    """What mixes the places of one dimension, and keeps its size: softmax, cumulative sums."""
    given = call.input()
    pin_static([given[call.dim()]] if given else [], f"{call.reason} mixes it")
    return [list(given)]


def _sum(call: Call) -> list[Shape]:
    return [_reduced(call)]


def _statistic(call: Call) -> list[Shape]:
    """What divides by a dimension's size: a mean, a variance, a norm. It stays defined when that is cut."""
    given = call.input()
    for at in call.dims() if "dim" in call.values else range(len(given)):
        for atom in leaves(given[at]):
            atom.statistics[f"{call.reason} is taken over it"] = None
    return [_reduced(call)]


def _reduced(call: Call) -> Shape:
    given = call.input()
    dims = call.dims() if "dim" in call.values else list(range(len(given)))
    keep = bool(call.values.get("keepdim", False))
    return [[] if at in dims else extent for at, extent in enumerate(given) if keep or at not in dims]


def _layer_norm(call: Call) -> list[Shape]:
    given, rank = list(call.input()), len(call.values["normalized_shape"])
    for extent in given[-rank:]:
        for atom in leaves(extent):
            atom.statistics[f"{call.reason} is taken over it"] = None
    for name in ("weight", "bias"):
        held = call.shape(name)
        for mine, other in zip(given[-rank:], held or [], strict=False):
            unify(mine, other, call.reason)
    return [given]


def _gather(call: Call) -> list[Shape] | None:
    given, index = call.input(), call.shape("index")
    if index is None:
        return None
    at = call.dim()
    pin_static([given[at], index[at]], f"{call.reason} picks from it")
    for place, (mine, other) in enumerate(zip(given, index, strict=True)):
        if place != at and extent_size(mine) == extent_size(other):
            unify(mine, other, call.reason)
    return [list(index)]


def _index(call: Call) -> list[Shape] | None:
    """Advanced indexing of the leading dimensions: those behind stay."""
    given, indices = call.input(), call.values["indices"]
    if any(not isinstance(index, fx.Node) for index in indices):
        return None
    covered = sum(
        index.meta["val"].dim() if index.meta["val"].dtype == torch.bool else 1 for index in indices
    )
    pin_static(given[:covered], f"{call.reason} picks from it")
    rest = given[covered:]
    leading = [fresh(size) for size in call.sizes[0][: len(call.sizes[0]) - len(rest)]]
    pin_static(leading, call.reason)
    return [[*leading, *rest]]


Rule = Callable[[Call], list[Shape] | None]
_NAMED: dict[Rule, str] = {
    _same: "to contiguous alias detach lift_fresh lift_fresh_copy dropout _to_copy clone zeros_like "
    "ones_like full_like empty_like type_as float",
    _pointwise: "where __and__ __or__ __xor__ floor_divide prelu copy masked_fill min max celu selu",
    _constant: "zeros ones full empty new_zeros new_ones new_full new_empty scalar_tensor",
    _counted: "arange tril_indices triu_indices eye linspace",
    views.reshape: "view _unsafe_view reshape view_as reshape_as flatten unflatten",
    views.permute: "permute transpose t mT swapaxes swapdims movedim moveaxis",
    views.unsqueeze: "unsqueeze",
    views.squeeze: "squeeze",
    views.expand: "expand expand_as broadcast_to",
    views.repeat: "repeat tile",
    views.repeat_interleave: "repeat_interleave",
    views.part: "slice narrow",
    views.select: "select",
    views.unbind: "unbind",
    views.split: "split split_with_sizes chunk tensor_split",
    views.cat: "cat concat",
    views.stack: "stack",
    _matmul: "matmul bmm mm",
    _linear: "linear",
    _addmm: "addmm",
    _embedding: "embedding",
    _along: "softmax _softmax log_softmax _log_softmax cumsum cumprod roll flip tril triu sort",
    _sum: "sum",
    _statistic: "mean var std norm linalg_vector_norm",
    _layer_norm: "layer_norm rms_norm",
    _gather: "gather take_along_dim",
    _index: "index",
}
_RULES: dict[str, Rule] = {name: rule for rule, names in _NAMED.items() for name in names.split()}

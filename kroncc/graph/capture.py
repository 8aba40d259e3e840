"""Capture a transformers model as a graph over its own modules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import fx
from torch._higher_order_ops.wrap import wrap_with_set_grad_enabled

from kroncc.errors import CaptureError
from kroncc.graph.fold import fold_leaves, name_functions
from kroncc.graph.inputs import default_inputs, example_inputs
from kroncc.graph.lift import innermost, lift, stack_of
from kroncc.graph.model_graph import Extras, ModelGraph, copy_graph
from kroncc.graph.modules import Region
from kroncc.graph.symbolic import unify, upper_limits
from kroncc.graph.trace import Reshape, Trace, place, trace

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["capture", "default_inputs"]


def capture(
    model: PreTrainedModel,
    inputs: Sequence[str] | Mapping[str, torch.Tensor] | None = None,
    reshape: Reshape | None = None,
) -> ModelGraph:
    """Return the graph of `model`, with symbolic batch and length, bound to the model's own modules.

    `model` is a transformers model on meta or with weights. `inputs` names the inputs to trace with, or gives
    example tensors for inputs of no standard shape (dimension 0 is the batch; dimension 1 of integer inputs
    is a length); the default is what the model's tokenizer or image processor gives. A model whose tree is no
    longer that of its config gives `reshape`, which makes it of a fresh one on meta. Raises CaptureError.
    """
    traced = trace(model, example_inputs(model, inputs), reshape)
    graph, constants = lift(traced)
    extras: Extras = dict(constants)
    limits = upper_limits(graph, traced.program.range_constraints)
    unify(graph)
    _name_outputs(traced, graph)
    fold_leaves(traced, graph)
    extras.update(name_functions(traced, graph))
    extras.update(_name_regions(traced, graph))
    _sweep(graph)
    _refuse_chance(graph)
    for node in graph.nodes:
        _annotate(node)
    return ModelGraph(copy_graph(graph), model, extras, model.dtype, limits)


def _name_outputs(traced: Trace, graph: fx.Graph) -> None:
    """Make the output a dict of the named tensors; caches and tuples of states are left out."""
    node = graph.output_node()
    leaves = list(node.args[0])  # type: ignore[arg-type]
    spec = traced.program.call_spec.out_spec
    children = spec.children() if spec.num_leaves != 1 or spec.num_children else [spec]
    keys = list(spec.context) if isinstance(spec.context, list) else []
    names = keys or [f"output_{index}" for index in range(len(children))]
    named = {}
    for name, child in zip(names, children, strict=True):
        mine, leaves = leaves[: child.num_leaves], leaves[child.num_leaves :]
        if child.is_leaf() and isinstance(mine[0], fx.Node):
            named[name] = mine[0]
    if not named:
        raise CaptureError(
            f"{type(traced.skeleton).__name__} returns no tensor by name",
            code="K306",
            expected="a forward that returns a ModelOutput with at least one tensor",
            remedy="choose a class with a head, or the base model",
        )
    node.args = (named,)


def _name_regions(traced: Trace, graph: fx.Graph) -> Extras:
    """Make a module of each sub-graph that the exporter keeps for code under `no_grad`."""
    regions: Extras = {}
    for node in graph.find_nodes(op="call_function", target=wrap_with_set_grad_enabled, sort=True):
        enabled, body, *operands = node.args
        part = getattr(traced.program.graph_module, str(body.target))
        owner = innermost(node)
        count = sum(1 for name in regions if name.rpartition(".")[0] == owner)
        target = f"{owner}.region_{count}".lstrip(".")
        regions[target] = Region(part, bool(enabled))
        with graph.inserting_after(node):
            call = graph.call_module(target, tuple(operands))
        call.meta = dict(node.meta)
        node.replace_all_uses_with(call)
        graph.erase_node(node)
    return regions


def _sweep(graph: fx.Graph) -> None:
    """Erase what nothing reads. Inputs stay: they are the signature."""
    for node in reversed(graph.nodes):
        if node.op not in ("placeholder", "output") and not node.users and not _writes(node):
            graph.erase_node(node)


def _writes(node: fx.Node) -> bool:
    """Tell whether a node changes, in place, a tensor that something else may read."""
    if not (isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable):
        return False
    changed = node.all_input_nodes[0]
    fresh = changed.op == "call_function" and not any(
        isinstance(source.meta.get("val"), torch.Tensor) for source in changed.all_input_nodes
    )
    return not (fresh and len(changed.users) == 1)


def _refuse_chance(graph: fx.Graph) -> None:
    """Refuse random numbers drawn outside dropout: they depend on a mode that the graph cannot switch."""
    for node in graph.nodes:
        target = node.target
        if isinstance(target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in target.tags:
            raise CaptureError(
                f"{place(innermost(node))} draws random numbers ({target}) in its own forward",
                code="K308",
                expected="randomness in dropout or in a module of its own only",
                remedy="switch it off in the config, or move it into a sub-module",
            )


def _annotate(node: fx.Node) -> None:
    """Note where a node came from: `fqn` of the innermost module, `stack` of FQNs outermost first."""
    stack = tuple(fqn for _, fqn in stack_of(node))
    node.meta["stack"] = stack
    node.meta["fqn"] = stack[-1] if stack else ""

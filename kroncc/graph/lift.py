"""Free an exported graph of the exporter: attributes by name, no assertions, devices found at run time."""

from __future__ import annotations

import builtins
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx
from torch.export.graph_signature import InputKind
from torch.fx.node import map_aggregate

from kroncc.errors import CaptureError
from kroncc.graph.model_graph import copy_graph
from kroncc.graph.trace import Trace, place

NO_STACK = "_empty_nn_module_stack_from_metadata_hook"
ASSERTIONS = ("_assert", "sym_constrain_range")


def stack_of(node: fx.Node) -> list[tuple[str, str]]:
    """Return (key, FQN) of the modules around a node, outermost first; keys tell repeated calls apart."""
    stack = node.meta.get("nn_module_stack") or {}
    return [(key, entry[0]) for key, entry in stack.items() if key != NO_STACK and entry[0]]


def innermost(node: fx.Node) -> str:
    """Return the FQN of the innermost module around a node, '' for the model itself."""
    stack = stack_of(node)
    return stack[-1][1] if stack else ""


def lift(trace: Trace) -> tuple[fx.Graph, dict[str, torch.Tensor]]:
    """Return the program's graph, belonging to no module, and its constants by name.

    Parameters, buffers and constants become `get_attr` of their FQN; inputs stay placeholders.
    Raises CaptureError (K304) where a constant lost its value on meta.
    """
    graph = copy_graph(trace.program.graph)
    constants = _attributes(trace, graph)
    _drop_assertions(graph)
    _runtime_device(graph)
    for part in _inner(trace.program.graph_module):
        _drop_assertions(part.graph)
        _runtime_device(part.graph)
        part.recompile()
    return graph, constants


def _inner(module: fx.GraphModule) -> Iterator[fx.GraphModule]:
    for child in module.children():
        if isinstance(child, fx.GraphModule):
            yield child
            yield from _inner(child)


def _attributes(trace: Trace, graph: fx.Graph) -> dict[str, torch.Tensor]:
    specs = {spec.arg.name: spec for spec in trace.program.graph_signature.input_specs}
    constants: dict[str, torch.Tensor] = {}
    for node in graph.find_nodes(op="placeholder"):
        spec = specs[node.name]
        if spec.kind == InputKind.USER_INPUT:
            continue
        target = str(spec.target)
        if spec.kind == InputKind.CONSTANT_TENSOR:
            constants[target] = _constant(trace.program.constants[target], target)
        last_input = list(graph.find_nodes(op="placeholder"))[-1]
        with graph.inserting_after(last_input):
            attribute = graph.get_attr(target)
        attribute.meta["val"] = node.meta["val"]
        node.replace_all_uses_with(attribute)
        graph.erase_node(node)
    return constants


def _constant(value: Any, target: str) -> torch.Tensor:
    if isinstance(value, torch.Tensor) and not value.is_meta:
        return value
    raise CaptureError(
        f"{place(target.rpartition('.')[0])} makes a tensor from Python values on the device of its input",
        code="K304",
        expected="tensors made by torch.full, torch.arange or a registered buffer",
        remedy="the values are lost on meta: mend the module",
    )


def _drop_assertions(graph: fx.Graph) -> None:
    for node in reversed(graph.nodes):
        name = getattr(node.target, "__name__", "")
        if node.op == "call_function" and name.startswith(ASSERTIONS) and not node.users:
            graph.erase_node(node)


def _runtime_device(graph: fx.Graph) -> None:
    """Replace every device baked as meta by the device of the first tensor input."""
    baked = [node for node in graph.nodes if _on_meta(node)]
    if not baked:
        return
    inputs = [n for n in graph.find_nodes(op="placeholder") if isinstance(n.meta.get("val"), torch.Tensor)]
    if not inputs:
        raise CaptureError(
            f"{place(innermost(baked[0]))} makes tensors where no input says on which device",
            code="K305",
            expected="at least one tensor input",
            remedy="mend the module: give it a tensor to take the device from",
        )
    with graph.inserting_after(list(graph.find_nodes(op="placeholder"))[-1]):
        device = graph.call_function(builtins.getattr, (inputs[0], "device"))
    for node in baked:
        node.args, node.kwargs = map_aggregate(
            (node.args, node.kwargs), lambda value: device if _is_meta(value) else value
        )


def _is_meta(value: Any) -> bool:
    return isinstance(value, torch.device) and value.type == "meta"


def _on_meta(node: fx.Node) -> bool:
    found: list[bool] = []
    map_aggregate((node.args, node.kwargs), lambda value: found.append(_is_meta(value)))
    return any(found)

"""Fold the flat graph of an exported program back into calls of the model's own modules."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx, nn

from kroncc.graph.lift import innermost, stack_of
from kroncc.graph.modules import Attention
from kroncc.graph.trace import Trace

aten = torch.ops.aten


def fold_leaves(trace: Trace, graph: fx.Graph) -> None:
    """Replace the nodes of each call of a leaf module, one tensor in, one out, by one `call_module`."""
    groups: dict[str, list[fx.Node]] = defaultdict(list)
    owners: dict[str, str] = {}
    for node in graph.nodes:
        stack = stack_of(node)
        if node.op not in ("call_function", "get_attr") or not stack:
            continue
        key, fqn = stack[-1]
        groups[key].append(node)
        owners[key] = fqn
    for key, nodes in groups.items():
        module = trace.skeleton.get_submodule(owners[key])
        if not any(True for _ in module.children()) and trace.calls.plain.get(owners[key]):
            _fold(trace, graph, owners[key], module, nodes)


def _fold(trace: Trace, graph: fx.Graph, fqn: str, module: nn.Module, nodes: Sequence[fx.Node]) -> None:
    inside = set(nodes)
    for node in nodes:
        _bypass(node, inside)
    outputs = [node for node in nodes if any(user not in inside for user in node.users)]
    sources = _tensor_sources(trace, module, inside, nodes)
    if len(outputs) != 1 or len(sources) != 1 or not isinstance(outputs[0].meta.get("val"), torch.Tensor):
        return
    output = outputs[0]
    with graph.inserting_after(output):
        call = graph.call_module(fqn, (sources[0],))
    call.meta = dict(output.meta)
    output.replace_all_uses_with(call, delete_user_cb=lambda user: user not in inside)
    for node in reversed(nodes):
        graph.erase_node(node)


def _bypass(node: fx.Node, inside: set[fx.Node]) -> None:
    """Let others read what a conversion without effect read: the tracer names both by the later one."""
    if node.op != "call_function" or getattr(node.target, "overloadpacket", None) is not aten.to:
        return
    source = node.args[0]
    if not isinstance(source, fx.Node) or source.meta["val"].dtype != node.meta["val"].dtype:
        return
    node.replace_all_uses_with(source, delete_user_cb=lambda user: user not in inside)


def _tensor_sources(
    trace: Trace, module: nn.Module, inside: set[fx.Node], nodes: Sequence[fx.Node]
) -> list[fx.Node]:
    """Return the distinct tensors that a group reads, less the module's own; sizes do not count."""
    own = {id(tensor) for tensor in [*module.parameters(), *module.buffers()]}
    sources: dict[fx.Node, None] = {}
    for node in nodes:
        for source in node.all_input_nodes:
            if source in inside or isinstance(source.meta.get("val"), torch.SymInt | int):
                continue
            if source.op == "get_attr" and id(_attribute(trace.skeleton, str(source.target))) in own:
                continue
            if source.target is getattr:  # the device, which the module finds by itself
                continue
            sources[source] = None
    return list(sources)


def _attribute(model: nn.Module, target: str) -> Any:
    owner, _, name = target.rpartition(".")
    try:
        return getattr(model.get_submodule(owner), name, None)
    except AttributeError:
        return None


def name_functions(trace: Trace, graph: fx.Graph) -> dict[str, nn.Module]:
    """Replace attention and dropout functions by modules of the graph view; return them by FQN."""
    extras: dict[str, nn.Module] = {}
    counts: dict[tuple[str, str], int] = defaultdict(int)
    makers: dict[Any, tuple[str, Callable[[fx.Node], tuple[nn.Module, tuple[Any, ...]]]]] = {
        aten.scaled_dot_product_attention.default: ("sdpa", _attention),
        aten.dropout.default: ("dropout", _dropout),
    }
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target not in makers:
            continue
        kind, make = makers[node.target]
        stack = stack_of(node)
        key = (stack[-1][0] if stack else "", kind)
        module, args = make(node)
        name = f"{kind}_{counts[key]}" if counts[key] or kind == "dropout" else kind
        counts[key] += 1
        target = _free_name(trace.skeleton, extras, f"{innermost(node)}.{name}".lstrip("."), module)
        extras[target] = module
        with graph.inserting_after(node):
            call = graph.call_module(target, args)
        call.meta = dict(node.meta)
        node.replace_all_uses_with(call)
        graph.erase_node(node)
    return extras


def _free_name(model: nn.Module, extras: dict[str, nn.Module], target: str, module: nn.Module) -> str:
    """Return `target`, or the next name that is neither the model's nor another module's."""
    while _attribute(model, target) is not None or repr(extras.get(target, module)) != repr(module):
        target += "_"
    return target


def _attention(node: fx.Node) -> tuple[nn.Module, tuple[Any, ...]]:
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    given: dict[str, Any] = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    module = Attention(
        dropout_p=given.get("dropout_p", 0.0),
        is_causal=given.get("is_causal", False),
        scale=given.get("scale"),
        enable_gqa=given.get("enable_gqa", False),
    )
    args = (given["query"], given["key"], given["value"])
    return module, args if given.get("attn_mask") is None else (*args, given["attn_mask"])


def _dropout(node: fx.Node) -> tuple[nn.Module, tuple[Any, ...]]:
    return nn.Dropout(float(node.args[1])), (node.args[0],)  # type: ignore[arg-type]

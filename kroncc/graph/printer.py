"""A model graph as text: one line a node, with module types and shapes; stable, so that goldens prove something."""

from __future__ import annotations

import sys
from collections import Counter
from typing import Any

import torch
from torch import fx, nn

from kroncc.graph.model_graph import ModelGraph
from kroncc.graph.symbolic import shape_text, symbols

DTYPES = {
    torch.float32: "f32",
    torch.float64: "f64",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.bool: "bool",
}


def format_graph(mg: ModelGraph) -> str:
    """Return the graph as text, grouped by the module that each line comes from.

    A line reads `name = what(inputs) -> dtype[shape]`; B, L and T are batch, length and target length. Names follow
    the model's own: neither fx's numbering nor the order of unrelated nodes shows.
    """
    names = _names(mg.graph)
    letters = symbols(mg.graph)
    lines = [type(mg.model).__name__]
    section = None
    for node in mg.graph.nodes:
        if node.op == "output":
            section = None
        elif _section(node) != section:
            section = _section(node)
            lines.append(f"{section or 'inputs and outermost'}:")
        lines.append(_line(mg, node, names, letters, section or ""))
    return "\n".join(lines) + "\n"


def _section(node: fx.Node) -> str:
    if node.op == "call_module":
        return str(node.target).rpartition(".")[0]
    return str(node.meta.get("fqn", ""))


def _names(graph: fx.Graph) -> dict[fx.Node, str]:
    """Name each node by its module and kind, counted within the module."""
    counts: Counter[str] = Counter()
    names: dict[fx.Node, str] = {}
    for node in graph.nodes:
        base = str(node.target)
        if node.op == "call_function":
            base = f"{node.meta.get('fqn', '')}/{_function(node).split('.')[0]}".lstrip("/")
        count = counts[base]
        counts[base] += 1
        names[node] = f"{base}@{count}" if count else base
    return names


def _function(node: fx.Node) -> str:
    return str(node.target).removeprefix("aten.") if "." in str(node.target) else getattr(node.target, "__name__", "?")


def _line(mg: ModelGraph, node: fx.Node, names: dict[fx.Node, str], letters: Any, section: str) -> str:
    def local(name: str) -> str:
        return name[len(section) + 1 :] if section and name.startswith((f"{section}.", f"{section}/")) else name

    def text(arg: Any) -> str:
        if isinstance(arg, fx.Node):
            return local(names[arg])
        if isinstance(arg, list | tuple):
            return f"[{', '.join(text(item) for item in arg)}]"
        if isinstance(arg, dict):
            return ", ".join(f"{key}={text(item)}" for key, item in arg.items())
        if isinstance(arg, float):
            return f"{arg:.6g}"
        return "end" if arg == sys.maxsize and isinstance(arg, int) else str(arg).removeprefix("torch.")

    value = node.meta.get("val")
    shape = f"{_dtype(value)}{shape_text(value, letters)}"
    given = ", ".join(text(item) for item in [*node.args, *([node.kwargs] if node.kwargs else [])])
    if node.op == "output":
        return f"return {given}"
    what = {
        "placeholder": lambda: "input",
        "get_attr": lambda: "tensor",
        "call_module": lambda: f"{describe(mg.get(str(node.target)))}({given})",
        "call_function": lambda: f"{_function(node)}({given})",
    }[node.op]()
    return f"  {local(names[node])} = {what}" + (f" -> {shape}" if shape else "")


def _dtype(value: Any) -> str:
    return DTYPES.get(value.dtype, str(value.dtype)) if isinstance(value, torch.Tensor) else ""


def describe(module: nn.Module) -> str:
    """Return a module's type with its key shapes, e.g. `Linear(32->64)`."""
    kind = type(module).__name__
    if isinstance(module, nn.Linear):
        return f"{kind}({module.in_features}->{module.out_features}{'' if module.bias is not None else ', no bias'})"
    if hasattr(module, "nx") and hasattr(module, "nf"):
        return f"{kind}({module.nx}->{module.nf})"
    inner = [describe(child) for child in module.children()]
    return f"{kind}({', '.join([part for part in [module.extra_repr()] if part] + inner)})"

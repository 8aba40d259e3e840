"""A model graph as text: one line a node, with module types and shapes; stable, so that goldens prove it."""

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
TOP = "(model)"


def format_graph(mg: ModelGraph) -> str:
    """Return the graph as text, grouped by the module that each line comes from.

    A line reads `name = what(inputs) -> dtype[shape]`; B, L and T are batch, length and target length. Names
    follow the model's own, so fx's numbering does not show. Sizes and the device are written in place.
    """
    printer = _Printer(mg)
    lines = [type(mg.model).__name__]
    section = None
    for node in mg.graph.nodes:
        if _is_plumbing(node):
            continue
        if node.op != "output" and _section(node) != section:
            section = _section(node)
            lines.append(f"{section or TOP}:")
        lines.append(printer.line(node, section or ""))
    return "\n".join(lines) + "\n"


def describe(module: nn.Module) -> str:
    """Return a module's type with its key shapes, e.g. `Linear(32->64)`."""
    kind = type(module).__name__
    leaf = next(module.children(), None) is None  # what has parts is told by them
    if leaf and isinstance(module, nn.Linear):
        bias = "" if module.bias is not None else ", no bias"
        return f"{kind}({module.in_features}->{module.out_features}{bias})"
    if leaf and hasattr(module, "nx") and hasattr(module, "nf"):
        return f"{kind}({module.nx}->{module.nf})"
    if isinstance(module, nn.Dropout):
        return f"{kind}({module.p:g})"
    if isinstance(module, nn.LayerNorm):
        return f"{kind}({', '.join(map(str, module.normalized_shape))}, eps={module.eps:g})"
    if isinstance(module, fx.GraphModule):
        return f"[{', '.join(_function(node) for node in module.graph.nodes if node.op == 'call_function')}]"
    inner = [f"{name}={describe(child)}" for name, child in module.named_children()]
    return f"{kind}({', '.join([part for part in [module.extra_repr()] if part] + inner)})"


def _is_plumbing(node: fx.Node) -> bool:
    """Tell whether a node only looks up a size or the device: both are written where they are used."""
    value = node.meta.get("val")
    return node.op == "call_function" and (node.target is getattr or isinstance(value, torch.SymInt | int))


def _section(node: fx.Node) -> str:
    return str(node.target).rpartition(".")[0] if node.op == "call_module" else str(node.meta.get("fqn", ""))


def _function(node: fx.Node) -> str:
    if isinstance(node.target, torch._ops.OpOverload):
        return str(node.target).removeprefix("aten.").removesuffix(".default")
    return str(getattr(node.target, "__name__", node.target))


class _Printer:
    """Names and symbols of one graph."""

    def __init__(self, mg: ModelGraph) -> None:
        self.mg = mg
        self.letters = symbols(mg.graph)
        self.names: dict[fx.Node, str] = {}
        counts: Counter[str] = Counter()
        for node in mg.graph.nodes:
            base = str(node.target)
            if node.op == "call_function":
                base = f"{node.meta.get('fqn', '')}/{_function(node).split('.')[0]}".lstrip("/")
            if not _is_plumbing(node):
                self.names[node] = f"{base}@{counts[base]}" if counts[base] else base
                counts[base] += 1

    def line(self, node: fx.Node, section: str) -> str:
        """Return the line of one node; names of its own section are shortened."""
        given = ", ".join(
            [self.text(arg, section) for arg in node.args]
            + [f"{key}={self.text(arg, section)}" for key, arg in node.kwargs.items()]
        )
        if node.op == "output":
            return f"return {given}"
        what = {"placeholder": "input", "get_attr": "tensor"}.get(node.op, f"{_function(node)}({given})")
        if node.op == "call_module":
            what = f"{describe(self.mg.get(str(node.target)))}({given})"
        shape = self.shape(node.meta.get("val"))
        return f"  {_local(self.names[node], section)} = {what}" + (f" -> {shape}" if shape else "")

    def shape(self, value: Any) -> str:
        """Return dtype and shape of a value, or of each of several."""
        if isinstance(value, list | tuple):
            return f"({', '.join(self.shape(item) for item in value)})"
        if isinstance(value, torch.Tensor):
            return DTYPES.get(value.dtype, str(value.dtype)) + shape_text(value, self.letters)
        return shape_text(value, self.letters)

    def text(self, arg: Any, section: str) -> str:
        """Return an argument as text: a node by name, a size by letter, a constant as it is."""
        if isinstance(arg, fx.Node) and _is_plumbing(arg):
            return "device" if arg.target is getattr else self.shape(arg.meta["val"]) or str(arg.meta["val"])
        if isinstance(arg, fx.Node):
            return _local(self.names[arg], section)
        if isinstance(arg, list | tuple):
            return f"[{', '.join(self.text(item, section) for item in arg)}]"
        if isinstance(arg, dict):
            return ", ".join(f"{key}={self.text(item, section)}" for key, item in arg.items())
        if isinstance(arg, float):
            return f"{arg:.6g}"
        return "end" if arg == sys.maxsize and type(arg) is int else str(arg).removeprefix("torch.")


def _local(name: str, section: str) -> str:
    inside = section and name.startswith((f"{section}.", f"{section}/"))
    return name[len(section) + 1 :] if inside else name

"""Run modules and graphs on meta with numbers for the symbols, to see which shapes come out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import sympy
import torch
from torch import fx, nn
from torch.func import functional_call
from torch.fx.node import map_aggregate

from kroncc.graph.symbolic import concrete, concrete_shape, depends_on_data, symbols

# Two sizes for every symbol: a shape that is right at both follows its input.
TRIALS = ({"batch": 2, "length": 5, "target_length": 4}, {"batch": 3, "length": 8, "target_length": 6})


def trial_sizes(graph: fx.Graph) -> list[dict[str, int]]:
    """Return the numbers to try for the symbols of a graph."""
    return [{name: trial.get(name, trial["length"]) for name in symbols(graph)} for trial in TRIALS]


def meta_value(value: Any, names: Mapping[str, sympy.Symbol], sizes: Mapping[str, int]) -> Any:
    """Return a node's value with symbols replaced: tensors on meta, numbers as they are."""

    def one(item: Any) -> Any:
        if isinstance(item, torch.Tensor):
            return torch.empty(concrete_shape(item, names, sizes), dtype=item.dtype, device="meta")
        return concrete(item, names, sizes) if isinstance(item, torch.SymInt) else item

    return map_aggregate(value, one)


def call_on_meta(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Call a module as if its parameters and buffers were on meta; the module itself is left as it is."""
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    on_meta = {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors.items()}
    with torch.no_grad():
        return functional_call(module, on_meta, args, kwargs)


def call_trial(node: fx.Node, module: nn.Module, sizes: Mapping[str, int]) -> tuple[Any, Any]:
    """Return what `module` gives in the place of the call `node`, and what is expected, both on meta."""
    names = symbols(node.graph)

    def value(arg: fx.Node) -> Any:
        return meta_value(arg.meta["val"], names, sizes)

    args, kwargs = fx.map_arg((node.args, node.kwargs), value)
    return call_on_meta(module, *args, **kwargs), meta_value(node.meta["val"], names, sizes)


class ShapeRun(fx.Interpreter):
    """Run a whole graph on meta and note the nodes whose shape or dtype is not the one they carry."""

    def __init__(self, module: fx.GraphModule, sizes: Mapping[str, int]) -> None:
        super().__init__(module)
        self.names = symbols(module.graph)
        self.sizes = sizes
        self.wrong: list[str] = []

    def run_on_meta(self) -> list[str]:
        """Return one line for each node that differs."""
        inputs = self.graph.find_nodes(op="placeholder")
        self.run(*(meta_value(node.meta["val"], self.names, self.sizes) for node in inputs))
        return self.wrong

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:  # noqa: ARG002
        value = self.fetch_attr(target)
        return torch.empty_like(value, device="meta") if isinstance(value, torch.Tensor) else value

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        return call_on_meta(self.fetch_attr(target), *args, **kwargs)

    def run_node(self, n: fx.Node) -> Any:
        if depends_on_data(n.meta.get("val")):
            return meta_value(n.meta["val"], self.names, self.sizes)
        result = super().run_node(n)
        if isinstance(n.meta.get("val"), torch.Tensor):
            expected = meta_value(n.meta["val"], self.names, self.sizes)
            difference = tensor_difference(expected, result)
            if difference:
                self.wrong.append(f"{n.target} ({n.name}): {difference}")
        return result


def tensor_difference(expected: torch.Tensor, got: Any) -> str:
    """Say how `got` differs from `expected` in shape or dtype; '' if it does not."""
    if not isinstance(got, torch.Tensor):
        return f"returns {type(got).__name__} instead of one tensor"
    if got.shape != expected.shape:
        return f"returns shape {list(got.shape)} where {list(expected.shape)} is due"
    if got.dtype != expected.dtype:
        return f"returns {got.dtype} where {expected.dtype} is due"
    return ""

"""Bytes that the values of a graph take: at the peak of inference, and kept for the backward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn
from torch.func import functional_call

from kroncc.graph.flops import Counter
from kroncc.graph.ops import (
    NONLINEAR,
    PRODUCTS,
    SOFTMAX,
    VIEWS,
    is_in_place,
    op_name,
    tensor_inputs,
    value_of,
)
from kroncc.graph.walk import Walker


class Memory:
    """Bytes of a graph's values for one choice of sizes; scratch space of modules and kernels is not seen."""

    def __init__(self, walker: Walker, counter: Counter) -> None:
        self.walker = walker
        self.counter = counter
        self.base: dict[fx.Node, fx.Node] = {}
        for node in walker.nodes:
            source = next(iter(tensor_inputs(node)), None)
            self.base[node] = (
                self.base[source] if source is not None and self._is_alias(node, source) else node
            )

    def inference_peak(self) -> int:
        """Return the largest sum of bytes of values that are alive at once, inputs included, weights not."""
        ends: dict[fx.Node, int] = {}
        for place, node in enumerate(self.walker.nodes):
            for operand in (*node.all_input_nodes, node):
                ends[self.base[operand]] = place
        free: dict[int, list[fx.Node]] = {}
        for node, place in ends.items():
            free.setdefault(place, []).append(node)
        alive = peak = 0
        for place, node in enumerate(self.walker.nodes):
            alive += self.size(node) if self.base[node] is node else 0
            peak = max(peak, alive)
            alive -= sum(self.size(done) for done in free.get(place, ()))
        return peak

    def saved_for_backward(self) -> int:
        """Return the bytes of the values that training keeps between the forward and the backward pass."""
        kept: dict[fx.Node, None] = {}
        inside = 0
        for node in self.walker.nodes:
            if self._trains(node):
                values, extra = self._saved(node)
                kept.update(dict.fromkeys(self.base[value] for value in values))
                inside += extra
        return inside + sum(self.size(node) for node in kept)

    def size(self, node: fx.Node) -> int:
        """Return the bytes of a node's tensor; 0 for parameters, numbers and lists."""
        value = value_of(node)
        if value is None or node.op == "get_attr":
            return 0
        count = 1
        for extent in self.counter.shape(node):
            count *= extent
        return count * value.element_size()

    def _is_alias(self, node: fx.Node, source: fx.Node) -> bool:
        if self.walker.kind(node) == "identity":
            return True
        given, result = value_of(source), value_of(node)
        same = given is None or result is None or given.dtype == result.dtype
        return (op_name(node) in VIEWS or is_in_place(node)) and same

    def _trains(self, node: fx.Node) -> bool:
        value = value_of(node)
        return value is not None and value.is_floating_point() and node.op.startswith("call")

    def _saved(self, node: fx.Node) -> tuple[list[fx.Node], int]:
        """Return the values that the derivative of a node reads, and the bytes of what it keeps inside."""
        kind, operands = self.walker.kind(node), tensor_inputs(node)
        if kind == "attention":
            return [*operands, node], 0
        if kind == "identity":
            return [], self._dropout(node)
        module = self.counter.module(node)
        if module is not None:
            return self._saved_inside(node, module)
        return _saved_by_function(node, operands), 0

    def _dropout(self, node: fx.Node) -> int:
        """Return the bytes of a dropout's mask (one a value) and of its result, a new value in training."""
        value = value_of(node)
        if value is None or not getattr(self.counter.module(node), "p", 0.0):
            return 0
        return self.size(node) // value.element_size() + self.size(node)

    def _saved_inside(self, node: fx.Node, module: nn.Module) -> tuple[list[fx.Node], int]:
        """Run the module on meta tensors and look at what its derivative keeps."""
        given = {operand: self.counter.value(operand) for operand in tensor_inputs(node)}
        given = {operand: _tracked(value) for operand, value in given.items()}
        weights = {name: _tracked(torch.empty_like(t, device="meta")) for name, t in _tensors(module)}
        kept: dict[int, torch.Tensor] = {}
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda one: given.get(one))
        hooks = torch.autograd.graph.saved_tensors_hooks(
            lambda t: kept.setdefault(_storage(t), t), lambda t: t
        )
        with torch.enable_grad(), hooks:
            result = functional_call(module, weights, args, kwargs)
        known = {_storage(value): operand for operand, value in given.items() if _is_tensor(value)}
        known |= {_storage(result): node} if _is_tensor(result) else {}
        free = {_storage(weight) for weight in weights.values()}
        inside = sum(
            t.untyped_storage().nbytes() for place, t in kept.items() if place not in known.keys() | free
        )
        return [known[place] for place in kept if place in known], inside


def _saved_by_function(node: fx.Node, operands: list[fx.Node]) -> list[fx.Node]:
    name = op_name(node)
    if name in NONLINEAR | PRODUCTS or (name in {"mul", "div"} and len(operands) > 1):
        return operands
    return [node] if name in SOFTMAX else []


def _tensors(module: nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [*module.named_parameters(), *module.named_buffers()]


def _tracked(value: Any) -> Any:
    return value.requires_grad_() if _is_tensor(value) and value.is_floating_point() else value


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


def _storage(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)

"""FLOPs of the nodes of a graph for given sizes, 2 a multiply-add; only products of matrices count."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import sympy
import torch
from torch import fx, nn
from torch.utils.flop_counter import FlopCounterMode

from kroncc.graph.modules import Attention, Region
from kroncc.graph.ops import PRODUCTS, module_of, op_name
from kroncc.graph.propagate import call_on_meta, meta_value
from kroncc.graph.symbolic import concrete_shape

METERED = frozenset({"einsum", "conv1d", "conv2d", "conv3d", "convolution"})
Shape = tuple[int, ...]


class Counter:
    """Counts the FLOPs of nodes with numbers for symbols, such as `{"batch": 1, "length": 128}`."""

    def __init__(
        self,
        names: Mapping[str, sympy.Symbol],
        sizes: Mapping[str, int],
        modules: Mapping[fx.Node, nn.Module],
    ) -> None:
        self.names = names
        self.modules = modules
        self.sizes = {name: sizes[name] for name in names if name in sizes}

    def count(self, node: fx.Node) -> int:
        """Return the FLOPs of one node. Look-ups, sums, elementwise functions and normalisation count 0."""
        module = self.module(node)
        if module is None:
            return self._function(node)
        if isinstance(module, Region):
            return sum(map(self.count, _body(module)))
        if isinstance(module, Attention):
            return attention_flops(*(self.shape(operand) for operand in _arguments(node)[:3]))
        return module_flops(module, [self.value(operand) for operand in _arguments(node)])

    def module(self, node: fx.Node) -> nn.Module | None:
        """Return the module that a node calls."""
        return self.modules.get(node) or module_of(node)

    def shape(self, node: fx.Node) -> Shape:
        """Return the shape of a node's tensor, in numbers; () where it has none."""
        value = node.meta.get("val")
        return concrete_shape(value, self.names, self.sizes) if isinstance(value, torch.Tensor) else ()

    def value(self, argument: Any) -> Any:
        """Return an argument with nodes replaced by tensors on meta and numbers."""
        return fx.map_arg(argument, lambda node: meta_value(node.meta.get("val"), self.names, self.sizes))

    def _function(self, node: fx.Node) -> int:
        name = op_name(node)
        if name in METERED:
            return _metered(node.target, *self.value(node.args), **self.value(node.kwargs))
        if name == "linear":
            return product_flops(self.shape(node), self.shape(_arguments(node)[0]))
        if name in {"addmm", "baddbmm"}:
            return product_flops(self.shape(node), self.shape(_arguments(node)[1]))
        if name in PRODUCTS or name == "mm":
            return product_flops(self.shape(node), self.shape(_arguments(node)[0]))
        return 0


def product_flops(result: Shape, left: Shape) -> int:
    """Return the FLOPs of a matrix product from the shape of its result and of its left side."""
    return 2 * math.prod(result) * left[-1]


def attention_flops(q: Shape, k: Shape, v: Shape) -> int:
    """Return the FLOPs of q k^T and of probabilities times v; keys may have fewer heads than queries."""
    scores = math.prod(q[:-1]) * k[-2]
    return 2 * scores * (q[-1] + v[-1])


def module_flops(module: nn.Module, inputs: list[Any]) -> int:
    """Return the FLOPs of a call: by the module's own `flops(input shape)`, else run on meta tensors."""
    own = getattr(module, "flops", None)
    first = next((value for value in inputs if isinstance(value, torch.Tensor)), None)
    if callable(own) and first is not None:
        return int(own(tuple(first.shape)))
    if isinstance(module, nn.Linear) and first is not None:
        return 2 * first.numel() * module.out_features
    if all(tensor.dim() < 2 for tensor in _tensors(module)):
        return 0
    return _metered(lambda *args: call_on_meta(module, *args), *inputs)


def _metered(call: Any, *args: Any, **kwargs: Any) -> int:
    with FlopCounterMode(display=False) as meter, torch.no_grad():
        call(*args, **kwargs)
    return int(meter.get_total_flops())


def _tensors(module: nn.Module) -> Iterator[torch.Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def _body(region: Region) -> Iterable[fx.Node]:
    body = region.body
    return body.graph.nodes if isinstance(body, fx.GraphModule) else ()


def _arguments(node: fx.Node) -> list[fx.Node]:
    return [value for value in (*node.args, *node.kwargs.values()) if isinstance(value, fx.Node)]

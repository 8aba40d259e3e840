"""A part of a model's graph as a module of its own, over the very same sub-modules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from kroncc.graph.model_graph import ModelGraph
from kroncc.graph.storage import Storage


class Segment:
    """What computes the values of `ends` from values that are known before the node `start`.

    `module` takes the values of `inputs`, in order, and returns a list: the value of each end. A value that
    the segment writes into is copied first. Nodes that the ends do not need are left out.
    """

    def __init__(self, graph: ModelGraph, start: fx.Node, ends: Sequence[fx.Node]) -> None:
        nodes = list(graph.graph.nodes)
        self._storage = Storage(nodes)
        self._first = self._storage.order[start]
        self.nodes = self._needed(ends)
        self.inputs = self._sources(nodes)
        self._written = self._written_inputs()
        self.module = self._module(graph, ends)

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters that can be trained, by name in the model; tied ones under the first name."""
        named = self.module.named_parameters()
        return {name: one for name, one in named if one.requires_grad and one.is_floating_point()}

    def layout(self) -> dict[str, tuple[torch.Size, torch.dtype]]:
        """Return shape and dtype of all that the segment's modules store, by name."""
        named = [*self.module.named_parameters(remove_duplicate=False), *self.module.named_buffers()]
        return {name: (tensor.shape, tensor.dtype) for name, tensor in named}

    def __call__(self, values: Sequence[Any]) -> list[Tensor]:
        """Run the segment on the values of `inputs`."""
        given = [
            value.clone() if node in self._written else value
            for node, value in zip(self.inputs, values, strict=True)
        ]
        ends: list[Tensor] = self.module(*given)
        return ends

    def _needed(self, ends: Sequence[fx.Node]) -> list[fx.Node]:
        """Return the nodes from `start` on that the ends are computed from, in graph order."""
        order, found, open_ = self._storage.order, set[fx.Node](), list(ends)
        while open_:
            node = open_.pop()
            if node in found or not self._inside(node):
                continue
            found.add(node)
            open_ += [*node.all_input_nodes, *self._storage.written_before(node)]
        return sorted(found, key=order.__getitem__)

    def _inside(self, node: fx.Node) -> bool:
        return self._storage.order[node] >= self._first and node.op not in ("placeholder", "get_attr")

    def _sources(self, nodes: Sequence[fx.Node]) -> list[fx.Node]:
        read = {operand for node in self.nodes for operand in node.all_input_nodes}
        return [node for node in nodes if node in read and not self._inside(node) and node.op != "get_attr"]

    def _written_inputs(self) -> set[fx.Node]:
        written = {
            base
            for base, writes in self._storage.writes.items()
            if any(write in self.nodes for write in writes)
        }
        return {node for node in self.inputs if self._storage.base[node] in written}

    def _module(self, graph: ModelGraph, ends: Sequence[fx.Node]) -> fx.GraphModule:
        part = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}
        for node in self.inputs:
            copies[node] = part.placeholder(node.name)
        for node in self.nodes:
            for operand in node.all_input_nodes:
                if operand.op == "get_attr" and operand not in copies:
                    copies[operand] = part.node_copy(operand)
            copies[node] = part.node_copy(node, copies.__getitem__)
        part.output([copies[end] for end in ends])
        return fx.GraphModule(graph.module, part, class_name="Segment")

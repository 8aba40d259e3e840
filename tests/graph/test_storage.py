"""Writes into memory that other nodes share: what depends on them, and which of them may go."""

from __future__ import annotations

import torch
from torch import fx

from kroncc.graph.storage import Storage, sweep

aten = torch.ops.aten


def _graph(*, read_after: bool) -> tuple[fx.Graph, dict[str, fx.Node]]:
    """Build: a buffer, a value copied into a view of it, and an output that reads it before or after."""
    graph = fx.Graph()
    value = torch.zeros(2, 3)

    def add(name: str, target: object, *args: object) -> fx.Node:
        node = graph.call_function(target, args)  # type: ignore[arg-type]
        node.meta["val"] = value
        return node

    x = graph.placeholder("x")
    x.meta["val"] = value
    buffer = add("buffer", aten.zeros_like.default, x)
    early = add("early", aten.neg.default, buffer)
    row = add("row", aten.slice.Tensor, buffer, 0, 0, 2)
    write = add("write", aten.copy_.default, row, x)
    late = add("late", aten.neg.default, buffer)
    graph.output(late if read_after else early)
    return graph, {"buffer": buffer, "early": early, "row": row, "write": write, "late": late, "x": x}


def test_a_write_through_a_view_belongs_to_the_buffer() -> None:
    graph, nodes = _graph(read_after=True)
    storage = Storage(graph.nodes)
    assert storage.base[nodes["row"]] is nodes["buffer"]
    assert storage.filled_by(nodes["buffer"]) == [nodes["x"]]
    assert storage.written_after(nodes["buffer"])
    assert storage.written_before(nodes["early"]) == []
    assert storage.written_before(nodes["late"]) == [nodes["write"]]


def test_sweep_keeps_a_write_that_is_read_later() -> None:
    graph, _ = _graph(read_after=True)
    sweep(graph)
    module = fx.GraphModule(torch.nn.Module(), graph)
    x = torch.arange(6.0).view(2, 3)
    torch.testing.assert_close(module(x), -x)
    assert [node for node in graph.nodes if node.target is aten.copy_.default]


def test_sweep_drops_a_write_that_nothing_reads() -> None:
    graph, _ = _graph(read_after=False)
    sweep(graph)
    assert [str(node.op) for node in graph.nodes] == [
        "placeholder",
        "call_function",
        "call_function",
        "output",
    ]
    assert not [node for node in graph.nodes if node.target is aten.copy_.default]

"""Which nodes share memory, and which ones write into it: a value may change after the node that made it."""

from __future__ import annotations

from collections.abc import Iterable

from torch import fx

from kroncc.graph.ops import VIEWS, is_in_place, op_name, tensor_inputs

BUFFERS = frozenset({"empty", "empty_like", "new_empty", "zeros", "zeros_like", "new_zeros"})


class Storage:
    """The memory behind each node, and the writes into it in graph order."""

    def __init__(self, nodes: Iterable[fx.Node]) -> None:
        self.base: dict[fx.Node, fx.Node] = {}
        self.order: dict[fx.Node, int] = {}
        self.writes: dict[fx.Node, list[fx.Node]] = {}
        for place, node in enumerate(nodes):
            self.order[node] = place
            sources = tensor_inputs(node)
            shared = bool(sources) and (is_in_place(node) or op_name(node) in VIEWS)
            self.base[node] = self.base[sources[0]] if shared else node
            if is_in_place(node):
                self.writes.setdefault(self.base[node], []).append(node)

    def written_after(self, node: fx.Node) -> bool:
        """Say whether a later node writes into the value of `node`."""
        return any(self.order[write] > self.order[node] for write in self.writes.get(self.base[node], ()))

    def written_before(self, node: fx.Node) -> list[fx.Node]:
        """Return the writes into what `node` reads that come before it."""
        bases = dict.fromkeys(self.base[operand] for operand in tensor_inputs(node))
        writes = [write for base in bases for write in self.writes.get(base, ())]
        return [write for write in writes if self.order[write] < self.order[node]]

    def filled_by(self, node: fx.Node) -> list[fx.Node]:
        """Return the values that are written into an empty buffer; nothing for other nodes."""
        if op_name(node) not in BUFFERS:
            return []
        return [value for write in self.writes.get(node, ()) for value in tensor_inputs(write)[1:]]


def sweep(graph: fx.Graph) -> None:
    """Erase what no output needs; a write is needed where something that is needed reads the memory later."""
    storage = Storage(graph.nodes)
    for node in reversed(graph.nodes):
        if node.op in ("placeholder", "output") or node.users:
            continue
        if not (is_in_place(node) and _is_read_later(storage, node)):
            graph.erase_node(node)


def _is_read_later(storage: Storage, write: fx.Node) -> bool:
    base = storage.base[write]
    if base.op in ("placeholder", "get_attr"):
        return True
    shared = [node for node, owner in storage.base.items() if owner is base]
    return any(storage.order[user] > storage.order[write] for node in shared for user in node.users)

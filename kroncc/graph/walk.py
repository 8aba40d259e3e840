"""Walks over a model graph: back to the linear maps that feed a value, forward to what takes it."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from torch import fx

from kroncc.graph.ops import (
    ARITHMETIC,
    MASKING,
    NONLINEAR,
    PRODUCTS,
    SHAPE,
    STATISTICS,
    Kind,
    is_anonymous_linear,
    kind_of,
    op_name,
    tensor_inputs,
    value_of,
)
from kroncc.graph.storage import BUFFERS, Storage

SUMS = frozenset({"add", "sub", "rsub"})
Feeds = frozenset[tuple[fx.Node, bool]]
"""Linear maps that feed a value; True: through a non-linear function."""

NOTHING: Feeds = frozenset()


@dataclass(frozen=True)
class Residual:
    """A sum that joins a branch to the stream it left: the sum, and the stream's value."""

    total: fx.Node
    stream: fx.Node


class Walker:
    """Answers about the data flow of one graph. It is valid as long as the graph does not change."""

    def __init__(self, graph: fx.Graph) -> None:
        self.nodes = list(graph.nodes)
        self.order = {node: place for place, node in enumerate(self.nodes)}
        self.kinds: dict[fx.Node, Kind] = {n: kind_of(n) for n in self.nodes if n.op == "call_module"}
        self.storage = Storage(self.nodes)
        self._above: dict[fx.Node, int] = {}
        for node in self.nodes:
            above = 0
            for operand in (*node.all_input_nodes, *self.storage.written_before(node)):
                above |= self._above[operand] | 1 << self.order[operand]
            self._above[node] = above

    def kind(self, node: fx.Node) -> Kind:
        """Return what the node's module does; "other" where the node calls none."""
        return self.kinds.get(node, "other")

    def linears(self) -> list[fx.Node]:
        """Return the calls of linear maps in order."""
        return [node for node in self.nodes if self.kind(node) == "linear"]

    def depends(self, node: fx.Node, on: fx.Node) -> bool:
        """Say whether `node` is `on` or is computed from it."""
        return node is on or bool(self._above[node] >> self.order[on] & 1)

    def operands(self, node: fx.Node) -> list[fx.Node]:
        """Return the operands that are tensors; in a sum or product, no parameters and no single numbers.

        Of an empty buffer, these are the values that are written into it.
        """
        found = tensor_inputs(node) + self.storage.filled_by(node)
        if op_name(node) not in ARITHMETIC:
            return found
        return [operand for operand in found if operand.op != "get_attr" and not _is_number(operand)]

    def feeds(self, node: fx.Node, passes: Callable[[fx.Node], bool]) -> Feeds:
        """Return the linear maps that feed `node` through nodes that `passes` admits.

        A sum of values from different maps is where branches meet, so no single map feeds it.
        """
        known: dict[fx.Node, Feeds] = {}

        def back(at: fx.Node) -> Feeds:
            if at not in known:
                known[at] = NOTHING
                known[at] = frozenset({(at, False)}) if self.kind(at) == "linear" else through(at)
            return known[at]

        def through(at: fx.Node) -> Feeds:
            if not passes(at):
                return NOTHING
            parts = [part for part in map(back, self.operands(at)) if part]
            if op_name(at) in SUMS and len({frozenset(n for n, _ in part) for part in parts}) > 1:
                return NOTHING
            bent = op_name(at) in NONLINEAR or self.kind(at) == "elementwise"
            return frozenset((n, bent or before) for part in parts for n, before in part)

        return back(node)

    def straight(self, node: fx.Node) -> bool:
        """Say whether q, k and v walks go through: views, rotary sums and products, norms, dropout."""
        return self._through(node, SHAPE | ARITHMETIC | STATISTICS, {"identity", "norm"})

    def elementwise(self, node: fx.Node) -> bool:
        """Say whether walks inside an FFN go through: elementwise functions, products, chunks, dropout."""
        return self._through(node, SHAPE | ARITHMETIC | NONLINEAR, {"identity", "norm", "elementwise"})

    def _through(self, node: fx.Node, ops: frozenset[str], kinds: set[Kind]) -> bool:
        return op_name(node) in ops | BUFFERS or self.kind(node) in kinds

    def downstream(self, node: fx.Node, passes: Callable[[fx.Node], bool]) -> Iterator[fx.Node]:
        """Yield what takes `node`, in graph order, going on through nodes that `passes` admits."""
        heap = [(self.order[user], user) for user in node.users]
        heapq.heapify(heap)
        seen: set[fx.Node] = set()
        while heap:
            _, at = heapq.heappop(heap)
            if at in seen:
                continue
            seen.add(at)
            yield at
            if passes(at):
                for user in at.users:
                    heapq.heappush(heap, (self.order[user], user))

    def next_maps(self, node: fx.Node) -> list[fx.Node]:
        """Return the first linear maps that take `node`, not going past a sum with another branch."""

        def passes(at: fx.Node) -> bool:
            return self.straight(at) and not (op_name(at) in SUMS and len(self.operands(at)) > 1)

        return [at for at in self.downstream(node, passes) if self.kind(at) == "linear"]

    def residual(self, branch: fx.Node, source: fx.Node) -> Residual | None:
        """Return the sum that joins `branch` with the stream that `source`, the branch's input, came from."""
        for at in self.downstream(branch, self.straight):
            if op_name(at) != "add":
                continue
            for other in self.operands(at):
                if self.depends(source, other) and not self.depends(other, branch):
                    return Residual(at, other)
        return None

    def score_product(self, softmax: fx.Node) -> fx.Node | None:
        """Return the nearest matrix product before a softmax: q k^T, behind scaling, biases and masks."""
        passing = SHAPE | ARITHMETIC | MASKING | NONLINEAR
        level, seen = [softmax.all_input_nodes[0]], set[fx.Node]()
        while level:
            for node in level:
                if self._is_product(node):
                    return node
            seen.update(level)
            level = [
                operand
                for node in level
                if op_name(node) in passing
                for operand in self.operands(node)
                if operand not in seen
            ]
        return None

    def value_product(self, softmax: fx.Node) -> tuple[fx.Node, fx.Node] | None:
        """Return the product of attention probabilities with v, and v."""

        def passes(node: fx.Node) -> bool:
            return op_name(node) in SHAPE | {"mul"} or self.kind(node) == "identity"

        for at in self.downstream(softmax, passes):
            if self._is_product(at):
                rest = [operand for operand in self.operands(at) if not self.depends(operand, softmax)]
                return (at, rest[-1]) if rest else None
        return None

    def _is_product(self, node: fx.Node) -> bool:
        return op_name(node) in PRODUCTS and not is_anonymous_linear(node)


def _is_number(node: fx.Node) -> bool:
    value = value_of(node)
    return value is not None and value.dim() == 0


def only(nodes: Iterable[fx.Node]) -> fx.Node | None:
    """Return the single node of `nodes`, or None."""
    found = list(nodes)
    return found[0] if len(found) == 1 else None

"""The blocks of a model: its layers in data-flow order, what comes before them, and what comes after.

A block starts where the one before it ends. Layers of an encoder-decoder are counted through, encoder first,
and each stack has embeddings of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx

from kroncc.graph.flow import find_flow
from kroncc.graph.model_graph import ModelGraph
from kroncc.graph.ops import value_of
from kroncc.graph.segment import Segment

EMBEDDINGS, LAYER, HEAD = "embeddings", "layer", "head"


@dataclass(frozen=True)
class Block:
    """A stretch of the graph: the node that it starts at, and the values that it gives.

    `first` and `last` number its layers, from 0; they say nothing of embeddings and head.
    """

    kind: str
    start: fx.Node
    ends: tuple[fx.Node, ...]
    first: int = 0
    last: int = 0

    @property
    def name(self) -> str:
        """What messages call the block: `embeddings`, `layer 3`, `layers 0-5`, `head`."""
        if self.kind != LAYER:
            return self.kind
        return f"layer {self.first}" if self.first == self.last else f"layers {self.first}-{self.last}"

    def segment(self, graph: ModelGraph) -> Segment:
        """Return the block as a module."""
        return Segment(graph, self.start, self.ends)


def find_blocks(graph: ModelGraph) -> list[Block]:
    """Return the blocks of a model in graph order; none where no layer is found.

    The head gives those of the model's outputs that come after the last layer.
    """
    flow = find_flow(graph.graph)
    if not flow.hidden or not flow.entries:
        return []
    order = flow.walker.order
    layers = {node: number for number, node in enumerate(flow.hidden)}
    blocks, start = [], flow.walker.nodes[0]
    for node in sorted({*flow.entries, *layers}, key=order.__getitem__):
        number = layers.get(node, 0)
        blocks.append(Block(LAYER if node in layers else EMBEDDINGS, start, (node,), number, number))
        start = node.next
    after = [node for node in graph.outputs.values() if order[node] >= order[start] and _is_float(node)]
    if after:
        blocks.append(Block(HEAD, start, tuple(dict.fromkeys(after))))
    return blocks


def shared_spans(graph: ModelGraph, blocks: Sequence[Block]) -> list[range]:
    """Return the blocks, by place, that belong together: alone, or all from one to another like it.

    Layers belong together where more than half of the trainable parameters of one are the other's as well:
    one layer that is called again and again. What lies between two such layers belongs to them too.
    """
    sizes = [
        {id(one): one.numel() for one in block.segment(graph).parameters().values()}
        if block.kind == LAYER
        else {}
        for block in blocks
    ]
    spans: list[range] = []
    while (place := spans[-1].stop if spans else 0) < len(blocks):
        stop, at = place + 1, place
        while at < stop:
            alike = [other for other in range(stop, len(blocks)) if _is_shared(sizes[at], sizes[other])]
            stop, at = max([stop, *(other + 1 for other in alike)]), at + 1
        spans.append(range(place, stop))
    return spans


def join(blocks: Sequence[Block]) -> Block:
    """Return consecutive blocks as one, which gives the values of all of them."""
    if len(blocks) == 1:
        return blocks[0]
    numbers = [block.first for block in blocks if block.kind == LAYER]
    ends = tuple(end for block in blocks for end in block.ends)
    return Block(LAYER, blocks[0].start, ends, min(numbers), max(numbers))


def _is_float(node: fx.Node) -> bool:
    value = value_of(node)
    return value is not None and value.is_floating_point()


def _is_shared(one: dict[int, int], other: dict[int, int]) -> bool:
    shared = sum(one[key] for key in one.keys() & other.keys())
    return 2 * shared > min(sum(one.values()), sum(other.values()))

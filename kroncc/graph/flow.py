"""The data flow of a transformer: its attentions, feed-forward pairs and layers, found without names."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import fx

from kroncc.graph.ops import SOFTMAX, op_name
from kroncc.graph.walk import NOTHING, Residual, Walker, only


@dataclass(frozen=True)
class AttentionFlow:
    """One attention: the node that gives its output, its operands, and the linear maps around it.

    `scores` and `probs` are nodes where the source computes them itself; None where a fused kernel does.
    """

    node: fx.Node
    q: fx.Node
    k: fx.Node
    v: fx.Node
    maps: dict[fx.Node, str]  # linear map -> q, k, v or qkv
    out: fx.Node | None
    residual: Residual | None
    scores: fx.Node | None = None
    probs: fx.Node | None = None


@dataclass(frozen=True)
class FeedForward:
    """One feed-forward pair: the maps up (and gate), the map down, and the sum that takes its output."""

    ups: tuple[fx.Node, ...]
    gates: tuple[fx.Node, ...]
    down: fx.Node
    residual: Residual


@dataclass
class Layer:
    """One layer: its attentions and feed-forward pairs in order."""

    attentions: list[AttentionFlow] = field(default_factory=list)
    feeds: list[FeedForward] = field(default_factory=list)

    def residuals(self) -> list[Residual]:
        """Return the layer's residual sums in graph order."""
        found = [part.residual for part in self.attentions if part.residual is not None]
        return [*found, *(part.residual for part in self.feeds)]

    def stream(self) -> fx.Node | None:
        """Return the value of the residual stream that enters the layer."""
        found = self.residuals()
        return found[0].stream if found else None

    def end(self) -> fx.Node:
        """Return the layer's last sum, or where it has none its last node."""
        found = self.residuals()
        if found:
            return found[-1].total
        last = self.feeds[-1].down if self.feeds else self.attentions[-1].out
        return last if last is not None else self.attentions[-1].node

    def is_post_norm(self, walker: Walker) -> bool:
        """Say whether the stream itself is normalised, not only what branches off it."""
        return any(walker.kind(part.stream) == "norm" for part in self.residuals()[1:])


@dataclass(frozen=True)
class Flow:
    """What is known of a graph: layers in data-flow order (encoder first), and where each stack ends."""

    walker: Walker
    layers: list[Layer]
    entries: list[fx.Node]  # the value that enters each stack
    hidden: list[fx.Node]  # the value that leaves each layer
    lasts: list[fx.Node]  # the last hidden state of each stack


def find_flow(graph: fx.Graph) -> Flow:
    """Return the layers of a graph and the values between them."""
    walker = Walker(graph)
    attentions = list(_attentions(walker))
    taken = {linear for one in attentions for linear in (*one.maps, *([one.out] if one.out else []))}
    feeds = [pair for down in walker.linears() if (pair := _feed_forward(walker, down, taken)) is not None]
    layers = _layers(walker, attentions, feeds)
    return _streams(walker, layers)


def _attentions(walker: Walker) -> Iterator[AttentionFlow]:
    for node in walker.nodes:
        if walker.kind(node) == "attention":
            q, k, v = walker.operands(node)[:3] if not node.kwargs else _operands_by_name(node)
            yield _attention(walker, node, q, k, v)
        if op_name(node) in SOFTMAX:
            product, value = walker.score_product(node), walker.value_product(node)
            if product is None or value is None:
                continue
            q, k = walker.operands(product)[-2:]
            yield _attention(walker, value[0], q, k, value[1], _scaled(walker, product), node)


def _operands_by_name(node: fx.Node) -> list[fx.Node]:
    given = dict(zip(("q", "k", "v"), node.args, strict=False)) | dict(node.kwargs)
    return [operand for name in ("q", "k", "v") if isinstance(operand := given[name], fx.Node)]


def _scaled(walker: Walker, product: fx.Node) -> fx.Node:
    """Follow the product through multiplication by a number, if that is all that happens to it."""
    at = product
    while (user := only(at.users)) is not None and op_name(user) in {"mul", "div"}:
        if len(walker.operands(user)) > 1:
            break
        at = user
    return at


def _attention(
    walker: Walker,
    node: fx.Node,
    q: fx.Node,
    k: fx.Node,
    v: fx.Node,
    scores: fx.Node | None = None,
    probs: fx.Node | None = None,
) -> AttentionFlow:
    fed: dict[fx.Node, str] = {}
    for name, operand in (("q", q), ("k", k), ("v", v)):
        for linear, _ in sorted(
            walker.feeds(operand, walker.straight), key=lambda feed: walker.order[feed[0]]
        ):
            fed[linear] = "qkv" if fed.get(linear, name) != name else name
    out = only(walker.next_maps(node))
    first = min(fed, key=lambda linear: walker.order[linear], default=None)
    queries = [linear for linear, name in fed.items() if name in ("q", "qkv")]
    source = walker.operands(queries[0])[0] if queries else (first or q)
    residual = walker.residual(out or node, source)
    return AttentionFlow(node, q, k, v, fed, out, residual, scores, probs)


def _feed_forward(walker: Walker, down: fx.Node, taken: set[fx.Node]) -> FeedForward | None:
    """Return the pair that `down` closes, or None: nothing bends before it, or no sum takes it."""
    if down in taken:
        return None
    fed = walker.feeds(walker.operands(down)[0], walker.elementwise) or NOTHING
    maps = sorted({linear for linear, _ in fed}, key=lambda linear: walker.order[linear])
    bent = {linear for linear, through in fed if through}
    if not maps or len(maps) > 2 or taken & set(maps) or (len(maps) == 1 and not bent):
        return None
    residual = walker.residual(down, walker.operands(maps[0])[0])
    if residual is None:
        return None
    gates = tuple(linear for linear in maps if linear in bent) if len(maps) == 2 else ()
    if len(gates) != 1:  # one map, or a product of two alike: the first one gates
        gates = tuple(maps[:-1])
    return FeedForward(tuple(linear for linear in maps if linear not in gates), gates, down, residual)


def _layers(walker: Walker, attentions: list[AttentionFlow], feeds: list[FeedForward]) -> list[Layer]:
    """Group in graph order: self-attention opens a layer, cross-attention and feed-forward pairs join one."""
    parts: list[AttentionFlow | FeedForward] = [*attentions, *feeds]
    parts.sort(key=lambda part: walker.order[part.down if isinstance(part, FeedForward) else part.node])
    layers = [Layer()]
    for part in parts:
        now = layers[-1]
        if isinstance(part, FeedForward):
            now.feeds.append(part)
            continue
        if now.attentions and (now.feeds or not _is_cross(walker, part)):
            now = Layer()
            layers.append(now)
        now.attentions.append(part)
    return [layer for layer in layers if layer.attentions or layer.feeds]


def _is_cross(walker: Walker, part: AttentionFlow) -> bool:
    """Say whether keys come from another stream than the one that the output joins."""
    return part.residual is not None and not walker.depends(part.k, part.residual.stream)


def _streams(walker: Walker, layers: list[Layer]) -> Flow:
    flow = Flow(walker, layers, [], [], [])
    for place, layer in enumerate(layers):
        end = layer.end()
        follower = layers[place + 1].stream() if place + 1 < len(layers) else None
        enters = layer.stream()
        if enters is not None and not (place and walker.depends(enters, layers[place - 1].end())):
            flow.entries.append(_before_dropout(walker, enters))
        if follower is not None and walker.depends(follower, end):
            flow.hidden.append(follower)
            continue
        flow.hidden.append(_normalised(walker, end))
        flow.lasts.append(flow.hidden[-1])
    return flow


def _before_dropout(walker: Walker, node: fx.Node) -> fx.Node:
    while (walker.kind(node) == "identity" or op_name(node) == "to") and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return node


def _normalised(walker: Walker, node: fx.Node) -> fx.Node:
    """Go on from the last sum to the last hidden state: through the norms and views that alone take it."""
    last = at = node
    while (user := only(at.users)) is not None and _keeps_stream(walker, user):
        at = user
        last = last if walker.kind(at) == "identity" or op_name(at) == "to" else at
    return last


def _keeps_stream(walker: Walker, node: fx.Node) -> bool:
    return walker.kind(node) in {"norm", "identity"} or op_name(node) in {"to", "view", "reshape"}

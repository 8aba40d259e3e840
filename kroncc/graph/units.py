"""What a transformer can be made narrower by: heads of an attention, neurons of a feed-forward pair."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import fx

from kroncc.graph.atoms import Atom, Extent
from kroncc.graph.axes import Axes
from kroncc.graph.flow import AttentionFlow, FeedForward, find_flow
from kroncc.graph.ops import is_linear


@dataclass
class Units:
    """Units that are cut together: their atom, the maps around them, and the maps that take them.

    `maps` are the FQNs by which a target may mean them; `outs` those of the maps that read them. `reason`
    says why they cannot be cut, '' where they can.
    """

    atom: Atom | None
    maps: list[str] = field(default_factory=list)
    outs: list[str] = field(default_factory=list)
    reason: str = ""

    @property
    def size(self) -> int:
        """How many there are."""
        return int(self.atom.root().size) if self.atom is not None else 1


def heads(axes: Axes) -> list[Units]:
    """Return the heads of every attention; those that share a table of biases are one entry.

    Where several heads of queries share one of keys and values, the unit is such a group.
    """
    flow = find_flow(axes.graph.graph)
    found = (_heads(axes, attention) for layer in flow.layers for attention in layer.attentions)
    return _merged(found)


def neurons(axes: Axes) -> list[Units]:
    """Return the neurons of every feed-forward pair."""
    flow = find_flow(axes.graph.graph)
    return _merged(_neurons(axes, pair) for layer in flow.layers for pair in layer.feeds)


def streams(axes: Axes) -> list[Units]:
    """Return the features of the residual streams: of what enters each stack of layers."""
    entries = find_flow(axes.graph.graph).entries
    return _merged(_features(axes, node, []) for node in entries)


def features(axes: Axes, fqn: str) -> Units:
    """Return the features that a module gives."""
    return _features(axes, axes.graph.calls(fqn)[0], [fqn])


def _features(axes: Axes, node: fx.Node, maps: list[str]) -> Units:
    """Return the last dimension of a value; it may be normalised over, and show in outputs."""
    extent = axes.of(node)[-1]
    if len(extent) != 1:
        return Units(None, maps, [], "gives features that are laid out in groups")
    obstacle = axes.obstacle(extent[0])
    reason = f"gives features that cannot be cut: {obstacle}" if obstacle else ""
    return Units(extent[0], maps, _readers(axes, extent[0]), reason)


def _readers(axes: Axes, atom: Atom) -> list[str]:
    """Return the linear maps whose input has the atom as its last dimension."""
    found = (node for node in axes.graph.graph.nodes if node.op == "call_module" and is_linear(node))
    return list(dict.fromkeys(str(node.target) for node in found if _read(axes, node) == [atom.root()]))


def _heads(axes: Axes, attention: AttentionFlow) -> Units:
    maps = [str(node.target) for node in attention.maps]
    outs = [str(attention.out.target)] if attention.out is not None else []
    lead = [atom for extent in axes.of(attention.q)[:-2] for atom in extent if isinstance(atom.size, int)]
    values = [node for node, name in attention.maps.items() if name in ("v", "qkv")]
    for held in (*(axes.of(node)[-1] for node in values), _read(axes, attention.out)):
        shared = [atom for atom in lead if atom in held]
        if len(shared) == 1:
            return _checked(axes, Units(shared[0], [*maps, *outs], outs))
    return Units(None, [*maps, *outs], outs, "has one head, or none that can be told apart")


def _neurons(axes: Axes, pair: FeedForward) -> Units:
    maps = [str(node.target) for node in (*pair.ups, *pair.gates, pair.down)]
    read = _read(axes, pair.down)
    if len(read) != 1:
        return Units(None, maps, [str(pair.down.target)], "has neurons that are laid out in groups")
    return _checked(axes, Units(read[0], maps, [str(pair.down.target)]))


def _read(axes: Axes, node: fx.Node | None) -> Extent:
    return axes.of(node.all_input_nodes[0])[-1] if node is not None else []


def _checked(axes: Axes, units: Units) -> Units:
    """Note why units cannot be cut as if they were never there."""
    assert units.atom is not None
    root = units.atom.root()
    units.reason = axes.obstacle(root)
    if not units.reason and root.statistics:
        units.reason = next(iter(root.statistics))
    if not units.reason and root.outputs:
        units.reason = f"it shows in the output {', '.join(root.outputs)}"
    if units.reason:
        units.reason = f"has units that cannot be cut: {units.reason}"
    return units


def _merged(found: Iterable[Units]) -> list[Units]:
    """Join entries of one atom, in order of first appearance."""
    joined: dict[int, Units] = {}
    for number, units in enumerate(found):
        key = id(units.atom.root()) if units.atom is not None else -number
        known = joined.setdefault(key, units)
        if known is not units:
            known.maps += [fqn for fqn in units.maps if fqn not in known.maps]
            known.outs += [fqn for fqn in units.outs if fqn not in known.outs]
    return list(joined.values())

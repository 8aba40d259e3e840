"""The graph of steps: order, cycles, ancestors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import networkx as nx

from kroncc.errors import PlanError, did_you_mean
from kroncc.plan.stages import Stage


def order(needs: Mapping[str, Iterable[str]]) -> list[str]:
    """Return the names of `needs` so that each comes after all it needs; ties keep the given order."""
    graph: nx.DiGraph[str] = nx.DiGraph()
    graph.add_nodes_from(needs)
    graph.add_edges_from((before, name) for name, befores in needs.items() for before in befores)
    rank = {name: index for index, name in enumerate(needs)}
    try:
        return list(nx.lexicographical_topological_sort(graph, key=lambda name: rank[name]))
    except nx.NetworkXUnfeasible as error:
        cycle = [edge[0] for edge in nx.find_cycle(graph)]
        raise PlanError(
            f"steps wait for each other: {' -> '.join([*cycle, cycle[0]])}", code="K701"
        ) from error


def until(stages: Iterable[Stage], name: str | None) -> tuple[Stage, ...]:
    """Return the stages that `name` needs, itself included, in order; all of them for None."""
    kept = tuple(stages)
    if name is None:
        return kept
    graph = nx.DiGraph((before, stage.name) for stage in kept for before in stage.needs)
    graph.add_nodes_from(stage.name for stage in kept)
    if name not in graph:
        remedy = did_you_mean(name, (stage.name for stage in kept))
        raise PlanError(f"--until names no step: {name!r}", code="K702", remedy=remedy)
    wanted = nx.ancestors(graph, name) | {name}
    return tuple(stage for stage in kept if stage.name in wanted)

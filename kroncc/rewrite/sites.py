"""Find the sites of a pass in a graph."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping

from torch import nn

from kroncc.graph.model_graph import ModelGraph, is_whole
from kroncc.graph.roles import Role, find_roles, module_infos
from kroncc.recipe.schema import Scope
from kroncc.recipe.targets import select
from kroncc.rewrite.base import Site, SiteStats

Stats = Mapping[str, SiteStats]


def site_seed(seed: int, fqn: str) -> int:
    """Return the seed of one site: the same for the same stage seed and module, whatever the order."""
    digest = hashlib.sha256(f"{seed}:{fqn}".encode()).digest()
    return int.from_bytes(digest[:4], "little")


def sites_of(graph: ModelGraph, scope: Scope, seed: int, stats: Stats | None = None) -> list[Site]:
    """Return the sites that `scope` means, in model order; modules that share a weight are one site.

    Raises `TargetError` as `select` does.
    """
    roles = find_roles(graph)
    return list(_sites(graph, roles, select(scope, module_infos(graph)), seed, stats or {}))


def _sites(
    graph: ModelGraph, roles: Mapping[str, Role], fqns: list[str], seed: int, stats: Stats
) -> Iterator[Site]:
    done: set[str] = set()
    for fqn in fqns:
        if fqn in done:
            continue
        site = _site(graph, roles, fqn, seed, stats)
        done.update((site.fqn, *site.tied))
        yield site


def _site(graph: ModelGraph, roles: Mapping[str, Role], fqn: str, seed: int, stats: Stats) -> Site:
    """Return the site of `fqn`; of a tied group, the embedding stands for all."""
    group = (fqn, *_weight_partners(graph, fqn))
    called = set(graph.fqns())
    tables = (name for name in group if name in called and isinstance(graph.get(name), nn.Embedding))
    owner = next(tables, fqn)
    role = roles.get(owner)
    return Site(
        fqn=owner,
        module=graph.get(owner),
        role=role.name if role else "",
        layer=role.layer if role else None,
        tied=tuple(name for name in group if name != owner),
        seed=site_seed(seed, owner),
        stats=stats.get(owner),
    )


def _weight_partners(graph: ModelGraph, fqn: str) -> tuple[str, ...]:
    """Return the modules tied to `fqn` by more than a bias, which stays a Parameter of its own."""
    mine = {id(p) for name, p in graph.get(fqn).named_parameters() if name != "bias"}
    return tuple(
        other
        for other in graph.tied(fqn)
        if mine & {id(p) for p in graph.get(other).parameters(recurse=is_whole(graph.get(other)))}
    )

"""Passes that work while a step trains: their live modules go in before it, and are settled after it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import nn

from kroncc.errors import PassError
from kroncc.graph.model_graph import ModelGraph
from kroncc.graph.rewriter import Rewriter
from kroncc.graph.verify import verify
from kroncc.recipe.schema import PassCall
from kroncc.rewrite.base import Resolved, Site, SitePass, Skip, TreePass
from kroncc.rewrite.pipeline import Applied, Run, build_pass, group
from kroncc.rewrite.sites import Stats
from kroncc.rewrite.structure import Structure
from kroncc.rewrite.treat import Treated, treat


@dataclass(frozen=True)
class Installed:
    """What is to be settled when training ends.

    `structure` is that of the settled model; `partners` holds, for each site whose weight is tied, the
    modules tied to it as they were; `tree` is the tree pass that ends its work then.
    """

    structure: Structure
    partners: Mapping[str, Mapping[str, nn.Module]]
    tree: Resolved | None


def install(
    graph: ModelGraph,
    calls: Sequence[PassCall],
    *,
    seed: int = 0,
    stats: Stats | None = None,
    before: Structure | None = None,
) -> Installed:
    """Put the live modules of `calls` into `graph` and its tree; say what is to be done after training.

    Raises `PassError` K407 for a pass without a live form, K409 for a tree pass that is not the last, and
    what `compress_graph` raises.
    """
    run = _LiveRun(graph, seed, stats, before or Structure())
    run.apply_all(calls, "during")
    return Installed(run.done, run.partners, run.tree)


def settled_structure(structure: Structure, model: nn.Module) -> Structure:
    """Return the `structure` that was planned with what training has settled in the modules of `model`."""
    known = Structure()
    for entry in structure.passes:
        pass_ = build_pass(entry.name, entry.options)
        if isinstance(pass_, SitePass) and not pass_.settled():
            known += group(Applied(fqn, pass_.settle(model.get_submodule(fqn))) for fqn in entry.sites)
        else:
            known += Structure(passes=(entry,))
    return known


@dataclass
class _LiveRun(Run):
    partners: dict[str, Mapping[str, nn.Module]] = field(default_factory=dict)
    tree: Resolved | None = None

    def apply(self, index: int, call: PassCall) -> None:  # noqa: ARG002
        """Put the live form of one pass in place."""
        pass_ = self.build(call)
        if self.tree is not None:
            raise PassError(
                f"pass {call.name!r} comes after {self.tree.options.kind!r}, which changes the whole tree",
                code="K409",
                expected="one such pass under `during`, as the last",
                remedy=f"move {self.tree.options.kind!r} to the end, or to a step of its own",
            )
        if isinstance(pass_, SitePass):
            self.swap(pass_, call, self._treat_live)
        elif isinstance(pass_, TreePass):
            self._attach(pass_, call)

    def _treat_live(self, pass_: SitePass, site: Site, partners: Mapping[str, Any]) -> Treated | Skip:
        if partners:
            self.partners[site.fqn] = dict(partners)
        return treat(pass_, site, partners, live=True)

    def _attach(self, pass_: TreePass, call: PassCall) -> None:
        resolved = self.resolve_tree(pass_, call)
        if not resolved.sites:
            return
        if type(pass_).begin is not TreePass.begin:
            resolved.options.begin(self.graph.model, resolved.sites, resolved.choice)
            self.recapture(call.name, partial(resolved.options.begin, sites=resolved.sites))
        resolved.options.attach(self.graph, Rewriter(self.graph, by=call.name), resolved.sites)
        verify(self.graph)
        self.done += self.entry(resolved)
        self.tree = resolved

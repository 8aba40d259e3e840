"""Run the passes of a compress step over a model graph, and record what was done and what was not."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from pydantic import ValidationError

from kroncc.errors import KronccError, PassError, did_you_mean
from kroncc.graph.capture import capture
from kroncc.graph.model_graph import ModelGraph
from kroncc.graph.rewriter import Rewriter
from kroncc.graph.verify import structure_of, verify, verify_reshaped
from kroncc.recipe.schema import PassCall
from kroncc.rewrite.base import Pass, Resolved, Site, SitePass, Skip, TreePass
from kroncc.rewrite.demands import Demands
from kroncc.rewrite.registry import get_pass
from kroncc.rewrite.reshape import reshape
from kroncc.rewrite.sites import Stats, site_seed, sites_of
from kroncc.rewrite.structure import AppliedPass, Structure
from kroncc.rewrite.treat import Treated, treat

__all__ = ["CompressResult", "SkippedSite", "build_pass", "compress_graph", "site_seed"]

Treatment = Callable[[SitePass, Site, Mapping[str, Any]], Treated | Skip]
Sequential = Callable[[ModelGraph, Iterable[Site]], Iterable[Site]]
"""Gives the sites of a graph, in order of their first calls, their statistics one after the other."""


@dataclass(frozen=True)
class SkippedSite:
    """A module that a target matched and a pass left alone."""

    fqn: str
    name: str
    reason: str


@dataclass(frozen=True)
class Applied:
    """A site that a pass rewrote, with the options it resolved to there."""

    fqn: str
    options: SitePass


@dataclass(frozen=True)
class CompressResult:
    """What the passes of one compress step did. Not `settled`: on real weights shapes may come out otherwise.

    `choices` holds, by place in the list of passes, what a tree pass chose by weights or data. `tokenizer` is
    the one that was given, as the passes have changed it.
    """

    structure: Structure
    skipped: tuple[SkippedSite, ...]
    settled: bool = True
    choices: Mapping[int, Any] = field(default_factory=dict)
    tokenizer: Any = None


def compress_graph(
    graph: ModelGraph,
    calls: Sequence[PassCall],
    *,
    seed: int = 0,
    stats: Stats | None = None,
    before: Structure | None = None,
    key: str = "passes",
    demands: Demands | None = None,
    sequential: Sequential | None = None,
    tokenizer: Any = None,
) -> CompressResult:
    """Apply `calls` in order to `graph` in place; every pass is followed by `verify`.

    `stats` is what was measured of the model, by module. `before` is the structure that it already has. `key`
    is where the recipe lists the calls, for messages. `demands` notes what the passes want to know, while
    planning; `sequential` measures for those that ask for it, while applying. `tokenizer` is that of the
    model, for passes that read it.
    """
    run = Run(graph, seed, stats, before or Structure(), demands, sequential, tokenizer)
    run.apply_all(calls, key)
    return CompressResult(run.done, tuple(run.skipped), run.settled, run.choices, run.tokenizer)


@dataclass
class Run:
    """One compress step under way: the graph, what was done so far, what was left alone."""

    graph: ModelGraph
    seed: int
    stats: Stats | None
    before: Structure
    demands: Demands | None = None
    sequential: Sequential | None = None
    tokenizer: Any = None
    done: Structure = field(default_factory=Structure)
    skipped: list[SkippedSite] = field(default_factory=list)
    settled: bool = True
    choices: dict[int, Any] = field(default_factory=dict)

    def apply_all(self, calls: Sequence[PassCall], key: str) -> None:
        """Apply `calls` in order; errors get their place in the list `key` of the step."""
        for index, call in enumerate(calls):
            try:
                self.apply(index, call)
            except KronccError as error:
                raise _placed(error, f"{key}[{index}].{call.name}") from error

    def apply(self, index: int, call: PassCall) -> None:
        """Apply one pass to all of its sites."""
        pass_ = self.build(call)
        if isinstance(pass_, TreePass):
            self.choices[index] = self._reshape(pass_, call)
        elif isinstance(pass_, SitePass):
            self.swap(pass_, call, treat)

    def build(self, call: PassCall) -> Pass:
        """Return the pass of a call; `PassError` K403 if it is of no kind that can be applied."""
        pass_ = build_pass(call.name, call.options)
        if not isinstance(pass_, SitePass | TreePass):
            raise PassError(f"pass {call.name!r} is not a pass over sites or trees", code="K403")
        self.settled = self.settled and pass_.settled()
        return pass_

    def swap(self, pass_: SitePass, call: PassCall, treatment: Treatment) -> None:
        """Let `treatment` make new modules for all sites of a call, and put them in."""
        was = structure_of(self.graph)
        outcomes = list(self._treat(pass_, call, treatment))
        verify(self.graph, was)
        self.skipped += [one for one in outcomes if isinstance(one, SkippedSite)]
        self.done += group(one for one in outcomes if isinstance(one, Applied))

    def _treat(
        self, pass_: SitePass, call: PassCall, treatment: Treatment
    ) -> Iterator[Applied | SkippedSite]:
        """Treat every site of one call; yield what was applied or skipped, in model order."""
        rewriter = Rewriter(self.graph, by=call.name)
        sites = self._sites(pass_, call)
        mine = pass_.apportion(sites)
        for site in self._informed(pass_, sites):
            partners = {partner: self.graph.get(partner) for partner in site.tied}
            outcome = treatment(mine.get(site.fqn, pass_), site, partners)
            if isinstance(outcome, Skip):
                self._refuse_order(pass_, site.fqn, outcome.reason)
                yield SkippedSite(site.fqn, call.name, outcome.reason)
                continue
            rewriter.swap(site.fqn, outcome.module, outcome.partners)
            yield Applied(site.fqn, outcome.options)

    def _sites(self, pass_: Pass, call: PassCall) -> list[Site]:
        """Return the sites of a call, and note what the pass wants to know of them."""
        needs_some = isinstance(pass_, SitePass) or call.scope.targets
        sites = sites_of(self.graph, call.scope, self.seed, self.stats) if needs_some else []
        if self.demands is not None:
            self.demands.note(pass_, self.graph, sites, self.done)
        return sites

    def _informed(self, pass_: SitePass, sites: list[Site]) -> Iterable[Site]:
        """Return the sites as they are to be treated: in the order of the graph for a sequential pass."""
        if not pass_.needs().sequential:
            return sites
        place = {fqn: index for index, fqn in enumerate(self.graph.fqns())}
        ordered = sorted(sites, key=lambda site: place[site.fqn])
        return self.sequential(self.graph, ordered) if self.sequential is not None else ordered

    def _reshape(self, pass_: TreePass, call: PassCall) -> Any:
        """Apply a tree pass: rewrite the tree, capture it again; return what the pass chose."""
        resolved = self.resolve_tree(pass_, call)
        if not resolved.sites:
            return None
        was = structure_of(self.graph)
        resolved.options.rewrite(self.graph.model, resolved.sites, resolved.choice)
        if self.tokenizer is not None:
            self.tokenizer = resolved.options.retokenise(self.tokenizer, resolved.choice)
        self.done += self.entry(resolved)
        self.recapture(call.name)
        verify_reshaped(self.graph, was, unread=pass_.unread)
        return resolved.choice

    def entry(self, resolved: Resolved) -> Structure:
        """Return what the structure says of a tree pass."""
        return Structure(passes=(_entry(resolved.options, resolved.sites),))

    def resolve_tree(self, pass_: TreePass, call: PassCall) -> Resolved:
        """Return a tree pass with all options explicit, and note what it leaves alone."""
        sites = self._sites(pass_, call)
        if self.tokenizer is not None:
            pass_ = pass_.informed(self.tokenizer)
        resolved = pass_.resolve_tree(self.graph, sites, self.stats, self.seed)
        for fqn, skip in resolved.skipped.items():
            self._refuse_order(pass_, fqn, skip.reason)
            self.skipped.append(SkippedSite(fqn, call.name, skip.reason))
        return resolved

    def recapture(self, by: str, then: Callable[[Any], None] | None = None) -> None:
        """Capture the tree as it is now; `then` repeats on a fresh tree what no structure tells."""
        structure = self.before + self.done

        def again(tree: Any) -> None:
            reshape(tree, structure)
            if then is not None:
                then(tree)

        Rewriter(self.graph, by=by).adopt(capture(self.graph.model, self.graph.inputs, again))

    def _refuse_order(self, pass_: Pass, fqn: str, reason: str) -> None:
        """Raise K408 where a site is left alone because a pass that belongs later was there first."""
        earlier = [
            get_pass(applied.name)
            for applied in (self.before + self.done).passes
            if any(fqn == site or fqn.startswith(f"{site}.") for site in applied.sites)
        ]
        later = next((cls for cls in earlier if cls.order > pass_.order), None)
        if later is None:
            return
        raise PassError(
            f"{pass_.kind} cannot treat {fqn} after {later.kind}: it {reason}",
            code="K408",
            expected=f"{pass_.kind} first, then {later.kind}",
            remedy=f"move {pass_.kind} before {later.kind}, or exclude {fqn}",
        )


def refuse_training(calls: Sequence[PassCall]) -> None:
    """Raise `PassError` K414 for calls that mean something only while a step trains."""
    for index, call in enumerate(calls):
        if build_pass(call.name, call.options).needs_training():
            raise PassError(
                f"pass {call.name!r} has options that need a training which it works in",
                code="K414",
                path=f"passes[{index}].{call.name}",
                expected="options that a compress step can follow",
                remedy="put the pass under `during` of a finetune or distill step",
            )


def build_pass(name: str, options: dict[str, object]) -> Pass:
    """Return the pass `name` with `options`, checked; raise `PassError` in plain words."""
    cls = get_pass(name)
    try:
        return cls(**options)
    except ValidationError as error:
        found = [one for one in error.errors() if one["loc"][:1] == error.errors()[0]["loc"][:1]]
        # of several forms that a value may have, the one that it comes nearest to
        first = max(found, key=lambda one: (len(one["loc"]), one["type"].startswith(("greater", "less"))))
        key = str(first["loc"][0]) if first["loc"] else ""
        known = did_you_mean(key, cls.model_fields) if first["type"] == "extra_forbidden" else ""
        said = first["msg"].removeprefix("Value error, ")
        message = f"option {key!r} of pass {name!r}: {said}" if key else f"pass {name!r}: {said}"
        raise PassError(message, code="K402", remedy=known or f"see `kroncc passes {name}`") from error


def _entry(options: Pass, sites: Iterable[str]) -> AppliedPass:
    """Return the entry of a structure for one pass with explicit options."""
    return AppliedPass(
        name=options.kind,
        version=options.version,
        options=options.model_dump(mode="json", exclude_none=True),
        sites=tuple(sites),
    )


def group(applied: Iterable[Applied]) -> Structure:
    """Join sites whose resolved options are equal into one entry, in order of first appearance."""
    groups: dict[str, tuple[SitePass, list[str]]] = {}
    for one in applied:
        key = one.options.kind + one.options.model_dump_json()
        groups.setdefault(key, (one.options, []))[1].append(one.fqn)
    return Structure(passes=tuple(_entry(options, sites) for options, sites in groups.values()))


def _placed(error: KronccError, where: str) -> KronccError:
    """Return `error` with the place in the step prefixed to each problem's path."""
    problems = [
        replace(problem, path=f"{where}.{problem.path}" if problem.path else where)
        for problem in error.problems
    ]
    return type(error)(problems=problems)

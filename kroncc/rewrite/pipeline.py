"""Run the passes of a compress step over a model graph, and record what was done and what was not."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from pydantic import ValidationError
from torch import nn

from kroncc.errors import KronccError, PassError, did_you_mean
from kroncc.graph.model_graph import ModelGraph
from kroncc.graph.rewriter import Rewriter
from kroncc.graph.roles import Role, find_roles, module_infos
from kroncc.graph.verify import structure_of, verify
from kroncc.recipe.schema import PassCall
from kroncc.recipe.targets import select
from kroncc.rewrite.base import Pass, Site, SitePass, Skip
from kroncc.rewrite.registry import get_pass
from kroncc.rewrite.structure import AppliedPass, Structure
from kroncc.rewrite.treat import treat


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
    """What the passes of one compress step did."""

    structure: Structure
    skipped: tuple[SkippedSite, ...]


def site_seed(seed: int, fqn: str) -> int:
    """Return the seed of one site: the same for the same stage seed and module, whatever the order."""
    digest = hashlib.sha256(f"{seed}:{fqn}".encode()).digest()
    return int.from_bytes(digest[:4], "little")


def compress_graph(graph: ModelGraph, calls: Sequence[PassCall], *, seed: int = 0) -> CompressResult:
    """Apply `calls` in order to `graph` in place; every pass is followed by `verify`."""
    structure = Structure()
    skipped: list[SkippedSite] = []
    for index, call in enumerate(calls):
        try:
            before = structure_of(graph)
            applied = list(_apply_call(graph, call, seed))
            verify(graph, before)
        except KronccError as error:
            raise _placed(error, f"passes[{index}].{call.name}") from error
        skipped += [outcome for outcome in applied if isinstance(outcome, SkippedSite)]
        structure += _group(outcome for outcome in applied if isinstance(outcome, Applied))
    return CompressResult(structure, tuple(skipped))


def build_pass(name: str, options: dict[str, object]) -> Pass:
    """Return the pass `name` with `options`, checked; raise `PassError` in plain words."""
    cls = get_pass(name)
    try:
        return cls(**options)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        known = did_you_mean(key, cls.model_fields) if first["type"] == "extra_forbidden" else ""
        message = (
            f"option {key!r} of pass {name!r}: {first['msg']}" if key else f"pass {name!r}: {first['msg']}"
        )
        raise PassError(message, code="K402", remedy=known or f"see `kroncc passes {name}`") from error


def _apply_call(graph: ModelGraph, call: PassCall, seed: int) -> Iterator[Applied | SkippedSite]:
    """Treat every site of one call; yield what was applied or skipped, in model order."""
    pass_ = build_pass(call.name, call.options)
    if not isinstance(pass_, SitePass):
        raise PassError(f"pass {call.name!r} is not a pass over sites", code="K403")
    roles = find_roles(graph)
    rewriter = Rewriter(graph, by=call.name)
    done: set[str] = set()
    for fqn in select(call.scope, module_infos(graph)):
        if fqn in done:
            continue
        site = _site(graph, roles, fqn, seed)
        done.update((site.fqn, *site.tied))
        outcome = treat(pass_, site, {partner: graph.get(partner) for partner in site.tied})
        if isinstance(outcome, Skip):
            yield SkippedSite(site.fqn, call.name, outcome.reason)
            continue
        rewriter.swap(site.fqn, outcome.module, outcome.partners)
        yield Applied(site.fqn, outcome.options)


def _site(graph: ModelGraph, roles: Mapping[str, Role], fqn: str, seed: int) -> Site:
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
    )


def _weight_partners(graph: ModelGraph, fqn: str) -> tuple[str, ...]:
    """Return the modules tied to `fqn` by more than a bias, which stays a Parameter of its own."""
    mine = {id(p) for name, p in graph.get(fqn).named_parameters() if name != "bias"}
    return tuple(
        other
        for other in graph.tied(fqn)
        if mine & {id(p) for p in graph.get(other).parameters(recurse=False)}
    )


def _group(applied: Iterable[Applied]) -> Structure:
    """Join sites whose resolved options are equal into one entry, in order of first appearance."""
    groups: dict[str, tuple[SitePass, list[str]]] = {}
    for one in applied:
        key = one.options.kind + one.options.model_dump_json()
        groups.setdefault(key, (one.options, []))[1].append(one.fqn)
    return Structure(
        passes=tuple(
            AppliedPass(
                name=options.kind,
                version=options.version,
                options=options.model_dump(mode="json", exclude_none=True),
                sites=tuple(sites),
            )
            for options, sites in groups.values()
        )
    )


def _placed(error: KronccError, where: str) -> KronccError:
    """Return `error` with the place in the step prefixed to each problem's path."""
    problems = [
        replace(problem, path=f"{where}.{problem.path}" if problem.path else where)
        for problem in error.problems
    ]
    return type(error)(problems=problems)

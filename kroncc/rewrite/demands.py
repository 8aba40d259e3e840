"""What the passes of one step want to know of the model that the step gets, found while planning."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from torch import nn

from kroncc.errors import PlanError
from kroncc.graph.model_graph import ModelGraph
from kroncc.rewrite.base import Calibration, Pass, Site, SitePass, TreePass
from kroncc.rewrite.registry import get_pass
from kroncc.rewrite.structure import Structure

Requests = Mapping[str, Calibration]


@dataclass
class Demands:
    """Collects the requests of a step's passes as they are applied on meta.

    `modules` are those of the model as the step gets it. Without `calibrated` the step has no rows to measure
    on, and a request is an error. `asked` is what has to be measured before the step, by module; requests
    that are `sequential` are met while it runs.
    """

    modules: frozenset[str]
    calibrated: bool
    asked: dict[str, Calibration] = field(default_factory=dict)

    @classmethod
    def of(cls, graph: ModelGraph, calibrated: bool) -> Demands:
        """Return the demands of a step that gets the model of `graph`."""
        names = (name for name, _ in graph.model.named_modules(remove_duplicate=False))
        return cls(frozenset(names), calibrated)

    def note(self, pass_: Pass, graph: ModelGraph, sites: Sequence[Site], done: Structure) -> None:
        """Take the requests of one pass, before it is applied; `done` is what the step did until then.

        Raises PlanError: K770 the step has no rows to measure on, K771 the step itself has already changed
        what would be measured.
        """
        requests = {fqn: request for fqn, request in _requests(pass_, graph, sites).items() if request}
        if not requests:
            return
        if not self.calibrated:
            raise PlanError(
                f"pass {pass_.kind!r} needs statistics of the model, and this step has no rows for them",
                code="K770",
                expected="`calibrate` beside `passes`, in a compress step",
                remedy="add calibrate: {data: ..., rows: 512} to the compress step that applies it",
            )
        for fqn, request in requests.items():
            self._check_unchanged(pass_, fqn, request, done)
            part = _measured_before(request, graph.get(fqn))
            if part:
                self.asked[fqn] = self.asked.get(fqn, Calibration()) | part

    def _check_unchanged(self, pass_: Pass, fqn: str, request: Calibration, done: Structure) -> None:
        """Raise K771 where the model that is measured differs from the one that the pass meets."""
        for applied in done.passes:
            of_tree = issubclass(get_pass(applied.name), TreePass)
            here = any(fqn == site or fqn.startswith(f"{site}.") for site in applied.sites)
            if of_tree or (here and (request.fisher or fqn not in self.modules)):
                what = "the modules of the model" if of_tree else fqn
                raise PlanError(
                    f"pass {pass_.kind!r} needs statistics, and {applied.name!r} has changed {what} "
                    "in the same step",
                    code="K771",
                    expected="statistics of the model that the step begins with",
                    remedy=f"put {pass_.kind!r} into a compress step of its own, after this one",
                )


def _requests(pass_: Pass, graph: ModelGraph, sites: Sequence[Site]) -> Requests:
    if isinstance(pass_, TreePass):
        return pass_.requests(graph, sites)
    accepts = pass_.accepts if isinstance(pass_, SitePass) else ()
    return {site.fqn: pass_.needs() for site in sites if isinstance(site.module, accepts)}


def _measured_before(request: Calibration, module: nn.Module) -> Calibration:
    """Return what of a request is measured before the step: of `sequential` all but the moments.

    How often a row is looked up does not depend on what is rewritten.
    """
    moments = request.moments and (not request.sequential or isinstance(module, nn.Embedding))
    return replace(request, moments=moments, sequential=False)


def dump_requests(requests: Requests) -> list[dict[str, Any]]:
    """Return requests as plain data: one entry for all sites with the same request, in order."""
    groups: dict[Calibration, list[str]] = {}
    for fqn, request in requests.items():
        groups.setdefault(request, []).append(fqn)
    return [
        {f.name: _plain(value) for f in fields(request) if (value := getattr(request, f.name))}
        | {"sites": sites}
        for request, sites in groups.items()
    ]


def parse_requests(groups: Iterable[Mapping[str, Any]]) -> dict[str, Calibration]:
    """Return requests from what `dump_requests` gave."""
    requests: dict[str, Calibration] = {}
    for group in groups:
        options = {key: value for key, value in group.items() if key != "sites"}
        options["saliency"] = frozenset(options.get("saliency", ()))
        requests |= dict.fromkeys(group["sites"], Calibration(**options))
    return requests


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, frozenset) else value

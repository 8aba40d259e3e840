"""Statistics of sites as they are when everything before them is already rewritten.

Two wavefronts over the same rows go through the graph in lockstep: the student, whose sites are rewritten
one after the other, and the teacher, the model as the step got it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import torch
from torch import Tensor, fx, nn

from kroncc.graph.model_graph import ModelGraph
from kroncc.graph.wavefront import Batch, Wavefront, call_sites
from kroncc.rewrite.base import Site, SiteStats
from kroncc.run.meters import Rows, Total

CPU = torch.device("cpu")
SHARE = 4  # each wavefront keeps values in so large a part (1 / SHARE) of the free memory, the rest in files


@dataclass
class Sequential:
    """Goes through a student's sites in order and gives each its statistics just before it is rewritten.

    `teacher` is the model before the step, over the same parameters. `batches` need no labels; positions of
    padding are left out by their `attention_mask`. Sites are on the CPU while they are rewritten, whatever
    the device.
    """

    teacher: ModelGraph
    batches: Sequence[Batch]
    device: torch.device = CPU
    directory: Path | None = None

    def __call__(self, student: ModelGraph, sites: Iterable[Site]) -> Iterator[Site]:
        """Yield every site with `mean`, `moment`, `cross` and `cross_mean` of its inputs.

        `sites` come in the order of their first calls in the graph. A site must be rewritten before the next
        one is asked for. Of a module that is called several times all calls count, the later ones as they are
        while the module itself is still the old one. What takes ids is yielded as it is: look-ups do not
        depend on what is rewritten.
        """
        pair = _Pair(student, self)
        known: tuple[list[fx.Node], SiteStats] = [], SiteStats()
        with _on(self.device, student, self.teacher):
            for site in sites:
                calls = pair.calls(site.fqn)
                inputs = [_first(call) for call, _ in calls]
                if not calls or not _is_float(inputs[0]):
                    yield site
                    continue
                if len(calls) > 1:  # its later calls read what rewritten modules give
                    known = [], self._measure(_Pair(student, self), calls)
                elif known[0] != inputs:  # q, k and v read one value
                    known = inputs, self._measure(pair, calls)
                with _lent(site, student, self.teacher, self.device):
                    yield _with(site, known[1])

    def _measure(self, pair: _Pair, calls: Sequence[tuple[fx.Node, fx.Node]]) -> SiteStats:
        sums = _Sums()
        for mine, theirs in calls:
            pair.student.advance(mine)
            pair.teacher.advance(theirs)
            for index, batch in enumerate(self.batches):
                x = pair.student.value(_first(mine), index)
                t = pair.teacher.value(_first(theirs), index)
                sums.add(x, t, _rows(batch, x.device))
        return sums.stats()


class _Pair:
    """The two wavefronts."""

    def __init__(self, student: ModelGraph, given: Sequential) -> None:
        limit = psutil.virtual_memory().available // SHARE
        self.student, self.teacher = (
            Wavefront(graph, given.batches, device=given.device, limit=limit, directory=given.directory)
            for graph in (student, given.teacher)
        )
        self._graphs = student.graph, given.teacher.graph

    def calls(self, fqn: str) -> list[tuple[fx.Node, fx.Node]]:
        """Return the calls of a module in the student and in the teacher, in order."""
        mine, theirs = (call_sites(graph) for graph in self._graphs)
        return [(node, theirs[site]) for site, node in mine.items() if site[0] == fqn]


class _Sums:
    """Products in float32 on the device, their totals in float64."""

    def __init__(self) -> None:
        self.count = 0
        self.mean, self.moment, self.cross, self.cross_mean = Total(), Total(), Total(), Total()

    def add(self, x: Tensor, t: Tensor, rows: Rows) -> None:
        """Take one batch of one call: the student's input x and the teacher's t, [..., in]."""
        mine, theirs = rows.vectors(x), rows.vectors(t)
        self.count += len(mine)
        self.mean.add(mine.sum(0))
        self.cross_mean.add(theirs.sum(0))
        self.moment.add(mine.T @ mine)
        self.cross.add(theirs.T @ mine)

    def stats(self) -> SiteStats:
        """Return the means."""
        return SiteStats(
            count=self.count,
            mean=self.mean.mean(self.count),
            moment=self.moment.mean(self.count),
            cross=self.cross.mean(self.count),
            cross_mean=self.cross_mean.mean(self.count),
        )


def _with(site: Site, found: SiteStats) -> Site:
    """Return a site with what was found, beside what was measured before the step."""
    stats = replace(
        site.stats or SiteStats(),
        count=found.count,
        mean=found.mean,
        moment=found.moment,
        cross=found.cross,
        cross_mean=found.cross_mean,
    )
    return replace(site, stats=stats)


@contextmanager
def _on(device: torch.device, *graphs: ModelGraph) -> Iterator[None]:
    if device.type == "cpu":
        yield
        return
    try:
        for graph in graphs:
            graph.to(device)
        yield
    finally:
        for graph in graphs:
            graph.to(CPU)


@contextmanager
def _lent(site: Site, student: ModelGraph, teacher: ModelGraph, device: torch.device) -> Iterator[None]:
    """Bring a site to the CPU, and what stands there afterwards to the device."""
    if device.type == "cpu":
        yield
        return
    for part in _modules(site, student):
        part.to(CPU)
    yield
    for part in (*_modules(site, student), *_modules(site, teacher)):
        part.to(device)


def _modules(site: Site, graph: ModelGraph) -> list[nn.Module]:
    return [graph.get(fqn) for fqn in (site.fqn, *site.tied)]


def _rows(batch: Batch, device: torch.device) -> Rows:
    mask = batch.get("attention_mask")
    return Rows(len(next(iter(batch.values()))), None if mask is None else (mask != 0).to(device))


def _first(call: fx.Node) -> fx.Node:
    """Return the value that a module is called with."""
    return next(one for one in (*call.args, *call.kwargs.values()) if isinstance(one, fx.Node))


def _is_float(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.is_floating_point()

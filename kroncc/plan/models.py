"""What the plan knows of every model of a recipe: one captured graph a head size, one report a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

from kroncc.errors import PlanError
from kroncc.graph.capture import capture
from kroncc.graph.cost import ModelCost, ModuleCost, model_cost
from kroncc.graph.model_graph import ModelGraph
from kroncc.graph.roles import find_roles
from kroncc.hashing import content_hash
from kroncc.model.load import skeleton
from kroncc.model.replay import replay, without_resized
from kroncc.model.source import Origin
from kroncc.plan.blocks import fitted_count
from kroncc.plan.check import check_distill
from kroncc.plan.measures import check_metrics
from kroncc.plan.stages import Flops, ModelReport, ModuleRow, Side, SkippedRow
from kroncc.plan.tokens import tokens_of
from kroncc.recipe.schema import (
    Action,
    Compress,
    Distill,
    Evaluate,
    Export,
    Finetune,
    PassCall,
    Reconstruct,
    inputs_of,
)
from kroncc.rewrite.demands import Demands, Requests
from kroncc.rewrite.during import install
from kroncc.rewrite.pipeline import SkippedSite, compress_graph, refuse_training
from kroncc.rewrite.reshape import reshape, tree_part
from kroncc.rewrite.structure import Structure

BASE = "base"
DEFAULT_LENGTH = 128


@dataclass
class Models:
    """The models of one recipe on the meta device, in the order in which the steps make them."""

    origin: Origin
    task: str
    length: int = DEFAULT_LENGTH
    reports: dict[str, ModelReport] = field(default_factory=dict)
    blocks: dict[str, int] = field(default_factory=dict)  # of reconstruct steps: how many are fitted
    tokens: dict[str, str] = field(default_factory=dict)  # whose tokens a model reads
    requests: dict[str, Requests] = field(default_factory=dict)  # of compress steps: to measure before them
    _dense: dict[tuple[int | None, str], ModelGraph] = field(default_factory=dict)
    _checked: set[str] = field(default_factory=set)  # distillations of a kind are checked once

    def dense(self, labels: int | None, structure: Structure | None = None) -> ModelGraph:
        """Return the graph of the dense model with `labels` labels, of the shape that the tree passes of
        `structure` give it; captured once.
        """
        shape = tree_part(structure or Structure())
        key = labels, shape.model_dump_json()
        if key not in self._dense:
            tree = skeleton(self.origin, self.task, labels)
            replay(tree, shape)
            self._dense[key] = capture(tree, reshape=partial(reshape, structure=shape))
        return self._dense[key]

    def rebuilt(self, structure: Structure, labels: int | None) -> ModelGraph:
        """Return a fresh graph with `structure` applied to the dense model."""
        tree = skeleton(self.origin, self.task, labels)
        replay(tree, structure)
        return self.dense(labels, structure).bind(tree)

    def head(self, name: str) -> int:
        """Return the number of outputs that the head of a classifier has."""
        config = getattr(self.dense(self.reports[name].labels).model, "config", None)
        return int(getattr(config, "num_labels", 0))

    def add_base(self, labels: int | None, lengths: Sequence[int] = ()) -> None:
        """Report the model as it came; costs are counted at the longest of the data's `lengths`.

        Raises `PlanError` K730 if the model takes no sequence that long.
        """
        longest = self.dense(labels).limits.get("length")
        self.length = max(lengths, default=min(DEFAULT_LENGTH, longest or DEFAULT_LENGTH))
        if longest is not None and self.length > longest:
            raise PlanError(
                f"max_length {self.length} is longer than the model's {longest} positions",
                code="K730",
                expected=f"max_length of {longest} or less in every data set",
                remedy=f"set max_length: {longest}",
            )
        structure = self.origin.structure
        graph = self.rebuilt(structure, labels)
        self.reports[BASE] = self._report(graph, labels, structure, ())

    def add(self, name: str, action: Action) -> None:
        """Report the model that step `name` makes; steps that make none add nothing."""
        self.tokens[name] = tokens_of(name, action, self.tokens)
        match action:
            case Compress():
                refuse_training(action.passes)
                source = self.reports[action.model]
                graph = self.rebuilt(source.structure, source.labels)
                demands = Demands.of(graph, action.calibrate is not None)
                done = compress_graph(graph, action.passes, before=source.structure, demands=demands)
                self.requests[name] = demands.asked
                structure = source.structure + done.structure
                settled = source.settled and done.settled
                self.reports[name] = self._report(graph, source.labels, structure, done.skipped, settled)
            case Finetune() | Distill():
                self._check_head(action)
                source = self.reports[inputs_of(action)[0]]
                self.reports[name] = self._relabelled(source, action.labels)
                if isinstance(action, Distill):
                    self._check(action, self.reports[name])
                if action.during:
                    self.reports[name] = self._settled(self.reports[name], action.during)
            case Reconstruct():
                self.reports[name] = self.reports[action.student]
                self.blocks[name] = self._fitted_blocks(action)
            case Export():
                self.reports[name] = self.reports[action.model]
            case Evaluate():
                check_metrics(action.metrics, self.task)

    def _check_head(self, action: Finetune | Distill) -> None:
        """Raise `PlanError` K731 for training on labels without a head that gives logits."""
        supervised = isinstance(action, Finetune) or any(loss.kind == "task" for loss in action.losses)
        if supervised and self.task == "feature-extraction":
            raise PlanError(
                "training on labels needs a head, and task 'feature-extraction' has none",
                code="K731",
                expected="a task such as text-classification, or losses without labels",
                remedy="set model.task, or distil with mse, cosine or another loss against the teacher",
            )

    def _fitted_blocks(self, action: Reconstruct) -> int:
        """Return how many blocks a reconstruct step fits; raises `PlanError` where it can fit none."""
        sides = [self.reports[name] for name in (action.student, action.teacher)]
        return fitted_count(*(self.rebuilt(side.structure, side.labels) for side in sides))

    def _settled(self, start: ModelReport, calls: Sequence[PassCall]) -> ModelReport:
        """Return the report of a model once the passes that worked while it trained have settled."""
        install(self.rebuilt(start.structure, start.labels), calls, before=start.structure)
        graph = self.rebuilt(start.structure, start.labels)
        demands = Demands.of(graph, calibrated=False)
        done = compress_graph(graph, calls, before=start.structure, key="during", demands=demands)
        structure = start.structure + done.structure
        return self._report(graph, start.labels, structure, done.skipped, start.settled and done.settled)

    def _relabelled(self, source: ModelReport, labels: int | None) -> ModelReport:
        if labels is None or labels == source.labels:
            return source
        structure = without_resized(
            source.structure, self.dense(source.labels).model, self.dense(labels).model
        )
        return self._report(self.rebuilt(structure, labels), labels, structure, (), source.settled)

    def _check(self, action: Distill, student: ModelReport) -> None:
        teacher = self.reports[action.teacher]
        asked = action.model_dump(include={"losses", "copy_from_teacher", "freeze"})
        pair = [(side.structure.model_dump(), side.labels) for side in (student, teacher)]
        key = content_hash([asked, pair])
        if key in self._checked:
            return
        self._checked.add(key)
        check_distill(
            action,
            self.rebuilt(student.structure, student.labels),
            self.rebuilt(teacher.structure, teacher.labels),
        )

    def _report(
        self,
        graph: ModelGraph,
        labels: int | None,
        structure: Structure,
        skipped: tuple[SkippedSite, ...],
        settled: bool = True,
    ) -> ModelReport:
        cost = model_cost(graph)
        flops = cost.flops(1, self.length)
        return ModelReport(
            params=cost.params,
            bytes=cost.bytes,
            flops=Flops(linear=flops.linear, total=flops.total),
            labels=labels,
            settled=settled,
            structure=structure,
            modules=self._rows(cost, self.dense(labels), structure, set(graph.fqns())),
            skipped=tuple(SkippedRow(fqn=one.fqn, name=one.name, reason=one.reason) for one in skipped),
        )

    def _rows(
        self, cost: ModelCost, dense: ModelGraph, structure: Structure, called: set[str]
    ) -> tuple[ModuleRow, ...]:
        """Return a row for each module of the model, then for those that it no longer has."""
        before = {module.fqn: module for module in model_cost(dense).modules}
        roles = find_roles(dense)
        passes = passes_by_module(dense, structure)
        rows = tuple(
            ModuleRow(
                fqn=module.fqn,
                role=roles[module.fqn].name if module.fqn in roles else "",
                passes=" + ".join(passes.get(module.fqn, ())),
                before=self._side(before.get(module.fqn, module)),
                after=self._side(module),
            )
            for module in cost.modules
        )
        kept = {module.fqn for module in cost.modules} | called  # what is shared costs nothing, and is there
        gone = (module for fqn, module in before.items() if fqn not in kept)
        nothing = Side(shape="removed", params=0, flops=0)
        return rows + tuple(
            ModuleRow(
                fqn=module.fqn,
                role=roles[module.fqn].name if module.fqn in roles else "",
                before=self._side(module),
                after=nothing,
            )
            for module in gone
        )

    def _side(self, module: ModuleCost) -> Side:
        return Side(shape=module.shape, params=module.params, flops=module.flops(1, self.length))


def passes_by_module(dense: ModelGraph, structure: Structure) -> dict[str, tuple[str, ...]]:
    """Return for every rewritten module, tied partners included, the passes that rewrote it, in order."""
    passes: dict[str, tuple[str, ...]] = {}
    for applied in structure.passes:
        for site in applied.sites:
            for fqn in (site, *dense.tied(site)):
                passes[fqn] = (*passes.get(fqn, ()), applied.name)
    return passes

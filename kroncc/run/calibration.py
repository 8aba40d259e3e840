"""The rows that a compress step measures on, and the work of a calibrate stage."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from kroncc.data.batching import Batches
from kroncc.data.labels import check_names
from kroncc.errors import DataError
from kroncc.graph.capture import default_inputs
from kroncc.graph.model_graph import ModelGraph
from kroncc.plan.stages import Stage
from kroncc.recipe.schema import CalibrationSpec, Compress
from kroncc.rewrite.demands import parse_requests
from kroncc.rewrite.pipeline import build_pass
from kroncc.rewrite.sites import Stats
from kroncc.run.accelerators import state
from kroncc.run.calibrate import collect
from kroncc.run.context import Context
from kroncc.run.sequential import Sequential
from kroncc.run.statistics import read_statistics, write_statistics
from kroncc.run.steps import Batch

LABELS = "labels"


def calibrate(context: Context, stage: Stage, path: Path) -> dict[str, Any]:
    """Measure a model as a calibrate stage says, write the statistics into `path`, return what was done."""
    name = stage.options["model"]
    spec = CalibrationSpec.model_validate(stage.options["calibrate"])
    requests = parse_requests(stage.options["requests"])
    model = context.load(name)
    rows = CalibrationRows(context, name, model, spec)
    backward = any(request.fisher or request.saliency for request in requests.values())
    if backward:
        rows.check_labels(context, stage.name)
    stats = collect(model, rows, requests, task=context.task, device=state().device, seed=spec.seed)
    write_statistics(stats, path)
    return {"rows": rows.count, "modules": len(stats), "labels": rows.labelled if backward else None}


def statistics_of(context: Context, stage: Stage) -> Stats | None:
    """Return what the calibrate stage before a compress step measured; None where there is none."""
    kinds = {other.name: other.kind for other in context.plan.stages}
    measured = next((name for name in stage.needs if kinds[name] == "calibrate"), None)
    return None if measured is None else read_statistics(context.store.step(measured))


def prepared(
    context: Context, stage: Stage, action: Compress, model: PreTrainedModel
) -> tuple[ModelGraph, Sequential | None]:
    """Return the graph that a compress step rewrites, and what measures for its sequential passes, if any."""
    passes = (build_pass(call.name, call.options) for call in action.passes)
    if action.calibrate is None or not any(pass_.needs().sequential for pass_ in passes):
        return context.graph(model), None
    rows = CalibrationRows(context, action.model, model, action.calibrate)
    batches = list(rows)
    graph = context.graph(model, [name for name in default_inputs(model) if name in batches[0]])
    directory = context.store.cache(stage.name)
    directory.mkdir(parents=True, exist_ok=True)
    return graph, Sequential(graph.copy(), batches, state().device, directory)


class CalibrationRows:
    """The batches of a calibration, made one after the other as they are asked for."""

    def __init__(self, context: Context, name: str, model: PreTrainedModel, spec: CalibrationSpec) -> None:
        self.data, self.model = spec.data, model
        self.source: Batches = context.batches(spec.data, spec.split, model, name, spec.batch_size, spec.seed)
        self.batches = self.source.sample(spec.rows, spec.seed)
        self.count = sum(len(batch) for batch in self.batches)
        self.labelled = True

    def __iter__(self) -> Iterator[Batch]:
        for rows in self.batches:
            yield self.batch(rows)

    def batch(self, rows: list[int]) -> Batch:
        """Return the tensors of these rows; their labels only where they are those of the model's head."""
        made = self.source.collate(rows)
        return made if self.labelled else {name: made[name] for name in made if name != LABELS}

    def check_labels(self, context: Context, stage: str) -> None:
        """Leave the labels out where the data has none, or others than the model's head; say which."""
        labels = self.source.data.labels
        if not context.task.endswith("classification"):
            self.labelled = context.task != "feature-extraction"
            return
        why = "the data has no labels" if labels is None else ""
        try:
            if labels is not None:
                labels.check_head(self.model.config.num_labels, self.data)
                check_names(labels, self.model.config, self.data)
        except DataError as error:
            why = error.problems[0].message
        if why:
            self.labelled = False
            context.reporter.message(f"{stage}: gradients are those of labels that the model draws: {why}")

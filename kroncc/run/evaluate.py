"""Run models over a split and measure them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping

import torch
from transformers import PreTrainedModel

from kroncc.data.labels import check_names
from kroncc.plan.measures import CLASSES, LATENCY, NUMBERS
from kroncc.recipe.schema import Evaluate
from kroncc.run.accelerators import state
from kroncc.run.context import Context
from kroncc.run.latency import measure_latency
from kroncc.run.metrics import Evaluation
from kroncc.run.steps import Batch


def evaluate(context: Context, action: Evaluate) -> dict[str, dict[str, float]]:
    """Return for each model of the step its figures by name.

    All models see the same rows in the same order; `against` runs once for all of them. `latency` is the
    median milliseconds of one forward pass at batch 1 with as many tokens as the plan counts FLOPs for.
    """
    names = dict.fromkeys((*action.models, *([action.against] if action.against else [])))
    device = state().device
    models = {name: context.load(name).to(device) for name in names}
    metrics = [metric for metric in action.metrics if metric != LATENCY]
    figures: dict[str, dict[str, float]] = {name: {} for name in action.models}
    if metrics:
        for name, measured in _measure(context, action, models, metrics).items():
            figures[name].update(measured)
    if LATENCY in action.metrics:
        for name, milliseconds in _latency(context, action, models).items():
            figures.setdefault(name, {})[LATENCY] = milliseconds
    return figures


@torch.inference_mode()
def _measure(
    context: Context, action: Evaluate, models: Mapping[str, PreTrainedModel], metrics: list[str]
) -> dict[str, dict[str, float]]:
    first = action.models[0]
    source = context.batches(action.data, action.split, models[first], first, action.batch_size)
    if {*CLASSES, *NUMBERS} & set(metrics):
        for model in models.values():
            check_names(source.data.labels, model.config, action.data)
    evaluations = {name: Evaluation(metrics, context.task, data=action.data) for name in action.models}
    for rows in source.epoch(0):
        batch = {key: value.to(models[first].device) for key, value in source.collate(rows).items()}
        outputs = {name: run_model(model, batch) for name, model in models.items()}
        reference = outputs[action.against] if action.against else None
        for name, evaluation in evaluations.items():
            evaluation.update(outputs[name], batch, reference)
    return {name: evaluation.result() for name, evaluation in evaluations.items()}


def run_model(model: PreTrainedModel, batch: Batch) -> dict[str, torch.Tensor]:
    """Return the named tensors that a model gives for a batch; labels are not shown to it."""
    accepted = inspect.signature(type(model).forward).parameters
    inputs = {name: tensor for name, tensor in batch.items() if name in accepted and name != "labels"}
    given = model(**inputs)
    return {name: value for name, value in given.items() if isinstance(value, torch.Tensor)}


def _latency(context: Context, action: Evaluate, models: Mapping[str, PreTrainedModel]) -> dict[str, float]:
    first = models[action.models[0]]
    vocabulary = int(first.config.vocab_size)
    ids = torch.arange(context.plan.length, device=first.device)[None] % vocabulary
    return measure_latency(models, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})

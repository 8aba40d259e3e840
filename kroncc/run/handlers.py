"""What each kind of stage does. A handler writes the step's files into `path` and returns its numbers.

Under `accelerate launch` every process calls the handler; `path` is None in all but the main one, and only
training does work there.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate.utils import set_seed
from transformers import PreTrainedModel

from kroncc.errors import RunError
from kroncc.graph.cost import model_cost
from kroncc.model.quantizer import attach
from kroncc.model.replay import structure_of
from kroncc.model.save import save_model, write_model
from kroncc.plan.preflight import cannot_export, export_refused
from kroncc.plan.stages import Flops, ModelReport, Stage, StageKind, costs
from kroncc.plan.tokens import changes_tokens
from kroncc.recipe.names import BASE
from kroncc.recipe.schema import Compress, Distill, Evaluate, Export, Finetune, Reconstruct, Training
from kroncc.rewrite.pipeline import compress_graph
from kroncc.rewrite.structure import Structure
from kroncc.run.calibration import calibrate, prepared, statistics_of
from kroncc.run.context import Context, weight_bytes
from kroncc.run.evaluate import evaluate
from kroncc.run.files import files_in
from kroncc.run.lessons import lesson
from kroncc.run.live import settle
from kroncc.run.reconstruct import reconstruct, reconstruct_job
from kroncc.run.train import train


@dataclass(frozen=True)
class Outcome:
    """What a handler made: values by name (`MODEL.metric`), details for the record, a model elsewhere."""

    values: dict[str, float] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)
    model: str | None = None
    model_files: dict[str, int] = field(default_factory=dict)


Handler = Callable[[Context, Stage, Path | None], Outcome]


def calibrated(context: Context, stage: Stage, path: Path | None) -> Outcome:
    """Measure a model for the compress steps that need statistics of it."""
    return Outcome() if path is None else Outcome(details=calibrate(context, stage, path))


def rewrite(context: Context, stage: Stage, path: Path | None) -> Outcome:
    """Run the passes of a compress step on real weights; K824 if they do not give what the plan promised."""
    if path is None:
        return Outcome()
    action = Compress.model_validate(stage.options)
    model = context.load(action.model)
    set_seed(stage.seed)
    before = structure_of(model)
    graph, sequential = prepared(context, stage, action, model)
    retokenised = any(changes_tokens(call.name) for call in action.passes)
    done = compress_graph(
        graph,
        action.passes,
        seed=stage.seed,
        stats=statistics_of(context, stage),
        before=before,
        sequential=sequential,
        tokenizer=context.tokenizer(action.model) if retokenised else None,
    )
    structure = before + done.structure
    _check_promise(context, stage, structure)
    skipped = [vars(site) for site in done.skipped]
    details = {"skipped": skipped}
    return _written(context, stage, path, action.model, model, structure, details, tokenizer=done.tokenizer)


def trained(context: Context, stage: Stage, path: Path | None) -> Outcome:
    """Run a finetune or distill step, from its last checkpoint where there is one."""
    action: Training
    if "student" in stage.options:
        action = Distill.model_validate(stage.options)
        source = action.student
    else:
        action = Finetune.model_validate(stage.options)
        source = action.model
    set_seed(stage.seed)
    model, installed, job = lesson(context, stage, action)
    result = train(job, context.reporter)
    if path is None:
        return Outcome()
    structure = structure_of(model) + settle(model, installed)
    _check_promise(context, stage, structure)
    details = {
        "steps": result.steps,
        "loss": result.loss,
        "resumed_from": result.resumed_from,
        "training_seconds": result.seconds,
        "peak_bytes": result.peak_bytes,
        "curve": result.curve,
    }
    return _written(context, stage, path, source, model, structure, details)


def reconstructed(context: Context, stage: Stage, path: Path | None) -> Outcome:
    """Fit a student to its teacher block after block, from the last finished block where there is one."""
    if path is None:
        return Outcome()
    action = Reconstruct.model_validate(stage.options)
    set_seed(stage.seed)
    model, job = reconstruct_job(context, stage, action)
    result = reconstruct(job, context.reporter)
    blocks = [block.model_dump(exclude={"curve"}) for block in result.blocks]
    details = {
        "steps": result.steps,
        "blocks": blocks,
        "resumed_from": result.resumed_from,
        "training_seconds": result.seconds,
        "peak_bytes": result.peak_bytes,
        "curve": result.curve,
    }
    return _written(context, stage, path, action.student, model, structure_of(model), details)


def evaluated(context: Context, stage: Stage, path: Path | None) -> Outcome:
    """Measure models; a value is called `MODEL.metric`, and `STEP.MODEL.metric` as well."""
    if path is None:
        return Outcome()
    measured = evaluate(context, Evaluate.model_validate(stage.options))
    values: dict[str, float] = {}
    for model, figures in measured.items():
        for metric, value in figures.items():
            values[f"{model}.{metric}"] = value
            values[f"{stage.name}.{model}.{metric}"] = value
    _write_json(path / "report.json", {"name": stage.name, "kind": "evaluate", "models": measured})
    return Outcome(values)


def exported(context: Context, stage: Stage, path: Path | None) -> Outcome:
    """Write a model as a Hugging Face directory: the step's own, or `to`, relative to the recipe's folder."""
    if path is None:
        return Outcome()
    action = Export.model_validate(stage.options)
    model = context.load(action.model)
    structure = structure_of(model)
    if action.to is None:
        return _written(context, stage, path, action.model, model, structure, {}, action.dtype)
    target = _export_target(context, action.to)
    extra = _texts(context, stage, context.report(stage.name), {})
    save_model(model, target, structure, context.location(action.model), action.dtype, extra)
    for name, text in extra.items():
        (path / name).write_text(text, encoding="utf-8")
    return Outcome(
        {f"{stage.name}.disk": weight_bytes(target)}, {}, model=str(target), model_files=files_in(target)
    )


def _export_target(context: Context, to: str) -> Path:
    """Return where `to` points; K827 for the source, the run directory, and what no export wrote."""
    target = (context.root / to).resolve()
    what = export_refused(target, context.location(BASE), context.store.directory)
    if what is not None:
        raise RunError(problems=cannot_export(target, what).problems)
    return target


HANDLERS: Mapping[StageKind, Handler] = {
    "calibrate": calibrated,
    "rewrite": rewrite,
    "train": trained,
    "reconstruct": reconstructed,
    "evaluate": evaluated,
    "export": exported,
}


def _written(
    context: Context,
    stage: Stage,
    path: Path,
    source: str,
    model: PreTrainedModel,
    structure: Structure,
    details: Mapping[str, Any],
    dtype: str | None = None,
    tokenizer: Any = None,
) -> Outcome:
    """Write a model with all that lies beside it; it keeps the tokenizer of `source` where none is given."""
    origin = context.location(source)
    report = context.report(stage.name)
    known: dict[str, float] = {}
    if not report.settled:
        report = _measured(context, stage, model, structure)
        known = costs(stage.name, report)
    texts = _texts(context, stage, report, details)
    write_model(model, path, structure, origin if tokenizer is None else tokenizer, dtype, texts)
    values = {f"{stage.name}.disk": float(weight_bytes(path)), **known}
    if source == BASE:
        values[f"{BASE}.disk"] = float(weight_bytes(origin))
    return Outcome(values, {key: value for key, value in details.items() if key != "curve"})


def _check_promise(context: Context, stage: Stage, structure: Structure) -> None:
    """Raise K824 where the passes did not do what the plan says, which it knew from the options alone."""
    report = context.report(stage.name)
    if report.settled and structure != report.structure:
        raise RunError(
            f"step {stage.name!r}: the passes gave another structure on real weights than the plan promised",
            code="K824",
            remedy="plan the recipe again; if it stays, a pass reads values where it resolves its options",
        )


def _measured(context: Context, stage: Stage, model: PreTrainedModel, structure: Structure) -> ModelReport:
    """Return the report of a model whose plan was an estimate, with what it really costs."""
    attach(model, structure)
    cost = model_cost(context.graph(model))
    flops = cost.flops(1, context.plan.length)
    return context.report(stage.name).model_copy(
        update={
            "params": cost.params,
            "bytes": cost.bytes,
            "flops": Flops(linear=flops.linear, total=flops.total),
            "structure": structure,
        }
    )


def _texts(context: Context, stage: Stage, report: ModelReport, details: Mapping[str, Any]) -> dict[str, str]:
    facts = {
        "name": stage.name,
        "kind": stage.kind,
        "params": report.params,
        "bytes": report.bytes,
        "flops": report.flops.model_dump(),
        "labels": report.labels,
        **details,
    }
    return {"recipe.yaml": context.recipe_text(), "report.json": _json(facts)}


def _write_json(path: Path, value: Any) -> None:
    path.write_text(_json(value), encoding="utf-8")


def _json(value: Any) -> str:
    return json.dumps(value, indent=1) + "\n"

"""From a training step of the plan to a `TrainJob`: models, taps, losses, rows, the teacher and its cache."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedModel

from kroncc.data.batching import Batches
from kroncc.data.labels import check_names, name_classes
from kroncc.errors import RunError
from kroncc.graph.capture import default_inputs
from kroncc.graph.model_graph import ModelGraph
from kroncc.graph.roles import module_infos
from kroncc.graph.taps import TapOutput, Tapped, with_taps
from kroncc.model.replay import structure_of
from kroncc.plan.stages import Stage
from kroncc.plan.terms import all_taps
from kroncc.recipe.schema import Distill, Finetune, LossSpec, Scope, Training
from kroncc.recipe.targets import select
from kroncc.rewrite.during import Installed, install
from kroncc.run.accelerators import is_main_process, wait_for_everyone
from kroncc.run.context import Context
from kroncc.run.losses import Losses, build_losses, shapes_of
from kroncc.run.steps import Batch, batch_count
from kroncc.run.teacher_cache import build_cache, open_cache
from kroncc.run.train import Teacher, TrainJob

VALIDATION = "validation"


class Objective(nn.Module):
    """What trains: the student with its taps, and the losses with their projections."""

    def __init__(self, student: Tapped, losses: Losses) -> None:
        super().__init__()
        self.student = student
        self.losses = losses

    def forward(
        self, batch: Batch, taught: TapOutput | None, progress: float
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return the loss and its terms; the losses compute in float32 whatever the student computes in."""
        given = self.student(**_inputs(batch))
        with torch.autocast(batch["input_ids"].device.type, enabled=False):
            total, terms = self.losses(given, taught, batch, progress)
        return total, terms


def lesson(context: Context, stage: Stage, action: Training) -> tuple[PreTrainedModel, Installed, TrainJob]:
    """Return the model that a finetune or distill step trains, what is to be settled, and the job."""
    assert isinstance(action, Finetune | Distill)
    name = action.student if isinstance(action, Distill) else action.model
    model = context.load(name, action.labels, stage.seed)
    source = context.batches(action.data, action.split, model, name, action.batch_size, stage.seed)
    specs = list(action.losses) if isinstance(action, Distill) else [LossSpec(kind="task")]
    if any(spec.kind == "task" for spec in specs) and source.data.labels is not None:
        source.data.labels.check_head(model.config.num_labels, action.data)
        check_names(source.data.labels, model.config, action.data)
        name_classes(source.data.labels, model.config)
    batch = source.collate(source.epoch(0)[0][:2])
    student = _graph(context, model, batch)
    teacher = None
    if isinstance(action, Distill):
        teacher = _graph(context, context.load(action.teacher), batch)
        _copy(action.copy_from_teacher, student, teacher)
    _freeze(action.freeze, student)
    installed = install(student, action.during, seed=stage.seed, before=structure_of(model))
    tapped = [with_taps(graph, all_taps(specs), outputs=False) for graph in (student, teacher) if graph]
    shapes = [shapes_of(_probe(one, batch)) for one in tapped]
    losses = build_losses(specs, *shapes, causal=context.task == "text-generation", seed=stage.seed)
    job = TrainJob(
        stage=stage.name,
        hash=stage.hash,
        objective=Objective(tapped[0], losses),
        tree=model,
        source=source,
        options=action,
        checkpoints=context.store.checkpoints(stage.name),
        seed=stage.seed,
        teacher=_teacher(context, stage, action, tapped[1], source) if teacher else None,
        validation=_validation(context, action, model, name),
    )
    return model, installed, job


def _graph(context: Context, model: PreTrainedModel, batch: Batch) -> ModelGraph:
    """Return the graph over the inputs that the batches have."""
    return context.graph(model, [name for name in default_inputs(model) if name in batch])


def _inputs(batch: Batch) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in batch.items() if name != "labels"}


@torch.no_grad()
def _probe(tapped: Tapped, batch: Batch) -> TapOutput:
    training = tapped.training
    given: TapOutput = tapped.eval()(**_inputs(batch))
    tapped.train(training)
    return given


def _validation(context: Context, action: Training, model: PreTrainedModel, name: str) -> Batches | None:
    if action.evaluate_every is None:
        return None
    return context.batches(action.data, VALIDATION, model, name, action.batch_size)


def _freeze(targets: Sequence[str], student: ModelGraph) -> None:
    for fqn in _selected(targets, student):
        student.get(fqn).requires_grad_(False)


@torch.no_grad()
def _copy(targets: Sequence[str], student: ModelGraph, teacher: ModelGraph) -> None:
    """Give the targets of the student the teacher's weights; K826 where they have no equal there."""
    for fqn in _selected(targets, student):
        theirs = teacher.get(fqn).state_dict() if fqn in teacher.fqns() else {}
        mine = student.get(fqn).state_dict()
        if _shapes(mine) != _shapes(theirs):
            raise RunError(
                f"cannot copy {fqn} from the teacher: it has {_shapes(theirs) or 'no such module'}, "
                f"the student {_shapes(mine)}",
                code="K826",
                remedy="take it out of copy_from_teacher",
            )
        student.get(fqn).load_state_dict(theirs)


def _selected(targets: Sequence[str], graph: ModelGraph) -> list[str]:
    return select(Scope(targets=list(targets)), module_infos(graph)) if targets else []


def _shapes(state: Mapping[str, torch.Tensor]) -> dict[str, list[int]]:
    return {name: list(tensor.shape) for name, tensor in state.items()}


def _teacher(
    context: Context, stage: Stage, action: Training, tapped: Tapped, source: Batches
) -> Callable[[Accelerator], Teacher]:
    """Return what makes the teacher's function on the device that training runs on."""
    tapped.requires_grad_(False)

    def make(accelerator: Accelerator) -> Teacher:
        teacher = tapped.to(accelerator.device).eval()

        def live(batch: Batch) -> Any:
            moved = {name: tensor.to(accelerator.device) for name, tensor in _inputs(batch).items()}
            with accelerator.autocast():
                return teacher(**moved)

        cache = None
        if isinstance(action, Distill) and action.cache_teacher:
            _fill_cache(context, stage, action, live, source)
            cache = open_cache(context.store.cache(stage.name), stage.hash, source.data.lengths.tolist())

        def taught(rows: Sequence[int] | None, batch: Batch) -> Any:
            if cache is None or rows is None:
                return live(batch)
            return cache.recall(rows, batch["input_ids"].shape[1], accelerator.device)

        return taught

    return make


def _fill_cache(
    context: Context, stage: Stage, action: Distill, live: Callable[[Batch], Any], source: Batches
) -> None:
    """Make the cache in the main process, unless it is there or would not pay; say why not."""
    directory, lengths = context.store.cache(stage.name), source.data.lengths.tolist()
    if is_main_process() and open_cache(directory, stage.hash, lengths) is None:
        why = _no_use(context, action, source) or build_cache(
            directory, stage.hash, live, source, all_taps(action.losses), lengths
        )
        if why is not None:
            context.reporter.message(f"{stage.name}: teacher outputs are not cached: {why}")
    wait_for_everyone()


def _no_use(context: Context, action: Distill, source: Batches) -> str | None:
    if context.task == "fill-mask":
        return "the masks differ in every epoch"
    if batch_count(source, action) <= len(source.epoch(0)):
        return "no row is seen twice"
    return None

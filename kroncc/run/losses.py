"""The losses of a distillation, built from the recipe: what each term reads, compares and weighs."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from kroncc.errors import DataError, PlanError, did_you_mean
from kroncc.plan.terms import (
    SOFT,
    Shape,
    Shapes,
    check_term,
    needed_taps,
    projected_widths,
    relation_heads,
    resolve_layers,
    term_names,
    weight_at,
)
from kroncc.recipe.schema import LossSpec
from kroncc.run import distance

__all__ = [
    "LossTerm",
    "Losses",
    "Taps",
    "build_losses",
    "needed_taps",
    "resolve_layers",
    "values_at",
    "weight_at",
]

PLAIN: Mapping[str, distance.Distance] = {
    "mse": distance.mse,
    "mae": distance.mae,
    "cosine": distance.cosine,
}
OF_SCORES = {"kl": distance.kl, "soft-ce": distance.soft_ce}
OF_PROBABILITIES: Mapping[str, distance.Distance] = {
    "kl": distance.kl_of_probabilities,
    "soft-ce": distance.soft_ce_of_probabilities,
}


class Taps(Protocol):
    """What a tapped model gives: named outputs, and for each tap one tensor a layer."""

    @property
    def outputs(self) -> Mapping[str, Tensor]: ...

    @property
    def taps(self) -> Mapping[str, Sequence[Tensor]]: ...


def values_at(given: Taps, at: str) -> Sequence[Tensor]:
    """Return the tensors of a tap, or an output as a list of one; raises `PlanError` (K742) for neither."""
    if at in given.taps:
        return given.taps[at]
    if at in given.outputs:
        return [given.outputs[at]]
    raise PlanError(
        f"the model gives no {at!r}",
        code="K742",
        path="at",
        remedy=did_you_mean(at, [*given.taps, *given.outputs]),
    )


def shapes_of(given: Taps) -> dict[str, list[Shape]]:
    """Return the shapes of all taps and outputs of one forward pass, as `build_losses` takes them."""
    shapes: dict[str, list[Shape]] = {name: [tuple(value.shape)] for name, value in given.outputs.items()}
    return {**shapes, **{name: [tuple(one.shape) for one in values] for name, values in given.taps.items()}}


class LossTerm(nn.Module):
    """One term of the recipe: a distance at a tap, summed over its pairs of layers, or the task's own loss.

    Where student and teacher differ in width, a learned linear map without bias takes the student's value to
    the teacher's width (Romero et al. 2015); the map belongs to the term, so it is gone when the training
    is.
    """

    def __init__(
        self, spec: LossSpec, name: str, student: Shapes, teacher: Shapes | None, causal: bool = False
    ) -> None:
        super().__init__()
        self.spec, self.name, self.causal = spec, name, causal
        self.pairs = check_term(spec, student, teacher)
        self.projections = nn.ModuleDict()
        self.heads = 1
        for at, to in self.pairs:
            assert teacher is not None  # check_term refuses a term that needs one and has none
            self.heads = relation_heads(spec, teacher[spec.at][to])
            widths = projected_widths(spec, student[spec.at][at], teacher[spec.at][to])
            if widths is not None:
                self.projections[f"{at}-{to}"] = nn.Linear(*widths, bias=False)
        self.distance = _distance(spec)

    def forward(self, student: Taps, teacher: Taps | None, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the value of the term, not weighted."""
        if self.spec.kind == "task":
            return self._task(student, batch)
        assert teacher is not None  # as above
        mine, theirs = values_at(student, self.spec.at), values_at(teacher, self.spec.at)
        return torch.stack([self._pair(at, to, mine[at], theirs[to], batch) for at, to in self.pairs]).sum()

    def _pair(self, at: int, to: int, mine: Tensor, theirs: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        if f"{at}-{to}" in self.projections:
            mine = self.projections[f"{at}-{to}"](mine)
        theirs = theirs.detach().to(mine.device)
        if self.spec.kind == "relation":
            mine, theirs = (distance.relations(side, self.heads) for side in (mine, theirs))
            keep = distance.keep_mask(theirs, "attention.scores", batch.get("attention_mask"), self.causal)
            return distance.kl(mine, theirs, keep)
        keep = distance.keep_mask(theirs, self.spec.at, batch.get("attention_mask"), self.causal)
        return self.distance(mine, theirs, keep)

    def _task(self, student: Taps, batch: Mapping[str, Tensor]) -> Tensor:
        if "labels" not in batch:
            raise DataError(
                "the task loss needs labels, and the data has none",
                code="K612",
                remedy="name the data's `label` column, or leave the task loss out",
            )
        return distance.task_loss(values_at(student, "logits")[0], batch["labels"], self.causal)


class Losses(nn.Module):
    """All terms of a distillation. Its parameters are the learned projections, if any."""

    def __init__(self, terms: Sequence[LossTerm]) -> None:
        super().__init__()
        self.terms = nn.ModuleList(terms)

    @property
    def needs_teacher(self) -> bool:
        """Whether any term compares with a teacher."""
        return any(term.pairs for term in self._terms())

    def forward(
        self, student: Taps, teacher: Taps | None, batch: Mapping[str, Tensor], progress: float = 0.0
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return (weighted sum of the terms, value of each term: detached, not weighted).

        `progress` is the share of the training that is done. A term over layers is the sum of its layers,
        each a mean over real positions, as KroneckerBERT and TinyBERT add them.
        """
        values = {term.name: term(student, teacher, batch) for term in self._terms()}
        weighted = [weight_at(term.spec, progress) * values[term.name] for term in self._terms()]
        return torch.stack(weighted).sum(), {name: value.detach() for name, value in values.items()}

    def _terms(self) -> list[LossTerm]:
        return [term for term in self.terms if isinstance(term, LossTerm)]


def build_losses(
    specs: Sequence[LossSpec],
    student_shapes: Shapes,
    teacher_shapes: Shapes | None = None,
    *,
    causal: bool = False,
    seed: int = 0,
) -> Losses:
    """Build the losses of a step from the shapes of one forward pass of each model: tap -> a shape a layer.

    `causal` says that a token attends to the past alone, and that logits predict the next token. Projections
    are initialised from `seed`, without touching the global random state. Raises `PlanError` for what does
    not compare.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        terms = [
            LossTerm(spec, name, student_shapes, teacher_shapes, causal)
            for spec, name in zip(specs, term_names(specs), strict=True)
        ]
    return Losses(terms)


def _distance(spec: LossSpec) -> distance.Distance:
    if spec.kind in SOFT and spec.at == "attention.probs":
        return OF_PROBABILITIES[spec.kind]
    if spec.kind in SOFT:
        return functools.partial(OF_SCORES[spec.kind], temperature=spec.temperature)
    return PLAIN.get(spec.kind, distance.mse)

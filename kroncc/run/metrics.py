"""What an evaluation measures: against labels, and against a reference model (`fidelity`)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from sklearn import metrics as sk
from torch import Tensor
from torch.nn import functional as F

from kroncc.data.batching import IGNORED
from kroncc.data.labels import check_head
from kroncc.errors import DataError, PlanError
from kroncc.plan.measures import LANGUAGE, NUMBERS, check_kind, check_metrics
from kroncc.run.fidelity import (
    DistributionFidelity,
    EmbeddingFidelity,
    Fidelity,
    ScoreFidelity,
    pearson,
    spearman,
)
from kroncc.run.losses import Taps, values_at


@dataclass(frozen=True)
class Outputs:
    """Named outputs of a model that was run without taps."""

    outputs: Mapping[str, Tensor]
    taps: Mapping[str, Sequence[Tensor]] = field(default_factory=dict)


class Evaluation:
    """Collects the outputs of one model on one split, batch by batch, and gives its figures.

    Names are flat: `accuracy`, `f1`, ..., `fidelity.agreement`, `fidelity.kl`, `fidelity.cosine`,
    `fidelity.rank_correlation`. A figure that has no value (outputs not finite, constant scores) is nan.
    """

    def __init__(self, metrics: Sequence[str], task: str, *, data: str = "") -> None:
        check_metrics(metrics, task)
        self.metrics, self.task, self.data = tuple(dict.fromkeys(metrics)), task, data
        self.batches = 0
        self.head = 0
        self._labels: list[np.ndarray[Any, Any]] = []
        self._outputs: list[np.ndarray[Any, Any]] = []
        self._tokens = _TokenSums()
        self._fidelity: Fidelity | None = None

    @property
    def taps(self) -> tuple[str, ...]:
        """The taps that `update` reads of both models."""
        embeds = self.task == "feature-extraction" and "fidelity" in self.metrics
        return ("sentence",) if embeds else ()

    def update(
        self,
        outputs: Taps | Mapping[str, Tensor],
        batch: Mapping[str, Tensor],
        reference: Taps | Mapping[str, Tensor] | None = None,
    ) -> None:
        """Take one batch: the model's outputs, the batch, and for `fidelity` the reference model's outputs.

        Raises `DataError`: labels missing (K612), not fitting the head (K611, K618) or the metric (K623), and
        `PlanError` (K753) for fidelity without a reference.
        """
        given = _taps(outputs)
        self.batches += 1
        if self.metrics != ("fidelity",):
            self._measure(values_at(given, "logits")[0].detach(), batch)
        if "fidelity" in self.metrics:
            self._compare(given, reference, batch)

    def result(self) -> dict[str, float]:
        """Return the figures by name; raises `DataError` (K605) where no row was given."""
        if not self.batches:
            raise DataError("there are no rows to evaluate on", code="K605")
        figures: dict[str, float] = {}
        for metric in self.metrics:
            if metric == "fidelity":
                parts = self._fidelity.result() if self._fidelity else {}
                figures.update({f"fidelity.{name}": value for name, value in parts.items()})
            elif self.task in LANGUAGE:
                figures[metric] = self._tokens.figure(metric)
            else:
                figures[metric] = self._figure(metric)
        return figures

    def _measure(self, logits: Tensor, batch: Mapping[str, Tensor]) -> None:
        if "labels" not in batch:
            raise DataError(
                f"{self.metrics[0]} needs labels, and the data has none",
                code="K612",
                path="metrics",
                remedy="name the data's `label` column, or measure `fidelity`",
            )
        labels = batch["labels"]
        if self.task in LANGUAGE:
            self._tokens.update(logits, labels, causal=self.task == "text-generation")
            return
        self.head = logits.shape[-1]
        self._check_labels(labels)
        self._labels.append(labels.cpu().numpy())
        self._outputs.append(logits.double().cpu().numpy())

    def _check_labels(self, labels: Tensor) -> None:
        regression = labels.is_floating_point()
        check_head(regression, int(labels.max()) if len(labels) else 0, self.head, self.data)
        check_kind(self.metrics, regression, self.head)

    def _figure(self, metric: str) -> float:
        outputs, labels = np.concatenate(self._outputs), np.concatenate(self._labels)
        if not np.isfinite(outputs).all():
            return math.nan
        if metric in NUMBERS:
            scores = outputs.reshape(len(labels), -1)[:, 0]
            return (pearson if metric == "pearson" else spearman)(scores, labels.astype(np.float64))
        predicted = outputs.argmax(-1)
        if metric == "accuracy":
            return float(sk.accuracy_score(labels, predicted))
        if metric == "mcc":
            return float(sk.matthews_corrcoef(labels, predicted))
        average = "binary" if self.head == 2 else "macro"
        return float(sk.f1_score(labels, predicted, average=average, zero_division=0.0))

    def _compare(
        self, given: Taps, reference: Taps | Mapping[str, Tensor] | None, batch: Mapping[str, Tensor]
    ) -> None:
        if reference is None:
            raise PlanError(
                "fidelity needs a reference model",
                code="K753",
                path="against",
                remedy="set `against` to a model",
            )
        other = _taps(reference)
        if self.task == "feature-extraction":
            mine, theirs = sentences(given, batch), sentences(other, batch)
        else:
            mine, theirs = (_positions(values_at(side, "logits")[0], batch) for side in (given, other))
            _check_heads(mine, theirs)
        if self._fidelity is None:
            self._fidelity = self._new_fidelity(mine)
        self._fidelity.update(mine.detach(), theirs.detach())

    def _new_fidelity(self, values: Tensor) -> Fidelity:
        if self.task == "feature-extraction":
            return EmbeddingFidelity()
        return ScoreFidelity() if values.shape[-1] == 1 else DistributionFidelity()


class _TokenSums:
    """Sums over the tokens that have a label: right ones, and the negative log likelihood in nats."""

    def __init__(self) -> None:
        self.count = 0
        self.right = 0
        self.loss = 0.0

    def update(self, logits: Tensor, labels: Tensor, causal: bool) -> None:
        if causal:
            logits, labels = logits[:, :-1], labels[:, 1:]
        counts = labels != IGNORED
        logits, labels = logits[counts].float(), labels[counts]
        self.count += len(labels)
        self.right += int((logits.argmax(-1) == labels).sum())
        self.loss += float(F.cross_entropy(logits, labels, reduction="sum").double()) if len(labels) else 0.0

    def figure(self, metric: str) -> float:
        if not self.count or not math.isfinite(self.loss):
            return math.nan
        if metric == "accuracy":
            return self.right / self.count
        mean = self.loss / self.count
        return math.exp(mean) if mean < 700 else math.inf


def sentences(given: Taps, batch: Mapping[str, Tensor]) -> Tensor:
    """Return embeddings [rows, width]: tap `sentence`, or the mean of the real tokens' last hidden states."""
    if "last_hidden_state" not in given.outputs or "sentence" in given.taps:
        return values_at(given, "sentence")[0]
    hidden = given.outputs["last_hidden_state"]
    if "attention_mask" not in batch:
        return hidden.mean(1)
    real = batch["attention_mask"].to(hidden)[:, :, None]
    return (hidden * real).sum(1) / real.sum(1).clamp(min=1)


def _taps(given: Taps | Mapping[str, Tensor]) -> Taps:
    return Outputs(given) if isinstance(given, Mapping) else given


def _positions(logits: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
    """Return logits [positions, classes] without those of padding."""
    if logits.dim() == 3 and "attention_mask" in batch:
        return logits[batch["attention_mask"].to(logits.device) != 0]
    return logits.reshape(-1, logits.shape[-1])


def _check_heads(mine: Tensor, theirs: Tensor) -> None:
    if mine.shape != theirs.shape:
        raise PlanError(
            f"the model's head has {mine.shape[-1]} outputs and its reference's {theirs.shape[-1]}",
            code="K754",
            path="against",
            remedy="measure fidelity against a model with the same labels",
        )

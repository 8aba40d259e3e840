"""Distances between a student's and a teacher's tensors over the positions that count. Pure functions.

`keep` is a boolean tensor that broadcasts to the tensors: False where an element is padding or may not be
attended to. What it leaves out has no influence on value or gradient, whatever it holds. Half precision is
raised to float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from kroncc.data.batching import IGNORED
from kroncc.errors import PlanError
from kroncc.plan.terms import PAIRWISE

Distance = Callable[[Tensor, Tensor, Tensor], Tensor]


def keep_mask(value: Tensor, tap: str, attention_mask: Tensor | None, causal: bool = False) -> Tensor:
    """Return which elements of a tap's tensor count, broadcastable to it.

    Attention [rows, heads, length, length]: query and key are real, key <= query for a causal model, and the
    score is not one that stands for "may not look". Token tensors [rows, length, width], [rows, heads,
    length, width] and [rows * length, width]: the token is real. [rows, width]: all. Without an attention
    mask all are real. Raises `PlanError` (K748) for any other shape.
    """
    attention = tap in PAIRWISE and value.dim() == 4
    open_pairs = _open_pairs(value, causal) if attention else None
    if attention_mask is None:
        ones = torch.ones([1] * value.dim(), dtype=torch.bool, device=value.device)
        return ones if open_pairs is None else open_pairs
    real = attention_mask.to(value.device) != 0
    rows, length = real.shape
    shape = tuple(value.shape)
    if open_pairs is not None and shape[2:] == (length, length):
        return open_pairs & real[:, None, :, None] & real[:, None, None, :]
    if value.dim() == 4 and shape[2] == length and not attention:
        return real[:, None, :, None]
    if value.dim() == 3 and shape[1] == length:
        return real[:, :, None]
    if value.dim() == 2 and shape[0] == rows * length and length > 1:
        return real.reshape(-1, 1)
    if value.dim() == 2:
        return torch.ones(1, 1, dtype=torch.bool, device=value.device)
    raise PlanError(
        f"{tap!r} gives a tensor of shape {list(shape)}, which does not fit sequences of {length} tokens",
        code="K748",
        path="at",
        expected="[rows, length, width], [rows, heads, length, width] or [rows, width]",
    )


def relations(value: Tensor, heads: int) -> Tensor:
    """Return how tokens relate: x x^T / sqrt(d) of each of `heads` parts of the width, before softmax.

    `value` [rows, length, width] or [rows, heads of the model, length, size] gives [rows, heads, length,
    length]. Wang et al. 2020, MiniLM, equations 5 and 6; other numbers of heads: MiniLMv2, 2021.
    """
    if value.dim() == 4:
        value = value.transpose(1, 2).flatten(2)
    rows, length, width = value.shape
    parts = _raised(value).reshape(rows, length, heads, width // heads).transpose(1, 2)
    return parts @ parts.transpose(-2, -1) / math.sqrt(width // heads)


def mse(student: Tensor, teacher: Tensor, keep: Tensor) -> Tensor:
    """Return the mean squared difference over the elements that count."""
    return _mean(_clean(student, keep).sub(_clean(teacher, keep)).square(), keep)


def mae(student: Tensor, teacher: Tensor, keep: Tensor) -> Tensor:
    """Return the mean absolute difference over the elements that count."""
    return _mean(_clean(student, keep).sub(_clean(teacher, keep)).abs(), keep)


def cosine(student: Tensor, teacher: Tensor, keep: Tensor) -> Tensor:
    """Return the mean of 1 - cos over the last dimension, over the positions that count."""
    similarity = F.cosine_similarity(_clean(student, keep), _clean(teacher, keep), dim=-1)
    return _mean_of_rows(1 - similarity, keep)


def kl(student: Tensor, teacher: Tensor, keep: Tensor, temperature: float = 1.0) -> Tensor:
    """Return T^2 KL(teacher || student) of softmax(. / T) over the last dimension, a mean over positions.

    Hinton et al. 2015, section 2: T^2 keeps the gradients of one size whatever the temperature.
    """
    mine, theirs = (_log_softmax(side, keep, temperature) for side in (student, teacher))
    return temperature**2 * _divergence(mine, theirs, keep)


def soft_ce(student: Tensor, teacher: Tensor, keep: Tensor, temperature: float = 1.0) -> Tensor:
    """Return T^2 times the cross entropy of softmax(student / T) under the teacher's, mean over positions."""
    mine, theirs = (_log_softmax(side, keep, temperature) for side in (student, teacher))
    return temperature**2 * _cross_entropy(mine, theirs, keep)


def kl_of_probabilities(student: Tensor, teacher: Tensor, keep: Tensor) -> Tensor:
    """Return KL(teacher || student) of tensors that hold probabilities already, a mean over positions."""
    return _divergence(_log(student, keep), _log(teacher, keep), keep)


def soft_ce_of_probabilities(student: Tensor, teacher: Tensor, keep: Tensor) -> Tensor:
    """Return the cross entropy of the student under the teacher's probabilities, a mean over positions."""
    return _cross_entropy(_log(student, keep), _log(teacher, keep), keep)


def task_loss(logits: Tensor, labels: Tensor, causal: bool = False) -> Tensor:
    """Return the supervised loss: squared error for labels with a fraction, else cross entropy.

    `logits` [rows, classes] with `labels` [rows], or [rows, length, vocabulary] with [rows, length], where
    -100 does not count; for a causal model position i predicts token i + 1. No label that counts gives 0.
    """
    logits = _raised(logits)
    if labels.is_floating_point():
        return F.mse_loss(logits.reshape(labels.shape), labels.to(logits.dtype))
    if causal and labels.dim() > 1:
        logits, labels = logits[:, :-1], labels[:, 1:]
    total = F.cross_entropy(
        logits.reshape(-1, logits.shape[-1]), labels.reshape(-1), ignore_index=IGNORED, reduction="sum"
    )
    return total / (labels != IGNORED).sum().clamp(min=1)


def _open_pairs(value: Tensor, causal: bool) -> Tensor:
    """Return which pairs (query, key) may look at each other; the lowest numbers mark the rest."""
    allowed = value > torch.finfo(value.dtype).min / 2
    return allowed.tril() if causal else allowed


def _raised(value: Tensor) -> Tensor:
    return value if value.dtype == torch.float64 else value.float()


def _clean(value: Tensor, keep: Tensor) -> Tensor:
    return _raised(value).masked_fill(~keep, 0.0)  # padding may hold infinities: inf - inf is not 0


def _mean(value: Tensor, keep: Tensor) -> Tensor:
    return value.sum() / keep.expand_as(value).sum().clamp(min=1)


def _mean_of_rows(value: Tensor, keep: Tensor) -> Tensor:
    rows = keep.any(-1).expand_as(value)
    return value.masked_fill(~rows, 0.0).sum() / rows.sum().clamp(min=1)


def _log_softmax(value: Tensor, keep: Tensor, temperature: float) -> Tensor:
    value = _raised(value) / temperature
    lowest = torch.finfo(value.dtype).min
    return value.clamp(min=lowest).masked_fill(~keep, lowest).log_softmax(-1)


def _log(value: Tensor, keep: Tensor) -> Tensor:
    value = _clean(value, keep)
    return value.clamp(min=torch.finfo(value.dtype).tiny).log()


def _divergence(mine: Tensor, theirs: Tensor, keep: Tensor) -> Tensor:
    terms = (theirs.exp() * (theirs - mine)).masked_fill(~keep, 0.0)
    return _mean_of_rows(terms.sum(-1), keep)


def _cross_entropy(mine: Tensor, theirs: Tensor, keep: Tensor) -> Tensor:
    terms = (-theirs.exp() * mine).masked_fill(~keep, 0.0)
    return _mean_of_rows(terms.sum(-1), keep)

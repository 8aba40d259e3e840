"""Distances against loops over single positions, and blind to padding."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import log_softmax
from torch import Tensor
from torch.nn import functional as F

from kroncc.errors import PlanError
from kroncc.run import distance

B, H, L, D = 3, 2, 5, 4
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]])
KINDS: dict[str, distance.Distance] = {
    "mse": distance.mse,
    "mae": distance.mae,
    "cosine": distance.cosine,
    "kl": lambda s, t, k: distance.kl(s, t, k, 2.0),
    "soft-ce": lambda s, t, k: distance.soft_ce(s, t, k, 2.0),
}


def pair(*shape: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    first, second = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    return first, second


def rows_of(kind: str, student: np.ndarray, teacher: np.ndarray) -> list[float]:
    """The terms whose mean is the loss, for one vector of the last dimension; numpy only."""
    if kind == "mse":
        return list((student - teacher) ** 2)
    if kind == "mae":
        return list(abs(student - teacher))
    if kind == "cosine":
        return [1 - student @ teacher / math.sqrt((student @ student) * (teacher @ teacher))]
    mine, theirs = log_softmax(student / 2), log_softmax(teacher / 2)
    entropy = 0 if kind == "soft-ce" else np.exp(theirs) @ theirs
    return [4 * (entropy - np.exp(theirs) @ mine)]


@pytest.mark.parametrize("kind", KINDS)
def test_token_tensors_against_a_loop(kind: str) -> None:
    student, teacher = pair(B, L, D)
    terms: list[float] = []
    for row in range(B):
        for position in range(int(MASK[row].sum())):
            terms += rows_of(kind, student[row, position].numpy(), teacher[row, position].numpy())
    keep = distance.keep_mask(teacher, "hidden", MASK)
    assert KINDS[kind](student, teacher, keep).item() == pytest.approx(np.mean(terms), rel=1e-12)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_attention_scores_against_a_loop(kind: str, causal: bool) -> None:
    student, teacher = pair(B, H, L, L)
    terms: list[float] = []
    for row in range(B):
        real = int(MASK[row].sum())
        for head in range(H):
            for query in range(real):
                keys = slice(0, query + 1 if causal else real)
                terms += rows_of(
                    kind, student[row, head, query, keys].numpy(), teacher[row, head, query, keys].numpy()
                )
    keep = distance.keep_mask(teacher, "attention.scores", MASK, causal)
    assert KINDS[kind](student, teacher, keep).item() == pytest.approx(np.mean(terms), rel=1e-12)


@pytest.mark.parametrize("kind", ["kl", "soft-ce"])
def test_probabilities_equal_scores(kind: str) -> None:
    """A divergence of softmaxed scores is the divergence of the scores."""
    student, teacher = pair(B, H, L, L)
    keep = distance.keep_mask(teacher, "attention.scores", MASK)
    of_scores = {"kl": distance.kl, "soft-ce": distance.soft_ce}[kind]
    of_probabilities = {"kl": distance.kl_of_probabilities, "soft-ce": distance.soft_ce_of_probabilities}[
        kind
    ]
    probabilities = [side.masked_fill(~keep, -math.inf).softmax(-1) for side in (student, teacher)]
    expected = of_scores(student, teacher, keep)
    torch.testing.assert_close(of_probabilities(*probabilities, keep), expected)


def test_kl_equals_torchs() -> None:
    student, teacher = pair(B, D)
    keep = distance.keep_mask(teacher, "logits", MASK)
    expected = F.kl_div(
        student.log_softmax(-1), teacher.log_softmax(-1), log_target=True, reduction="batchmean"
    )
    torch.testing.assert_close(distance.kl(student, teacher, keep), expected)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(sorted(KINDS)), st.integers(0, 4), st.integers(0, 100), st.booleans())
def test_padding_never_counts(kind: str, extra: int, seed: int, attention: bool) -> None:
    """More padding, holding whatever it may, changes neither the value nor a gradient."""
    shape = (B, H, L, L) if attention else (B, L, D)
    tap = "attention.scores" if attention else "hidden"
    student, teacher = pair(*shape, seed=seed)
    value, gradient = _value_and_gradient(kind, tap, student, teacher, MASK)
    assert not gradient[_padding_of(gradient, MASK)].any()
    pads = (0, extra, 0, extra) if attention else (0, 0, 0, extra)
    mask = F.pad(MASK, (0, extra))
    for filler in (7.0, math.inf, math.nan):
        wide = [F.pad(side, pads) for side in (student, teacher)]
        for side in wide:
            side[_padding_of(side, mask)] = filler
        again, _ = _value_and_gradient(kind, tap, wide[0], wide[1], mask)
        torch.testing.assert_close(again, value)


def _padding_of(value: Tensor, mask: Tensor) -> Tensor:
    real = mask != 0
    keep = real[:, None, :, None] & real[:, None, None, :] if value.dim() == 4 else real[:, :, None]
    return ~keep.expand_as(value)


def _value_and_gradient(
    kind: str, tap: str, student: Tensor, teacher: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor]:
    student = student.clone().requires_grad_()
    value = KINDS[kind](student, teacher, distance.keep_mask(teacher, tap, mask))
    value.backward()
    assert student.grad is not None
    assert torch.isfinite(student.grad).all()
    return value.detach(), student.grad


@pytest.mark.parametrize("kind", KINDS)
def test_gradients(kind: str) -> None:
    student, teacher = pair(B, H, L, L)
    keep = distance.keep_mask(teacher, "attention.scores", MASK, causal=True)
    function: Callable[[Tensor], Tensor] = lambda value: KINDS[kind](value, teacher, keep)  # noqa: E731
    assert torch.autograd.gradcheck(function, (student.requires_grad_(),))


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_is_raised(kind: str) -> None:
    student, teacher = (side.bfloat16() for side in pair(B, L, D))
    keep = distance.keep_mask(teacher, "hidden", MASK)
    value = KINDS[kind](student, teacher, keep)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, KINDS[kind](student.float(), teacher.float(), keep))


@pytest.mark.parametrize("kind", KINDS)
def test_equal_tensors_have_no_distance(kind: str) -> None:
    student, _ = pair(B, L, D)
    value = KINDS[kind](student, student, distance.keep_mask(student, "hidden", MASK))
    if kind != "soft-ce":
        assert value.item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("lowest", [-math.inf, torch.finfo(torch.float32).min])
def test_scores_that_a_mask_closed_do_not_count(lowest: float) -> None:
    student, teacher = (side.float() for side in pair(B, H, L, L))
    window = torch.ones(L, L, dtype=torch.bool).tril().triu(-1)
    closed = [side.masked_fill(~window, lowest) for side in (student, teacher)]
    keep = distance.keep_mask(closed[1], "attention.scores", MASK)
    open_pairs = window.expand_as(student) & distance.keep_mask(teacher, "attention.scores", MASK)
    expected = ((student - teacher) ** 2)[open_pairs].mean()
    torch.testing.assert_close(distance.mse(*closed, keep), expected)


@pytest.mark.parametrize(
    ("tap", "shape", "counted"),
    [
        ("hidden", (B, L, D), 9 * D),
        ("encoder.sdpa", (B, H, L, D), 9 * H * D),
        ("encoder.dense", (B * L, D), 9 * D),
        ("sentence", (B, D), B * D),
        ("attention.probs", (B, H, L, L), H * (25 + 9 + 1)),
    ],
)
def test_what_counts(tap: str, shape: tuple[int, ...], counted: int) -> None:
    value = torch.zeros(shape)
    assert distance.keep_mask(value, tap, MASK).expand_as(value).sum() == counted


def test_without_an_attention_mask_all_counts() -> None:
    value = torch.zeros(B, 9, D)
    assert distance.keep_mask(value, "hidden", None).expand_as(value).all()
    scores = torch.zeros(B, H, L, L)
    assert distance.keep_mask(scores, "attention.scores", None, causal=True).sum() == B * H * 15


@pytest.mark.parametrize(
    ("tap", "shape"),
    [("hidden", (B, 9, D)), ("attention.scores", (B, H, L, 9)), ("x", (B, L, H, D)), ("x", (B,))],
)
def test_shapes_that_do_not_fit(tap: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(PlanError, match="K748"):
        distance.keep_mask(torch.zeros(shape), tap, MASK)


def test_task_loss_of_classes_and_numbers() -> None:
    logits, _ = pair(B, D)
    labels = torch.tensor([1, 0, 3])
    torch.testing.assert_close(distance.task_loss(logits, labels), F.cross_entropy(logits, labels))
    scores, targets = pair(B, 1)
    expected = ((scores[:, 0] - targets[:, 0]) ** 2).mean()
    torch.testing.assert_close(distance.task_loss(scores, targets[:, 0].float()), expected)


@pytest.mark.parametrize("causal", [False, True])
def test_task_loss_of_language_models(causal: bool) -> None:
    logits, _ = pair(B, L, D)
    labels = torch.tensor([[0, 1, 2, 3, 0], [2, 1, 3, -100, -100], [1, -100, -100, -100, -100]])
    terms = []
    for row in range(B):
        for at in range(L):
            wanted = at + 1 if causal else at
            if wanted < L and labels[row, wanted] >= 0:
                terms.append(-log_softmax(logits[row, at].numpy())[labels[row, wanted]])
    assert distance.task_loss(logits, labels, causal).item() == pytest.approx(np.mean(terms))


def test_task_loss_without_a_label_that_counts_is_zero() -> None:
    logits = torch.randn(1, 2, D, requires_grad=True)
    loss = distance.task_loss(logits, torch.tensor([[-100, -100]]))
    loss.backward()
    assert loss.item() == 0

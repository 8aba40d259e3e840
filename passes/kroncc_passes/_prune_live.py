"""A weight that is pruned while it trains: its mask follows its scores and the schedule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from kroncc_passes._prune_masks import kept_of, largest, largest_of_all, n_of_m
from kroncc_passes._prune_store import PrunedStore
from kroncc_passes._stored import Store


@dataclass(frozen=True)
class Schedule:
    """How much of the pruning is in force at a time: nothing in the warm-up, all of it in the cool-down.

    `gradual`: 1 - (1 - p)^3 in between, which takes the density from v_i to v_f as v_f + (v_i - v_f)(1 - p)^3
    (Zhu and Gupta, 2017); else all of it at once.
    """

    gradual: bool
    warmup: float = 0.0
    cooldown: float = 0.0

    def share(self, progress: float) -> float:
        """Return the share (0 to 1) at `progress` (0 to 1) of the step."""
        if progress < self.warmup:
            return 0.0
        if not self.gradual or progress >= 1 - self.cooldown:
            return 1.0
        return 1 - (1 - (progress - self.warmup) / (1 - self.cooldown - self.warmup)) ** 3


@dataclass(frozen=True)
class Rule:
    """Which weights are masked. `sparsity`, `pattern` (n, m) or `threshold` holds at the schedule's end.

    With `trained`, scores are Parameters that learn at `learning_rate`; else they are the sizes of the
    weights. `penalty` is the factor of the mean of sigmoid(score). `together`: the largest of all weights of
    the pool stay, not of each.
    """

    schedule: Schedule
    sparsity: float | None = None
    pattern: tuple[int, int] | None = None
    threshold: float | None = None
    penalty: float = 0.0
    trained: bool = False
    learning_rate: float = 0.0
    together: bool = False


@dataclass(eq=False)
class Pool:
    """The weights that one call of the pass prunes."""

    stores: list[LiveStore] = field(default_factory=list)
    progress: float | None = None

    def total(self) -> int:
        """Return how many weights there are."""
        return sum(store.weight.numel() for store in self.stores)

    def set_progress(self, progress: float) -> None:
        """Make the masks of all stores, once for each `progress`."""
        if progress == self.progress:
            return
        self.progress = progress
        rule = self.stores[0].rule
        kept = kept_of(self.total(), rule.schedule.share(progress) * (rule.sparsity or 0.0))
        masks = largest_of_all([one_always(store.scores()) for store in self.stores], kept)
        for store, mask in zip(self.stores, masks, strict=True):
            store.mask.copy_(mask)


class LiveStore(Store):
    """W * mask: masked weights are zero and get no gradient; trained scores get it straight through the mask.

    `rowwise` says that the rows of the weight are outputs, so that patterns run along them.
    Source: Sanh et al., Movement pruning, NeurIPS 2020, equations 1 to 3.
    """

    mask: Tensor

    def __init__(self, weight: nn.Parameter, rule: Rule, pool: Pool, rowwise: bool = True) -> None:
        super().__init__()
        self.weight = weight
        self.rule = rule
        self.pool = pool
        self.rowwise = rowwise
        self.shape = tuple(weight.shape)
        self.in_force = 0.0
        self.register_buffer("mask", torch.ones_like(weight, dtype=torch.bool))
        self.score: nn.Parameter | None = None
        if rule.trained:
            self.score = nn.Parameter(torch.zeros_like(weight, dtype=torch.float32))
            self.score.learning_rate = rule.learning_rate  # type: ignore[attr-defined]
        pool.stores.append(self)

    def forward(self) -> Tensor:
        """Return the masked weight."""
        if self.score is None:
            return self.weight * self.mask
        through = self.score - self.score.detach()  # zeros that carry the gradient
        return self.weight * (self.mask + through).to(self.weight.dtype)

    def scores(self) -> Tensor:
        """Return what the weights are ranked by."""
        return self.weight.detach().abs() if self.score is None else self.score.detach()

    @torch.no_grad()
    def set_progress(self, progress: float) -> None:
        """Make the mask anew from the scores of now."""
        self.in_force = self.rule.schedule.share(progress)
        if self.rule.together:
            self.pool.set_progress(progress)
        else:
            self.mask.copy_(self._mask())

    def penalty(self) -> Tensor:
        """Return this weight's part of the penalty on scores; zero where there is none."""
        if self.score is None or not self.rule.penalty:
            return self.weight.new_zeros(())
        return self.rule.penalty * self.in_force * self.score.sigmoid().sum() / self.pool.total()

    def finalise(self) -> nn.Module:
        """Return the store of what is left."""
        self.set_progress(1.0)
        return PrunedStore.of(self.weight, self.mask)

    def text(self) -> str:
        """Return what `print` shows."""
        return "pruned while it trains"

    def _mask(self) -> Tensor:
        rule, scores = self.rule, self.scores()
        if rule.pattern is not None:
            return masked_by_pattern(scores, rule.pattern, self.rowwise) if self.in_force else self.mask
        if rule.threshold is not None:
            return one_always(scores).sigmoid() > rule.threshold * self.in_force
        return largest(scores, kept_of(scores.numel(), self.in_force * (rule.sparsity or 0.0)))


def masked_by_pattern(scores: Tensor, pattern: tuple[int, int], rowwise: bool = True) -> Tensor:
    """Return the mask of n of every m along the inputs of a weight [..., out, in], or [in, out]."""
    return n_of_m(scores, *pattern) if rowwise else n_of_m(scores.mT, *pattern).mT


def one_always(scores: Tensor) -> Tensor:
    """Return the scores with the largest raised above all others, so that no weight loses every value."""
    raised = scores.float().clone()
    raised.view(-1)[scores.argmax()] = torch.inf
    return raised


def shares(counts: Sequence[int], kept: int) -> list[int]:
    """Return how many of `counts` stay each, in proportion, at least one, `kept` in all where that can be."""
    total, given, parts, seen = sum(counts), 0, [], 0
    for count in counts:
        seen += count
        part = max(1, round(kept * seen / total) - given)
        parts.append(min(part, count))
        given += parts[-1]
    return parts

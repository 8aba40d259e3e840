"""Which weights stay: the largest by score, of one weight or of many together, or n of every m."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

HALF = 1 << 16


def kept_of(count: int, sparsity: float) -> int:
    """Return how many of `count` weights stay, at least one; rounded as torch.nn.utils.prune does."""
    return max(1, count - round(sparsity * count))


def largest(scores: Tensor, kept: int) -> Tensor:
    """Return the mask of exactly `kept` largest scores; of equal ones the first in row-major order."""
    return largest_of_all([scores], kept)[0]


def largest_of_all(scores: Sequence[Tensor], kept: int) -> list[Tensor]:
    """Return one mask for each tensor of scores, exactly `kept` set in all: the largest of them together.

    Scores are compared as float32; of equal ones the first stay. Two counts over halves of the bits find the
    threshold, so that nothing is sorted and the tensors are never joined.
    """
    keys = [_ordered(each) for each in scores]
    if kept >= sum(key.numel() for key in keys):
        return [torch.ones_like(each, dtype=torch.bool) for each in scores]
    high, above = _bucket([key >> 16 for key in keys], kept, HALF // 2)
    inside = [key[key >> 16 == high] & (HALF - 1) for key in keys]
    low, more = _bucket(inside, kept - above, 0)
    threshold, equal = high * HALF + low, kept - above - more
    masks = []
    for key, each in zip(keys, scores, strict=True):
        mask = key > threshold
        ties = (key == threshold).nonzero().squeeze(1)[:equal]
        mask[ties] = True
        equal -= ties.numel()
        masks.append(mask.view(each.shape))
    return masks


def n_of_m(scores: Tensor, n: int, m: int) -> Tensor:
    """Return the mask of the `n` largest scores in every `m` consecutive ones of the last dimension.

    Of equal scores the first stay.
    """
    groups = scores.reshape(-1, m)
    order = groups.argsort(dim=1, descending=True, stable=True)[:, :n]
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(1, order, True).view(scores.shape)


def _ordered(scores: Tensor) -> Tensor:
    """Return int32 [n] in the order of the scores: their bits, those of negative ones turned over."""
    bits = (scores.detach().reshape(-1).float() + 0.0).view(torch.int32)  # -0.0 becomes 0.0
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _bucket(keys: Sequence[Tensor], kept: int, shift: int) -> tuple[int, int]:
    """Return the key (16 bits) of the `kept`-th largest, and how many keys are larger than it."""
    counts = sum(torch.bincount(key + shift, minlength=HALF) for key in keys)
    assert isinstance(counts, Tensor)
    reached = counts.flip(0).cumsum(0)
    place = int(torch.searchsorted(reached, kept))
    above = int(reached[place - 1]) if place else 0
    return HALF - 1 - place - shift, above

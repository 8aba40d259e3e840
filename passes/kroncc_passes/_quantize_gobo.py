"""GOBO: outliers of a Gaussian fit stay exact, all other weights become one of a few centroids.

Source: Zadeh et al., GOBO: Quantizing attention-based NLP models for low latency and energy efficient
inference, MICRO 2020, section IV.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kroncc_passes._quantize_stores import CodedWeight, Layout

ROUNDS = 50
USUAL = 0.04  # standard deviation of the weights of a trained encoder, where none are at hand


def is_outlier(weight: Tensor, threshold: float) -> Tensor:
    """Return where the log-likelihood of a weight under the Gaussian of all of them is below `threshold`."""
    w = weight.double()
    mean, deviation = w.mean(), w.std(correction=0).clamp(min=1e-300)
    likelihood = -0.5 * ((w - mean) / deviation) ** 2 - torch.log(deviation) - 0.5 * math.log(2 * math.pi)
    return likelihood < threshold


def coded_weight(
    weight: Tensor, layout: Layout, threshold: float, count: int | None = None, *, trained: bool = False
) -> CodedWeight:
    """Return `weight` as numbers of 2^bits centroids and `count` outliers, those farthest from the mean.

    Without `count`, as many as lie below `threshold`; on meta as many as of normal weights would.
    """
    if count is None:
        count = count_outliers(weight, threshold)
    flat = layout.matrix(weight.detach()).reshape(-1)
    if weight.is_meta:
        codes = flat.new_empty(layout.packed_shape, dtype=torch.uint8)
        places = flat.new_empty(count, dtype=torch.int32)
        return CodedWeight(
            layout, codes, flat.new_empty(1 << layout.bits), places, flat.new_empty(count), trained=trained
        )
    distance = (flat.double() - flat.double().mean()).abs()
    places = distance.argsort(descending=True, stable=True)[:count].sort().values
    rest = torch.ones_like(flat, dtype=torch.bool).index_fill_(0, places, False)
    centres, numbers = centroids(flat[rest], layout.bits)
    codes = flat.new_zeros(flat.shape, dtype=torch.uint8)
    codes[rest] = numbers.to(torch.uint8)
    packed = layout.pack(codes.view(layout.rows, layout.columns))
    exact = flat[places].clone()
    return CodedWeight(layout, packed, centres.to(flat.dtype), places.int(), exact, trained=trained)


def count_outliers(weight: Tensor, threshold: float) -> int:
    """Return how many outliers `weight` has; on meta, how many a normal weight of its size would have."""
    if weight.is_meta:
        return expected_outliers(weight.numel(), USUAL, threshold)
    return min(int(is_outlier(weight.detach(), threshold).sum()), weight.numel() - 1)


def expected_outliers(count: int, deviation: float, threshold: float) -> int:
    """Return how many of `count` normal weights of this standard deviation would be outliers."""
    reach = -2 * (threshold + math.log(deviation) + 0.5 * math.log(2 * math.pi))
    return count if reach <= 0 else round(count * math.erfc(math.sqrt(reach / 2)))


def centroids(values: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Return 2^bits centroids (increasing, float64) and the number of the nearest one for each of `values`.

    They start as the means of equally many sorted values; then values move to the nearest centroid and
    centroids to the mean of their values, as long as the summed distance (L1) falls.
    """
    ordered, places = values.double().sort()
    sums = torch.cat([ordered.new_zeros(1), ordered.cumsum(0)])
    count = 1 << bits
    bounds = torch.linspace(0, ordered.numel(), count + 1).round().long()
    best = _means(ordered, sums, bounds)
    bounds = _bounds(ordered, best)
    least = _distance(ordered, sums, bounds, best)
    for _ in range(ROUNDS):
        now = _means(ordered, sums, bounds)
        moved = _bounds(ordered, now)
        distance = _distance(ordered, sums, moved, now)
        if distance >= least:
            break
        best, bounds, least = now, moved, distance
    numbers = torch.repeat_interleave(torch.arange(count), bounds.diff())
    return best, torch.empty_like(numbers).scatter_(0, places, numbers)


def _means(ordered: Tensor, sums: Tensor, bounds: Tensor) -> Tensor:
    """Return the mean between each two bounds; of nothing, the value at the bound."""
    sizes = bounds.diff()
    at = ordered[bounds[:-1].clamp(max=ordered.numel() - 1)]
    return torch.where(sizes > 0, (sums[bounds[1:]] - sums[bounds[:-1]]) / sizes.clamp(min=1), at)


def _bounds(ordered: Tensor, centres: Tensor) -> Tensor:
    """Return where the values nearest to each centroid begin, and the end."""
    middle = (centres[1:] + centres[:-1]) / 2
    inner = torch.searchsorted(ordered, middle)
    return torch.cat([inner.new_zeros(1), inner, inner.new_tensor([ordered.numel()])])


def _distance(ordered: Tensor, sums: Tensor, bounds: Tensor, centres: Tensor) -> float:
    """Return the sum of abs(value - its centroid)."""
    middle = torch.searchsorted(ordered, centres).clamp(bounds[:-1], bounds[1:])
    below = centres * (middle - bounds[:-1]) - (sums[middle] - sums[bounds[:-1]])
    above = (sums[bounds[1:]] - sums[middle]) - centres * (bounds[1:] - middle)
    return float((below + above).sum())

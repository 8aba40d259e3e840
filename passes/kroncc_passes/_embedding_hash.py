"""Fit buckets and shares so that hashed rows come close to those of a table, by alternating least squares."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

ROUNDS = 5  # of shares, then buckets
STEPS = 6  # of conjugate gradients for the buckets of a round
RIDGE = 1e-6  # relative; decides where rows share all their buckets, and for buckets that no row has


def fit_hashes(
    table: Tensor, places: Tensor, count: int, weights: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return buckets [count, width] and shares [rows, functions], float32, for a table [rows, width].

    They make sum_v weights_v |table_v - sum_i shares_vi bucket(places_vi)|^2 small: given the shares, the
    buckets by conjugate gradients on the normal equations; given the buckets, the shares of each row.
    `places` [rows, functions] are the buckets of each row; `weights` [rows] positive.
    """
    table = table.float()
    weights = table.new_ones(len(table)) if weights is None else weights.float() / weights.mean()
    shares = table.new_ones(places.shape)
    buckets = table.new_zeros(count, table.shape[1])
    for _ in range(ROUNDS):
        buckets = solve_buckets(table, places, shares, weights, buckets)
        shares = solve_shares(table, places, buckets)
    return solve_buckets(table, places, shares, weights, buckets), shares


def solve_buckets(table: Tensor, places: Tensor, shares: Tensor, weights: Tensor, start: Tensor) -> Tensor:
    """Return buckets that fit better than `start` for given shares; STEPS of conjugate gradients from it."""

    def pull(rows: Tensor) -> Tensor:
        """Return sum over rows and functions of weight, share and row, by bucket."""
        total = torch.zeros_like(start)
        for function in range(places.shape[1]):
            total.index_add_(0, places[:, function], rows * (weights * shares[:, function])[:, None])
        return total

    def apply(buckets: Tensor) -> Tensor:
        return pull(combine(buckets, places, shares)) + ridge * buckets

    mass = start.new_zeros(len(start)).index_add_(
        0, places.flatten(), (weights[:, None] * shares.square()).flatten()
    )
    ridge = RIDGE * float(mass.mean())
    scale = (mass + ridge)[:, None]  # the diagonal, as preconditioner
    found = start.clone()
    rest = pull(table) - apply(found)
    step = rest / scale
    size = (rest * step).sum(0)
    for _ in range(STEPS):
        image = apply(step)
        along = size / (step * image).sum(0).clamp_min(1e-30)
        found += along * step
        rest -= along * image
        turned = rest / scale
        fresh = (rest * turned).sum(0)
        step = turned + fresh / size.clamp_min(1e-30) * step
        size = fresh
    return found


def solve_shares(table: Tensor, places: Tensor, buckets: Tensor) -> Tensor:
    """Return for each row the shares of its buckets [rows, functions] that fit it best."""
    held = F.embedding(places, buckets)  # [rows, functions, width]
    gram = held @ held.mT
    size = gram.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-12)
    gram = gram + RIDGE * size[:, None, None] * torch.eye(places.shape[1], device=gram.device)
    solved: Tensor = torch.linalg.solve(gram, held @ table[:, :, None])
    return solved.squeeze(2)


def combine(buckets: Tensor, places: Tensor, shares: Tensor) -> Tensor:
    """Return the rows that buckets and shares make, [rows, width]."""
    rows: Tensor = F.embedding_bag(places, buckets, mode="sum", per_sample_weights=shares)
    return rows

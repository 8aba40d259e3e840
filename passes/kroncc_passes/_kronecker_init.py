"""Starting values of the factors."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from kroncc_passes._kronecker_math import Shape, nearest_product, rearrange

Init = Literal["nearest", "scaled", "prune", "random"]


def initial_factors(
    init: Init, weight: Tensor, a: Shape, b: Shape, rank: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Return A [rank, m1, n1] and B [rank, m2, n2] for `weight` [m1 m2, n1 n2], of its type, on its device.

    A weight on meta gives factors on meta. Raises PassError K425 if the weight is not finite.
    """
    if weight.is_meta:
        return weight.new_empty(rank, *a), weight.new_empty(rank, *b)
    weight = weight.detach()
    match init:
        case "nearest":
            factors = nearest_product(weight, a, b, rank, seed)
        case "scaled":
            factors = _same_norm(*nearest_product(weight, a, b, rank, seed), weight)
        case "prune":
            factors = _sampled(weight, a, b, rank)
        case "random":
            factors = _drawn(weight, a, b, rank, seed)
    return factors[0].to(weight.dtype).contiguous(), factors[1].to(weight.dtype).contiguous()


def _same_norm(a: Tensor, b: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Scale the factors so that the sum of products has the Frobenius norm of the weight."""
    flat_a, flat_b = a.flatten(1).double(), b.flatten(1).double()
    norm = ((flat_a @ flat_a.T) * (flat_b @ flat_b.T)).sum().sqrt().item()
    share = math.sqrt(_norm(weight) / norm) if norm > 0 else 1.0
    return a * share, b * share


def _sampled(weight: Tensor, a: Shape, b: Shape, rank: int) -> tuple[Tensor, Tensor]:
    """Let the larger factor hold every k-th row and column of the weight, the smaller one say which.

    A term keeps the entries of the weight at one position of the smaller factor and drops the others; the
    positions with the largest norm are kept.
    """
    grid = rearrange(weight.float(), a, b).reshape(math.prod(a), math.prod(b))
    a_is_small = grid.shape[0] < grid.shape[1]
    grid = grid.T if a_is_small else grid
    order = torch.linalg.vector_norm(grid, dim=0).sort(descending=True, stable=True).indices[:rank]
    large = grid[:, order].T
    small = torch.nn.functional.one_hot(order, grid.shape[1]).to(grid)
    first, second = (small, large) if a_is_small else (large, small)
    return first.reshape(rank, *a), second.reshape(rank, *b)


def _drawn(weight: Tensor, a: Shape, b: Shape, rank: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draw normal factors whose sum of products has, in expectation, the squared norm of the weight."""
    generator = torch.Generator().manual_seed(seed)
    deviation = (_norm(weight) ** 2 / (weight.numel() * rank)) ** 0.25
    first = torch.randn(rank, *a, generator=generator) * deviation
    second = torch.randn(rank, *b, generator=generator) * deviation
    return first.to(weight.device), second.to(weight.device)


def _norm(weight: Tensor) -> float:
    return float(torch.linalg.vector_norm(weight.float(), dtype=torch.float64).item())

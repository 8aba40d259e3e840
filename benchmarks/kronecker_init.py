"""Nearest Kronecker product against the full singular value decomposition of the rearranged weight R."""

from __future__ import annotations

import time
from functools import partial

import torch
from torch import Tensor

from benchmarks.timing import interleaved
from kroncc_passes._kronecker_math import Shape, nearest_product, rearrange

CASES: tuple[tuple[Shape, Shape, int], ...] = (
    ((384, 384), (2, 2), 1),
    ((8, 2), (384, 384), 1),
    ((24, 32), (32, 24), 1),
    ((64, 64), (64, 64), 1),
    ((3072, 1), (1, 768), 48),
)


def main() -> None:
    """Print one row a case: seconds, ratio, and how far the relative error is above the optimum."""
    print(f"float32, {torch.get_num_threads()} threads; error: relative Frobenius error above the optimum")
    columns = f"{'weight':>11} {'A':>9} {'B':>9} {'rank':>4} {'nearest':>11} {'full SVD':>11}"
    print(f"{columns} {'ratio':>8} {'error':>9}")
    generator = torch.Generator().manual_seed(0)
    for a, b, rank in CASES:
        size = a[0] * b[0], a[1] * b[1]
        weight = torch.randn(size, generator=generator)
        call = partial(nearest_product, weight, a, b, rank)
        nearest = interleaved({"nearest": call}, 9)["nearest"]
        r = rearrange(weight, a, b).reshape(a[0] * a[1], b[0] * b[1])
        start = time.perf_counter()
        values = torch.linalg.svd(r, full_matrices=False).S
        svd = time.perf_counter() - start
        above = _error(weight, *call()) - _optimum(values, rank)
        shapes = (
            f"{'x'.join(map(str, size)):>11} {'x'.join(map(str, a)):>9} {'x'.join(map(str, b)):>9} {rank:4}"
        )
        print(f"{shapes} {nearest * 1e3:8.2f} ms {svd * 1e3:8.1f} ms {svd / nearest:7.0f}x {above:9.1e}")


def _error(weight: Tensor, a: Tensor, b: Tensor) -> float:
    found = sum(torch.kron(left, right) for left, right in zip(a, b, strict=True))
    return float((weight - found).double().norm() / weight.double().norm())


def _optimum(values: Tensor, rank: int) -> float:
    return float(values[rank:].double().norm() / values.double().norm())

"""Nearest sum of Kronecker products to a matrix (Van Loan and Pitsianis, 1993).

W [m, n] is rearranged into R [m1 n1, m2 n2], so that sum_k A_k (x) B_k becomes sum_k vec(A_k) vec(B_k)^T.
The nearest sum of `rank` products is therefore R cut to its leading singular triples. R is never decomposed
as a whole: its shorter side has a Gram matrix, and where that is large too, a block Krylov space (Musco and
Musco, 2015) is grown until the residual is settled. `python -m benchmarks kronecker-init` compares the times.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from kroncc.api import PassError

Shape = tuple[int, int]

GRAM_SIDE = 512  # up to this short side of R, the Gram matrix and its eigenvectors are cheapest
CHUNK = 1 << 22  # elements of R held in float64 at a time: 32 MiB
TOLERANCE = 3e-6  # of the attained residual: what a longer iteration may still take off it
FLOOR = 1e-12  # energy share below which a remaining gain counts as none
BLOCK = 16  # columns a Krylov step; fewer cost the same memory traffic and converge later


def nearest_product(weight: Tensor, a: Shape, b: Shape, rank: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return A [rank, m1, n1] and B [rank, m2, n2], their sum of products nearest to `weight` [m1 m2, n1 n2].

    Nearest in the Frobenius norm; the relative error is within 1e-5 of the optimum. Each factor takes the
    square root of its singular value; the largest entry of the factor with fewer entries is positive. The
    factors are float32 (float64 for a float64 weight): what they are stored in is the caller's choice.
    Raises PassError K425 if the weight is not finite.
    """
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    rearranged = rearrange(weight.detach(), a, b)
    a_is_short = math.prod(a) <= math.prod(b)
    if not a_is_short:
        rearranged = rearranged.permute(2, 3, 0, 1)
    basis = _leading_vectors(rearranged, rank, seed)  # [short, rank]
    largest = basis.gather(0, basis.abs().argmax(0, keepdim=True))
    basis = basis * torch.where(largest < 0, -1.0, 1.0)
    rows = torch.cat([basis.T @ block for block in _blocks(rearranged, torch.float64)], dim=1)
    root = torch.linalg.vector_norm(rows, dim=1).sqrt().unsqueeze(1)  # sqrt(s)
    short = (basis.T * root).to(dtype)
    long = torch.where(root > 0, rows / root, 0.0).to(dtype)
    first, second = (short, long) if a_is_short else (long, short)
    return first.reshape(rank, *a), second.reshape(rank, *b)


def rearrange(weight: Tensor, a: Shape, b: Shape) -> Tensor:
    """Return the view [m1, n1, m2, n2] of `weight` [m1 m2, n1 n2]; its two halves flattened give R."""
    return weight.reshape(a[0], b[0], a[1], b[1]).permute(0, 2, 1, 3)


def _blocks(rearranged: Tensor, dtype: torch.dtype) -> Iterator[Tensor]:
    """Yield R [short, long] in column blocks of about CHUNK elements."""
    s1, s2, l1, l2 = rearranged.shape
    step = max(1, CHUNK // (s1 * s2 * l2))
    for start in range(0, l1, step):
        part = rearranged[:, :, start : start + step]
        # One copy both permutes and converts; flattening first would permute element by element.
        block = torch.empty(part.shape, dtype=dtype, device=part.device).copy_(part)
        yield block.view(s1 * s2, part.shape[2] * l2)


def _leading_vectors(rearranged: Tensor, rank: int, seed: int) -> Tensor:
    """Return `rank` orthonormal columns [short, rank], float64: the leading left singular space of R."""
    short = rearranged.shape[0] * rearranged.shape[1]
    if short > GRAM_SIDE and 8 * (rank + BLOCK) < short:
        exact = rearranged.dtype == torch.float64
        for dtype in (torch.float64,) if exact else (torch.float32, torch.float64):
            basis = _krylov(torch.cat(list(_blocks(rearranged, dtype)), dim=1), rank, seed)
            if basis is not None:
                return basis
    return _gram_vectors(rearranged, rank)


def _gram_vectors(rearranged: Tensor, rank: int) -> Tensor:
    """Return the leading eigenvectors of R R^T, summed in float64: squaring costs half the digits."""
    gram = sum((block @ block.T for block in _blocks(rearranged, torch.float64)), start=torch.zeros(()))
    _require_finite(gram.diagonal().sum().item())
    vectors: Tensor = torch.linalg.eigh(gram).eigenvectors
    return vectors[:, -rank:].flip(1)


def _krylov(matrix: Tensor, rank: int, seed: int) -> Tensor | None:
    """Return `rank` leading left singular vectors [short, rank] of `matrix` [short, long], or None.

    None means that this precision cannot measure so small a residual, or that the space grew to half the
    short side before it settled.
    """
    short = matrix.shape[0]
    energy = torch.linalg.vector_norm(matrix, dtype=torch.float64).item() ** 2
    _require_finite(energy)
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(rank + BLOCK, short, generator=generator).to(matrix)
    block = torch.linalg.qr(start.T).Q.T
    space = images = matrix.new_empty(0, short)  # rows: the space, and R R^T of it
    gained = [0.0, 0.0]
    while space.shape[0] + block.shape[0] <= short // 2:
        image = (block @ matrix) @ matrix.T
        space, images = torch.cat([space, block]), torch.cat([images, image])
        vectors, captured, bound = _rayleigh_ritz(space, images, rank)
        residual = energy - captured
        if matrix.dtype == torch.float32 and residual < 0.1 * energy:
            return None
        gained.append(captured)
        if _settled(gained, bound, residual, energy):
            basis: Tensor = torch.linalg.qr(vectors.T.double()).Q
            return basis
        block = _orthonormal(image, space)
    return None


def _rayleigh_ritz(space: Tensor, images: Tensor, rank: int) -> tuple[Tensor, float, float]:
    """Return the leading Ritz vectors [rank, short], the energy they hold, and a bound on what they miss."""
    projected = (space @ images.T).double()
    values, coefficients = torch.linalg.eigh((projected + projected.T) / 2)
    values, coefficients = values.flip(0), coefficients.flip(1)[:, :rank].T.to(space.dtype)
    vectors = coefficients @ space
    miss = coefficients @ images - values[:rank, None].to(space.dtype) * vectors
    norm = torch.linalg.vector_norm(miss).item()
    gap = (values[rank - 1] - values[rank]).item()
    bound = math.sqrt(rank) * norm
    return vectors, values[:rank].sum().item(), min(bound, norm**2 / gap) if gap > 0 else bound


def _settled(gained: list[float], bound: float, residual: float, energy: float) -> bool:
    """Say whether more steps would change the attained residual by less than TOLERANCE of itself.

    `bound` overstates what is missing where the spectrum is flat; there the gains of the last two steps,
    continued as a geometric series, tell more.
    """
    allowed = max(2 * TOLERANCE * residual, FLOOR * energy)  # twice: errors are roots of energies
    if bound <= allowed:
        return True
    last, before = gained[-1] - gained[-2], gained[-2] - gained[-3]
    ratio = min(max(last / before, 0.0), 0.95) if before > 0 else 0.95
    return len(gained) > 4 and bound <= 15 * allowed and last * ratio / (1 - ratio) <= allowed


def _orthonormal(block: Tensor, space: Tensor) -> Tensor:
    """Return orthonormal rows that span the part of `block` outside `space`."""
    for _ in range(2):  # rounding leaves too much of `space` after one
        block = block - (block @ space.T) @ space
        block = torch.linalg.qr(block.T).Q.T
    return block


def _require_finite(energy: float) -> None:
    if math.isfinite(energy):
        return
    raise PassError(
        "the weight holds NaN or infinite values",
        code="K425",
        expected="finite weights",
        remedy="check the checkpoint, or leave the module out with `exclude`",
    )

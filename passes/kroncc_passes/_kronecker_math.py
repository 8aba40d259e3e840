"""Nearest sum of Kronecker products to a matrix (Van Loan and Pitsianis, 1993).

W [m, n] is rearranged into R [m1 n1, m2 n2], so that sum_k A_k (x) B_k becomes sum_k vec(A_k) vec(B_k)^T.
The nearest sum of `rank` products is therefore R cut to its leading singular triples. R is never decomposed
as a whole: its shorter side has a Gram matrix, and where that is large too, a block Krylov space (Musco and
Musco, 2015) is grown until the residual is settled. `python -m benchmarks kronecker-init` compares the times.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor

from kroncc.api import PassError

Shape = tuple[int, int]

GRAM_SIDE = 512  # up to this short side of R, the Gram matrix and its eigenvectors are cheapest
CHUNK = 1 << 18  # elements of R turned to float64 at a time: 2 MiB, which the cache holds
KEPT = 1 << 20  # elements of R up to which they are kept in float64, to be turned once: 8 MiB
TOLERANCE = 5e-6  # of the attained residual: what a longer iteration may still take off it
FLOOR = 1e-12  # energy share below which a remaining gain counts as none
CACHED = 1 << 20  # elements of R that stay in the cache between two products
STEPS = 20  # of a Krylov space; if so many would fill the short side, its Gram matrix is cheaper
BLOCK = 8  # vectors of a Krylov step come in such numbers: fewer take about as long

_NUMPY = {torch.float32: np.float32, torch.float64: np.float64}


def nearest_product(weight: Tensor, a: Shape, b: Shape, rank: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return A [rank, m1, n1] and B [rank, m2, n2], their sum of products nearest to `weight` [m1 m2, n1 n2].

    Nearest in the Frobenius norm; the relative error is within 1e-5 of the optimum. Each factor takes the
    square root of its singular value; the largest entry of the smaller factor (B where they are equal) is
    positive. The factors are float32 (float64 for a float64 weight): what they are stored in is the caller's
    choice.
    Raises PassError K425 if the weight is not finite.
    """
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    rearranged = rearrange(weight.detach(), a, b)
    a_is_short = math.prod(a) < math.prod(b)
    if not a_is_short:
        rearranged = rearranged.permute(2, 3, 0, 1)
    basis, rows = _leading_vectors(rearranged, rank, seed)
    largest = basis.gather(0, basis.abs().argmax(0, keepdim=True))
    sign = torch.where(largest < 0, -1.0, 1.0)
    basis, rows = basis * sign, rows * sign.T
    root = torch.linalg.vector_norm(rows, dim=1).sqrt().unsqueeze(1)  # sqrt(s)
    short = (basis.T * root).to(dtype)
    long = torch.where(root > 0, rows / root, 0.0).to(dtype)
    first, second = (short, long) if a_is_short else (long, short)
    return first.reshape(rank, *a), second.reshape(rank, *b)


def squared_singular_values(weight: Tensor, a: Shape, b: Shape) -> Tensor:
    """Return those of R for `weight` [m1 m2, n1 n2], all of them, the largest first, in float64.

    Raises PassError K425 if the weight is not finite.
    """
    rearranged = rearrange(weight.detach(), a, b)
    if math.prod(a) > math.prod(b):
        rearranged = rearranged.permute(2, 3, 0, 1)
    values: Tensor = torch.linalg.eigvalsh(_gram(_blocks(rearranged))).clamp(min=0).flip(0)
    return values


def balanced(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Return factors of the same product `left` [p, rank] times `right` [rank, q], as the nearest has them.

    Their columns and rows are the singular vectors of the product, each with the root of its singular value.
    """
    left_basis, left_mix = torch.linalg.qr(left)
    right_basis, right_mix = torch.linalg.qr(right.T)
    u, values, v = torch.linalg.svd(left_mix @ right_mix.T)
    left, right = left_basis @ u, v @ right_basis.T
    short = left if left.shape[0] < right.shape[1] else right.T
    largest = short.gather(0, short.abs().argmax(0, keepdim=True))
    root = values.sqrt()
    signed = torch.where(largest < 0, -root, root)
    return left * signed, right * signed.T


def rearrange(weight: Tensor, a: Shape, b: Shape) -> Tensor:
    """Return the view [m1, n1, m2, n2] of `weight` [m1 m2, n1 n2]; its two halves flattened give R."""
    return weight.reshape(a[0], b[0], a[1], b[1]).permute(0, 2, 1, 3)


def _leading_vectors(rearranged: Tensor, rank: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return U [short, rank], orthonormal and spanning the leading left singular space of R, and U^T R."""
    short = rearranged.shape[0] * rearranged.shape[1]
    if short <= GRAM_SIDE or STEPS * _width(rank) > short:
        return _by_gram(rearranged, rank)
    found = None
    if rearranged.dtype != torch.float64:
        found = _krylov(rearranged, rank, seed, torch.float32)
    if found is None:
        found = _krylov(rearranged, rank, seed, torch.float64)
    return _by_gram(rearranged, rank) if found is None else found


def _by_gram(rearranged: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Use the eigenvectors of R R^T, all in float64: squaring costs half the digits."""
    kept = list(_blocks(rearranged)) if rearranged.numel() <= KEPT else None
    vectors = torch.linalg.eigh(_gram(kept or _blocks(rearranged))).eigenvectors[:, -rank:].flip(1)
    return vectors, torch.cat([vectors.T @ block for block in kept or _blocks(rearranged)], dim=1)


def _gram(blocks: Iterable[Tensor]) -> Tensor:
    """Return R R^T in float64."""
    gram: Tensor = sum((block @ block.T for block in blocks), start=torch.zeros(()))
    _require_finite(gram.diagonal().sum().item())
    return gram


def _blocks(rearranged: Tensor) -> Iterator[Tensor]:
    """Yield R [short, long] in float64, in column blocks of about CHUNK elements."""
    s1, s2, l1, l2 = rearranged.shape
    step = max(1, CHUNK // (s1 * s2 * l2))
    for start in range(0, l1, step):
        yield _flat(rearranged[:, :, start : start + step], torch.float64)


def _flat(rearranged: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the two halves of the axes flattened, in `dtype`: permuted and converted in at most one copy."""
    if rearranged.dtype == dtype and rearranged.is_contiguous():
        return rearranged.flatten(2).flatten(0, 1)
    if rearranged.device.type == "cpu":  # NumPy asks for large pages, which the system hands out sooner
        flat = torch.from_numpy(np.empty(rearranged.shape, _NUMPY[dtype]))
    else:
        flat = torch.empty(rearranged.shape, dtype=dtype, device=rearranged.device)
    return flat.copy_(rearranged).flatten(2).flatten(0, 1)


def _krylov(rearranged: Tensor, rank: int, seed: int, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
    """Return as `_leading_vectors`, computed in `dtype`, or None.

    None means that this precision cannot measure so small a residual, or that the space grew to half the
    short side before it settled.
    """
    matrix = _flat(rearranged.permute(2, 3, 0, 1), dtype)  # R^T
    long, short = matrix.shape
    energy = torch.linalg.vector_norm(matrix).item() ** 2
    _require_finite(energy)
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(_width(rank), short, generator=generator).to(matrix)
    block = torch.linalg.qr(start.T).Q.T
    space = images = start.new_empty(0, short)  # rows: the space, and its image under R R^T
    through = start.new_empty(0, long)  # space R
    projected = start.new_empty(0, 0)  # space R R^T space^T
    gained = [0.0, 0.0]
    while space.shape[0] + block.shape[0] <= short // 2:
        product, image = _image(block, matrix)
        space, images, through = (torch.cat(p) for p in ((space, block), (images, image), (through, product)))
        projected = _bordered(projected, block @ images.T)
        coefficients, captured, bound = _rayleigh_ritz(space, images, projected, rank)
        residual = energy - captured
        if dtype == torch.float32 and residual < 0.1 * energy:
            return None
        gained.append(captured)
        if _settled(gained, bound, residual, energy):
            return (coefficients @ space).T.double(), (coefficients @ through).double()
        block = _orthonormal(image, space)
    return None


def _image(block: Tensor, matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return block M^T and block M^T M for M = `matrix`, by parts: the second finds M in the cache."""
    image, products = torch.zeros_like(block), []
    for part in torch.split(matrix, max(1, CACHED // matrix.shape[1])):
        products.append(block @ part.T)
        image.addmm_(products[-1], part)
    return torch.cat(products, dim=1), image


def _width(rank: int) -> int:
    """Return the vectors of a step: at least 7 more than asked for, so that the last ones settle too."""
    return -(-(rank + 7) // BLOCK) * BLOCK


def _bordered(matrix: Tensor, rows: Tensor) -> Tensor:
    """Return the symmetric matrix that `matrix` begins and whose last rows are `rows`."""
    size = matrix.shape[0]
    grown = torch.nn.functional.pad(matrix, (0, rows.shape[0], 0, rows.shape[0]))
    grown[size:] = rows
    grown[:, size:] = rows.T
    return grown


def _rayleigh_ritz(
    space: Tensor, images: Tensor, projected: Tensor, rank: int
) -> tuple[Tensor, float, float]:
    """Return the leading Ritz vectors in the space, the energy they hold, and a bound on what they miss."""
    values, coefficients = torch.linalg.eigh(projected.double())
    values, coefficients = values.flip(0), coefficients.flip(1)[:, :rank].T.to(space.dtype)
    vectors = coefficients @ space
    miss = coefficients @ images - values[:rank, None].to(space.dtype) * vectors
    norm = torch.linalg.vector_norm(miss).item()
    gap = (values[rank - 1] - values[rank]).item()
    bound = math.sqrt(rank) * norm
    return coefficients, values[:rank].sum().item(), min(bound, norm**2 / gap) if gap > 0 else bound


def _settled(gained: list[float], bound: float, residual: float, energy: float) -> bool:
    """Say whether more steps would change the attained residual by less than TOLERANCE of itself.

    `bound` overstates what is missing where the spectrum is flat; there the last two gains, continued as a
    geometric series, tell more, and the bound only guards against a pause.
    """
    allowed = max(2 * TOLERANCE * residual, FLOOR * energy)  # twice: errors are roots of energies
    last, before = gained[-1] - gained[-2], gained[-2] - gained[-3]
    ratio = min(max(last / before, 0.0), 0.95) if before > 0 else 0.95
    to_come = last * ratio / (1 - ratio) if len(gained) > 4 else math.inf
    return bound <= allowed or (bound <= 4 * allowed and to_come <= allowed)


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

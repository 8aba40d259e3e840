"""The sum of Kronecker products that is nearest in the norm that matters, by alternating least squares.

Given all B_k, the A_k that minimise E norm((W* - sum_k A_k (x) B_k) x)^2 solve one linear system, and the
other way round; each step can only lower the error. With S = E[x x^T] seen as [n1, n2, n1, n2] and the B_k
orthonormal, all rows i of the A_k share the normal equations

    sum_lj' N[kj, lj'] A_l[i, j'] = sum_pq (W* S)[ip, jq] B_k[p, q]
    N[kj, lj'] = sum_qq' (B_k^T B_l)[q, q'] S[jq, j'q']

of rank n1 unknowns, as well conditioned as S itself. Where rows count differently instead (an embedding), row
i has a system of its own, of rank unknowns. The start is exact where S is itself a Kronecker product, or the
weights of the rows are: whitened by the two factors, the problem is that of the nearest product.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor, nn

from kroncc.api import Site
from kroncc_passes._dense import weight_of
from kroncc_passes._kronecker_math import Shape, balanced, nearest_product, rearrange
from kroncc_passes._kronecker_product import dense
from kroncc_passes._weighting import FLOOR, InputProblem, input_problem, row_weights

Factors = tuple[Tensor, Tensor]  # A [rank, m1, n1], B [rank, m2, n2]
DECREASE = 5e-4  # of the error a round, below which the fit ends
ROUNDS = 30  # at most
STRIDE = 1.5  # growth of the step beyond the least-squares one, while that lowers the error further
EXACT = 1e-12  # share of the whole that counts as no error
UNKNOWNS = 4096  # of one linear system; terms beyond it take turns
ROWS = 1 << 24  # elements of the systems of rows that are solved at once


def fitted_factors(site: Site, a: Shape, b: Shape, rank: int) -> Factors:
    """Return A [rank, m1, n1] and B [rank, m2, n2] fitted to what arrives at `site`.

    Never worse than the nearest product. float32 (float64 for a float64 weight).
    Raises PassError K425 if the weight is not finite, K426-K428 if the statistics are missing or of no use.
    """
    weight = weight_of(site.module).detach()
    nearest = nearest_product(weight, a, b, rank, site.seed)
    start = nearest[0].double(), nearest[1].double()
    if isinstance(site.module, nn.Embedding):
        rows = row_weights(site)
        seen = rows - FLOOR / rows.shape[0]
        found = _fit_rows(_single(weight), rows.view(a[0], b[0]), start, site.seed)

        def error(factors: Factors) -> float:
            return float((seen[:, None] * (weight - _dense(factors)).square()).sum().item())
    else:
        problem = input_problem(site)
        found = _fit_inputs(problem, start, site.seed)

        def error(factors: Factors) -> float:
            return problem.error(_dense(factors))

    left, right = balanced(found[0].flatten(1).T, found[1].flatten(1))
    fitted = left.T.reshape(rank, *a).to(nearest[0]), right.reshape(rank, *b).to(nearest[1])
    return min(fitted, nearest, key=error)


@dataclass(frozen=True)
class InputHalf:
    """Least squares for the A's given the B's: `pull` = W* S as R [m1 n1, m2 n2], `spread` = S as R."""

    pull: Tensor
    spread: Tensor
    shape: Shape

    def solve(self, fixed: Tensor) -> tuple[Tensor, float]:
        """Return the best A [rank, m1, n1] for orthonormal B [rank, m2, n2], and what they explain."""
        (m1, n1), rank = self.shape, fixed.shape[0]
        one, two = torch.tril_indices(rank, rank, device=fixed.device)  # the blocks that Cholesky reads
        inner = (fixed[one].mT @ fixed[two]).flatten(1)
        normal = fixed.new_zeros(rank, n1, rank, n1)
        normal.permute(0, 2, 1, 3)[one, two] = (inner @ self.spread.T).view(-1, n1, n1)
        right = (self.pull @ fixed.flatten(1).T).view(m1, n1, rank).permute(2, 1, 0).reshape(rank * n1, m1)
        root = torch.linalg.cholesky(normal.reshape(rank * n1, rank * n1))
        found = torch.cholesky_solve(right, root)
        return found.view(rank, n1, m1).mT, float((found * right).sum().item())

    def turned(self, shape: Shape) -> Self:
        """Return the half that solves for the B's, of `shape`."""
        return replace(self, pull=self.pull.T.contiguous(), spread=self.spread.T.contiguous(), shape=shape)


@dataclass(frozen=True)
class RowHalf:
    """Least squares for the A's given the B's where rows count by `rows` [m1, m2]; `pull` = rows W as R."""

    pull: Tensor
    rows: Tensor
    shape: Shape

    def solve(self, fixed: Tensor) -> tuple[Tensor, float]:
        """Return as `InputHalf.solve`."""
        (m1, n1), rank = self.shape, fixed.shape[0]
        inner = torch.einsum("kpq,lpq->pkl", fixed, fixed).flatten(1)
        right = (self.pull @ fixed.flatten(1).T).view(m1, n1, rank).mT
        step = max(1, ROWS // rank**2)
        found = torch.cat(
            [
                torch.cholesky_solve(part, torch.linalg.cholesky((rows @ inner).view(-1, rank, rank)))
                for rows, part in zip(torch.split(self.rows, step), torch.split(right, step), strict=True)
            ]
        )
        return found.transpose(0, 1), float((found * right).sum().item())

    def turned(self, shape: Shape) -> Self:
        """Return the half that solves for the B's, of `shape`."""
        return replace(self, pull=self.pull.T.contiguous(), rows=self.rows.T.contiguous(), shape=shape)


def _fit_inputs(problem: InputProblem, nearest: Factors, seed: int) -> Factors:
    (rank, *_), a, b = nearest[0].shape, _shape(nearest[0]), _shape(nearest[1])
    grid = problem.moment.view(a[1], b[1], a[1], b[1])
    left, right = grid.diagonal(dim1=1, dim2=3).sum(2), grid.diagonal(dim1=0, dim2=2).sum(2)
    roots = [torch.linalg.cholesky(part) for part in (left, right)]
    image = problem.target.reshape(-1, a[1], b[1])
    image = torch.einsum("wjq,jx,qy->wxy", image, *roots).reshape(problem.target.shape)
    whitened = nearest_product(image, a, b, rank, seed)
    start = tuple(
        torch.linalg.solve_triangular(root, factor, upper=False, left=False)
        for root, factor in zip(roots, whitened, strict=True)
    )
    if 1 in (a[1], b[1]):  # S is the product of its two parts
        return start[0], start[1]
    whole = float((problem.pull * problem.target).sum().item())
    spread = rearrange(problem.moment, (a[1], a[1]), (b[1], b[1])).reshape(a[1] ** 2, b[1] ** 2)
    half = InputHalf(_grid(problem.pull, a, b), spread, a)
    if rank * max(a[1], b[1]) > UNKNOWNS:
        return _in_turns(problem, half, nearest, whole)
    return _alternate(half, [start[1], nearest[1]], whole)


def _fit_rows(weight: Tensor, rows: Tensor, nearest: Factors, seed: int) -> Factors:
    (rank, *_), a, b = nearest[0].shape, _shape(nearest[0]), _shape(nearest[1])
    left, right = rows.sum(1).sqrt()[:, None], rows.sum(0).sqrt()[:, None]
    image = (weight.reshape(*rows.shape, -1) * left[:, None] * right).to(weight).reshape(weight.shape)
    whitened = nearest_product(image, a, b, rank, seed)
    if 1 in rows.shape:
        return whitened[0] / left, whitened[1] / right
    pull = rows.reshape(-1, 1) * weight
    return _alternate(
        RowHalf(_grid(pull, a, b), rows, a),
        [whitened[1] / right, nearest[1]],
        float((pull * weight).sum().item()),
    )


def _alternate(half: InputHalf | RowHalf, starts: list[Tensor], whole: float) -> Factors:
    """Solve for the A's and the B's in turn, from the better one of `starts`, until the error settles.

    From where the B's stood to where they go is a direction; going further along it takes fewer rounds, and
    is taken back where it does not pay.
    """
    other = half.turned(_shape(starts[0]))
    tried = [(start, *half.solve(start)) for start in map(_orthonormal, starts)]
    b, a, explained = max(tried, key=lambda found: found[2])
    errors, stride = [whole - explained], 1.0
    while len(errors) <= ROUNDS:
        new, least = other.solve(_orthonormal(a))
        new = _aligned(_orthonormal(new), b)
        b = _orthonormal(new + stride * (new - b))
        a, explained = half.solve(b)
        stride *= STRIDE
        if explained < least:
            b, stride = new, max(1.0, stride / STRIDE**4)
            a, explained = half.solve(b)
        errors.append(whole - explained)
        if errors[-3:][0] - errors[-1] <= max(2 * DECREASE * errors[-1], EXACT * whole):
            break
    return a, b


def _in_turns(problem: InputProblem, half: InputHalf, start: Factors, whole: float) -> Factors:
    """Fit a few terms at a time to what the others leave, where one system of all would be too large."""
    a, b = start[0].clone(), start[1].clone()
    size = max(1, UNKNOWNS // max(a.shape[2], b.shape[2]))
    error = whole
    for _ in range(ROUNDS):
        for some in torch.split(torch.arange(a.shape[0]), size):
            rest = torch.ones(a.shape[0], dtype=torch.bool).index_fill(0, some, False)
            others = dense(a[rest], b[rest])
            image = others @ problem.moment
            left = replace(half, pull=_grid(problem.pull - image, _shape(a), _shape(b)))
            b[some], _ = left.turned(_shape(b)).solve(_orthonormal(a[some]))
            b[some] = _orthonormal(b[some])
            a[some], explained = left.solve(b[some])
        before, error = error, whole + float((others * (image - 2 * problem.pull)).sum().item()) - explained
        if before - error <= max(DECREASE * error, EXACT * whole):
            break
    return a, b


def _orthonormal(terms: Tensor) -> Tensor:
    """Return terms [rank, m, n] that span the same space, orthonormal as vectors."""
    basis: Tensor = torch.linalg.qr(terms.flatten(1).T).Q
    return basis.T.reshape(terms.shape)


def _aligned(terms: Tensor, others: Tensor) -> Tensor:
    """Return orthonormal terms that span what `terms` do, each as close to one of `others` as can be."""
    u, _, v = torch.linalg.svd(others.flatten(1) @ terms.flatten(1).T)
    nearest: Tensor = u @ v @ terms.flatten(1)
    return nearest.view(terms.shape)


def _grid(matrix: Tensor, a: Shape, b: Shape) -> Tensor:
    """Return R [m1 n1, m2 n2]."""
    return rearrange(matrix, a, b).reshape(a[0] * a[1], b[0] * b[1])


def _dense(factors: Factors) -> Tensor:
    return dense(factors[0].double(), factors[1].double())


def _single(weight: Tensor) -> Tensor:
    return weight if weight.dtype == torch.float64 else weight.float()


def _shape(factor: Tensor) -> Shape:
    return factor.shape[1], factor.shape[2]

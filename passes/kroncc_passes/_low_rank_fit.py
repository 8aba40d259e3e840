"""The product of two thin matrices that is nearest in the norm that matters, in closed form.

Each norm turns W into an image whose singular triples say what to keep. Of inputs with moment S = L L^T the
image is W* L, and its leading left space Q gives W' = Q Q^T W*, reduced-rank regression (Izenman, 1975). Of
rows that count differently, D W, and its leading right space V gives W' = W V V^T. Of the Fisher
information, close to the product of its row and column sums (Hsu et al., 2022, weigh one side), D W C.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from kroncc.api import Site
from kroncc_passes._dense import weight_of
from kroncc_passes._kronecker_math import balanced, nearest_product, squared_singular_values
from kroncc_passes._weighting import FLOOR, fisher_of, input_problem, row_weights

Weighted = Literal["none", "activations", "fisher"]
Factors = tuple[Tensor, Tensor]  # U [m, rank], V [rank, n]
ROUNDING = 1e-10  # share of the energy that float32 weights cannot tell from nothing


@dataclass(frozen=True)
class Norm:
    """One way to measure: the image, how its factors give those of W, and the error of a product [m, n]."""

    image: Tensor
    back: Callable[[Tensor, Tensor], Factors]
    error: Callable[[Tensor], float]


def fitted_factors(site: Site, weighted: Weighted, rank: int) -> Factors:
    """Return U [m, rank] and V [rank, n], nearest to the weight at `site`, never worse than unweighted.

    Both carry the root of the singular values of U V. float32 (float64 for a float64 weight).
    Raises PassError K425 if the weight is not finite, K426-K428 if the statistics are missing or of no use.
    """
    weight = weight_of(site.module).detach()
    nearest = _thin(weight, rank, site.seed)
    if weighted == "none":
        return nearest
    norm = _norm(site, weighted)
    u, v = balanced(*norm.back(*_thin(norm.image, rank, site.seed)))
    fitted = u.to(nearest[0].dtype), v.to(nearest[1].dtype)
    return min(fitted, nearest, key=lambda pair: norm.error(pair[0].double() @ pair[1].double()))


def energy_rank(site: Site, weighted: Weighted, share: float) -> int:
    """Return the smallest rank whose squared singular values are `share` of all, in the norm of `weighted`.

    Raises PassError as `fitted_factors`.
    """
    image = weight_of(site.module).detach() if weighted == "none" else _norm(site, weighted).image
    values = squared_singular_values(image, (image.shape[0], 1), (1, image.shape[1]))
    left = values.flip(0).cumsum(0).flip(0)  # what ranks 0, 1, ... leave out
    enough = left <= (1 - share + ROUNDING) * left[0]
    return max(1, int(enough.int().argmax().item()) if enough.any() else len(values))


def _norm(site: Site, weighted: Weighted) -> Norm:
    if weighted == "fisher":
        return _by_fisher(weight_of(site.module).detach().double(), fisher_of(site))
    if isinstance(site.module, nn.Embedding):
        return _by_rows(weight_of(site.module).detach(), row_weights(site))
    problem = input_problem(site)

    def back(u: Tensor, _: Tensor) -> Factors:
        space = torch.linalg.qr(u).Q
        return space, space.T @ problem.target

    return Norm(problem.target @ problem.root, back, problem.error)


def _by_rows(weight: Tensor, rows: Tensor) -> Norm:
    """Weigh the rows of an embedding; the table stays in its own type, which may be all that fits."""
    single = weight if weight.dtype == torch.float64 else weight.float()
    seen = rows - FLOOR / rows.shape[0]

    def back(_: Tensor, v: Tensor) -> Factors:
        space = torch.linalg.qr(v.T).Q
        return single @ space, space.T

    def error(other: Tensor) -> float:
        return float((seen[:, None] * (single - other).square()).sum().item())

    return Norm(rows.sqrt()[:, None].to(single.dtype) * single, back, error)


def _by_fisher(weight: Tensor, fisher: Tensor) -> Norm:
    left, right = (_shares(fisher.sum(axis)).sqrt() for axis in (1, 0))

    def back(u: Tensor, v: Tensor) -> Factors:
        return u / left[:, None], v / right

    def error(other: Tensor) -> float:
        return float((fisher * (weight - other).square()).sum().item())

    return Norm(left[:, None] * weight * right, back, error)


def _shares(sums: Tensor) -> Tensor:
    total = sums.sum()
    return (sums / total if total > 0 else sums) + FLOOR / sums.shape[0]


def _thin(matrix: Tensor, rank: int, seed: int) -> Factors:
    """Return the nearest product of two thin matrices.

    A column (x) a row is their outer product, so the nearest sum of `rank` such Kronecker products is the
    truncated singular value decomposition.
    """
    m, n = matrix.shape
    columns, rows = nearest_product(matrix, (m, 1), (1, n), rank, seed)
    return columns.squeeze(2).T, rows.squeeze(1)

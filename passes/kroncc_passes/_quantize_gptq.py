"""Rounding column by column, the error of each passed on to the columns that are still to come.

Source: Frantar et al., GPTQ: Accurate post-training quantization for generative pre-trained transformers,
2022, algorithm 1, with columns in the order of falling diagonal of the Hessian.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kroncc_passes._quantize_grid import Grid

BLOCK = 128
DAMPING = 0.01  # of the mean diagonal of the Hessian


def compensated(matrix: Tensor, moment: Tensor, grid: Grid, scale: Tensor, zero: Tensor | None) -> Tensor:
    """Return codes uint8 [rows, columns] for `matrix`, small in E norm((W - W') x)^2 with `moment` E[x x^T].

    A row for which the nearest codes do better keeps those: no row is worse than by rounding.
    """
    nearest = grid.encode(matrix, scale, zero)
    order = moment.diagonal().argsort(descending=True, stable=True)
    w = matrix.double()[:, order].clone()
    per_column = _per_column(grid, matrix, scale)[:, order].double()
    zeros = _per_column(grid, matrix, zero)[:, order].double() if zero is not None else None
    codes = _rounded(w, _inverse_root(moment.double()[order][:, order]), grid, per_column, zeros)
    passed_on = torch.empty_like(nearest).index_copy_(1, order, codes.to(torch.uint8))
    better = _errors(matrix, passed_on, moment, grid, scale, zero) < _errors(
        matrix, nearest, moment, grid, scale, zero
    )
    return torch.where(better.unsqueeze(1), passed_on, nearest)


def output_error(difference: Tensor, moment: Tensor) -> Tensor:
    """Return E (d x)^2 for each row d of `difference` [rows, columns]."""
    d = difference.double()
    return ((d @ moment.double()) * d).sum(1)


def _errors(
    matrix: Tensor, codes: Tensor, moment: Tensor, grid: Grid, scale: Tensor, zero: Tensor | None
) -> Tensor:
    return output_error(matrix.double() - grid.decode(codes, scale, zero).double(), moment)


def _per_column(grid: Grid, matrix: Tensor, scale: Tensor) -> Tensor:
    """Return a scale for every weight."""
    return grid.spread(scale, matrix.shape[1]).expand(matrix.shape)


def _inverse_root(moment: Tensor) -> Tensor:
    """Return U, upper triangular, with U^T U the inverse of the damped Hessian 2 E[x x^T]."""
    hessian = 2 * moment
    diagonal = hessian.diagonal()
    damping = DAMPING * diagonal.mean().clamp(min=torch.finfo(torch.float64).tiny)
    hessian = hessian + torch.diag(damping + (diagonal <= 0).double())  # inputs that never occur
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    root: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return root


def _rounded(w: Tensor, root: Tensor, grid: Grid, scale: Tensor, zero: Tensor | None) -> Tensor:
    """Return the codes of `w`, which is used up."""
    columns = w.shape[1]
    codes = torch.empty_like(w)
    least, offset = (1, None) if zero is None else (0, zero)
    for start in range(0, columns, BLOCK):
        end = min(start + BLOCK, columns)
        errors = w.new_zeros(w.shape[0], end - start)
        for column in range(start, end):
            shift = grid.centre if offset is None else offset[:, column]
            code = ((w[:, column] / scale[:, column]).round() + shift).clamp(least, grid.top)
            error = (w[:, column] - (code - shift) * scale[:, column]) / root[column, column]
            w[:, column:end] -= error.unsqueeze(1) * root[column, column:end]
            codes[:, column], errors[:, column - start] = code, error
        w[:, end:] -= errors @ root[start:end, end:]
    return codes

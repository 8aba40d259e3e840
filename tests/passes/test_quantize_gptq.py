"""GPTQ: never worse than rounding on the moment it saw, the paper's algorithm by a plain loop."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kroncc_passes._quantize_gptq import compensated, output_error
from kroncc_passes._quantize_grid import Grid

GRIDS = [
    Grid(3),
    Grid(4, "group", 5),
    Grid(3, "tensor"),
    Grid(4, symmetric=False),
    Grid(2, "group", 8, False),
]


def case(rows, columns, seed, rank=None):
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(rows, columns, generator=generator)
    mix = torch.randn(columns, rank or columns, generator=generator)
    x = torch.randn(400, rank or columns, generator=generator) @ mix.T
    return matrix, x.T @ x / 400


def by_loop(matrix, moment, grid, scale):
    """Algorithm 1 with a full inverse Hessian that is shrunk column by column (OBQ), in numpy."""
    w, hessian = matrix.double().numpy().copy(), 2 * moment.double().numpy()
    hessian += 0.01 * np.diag(hessian).mean() * np.eye(len(hessian))
    order = np.argsort(-np.diag(moment.numpy()), kind="stable")
    steps = grid.spread(scale, matrix.shape[1]).expand(matrix.shape).double().numpy()
    left, codes = list(order), np.zeros(matrix.shape, dtype=np.uint8)
    for column in order:
        inverse = np.linalg.inv(hessian[np.ix_(left, left)])
        place = left.index(column)
        code = np.clip(np.round(w[:, column] / steps[:, column]) + grid.centre, 1, grid.top)
        error = (w[:, column] - (code - grid.centre) * steps[:, column]) / inverse[place, place]
        w[:, left] -= np.outer(error, inverse[place])
        codes[:, column] = code
        left.remove(column)
    return torch.from_numpy(codes)


@pytest.mark.parametrize("grid", [Grid(3), Grid(4, "group", 5)], ids=str)
def test_follows_the_paper(grid):
    matrix, moment = case(4, 13, seed=3)
    scale, _ = grid.fit(matrix)
    got = compensated(matrix, moment, grid, scale, None)
    nearest = grid.encode(matrix, scale, None)
    want = by_loop(matrix, moment, grid, scale)
    for row in range(4):
        assert torch.equal(got[row], want[row]) or torch.equal(got[row], nearest[row])
    assert any(torch.equal(got[row], want[row]) for row in range(4))


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(GRIDS), st.integers(1, 6), st.integers(1, 40), st.integers(0, 999), st.booleans())
def test_no_row_is_worse_than_by_rounding(grid, rows, columns, seed, thin):
    matrix, moment = case(rows, columns, seed, rank=max(columns // 3, 1) if thin else None)
    scale, zero = grid.fit(matrix)
    errors = [
        output_error(matrix - grid.decode(codes, scale, zero), moment)
        for codes in (compensated(matrix, moment, grid, scale, zero), grid.encode(matrix, scale, zero))
    ]
    assert (errors[0] <= errors[1] * (1 + 1e-9)).all()


def test_correlated_inputs_are_worth_it():
    matrix, moment = case(32, 200, seed=0, rank=20)
    grid = Grid(3)
    scale, _ = grid.fit(matrix)
    passed_on, nearest = (
        output_error(matrix - grid.decode(codes, scale, None), moment).sum()
        for codes in (compensated(matrix, moment, grid, scale, None), grid.encode(matrix, scale, None))
    )
    assert passed_on < 0.5 * nearest


def test_inputs_that_never_occur():
    matrix, moment = case(3, 12, seed=1)
    moment[:, 4:8] = moment[4:8] = 0
    grid = Grid(4)
    scale, _ = grid.fit(matrix)
    codes = compensated(matrix, moment, grid, scale, None)
    assert torch.isfinite(grid.decode(codes, scale, None)).all()
    assert torch.equal(compensated(matrix, 0 * moment, grid, scale, None), grid.encode(matrix, scale, None))


def test_output_error_is_the_mean_square_of_outputs():
    generator = torch.Generator().manual_seed(0)
    x, d = torch.randn(50, 6, generator=generator), torch.randn(4, 6, generator=generator)
    want = (x @ d.T).square().mean(0)
    torch.testing.assert_close(output_error(d, x.T @ x / 50).float(), want)

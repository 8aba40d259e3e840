"""The grid against the formulas in numpy and against torch's own quantised tensors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kroncc_passes._quantize_grid import Grid


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def parts_of(matrix, grid):
    """The weights that share a scale, as numpy views."""
    if grid.granularity == "tensor":
        return [(slice(None), slice(None))]
    size = grid.group or matrix.shape[1]
    starts = range(0, matrix.shape[1], size)
    return [(slice(row, row + 1), slice(s, s + size)) for row in range(matrix.shape[0]) for s in starts]


def rounded_by_numpy(matrix, grid):
    out = np.empty_like(matrix)
    for part in parts_of(matrix, grid):
        w = matrix[part]
        if grid.symmetric:
            top = 2 ** (grid.bits - 1) - 1
            scale = np.float32(np.abs(w).max() / top) or np.float32(1)
            out[part] = np.clip(np.round(w / scale), -top, top) * scale
            continue
        low, high = min(w.min(), 0), max(w.max(), 0)
        scale = np.float32((high - low) / (2**grid.bits - 1)) or np.float32(1)
        zero = np.round(-low / scale)
        out[part] = (np.clip(np.round(w / scale) + zero, 0, 2**grid.bits - 1) - zero) * scale
    return out


GRIDS = [
    Grid(bits, granularity, group, symmetric)
    for bits in (2, 3, 4, 5, 8)
    for granularity, group in (("tensor", None), ("channel", None), ("group", 5), ("group", 100))
    for symmetric in (True, False)
]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_rounds_as_the_formula_says(grid):
    matrix = normal(7, 23) * torch.linspace(0.1, 3, 7).unsqueeze(1)
    matrix[3] = 0
    matrix[4] = matrix[4].abs()
    scale, zero = grid.fit(matrix)
    assert scale.shape == grid.scales(7, 23)
    codes = grid.encode(matrix, scale, zero)
    assert codes.dtype == torch.uint8
    assert int(codes.max()) < 1 << grid.bits
    got = grid.decode(codes, scale, zero)
    np.testing.assert_allclose(got.numpy(), rounded_by_numpy(matrix.numpy(), grid), rtol=1e-5, atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 8), st.booleans(), st.integers(1, 30), st.integers(0, 10_000))
def test_no_weight_is_off_by_more_than_half_a_step(bits, symmetric, group, seed):
    matrix = normal(3, 17, seed=seed) * 10.0 ** (seed % 7 - 3)
    grid = Grid(bits, "group", group, symmetric)
    scale, zero = grid.fit(matrix)
    got = grid.decode(grid.encode(matrix, scale, zero), scale, zero)
    steps = grid.spread(scale, 17)
    slack = 1.0 if not symmetric else 0.5  # a rounded zero may cut half a step off an end
    assert ((got - matrix).abs() <= slack * steps * 1.0001).all()


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_zero_stays_zero(bits):
    matrix = normal(4, 16).abs() + 1
    matrix[:, ::3] = 0
    for symmetric in (True, False):
        grid = Grid(bits, symmetric=symmetric)
        scale, zero = grid.fit(matrix)
        assert not grid.decode(grid.encode(matrix, scale, zero), scale, zero)[:, ::3].any()


def test_eight_bits_a_channel_are_those_of_torch():
    matrix = normal(6, 40)
    grid = Grid(8)
    scale, _ = grid.fit(matrix)
    codes = grid.encode(matrix, scale, None).int() - 128
    zeros = torch.zeros(6, dtype=torch.int32)
    seen = torch.fake_quantize_per_channel_affine(matrix, scale[:, 0], zeros, 0, -127, 127)
    torch.testing.assert_close(grid.decode(codes.add(128).to(torch.uint8), scale, None), seen)


def test_the_gradient_of_a_scale_is_the_sum_over_its_codes():
    matrix = normal(3, 10)
    for grid in (Grid(4), Grid(4, "tensor"), Grid(4, "group", 4)):
        scale, _ = grid.fit(matrix)
        codes = grid.encode(matrix, scale, None)
        scale = scale.requires_grad_()
        grid.decode(codes, scale, None).sum().backward()
        centred = codes.float() - 8
        if grid.granularity == "tensor":
            want = centred.sum().view(1, 1)
        else:
            want = torch.stack([p.sum(1) for p in centred.split(grid.group or 10, dim=1)], dim=1)
        torch.testing.assert_close(scale.grad, want)


def test_half_precision_scales_give_codes_for_themselves():
    matrix = normal(4, 32).half()
    grid = Grid(8)
    scale, _ = grid.fit(matrix)
    assert scale.dtype == torch.float16
    got = grid.decode(grid.encode(matrix, scale, None), scale, None)
    assert ((got - matrix).abs() <= 0.51 * scale).all()

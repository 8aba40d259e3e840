"""Fitted sums of Kronecker products against closed forms of numpy, and against a search by gradients."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.pytorch_utils import Conv1D

from kroncc.api import Site, SiteStats
from kroncc.compiler import compile_recipe
from kroncc.recipe.loader import load_recipe
from kroncc_passes import _kronecker_fit, _weighting
from kroncc_passes._kronecker_fit import fitted_factors
from kroncc_passes._kronecker_math import nearest_product
from kroncc_passes._kronecker_product import dense
from kroncc_passes._weighting import output_error

RECIPES = Path(__file__).parents[2] / "recipes"


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inputs(count, n, seed=0):
    """Return inputs of unequal spread, correlated, with a mean."""
    return (
        normal(count, n, seed=seed) @ (torch.logspace(0, -2, n).double() * normal(n, n, seed=seed + 1)) + 0.3
    )


def measured(x, t=None):
    return SiteStats(
        count=len(x),
        mean=x.mean(0),
        moment=x.T @ x / len(x),
        cross=None if t is None else t.T @ x / len(x),
        cross_mean=None if t is None else t.mean(0),
    )


def linear(weight, bias=False):
    module = nn.Linear(weight.shape[1], weight.shape[0], bias=bias, dtype=weight.dtype)
    module.weight.data = weight.clone()
    return module


def table(weight):
    module = nn.Embedding(*weight.shape, dtype=weight.dtype)
    module.weight.data = weight.clone()
    return module


def fitted(site, a, b, rank=1):
    return dense(*fitted_factors(site, a, b, rank))


def nearest(weight, a, b, rank=1):
    return dense(*nearest_product(weight, a, b, rank))


def searched(weight, start, loss_of):
    """Return the least loss that L-BFGS finds from `start`."""
    factors = [factor.clone().requires_grad_() for factor in start]
    search = torch.optim.LBFGS(factors, max_iter=400, line_search_fn="strong_wolfe", tolerance_change=1e-14)

    def loss():
        search.zero_grad()
        value = loss_of(weight - dense(*factors)) / loss_of(weight)
        value.backward()
        return value

    search.step(loss)
    return loss().item()


@pytest.fixture
def to_the_end(monkeypatch):
    """Fit without a ridge until nothing moves."""
    monkeypatch.setattr(_weighting, "RIDGE", 1e-12)
    monkeypatch.setattr(_weighting, "SCARCE", 0.0)
    monkeypatch.setattr(_kronecker_fit, "DECREASE", 1e-9)
    monkeypatch.setattr(_kronecker_fit, "ROUNDS", 500)


SHAPES = [((4, 3), (3, 4)), ((6, 6), (2, 2)), ((2, 4), (6, 3)), ((12, 2), (1, 6))]


class TestInputs:
    @pytest.mark.parametrize("rank", [1, 3])
    @pytest.mark.parametrize(("a", "b"), SHAPES)
    def test_a_search_from_the_nearest_finds_no_better_one(self, a, b, rank, to_the_end):
        weight = normal(12, 12)
        stats = measured(inputs(300, 12))
        got = output_error(weight, fitted(Site("up", linear(weight), stats=stats), a, b, rank), stats)
        start = nearest_product(weight, a, b, rank)
        best = searched(weight, start, lambda left: ((left @ stats.moment) * left).sum())
        assert got <= best * 1.002
        assert got < 0.9 * output_error(weight, nearest(weight, a, b, rank), stats)

    def test_is_close_to_the_best_of_many_searches(self):
        (a, b), weight = SHAPES[0], normal(12, 12, seed=3)
        stats = measured(inputs(300, 12, seed=3))
        got = output_error(weight, fitted(Site("up", linear(weight), stats=stats), a, b, 2), stats)
        best = min(
            searched(
                weight,
                (normal(2, *a, seed=seed), normal(2, *b, seed=seed + 40)),
                lambda left: ((left @ stats.moment) * left).sum(),
            )
            for seed in range(8)
        )
        assert best * 0.999 <= got <= best * 1.1

    @pytest.mark.parametrize("rank", [1, 2, 5])
    @pytest.mark.parametrize(("a", "b"), SHAPES)
    def test_closed_form_where_the_moment_is_a_product(self, a, b, rank, to_the_end):
        """Whitened by the two parts of the moment, the problem is that of the nearest product (by numpy)."""
        weight, parts = normal(12, 12), []
        for size, seed in ((a[1], 1), (b[1], 2)):
            root = normal(size, size, seed=seed)
            parts.append(root @ root.T + 0.1 * torch.eye(size))
        rank = min(rank, b[0] * b[1])
        stats = SiteStats(count=90, mean=torch.zeros(12), moment=torch.kron(*parts))
        got = output_error(weight, fitted(Site("up", linear(weight), stats=stats), a, b, rank), stats)
        image = (weight @ torch.kron(*map(torch.linalg.cholesky, parts))).numpy()
        grid = image.reshape(a[0], b[0], a[1], b[1]).transpose(0, 2, 1, 3).reshape(a[0] * a[1], -1)
        values = np.linalg.svd(grid, compute_uv=False)
        assert got == pytest.approx((values[rank:] ** 2).sum() / (values**2).sum(), rel=1e-6, abs=1e-12)

    @pytest.mark.parametrize("bias", [False, True])
    def test_one_column_or_one_row_is_reduced_rank_regression(self, bias, to_the_end):
        x, weight = inputs(300, 8), normal(10, 8)
        got = fitted(Site("up", linear(weight, bias), stats=measured(x)), (10, 1), (1, 8), 3)
        outputs = (x @ weight.T).numpy()
        outputs = outputs - outputs.mean(0) if bias else outputs
        left = x.numpy() @ (weight - got).numpy().T
        left = left - left.mean(0) if bias else left
        want = np.linalg.svd(outputs, compute_uv=False)[3:]
        assert np.linalg.norm(left) == pytest.approx(np.linalg.norm(want), rel=1e-6)
        turned = fitted(Site("up", linear(weight, bias), stats=measured(x)), (1, 8), (10, 1), 3)
        torch.testing.assert_close(turned, got)

    @settings(max_examples=60, deadline=None)
    @given(
        a=st.tuples(st.integers(1, 4), st.integers(1, 4)),
        b=st.tuples(st.integers(1, 4), st.integers(1, 4)),
        count=st.integers(1, 40),
        bias=st.booleans(),
        sequential=st.booleans(),
        data=st.data(),
    )
    def test_is_never_worse_than_the_nearest(self, a, b, count, bias, sequential, data):
        rank, seed = data.draw(st.integers(1, min(a[0] * a[1], b[0] * b[1]))), data.draw(st.integers(0, 99))
        m, n = a[0] * b[0], a[1] * b[1]
        x, weight = inputs(count, n, seed), normal(m, n, seed=seed + 5)
        t = x + 0.5 * normal(count, n, seed=seed + 6)
        where = Site("up", linear(weight, bias), stats=measured(x, t if sequential else None))
        want = (t if sequential else x) @ weight.T

        def error(other):
            left = want - x @ other.T
            return (left - left.mean(0) if bias else left).square().sum()

        bound = error(nearest(weight, a, b, rank)) * (1 + 1e-6) + 1e-9 * want.square().sum()
        assert error(fitted(where, a, b, rank)) <= bound

    @pytest.mark.parametrize("rank", [1, 3])
    def test_is_the_nearest_where_all_directions_count_alike(self, rank):
        weight, shift = normal(12, 12), normal(12)
        stats = SiteStats(count=90, mean=shift, moment=torch.eye(12) + torch.outer(shift, shift))
        where = Site("up", linear(weight, bias=True), stats=stats)
        torch.testing.assert_close(fitted(where, (4, 3), (3, 4), rank), nearest(weight, (4, 3), (3, 4), rank))

    @pytest.mark.parametrize("count", [2, 300])
    def test_a_weight_that_is_such_a_sum_is_kept(self, count):
        weight = dense(normal(3, 4, 3), normal(3, 3, 4, seed=1))
        where = Site("up", linear(weight, True), stats=measured(inputs(count, 12)))
        for rank in (3, 4, 12):
            torch.testing.assert_close(fitted(where, (4, 3), (3, 4), rank), weight, atol=1e-6, rtol=0)

    @settings(max_examples=30, deadline=None)
    @given(st.floats(1e-3, 1e3), st.floats(1e-3, 1e3), st.integers(0, 99))
    def test_units_do_not_matter(self, unit, scale, seed):
        x, weight = inputs(40, 12, seed), normal(12, 12, seed=seed)
        plain = fitted(Site("up", linear(weight, True), stats=measured(x)), (4, 3), (3, 4), 2)
        where = Site("up", linear(scale * weight, True), stats=measured(unit * x))
        torch.testing.assert_close(fitted(where, (4, 3), (3, 4), 2) / scale, plain, rtol=1e-4, atol=1e-4)

    def test_in_sequence_it_aims_at_what_was(self, to_the_end):
        weight, x = normal(12, 12), inputs(300, 12)
        mixing = torch.eye(12) + 0.4 * normal(12, 12, seed=9)
        t = x @ mixing.T  # what stood there before: a target that a linear map of x reaches
        stats = measured(x, t)
        got = fitted(Site("up", linear(weight), stats=stats), (6, 6), (2, 2), 4)
        assert (t @ weight.T - x @ got.T).norm() < 1e-4 * (t @ weight.T).norm()
        plain = fitted(Site("up", linear(weight), stats=measured(x)), (6, 6), (2, 2), 4)
        assert (t @ weight.T - x @ plain.T).norm() > 0.1 * (t @ weight.T).norm()

    def test_terms_that_take_turns_come_as_far(self, monkeypatch):
        weight, stats = normal(24, 24), measured(inputs(400, 24))
        where = Site("up", linear(weight, True), stats=stats)
        together = output_error(weight, fitted(where, (6, 6), (4, 4), 6), stats, corrected=True)
        monkeypatch.setattr(_kronecker_fit, "UNKNOWNS", 13)  # two terms at a time
        monkeypatch.setattr(_kronecker_fit, "ROUNDS", 300)
        monkeypatch.setattr(_kronecker_fit, "DECREASE", 1e-5)
        in_turns = output_error(weight, fitted(where, (6, 6), (4, 4), 6), stats, corrected=True)
        assert in_turns == pytest.approx(together, rel=0.05)

    def test_the_error_falls_in_every_round(self, monkeypatch):
        weight, stats = normal(24, 24), measured(inputs(400, 24))
        where, errors = Site("up", linear(weight, True), stats=stats), []
        for rounds in range(1, 12):
            monkeypatch.setattr(_kronecker_fit, "ROUNDS", rounds)
            errors.append(output_error(weight, fitted(where, (6, 6), (4, 4), 3), stats, corrected=True))
        assert all(later <= before * (1 + 1e-9) for before, later in itertools.pairwise(errors))
        assert errors[-1] < 0.98 * errors[0]

    def test_conv1d_is_fitted_as_the_linear_map_is(self):
        weight, stats = normal(12, 8), measured(inputs(50, 8))
        conv = Conv1D(12, 8).double()
        conv.weight.data = weight.T.contiguous()
        one, two = (
            fitted(Site("up", module, stats=stats), (4, 2), (3, 4), 2)
            for module in (linear(weight, True), conv)
        )
        torch.testing.assert_close(one, two)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_half_precision_is_fitted_in_single(self, dtype):
        weight = normal(12, 8).to(dtype)
        a, b = fitted_factors(Site("up", linear(weight), stats=measured(inputs(50, 8))), (4, 2), (3, 4), 2)
        assert a.dtype == b.dtype == torch.float32

    def test_factors_have_the_form_of_the_nearest(self):
        where = Site("up", linear(normal(12, 12), True), stats=measured(inputs(50, 12)))
        a, b = (factor.flatten(1) for factor in fitted_factors(where, (4, 3), (3, 4), 3))
        torch.testing.assert_close(a @ a.T, b @ b.T)
        assert (a @ a.T).fill_diagonal_(0).abs().max() < 1e-6
        assert (b.gather(1, b.abs().argmax(1, keepdim=True)) > 0).all()


class TestRows:
    def site(self, weight, lookups):
        return Site("table", table(weight), stats=SiteStats(count=int(lookups.sum()), lookups=lookups))

    @pytest.mark.parametrize("rank", [1, 2])
    def test_one_row_a_token_is_the_weighted_decomposition_of_numpy(self, rank):
        weight, lookups = normal(30, 8), torch.arange(30.0)
        got = fitted(self.site(weight, lookups), (30, 2), (1, 4), rank)
        root = np.sqrt(lookups.double().numpy() / lookups.sum().item() + _weighting.FLOOR / 30).repeat(2)[
            :, None
        ]
        u, s, v = np.linalg.svd(root * weight.numpy().reshape(60, 4), full_matrices=False)
        want = ((u[:, :rank] * s[:rank]) @ v[:rank] / root).reshape(30, 8)
        np.testing.assert_allclose(got, want, atol=1e-6)

    @pytest.mark.parametrize("rank", [1, 3])
    @pytest.mark.parametrize(("a", "b"), [((10, 2), (3, 4)), ((15, 4), (2, 2)), ((1, 2), (30, 4))])
    def test_a_search_from_the_nearest_finds_no_better_one(self, a, b, rank, to_the_end):
        weight = normal(30, 8)
        lookups = torch.poisson(3 * torch.rand(30), generator=torch.Generator().manual_seed(0)) + 1
        rank = min(rank, a[0] * a[1])
        rows = lookups.double() / lookups.sum() + _weighting.FLOOR / 30

        def loss(left):
            return (rows[:, None] * left.square()).sum()

        got = loss(weight - fitted(self.site(weight, lookups), a, b, rank)) / loss(weight)
        assert got <= searched(weight, nearest_product(weight, a, b, rank), loss) * 1.002

    @settings(max_examples=40, deadline=None)
    @given(
        a=st.tuples(st.integers(1, 6), st.integers(1, 4)),
        b=st.tuples(st.integers(1, 4), st.integers(1, 4)),
        seed=st.integers(0, 99),
        data=st.data(),
    )
    def test_is_never_worse_than_the_nearest(self, a, b, seed, data):
        rank = data.draw(st.integers(1, min(a[0] * a[1], b[0] * b[1])))
        weight = normal(a[0] * b[0], a[1] * b[1], seed=seed)
        lookups = torch.poisson(torch.rand(len(weight)), generator=torch.Generator().manual_seed(seed))
        lookups[0] += 1
        where = self.site(weight, lookups)
        errors = [
            output_error(weight, other, where.stats)
            for other in (fitted(where, a, b, rank), nearest(weight, a, b, rank))
        ]
        assert errors[0] <= errors[1] * (1 + 1e-6) + 1e-12

    def test_systems_of_rows_may_be_solved_in_parts(self, monkeypatch):
        weight, lookups = normal(30, 8), torch.arange(30.0)
        whole = fitted(self.site(weight, lookups), (10, 2), (3, 4), 3)
        monkeypatch.setattr(_kronecker_fit, "ROWS", 20)
        torch.testing.assert_close(fitted(self.site(weight, lookups), (10, 2), (3, 4), 3), whole)


@pytest.mark.parametrize(("ratio", "count"), [(8, 14_635_604), (21, 5_204_078)])
def test_the_fitted_siblings_plan_as_they_say(ratio, count):
    """The paper's shapes in the encoder; the largest rank at which the embedding is no larger than there."""
    plan = compile_recipe(load_recipe(RECIPES / f"kroneckerbert-{ratio}-fitted.yaml"), offline=True)
    small = plan.models["factored"]
    paper = 14_655_754 if ratio == 8 else 5_229_810
    rank, table = (93, 30522 * 96 + 8) if ratio == 8 else (46, 30522 * 48 + 16)
    assert small.params == count == paper - table + rank * (30522 + 768)
    assert small.skipped == ()
    assert all(plan.expectations.values())

"""Weighted products of two thin matrices against formulas of numpy on samples, and against a search."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from kroncc.api import Site, SiteStats
from kroncc_passes import _weighting
from kroncc_passes._low_rank_fit import energy_rank, fitted_factors
from kroncc_passes._weighting import FLOOR, output_error


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


def product(site, weighted, rank):
    u, v = fitted_factors(site, weighted, rank)
    return u @ v


@pytest.fixture
def no_ridge(monkeypatch):
    monkeypatch.setattr(_weighting, "RIDGE", 1e-12)
    monkeypatch.setattr(_weighting, "SCARCE", 0.0)


class TestActivations:
    @pytest.mark.parametrize("size", [(12, 9), (9, 12), (60, 7)])
    @pytest.mark.parametrize("rank", [1, 4])
    def test_is_the_best_that_a_map_of_that_rank_can_do_on_the_samples(self, size, rank, no_ridge):
        x, weight = inputs(400, size[1]), normal(*size)
        outputs = (x @ weight.T).numpy()
        left = np.linalg.svd(outputs, compute_uv=False)[rank:]
        got = product(Site("up", linear(weight), stats=measured(x)), "activations", rank)
        error = np.linalg.norm(outputs - x.numpy() @ got.numpy().T)
        assert error == pytest.approx(np.linalg.norm(left), rel=1e-6)

    @pytest.mark.parametrize("bias", [False, True])
    @pytest.mark.parametrize("sequential", [False, True])
    def test_is_reduced_rank_regression(self, bias, sequential, no_ridge):
        x, weight, rank = inputs(400, 9), normal(12, 9), 3
        t = x + 0.2 * normal(400, 9, seed=8) if sequential else x
        module = linear(weight, bias)
        got = product(
            Site("up", module, stats=measured(x, t if sequential else None)), "activations", rank
        ).numpy()
        design, wanted = x.numpy(), (t @ weight.T).numpy()
        if bias:
            design, wanted = design - design.mean(0), wanted - wanted.mean(0)
        full = np.linalg.lstsq(design, wanted, rcond=None)[0]
        leading = np.linalg.svd(design @ full)[2][:rank]
        np.testing.assert_allclose(got.T, full @ leading.T @ leading, atol=1e-6)

    def test_no_search_finds_a_better_one(self, no_ridge):
        x, weight = inputs(300, 8), normal(10, 8)
        stats = measured(x)
        got = output_error(weight, product(Site("up", linear(weight), stats=stats), "activations", 2), stats)
        outcomes = [searched(weight, stats.moment, 2, seed) for seed in range(5)]
        assert got <= min(outcomes) * (1 + 1e-6)
        assert got == pytest.approx(min(outcomes), rel=1e-3)

    @settings(max_examples=60, deadline=None)
    @given(
        m=st.integers(2, 24),
        n=st.integers(2, 24),
        count=st.integers(1, 60),
        bias=st.booleans(),
        sequential=st.booleans(),
        data=st.data(),
    )
    def test_is_never_worse_than_the_nearest(self, m, n, count, bias, sequential, data):
        rank, seed = data.draw(st.integers(1, min(m, n))), data.draw(st.integers(0, 99))
        x, weight = inputs(count, n, seed), normal(m, n, seed=seed + 5)
        t = x + 0.5 * normal(count, n, seed=seed + 6)
        where = Site("up", linear(weight, bias), stats=measured(x, t if sequential else None))
        want = (t if sequential else x) @ weight.T

        def error(other):
            left = want - x @ other.T
            return (left - left.mean(0) if bias else left).square().sum()

        nearest = error(product(where, "none", rank))
        assert error(product(where, "activations", rank)) <= nearest * (1 + 1e-6) + 1e-9 * want.square().sum()

    @pytest.mark.parametrize("mean", [False, True])
    def test_is_the_nearest_where_all_directions_count_alike(self, mean):
        weight, shift = normal(12, 9), 2.0 * mean * normal(9)
        stats = SiteStats(count=90, mean=shift, moment=torch.eye(9) + torch.outer(shift, shift))
        where = Site("up", linear(weight, bias=True), stats=stats)
        torch.testing.assert_close(product(where, "activations", 3), product(where, "none", 3))

    @settings(max_examples=30, deadline=None)
    @given(st.floats(1e-3, 1e3), st.floats(1e-3, 1e3), st.integers(0, 99))
    def test_units_do_not_matter(self, unit, scale, seed):
        x, weight = inputs(40, 9, seed), normal(12, 9, seed=seed)
        plain = product(Site("up", linear(weight, True), stats=measured(x)), "activations", 3)
        scaled = product(Site("up", linear(scale * weight, True), stats=measured(unit * x)), "activations", 3)
        torch.testing.assert_close(scaled / scale, plain, rtol=1e-6, atol=1e-6)

    @pytest.mark.parametrize("count", [2, 200])
    def test_a_weight_of_that_rank_is_kept(self, count):
        weight = normal(12, 3) @ normal(3, 9, seed=1)
        where = Site("up", linear(weight, True), stats=measured(inputs(count, 9)))
        torch.testing.assert_close(product(where, "activations", 3), weight)
        torch.testing.assert_close(product(where, "activations", 5), weight)

    def test_both_factors_carry_the_root_of_a_singular_value(self):
        where = Site("up", linear(normal(12, 9), True), stats=measured(inputs(50, 9)))
        u, v = fitted_factors(where, "activations", 3)
        want = torch.linalg.svdvals(u @ v)[:3].diag()
        torch.testing.assert_close(u.T @ u, want)
        torch.testing.assert_close(v @ v.T, want)


def searched(weight, moment, rank, seed):
    """Return the least relative error that L-BFGS finds from a random start."""
    u = normal(weight.shape[0], rank, seed=seed).requires_grad_()
    v = normal(rank, weight.shape[1], seed=seed + 50).requires_grad_()
    search = torch.optim.LBFGS([u, v], max_iter=500, line_search_fn="strong_wolfe", tolerance_change=1e-14)

    def loss():
        search.zero_grad()
        left = weight - u @ v
        value = ((left @ moment) * left).sum() / ((weight @ moment) * weight).sum()
        value.backward()
        return value

    search.step(loss)
    return loss().item()


class TestRows:
    def table(self, weight):
        module = nn.Embedding(*weight.shape, dtype=weight.dtype)
        module.weight.data = weight.clone()
        return module

    def test_is_the_weighted_decomposition_of_numpy(self):
        weight, lookups = normal(30, 8), torch.arange(30.0) ** 2
        where = Site("table", self.table(weight), stats=SiteStats(count=9, lookups=lookups))
        root = np.sqrt(lookups.double().numpy() / lookups.sum().item() + FLOOR / 30)[:, None]
        u, s, v = np.linalg.svd(root * weight.numpy(), full_matrices=False)
        want = (u[:, :3] * s[:3]) @ v[:3] / root
        np.testing.assert_allclose(product(where, "activations", 3), want, atol=1e-8)

    @settings(max_examples=40, deadline=None)
    @given(st.integers(2, 30), st.integers(2, 12), st.integers(0, 99), st.data())
    def test_is_never_worse_than_the_nearest(self, tokens, width, seed, data):
        rank = data.draw(st.integers(1, min(tokens, width)))
        lookups = torch.poisson(2 * torch.rand(tokens), generator=torch.Generator().manual_seed(seed))
        lookups[0] += 1
        weight = normal(tokens, width, seed=seed)
        stats = SiteStats(count=int(lookups.sum()), lookups=lookups)
        where = Site("table", self.table(weight), stats=stats)
        errors = [output_error(weight, product(where, way, rank), stats) for way in ("activations", "none")]
        assert errors[0] <= errors[1] * (1 + 1e-6) + 1e-12

    def test_tokens_never_seen_are_not_thrown_away(self):
        weight = torch.cat([normal(20, 3) @ normal(3, 8, seed=1), normal(20, 3) @ normal(3, 8, seed=2)])
        lookups = torch.cat([torch.full((20,), 9.0), torch.zeros(20)])
        where = Site("table", self.table(weight), stats=SiteStats(count=180, lookups=lookups))
        got = product(where, "activations", 5)
        unseen = (got - weight)[20:].square().sum() / weight[20:].square().sum()
        assert unseen < 0.35
        assert (got - weight)[:20].square().sum() / weight[:20].square().sum() < 0.05

    def test_alike_for_all_tokens_is_the_nearest(self):
        stats = SiteStats(count=30, lookups=torch.ones(30))
        where = Site("table", self.table(normal(30, 8)), stats=stats)
        torch.testing.assert_close(product(where, "activations", 3), product(where, "none", 3))


class TestFisher:
    def site(self, weight, fisher):
        return Site("up", linear(weight), stats=SiteStats(count=9, fisher=fisher))

    def test_is_hsus_decomposition_where_columns_count_alike(self):
        weight, rows = normal(12, 9), torch.arange(1.0, 13).double()
        root = np.sqrt(rows.numpy() / rows.sum().item() + FLOOR / 12)[:, None]
        u, s, v = np.linalg.svd(root * weight.numpy(), full_matrices=False)
        want = (u[:, :3] * s[:3]) @ v[:3] / root
        got = product(self.site(weight, rows[:, None].expand(12, 9)), "fisher", 3)
        np.testing.assert_allclose(got, want, atol=1e-8)

    def test_no_search_finds_a_better_one_where_rows_and_columns_say_all(self, monkeypatch):
        monkeypatch.setattr("kroncc_passes._low_rank_fit.FLOOR", 0.0)
        weight, fisher = normal(10, 8), torch.outer(torch.arange(1.0, 11), torch.arange(1.0, 9)).double()
        got = product(self.site(weight, fisher), "fisher", 2)
        error = ((fisher * (weight - got).square()).sum() / (fisher * weight.square()).sum()).item()
        whitened = fisher[:, :1].sqrt() * weight  # rows first, then columns as a moment
        outcomes = [searched(whitened, fisher[0].diag(), 2, seed) for seed in range(5)]
        assert error == pytest.approx(min(outcomes), rel=1e-3)

    @settings(max_examples=40, deadline=None)
    @given(st.integers(2, 20), st.integers(2, 20), st.integers(0, 99), st.booleans(), st.data())
    def test_is_never_worse_than_the_nearest(self, m, n, seed, some, data):
        rank = data.draw(st.integers(1, min(m, n)))
        weight, fisher = normal(m, n, seed=seed), normal(m, n, seed=seed + 1) ** 4
        fisher = fisher * (normal(m, 1, seed=seed + 2) > 0) if some else fisher
        where = self.site(weight, fisher)
        fitted, nearest = (
            (fisher * (weight - product(where, way, rank)).square()).sum() for way in ("fisher", "none")
        )
        assert fitted <= nearest * (1 + 1e-6) + 1e-12

    def test_no_information_at_all_is_the_nearest(self):
        where = self.site(normal(12, 9), torch.zeros(12, 9))
        torch.testing.assert_close(product(where, "fisher", 3), product(where, "none", 3))


class TestEnergy:
    @settings(max_examples=60, deadline=None)
    @given(st.integers(2, 30), st.integers(2, 30), st.floats(0.01, 0.999), st.booleans(), st.integers(0, 99))
    def test_is_the_smallest_rank_with_that_share(self, m, n, share, weighted, seed):
        x, weight = inputs(200, n, seed), normal(m, n, seed=seed + 3)
        where = Site("up", linear(weight), stats=measured(x))
        rank = energy_rank(where, "activations" if weighted else "none", share)
        ridge = 1e-3 + 0.1 * n / 200
        moment = (x.T @ x / 200).numpy()
        moment = moment + ridge * np.trace(moment) / n * np.eye(n)
        values, vectors = np.linalg.eigh(moment)
        image = weight.numpy() @ (vectors * np.sqrt(values)) if weighted else weight.numpy()
        squares = np.linalg.svd(image, compute_uv=False) ** 2
        kept = squares.cumsum() / squares.sum()
        assert kept[rank - 1] >= share - 1e-9
        assert rank == 1 or kept[rank - 2] < share

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("weighted", ["none", "activations"])
    def test_all_of_it_is_the_rank_of_the_weight(self, weighted, dtype):
        weight = (normal(40, 4) @ normal(4, 30, seed=1)).to(dtype)
        where = Site("up", linear(weight), stats=measured(inputs(200, 30)))
        assert energy_rank(where, weighted, 1.0) == 4

    @pytest.mark.parametrize("share", [0.5, 1.0])
    def test_a_weight_of_zeros_takes_one(self, share):
        assert energy_rank(Site("up", linear(torch.zeros(6, 5))), "none", share) == 1

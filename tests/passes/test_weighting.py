"""Errors as read from moments, against the same errors summed over samples."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.pytorch_utils import Conv1D

from kroncc.api import PassError, Site, SiteStats
from kroncc_passes import _weighting
from kroncc_passes._weighting import corrected_bias, fisher_of, input_problem, output_error, row_weights


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def samples(count, n, seed=0, noise=0.3):
    """Return inputs x with a mean and correlations, and t, what stood there before."""
    x = normal(count, n, seed=seed) @ normal(n, n, seed=seed + 1) + normal(n, seed=seed + 2)
    return x, x + noise * normal(count, n, seed=seed + 3)


def measured(x, t=None):
    count = len(x)
    return SiteStats(
        count=count,
        mean=x.mean(0),
        moment=x.T @ x / count,
        cross=None if t is None else t.T @ x / count,
        cross_mean=None if t is None else t.mean(0),
    )


def linear(m, n, bias, seed=0):
    module = nn.Linear(n, m, bias=bias, dtype=torch.float64)
    module.weight.data = normal(m, n, seed=seed)
    return module


class TestInputs:
    @pytest.mark.parametrize("bias", [False, True])
    @pytest.mark.parametrize("sequential", [False, True])
    def test_error_differs_as_that_of_the_samples_does(self, bias, sequential):
        x, t = samples(50, 6)
        t = t if sequential else x
        module = linear(4, 6, bias)
        where = Site("up", module, stats=measured(x, t if sequential else None))
        problem = input_problem(where)

        def direct(other):
            shift = 0 if not bias else module.bias
            new = 0 if not bias else corrected_bias(where, other)
            return (t @ module.weight.T + shift - x @ other.T - new).square().sum(1).mean().item()

        one, two = normal(4, 6, seed=7), 0.5 * module.weight.detach()
        assert problem.error(one) - problem.error(two) == pytest.approx(direct(one) - direct(two), rel=1e-9)

    @pytest.mark.parametrize("bias", [False, True])
    def test_the_target_is_least_squares_of_the_samples(self, bias, monkeypatch):
        monkeypatch.setattr(_weighting, "RIDGE", 0.0)
        monkeypatch.setattr(_weighting, "SCARCE", 1e-12)
        x, t = samples(50, 6)
        module = linear(4, 6, bias)
        design = torch.cat([x, torch.ones(50, 1, dtype=x.dtype)], 1) if bias else x
        want = torch.linalg.lstsq(design, t @ module.weight.T).solution[:6].T
        got = input_problem(Site("up", module, stats=measured(x, t))).target
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)

    def test_without_a_sequence_the_target_is_the_weight(self):
        module = linear(4, 6, True)
        problem = input_problem(Site("up", module, stats=measured(samples(50, 6)[0])))
        assert torch.equal(problem.target, module.weight)
        torch.testing.assert_close(problem.root @ problem.root.T, problem.moment)
        torch.testing.assert_close(problem.pull, problem.target @ problem.moment)

    def test_the_ridge_pulls_a_target_of_a_sequence_to_the_weight(self):
        x, t = samples(3, 6)  # three vectors say nothing about half of the directions
        module = linear(4, 6, False)
        target = input_problem(Site("up", module, stats=measured(x, t))).target
        unseen = torch.linalg.svd(x).Vh[3:].T
        torch.testing.assert_close(target @ unseen, (module.weight @ unseen).detach())

    @pytest.mark.parametrize("x", [torch.zeros(9, 6), torch.ones(9, 6), 1e4 + 1e-3 * torch.randn(9, 6)])
    def test_inputs_that_vary_little_or_not_at_all(self, x):
        problem = input_problem(Site("up", linear(4, 6, True), stats=measured(x)))
        assert problem.root.isfinite().all()
        assert (problem.root.diagonal() > 0).all()

    def test_conv1d_is_the_linear_map_that_it_stores_the_other_way_round(self):
        module, conv = linear(4, 6, True), Conv1D(4, 6)
        conv.weight.data, conv.bias.data = module.weight.data.T.contiguous(), module.bias.data
        stats = measured(*samples(50, 6))
        one, two = (input_problem(Site("up", each, stats=stats)) for each in (module, conv))
        assert torch.equal(one.target, two.target)


class TestBias:
    @settings(max_examples=30, deadline=None)
    @given(st.integers(0, 1000), st.booleans())
    def test_nothing_is_missing_in_the_mean(self, seed, sequential):
        x, t = samples(20, 5, seed)
        module, other = linear(3, 5, True, seed), normal(3, 5, seed=seed + 9)
        where = Site("up", module, stats=measured(x, t if sequential else None))
        new = corrected_bias(where, other)
        before = (t if sequential else x) @ module.weight.T + module.bias
        torch.testing.assert_close((x @ other.T + new).mean(0), before.mean(0))

    def test_the_bias_that_was_there_stays_as_it_is(self):
        module = linear(3, 5, True).requires_grad_(False)
        old = copy.deepcopy(module.bias)
        new = corrected_bias(Site("up", module, stats=measured(samples(9, 5)[0])), normal(3, 5))
        assert torch.equal(module.bias, old)
        assert new is not module.bias
        assert not new.requires_grad

    def test_none_where_the_map_has_none(self):
        assert corrected_bias(Site("up", linear(3, 5, False)), normal(3, 5)) is None

    def test_on_meta_it_has_the_right_shape_and_type(self):
        module = nn.Linear(5, 3, device="meta", dtype=torch.bfloat16)
        new = corrected_bias(Site("up", module), module.weight.double())
        assert (new.shape, new.dtype, new.is_meta) == ((3,), torch.bfloat16, True)
        assert new is not module.bias


class TestOutputError:
    def test_is_that_of_the_samples(self):
        x, _ = samples(50, 6)
        weight, other = normal(4, 6), normal(4, 6, seed=5)
        want = (x @ (weight - other).T).square().sum() / (x @ weight.T).square().sum()
        assert output_error(weight, other, measured(x)) == pytest.approx(want.item())
        centred = (x - x.mean(0)) @ (weight - other).T
        want = centred.square().sum() / (x @ weight.T).square().sum()
        assert output_error(weight, other, measured(x), corrected=True) == pytest.approx(want.item())

    def test_of_an_embedding_counts_rows_as_they_are_looked_up(self):
        table, other = normal(5, 3), normal(5, 3, seed=5)
        ids = torch.tensor([0, 0, 3, 4, 0])
        want = (table - other)[ids].square().sum() / table[ids].square().sum()
        lookups = torch.bincount(ids, minlength=5).float()
        got = output_error(table, other, SiteStats(count=5, lookups=lookups))
        assert got == pytest.approx(want.item())

    def test_in_sequence_the_best_guess_from_the_inputs_stands_for_what_was(self, monkeypatch):
        monkeypatch.setattr(_weighting, "RIDGE", 0.0)
        monkeypatch.setattr(_weighting, "SCARCE", 1e-12)
        x, t = samples(50, 6)
        weight, other = normal(4, 6), normal(4, 6, seed=5)
        guess = x @ torch.linalg.lstsq(x, t @ weight.T).solution
        want = (guess - x @ other.T).square().sum() / guess.square().sum()
        assert output_error(weight, other, measured(x, t)) == pytest.approx(want.item())
        assert output_error(weight, weight, measured(x)) == 0


class TestRefuses:
    stats = measured(samples(20, 6)[0])

    def refused(self, stats, read=input_problem, module=None):
        with pytest.raises(PassError) as caught:
            read(Site("encoder.up", module or linear(4, 6, True), stats=stats))
        (problem,) = caught.value.problems
        return problem

    @pytest.mark.parametrize("stats", [None, SiteStats(count=3)])
    @pytest.mark.parametrize("read", [input_problem, row_weights, fisher_of])
    def test_missing_statistics(self, read, stats):
        problem = self.refused(stats, read)
        assert problem.code == "K426"
        assert "`calibrate: {data: NAME}`" in problem.remedy

    def test_a_moment_without_its_mean(self):
        assert self.refused(dataclasses.replace(self.stats, mean=None)).code == "K426"

    def test_a_module_that_nothing_reached(self):
        problem = self.refused(dataclasses.replace(self.stats, count=0))
        assert problem.code == "K427"
        assert "exclude" in problem.remedy

    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    def test_statistics_that_are_not_finite(self, bad):
        moment = self.stats.moment.clone()
        moment[0, 1] = bad
        assert self.refused(dataclasses.replace(self.stats, moment=moment)).code == "K428"


def test_rows_that_nobody_looked_up_keep_a_small_weight():
    lookups = torch.tensor([6.0, 0.0, 2.0])
    weights = row_weights(Site("table", nn.Embedding(3, 4), stats=SiteStats(count=8, lookups=lookups)))
    torch.testing.assert_close(weights, torch.tensor([0.75, 0.0, 0.25]).double() + 0.1 / 3)


@pytest.mark.parametrize("module", [nn.Linear(5, 3), Conv1D(3, 5), Conv1D(5, 5)])
def test_fisher_is_laid_out_as_the_weight_is(module):
    fisher = torch.rand(module.weight.shape)
    got = fisher_of(Site("up", module, stats=SiteStats(count=1, fisher=fisher)))
    assert torch.equal(got, (fisher.T if isinstance(module, Conv1D) else fisher).double())

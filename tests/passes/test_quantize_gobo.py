"""GOBO: outliers by scipy's normal density, centroids by a plain loop."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from kroncc_passes._quantize_gobo import (
    centroids,
    coded_weight,
    count_outliers,
    expected_outliers,
    is_outlier,
)
from kroncc_passes._quantize_stores import Layout


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def centroids_by_loop(values, bits):
    """Section IV of the paper: equal populations, then nearest centroid and mean while the L1 norm falls."""
    values = np.sort(values.astype(np.float64))
    centres = np.array([part.mean() for part in np.array_split(values, 2**bits)])
    best, least = None, np.inf
    while True:
        nearest = np.abs(values[:, None] - centres[None]).argmin(1)
        distance = np.abs(values - centres[nearest]).sum()
        if distance >= least:
            return best, least
        best, least = centres, distance
        filled = [values[nearest == k] for k in range(len(centres))]
        centres = np.array([part.mean() if len(part) else c for part, c in zip(filled, centres, strict=True)])


def test_outliers_are_unlikely_under_the_normal_density_of_scipy():
    weight = normal(100, 100) * 0.05
    weight[3, 5] = 0.5
    w = weight.double().numpy()
    want = stats.norm(w.mean(), w.std()).logpdf(w) < -4
    assert np.array_equal(is_outlier(weight, -4.0).numpy(), want)
    assert want[3, 5]
    assert count_outliers(weight, -4.0) == want.sum()


@pytest.mark.parametrize("deviation", [0.02, 0.04, 0.3])
def test_the_expected_number_is_that_of_normal_weights(deviation):
    found = count_outliers(normal(1000, 500) * deviation, -4.0)
    assert expected_outliers(500_000, deviation, -4.0) == pytest.approx(found, rel=0.2)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("seed", [0, 1])
def test_centroids_are_those_of_a_plain_loop(bits, seed):
    values = normal(1600, seed=seed) ** 3
    centres, numbers = centroids(values, bits)
    _, least = centroids_by_loop(values.numpy(), bits)
    distance = (values.double() - centres[numbers]).abs()
    assert distance.sum().item() == pytest.approx(least, rel=1e-6)
    nearest = (values.double().unsqueeze(1) - centres).abs().min(1).values
    torch.testing.assert_close(distance, nearest)


def test_few_values_are_kept_exactly():
    values = torch.tensor([3.0, -1.0, 3.0, 0.5])
    centres, numbers = centroids(values, 3)
    torch.testing.assert_close(centres[numbers], values.double())


def test_outliers_are_exact_and_the_rest_are_centroids():
    weight = normal(20, 24) * 0.05
    weight[1, 2], weight[19, 23] = 9.0, -9.0
    store = coded_weight(weight, Layout(weight.shape, 3), -4.0)
    got = store()
    assert (got[1, 2], got[19, 23]) == (9.0, -9.0)
    assert store.places.tolist() == [1 * 24 + 2, 19 * 24 + 23]
    assert len(got.unique()) <= 8 + 2
    assert (got - weight).abs().max() < 0.12


@pytest.mark.parametrize("columns", [24, 21])
@pytest.mark.parametrize("count", [0, 7])
def test_rows_are_those_of_the_whole(columns, count):
    store = coded_weight(normal(20, columns), Layout((20, columns), 3), -4.0, count)
    index = torch.tensor([[0, 19, 3], [3, 3, 7]])
    assert torch.equal(store.rows(index), store()[index])

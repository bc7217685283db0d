"""The bootstrap against the one of scipy and the normal approximation."""

import numpy as np
import pytest

from ospo_fast.evaluation.statistics import bootstrap_interval


def test_the_interval_is_that_of_scipy():
    stats = pytest.importorskip("scipy.stats")
    values = np.random.default_rng(1).exponential(size=60)
    found = bootstrap_interval(values, resamples=20_000)
    settings = {"method": "percentile", "n_resamples": 20_000, "rng": np.random.default_rng(2)}
    expected = stats.bootstrap((values,), np.mean, **settings).confidence_interval
    assert found == pytest.approx(tuple(expected), abs=0.012)  # the width is 0.5


def test_the_interval_of_many_values_is_the_normal_one():
    values = np.random.default_rng(0).normal(2, 3, 4000)
    error = values.std(ddof=1) / np.sqrt(4000)
    found = bootstrap_interval(values)
    assert found == pytest.approx((values.mean() - 1.96 * error, values.mean() + 1.96 * error), abs=0.15 * error)


def test_pooled_means_weigh_prompts_by_their_questions():
    """Each question of a prompt has the same value: with all or none of a prompt drawn, the mean is 0 or 1."""
    assert bootstrap_interval([3.0, 0.0], [3, 1]) == (0.0, 1.0)
    drawn = bootstrap_interval([30.0, 0.0], [30, 10], level=0.4)  # a quarter of the resamples each: 0 and 1, 3/4 else
    assert drawn == (0.75, 0.75)


def test_the_same_numbers_give_the_same_interval():
    values = list(np.random.default_rng(0).random(50))
    assert bootstrap_interval(values) == bootstrap_interval(values)
    assert bootstrap_interval(values) != bootstrap_interval(values, seed=1)
    assert bootstrap_interval([0.5] * 9) == (0.5, 0.5)


@pytest.mark.parametrize(("sums", "counts"), [([], None), ([0.5], None), ([0.5, 0, 0], [1, 0, 0])])
def test_too_few_prompts_have_no_interval(sums, counts):
    assert bootstrap_interval(sums, counts) is None


def test_the_interval_covers_the_mean_as_often_as_it_says():
    rng = np.random.default_rng(3)
    hits = 0
    for _ in range(200):
        low, high = bootstrap_interval(rng.random(40), resamples=500)
        hits += low <= 0.5 <= high
    assert 180 <= hits <= 198  # 95% of 200 is 190, with a standard deviation of 3

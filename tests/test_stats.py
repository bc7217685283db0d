"""Standard errors against their definitions."""

import math

import numpy as np
import pytest

from ospo_fast.stats import standard_error


def test_independent_values():
    values = np.random.default_rng(0).normal(size=20)
    assert standard_error(values) == pytest.approx(values.std(ddof=1) / math.sqrt(20))
    assert math.isnan(standard_error([1.0]))


def test_clusters():
    values = np.random.default_rng(0).normal(size=6)
    away = values - values.mean()
    squares = (away[0] + away[1]) ** 2 + (away[2] + away[3]) ** 2 + (away[4] + away[5]) ** 2
    assert standard_error(values, [0, 0, 3, 3, 1, 1]) == pytest.approx(math.sqrt(squares * 3 / 2) / 6)
    assert standard_error(values, range(6)) == pytest.approx(standard_error(values))
    assert math.isnan(standard_error([], []))
    assert math.isnan(standard_error(values, [5] * 6))  # one cluster says nothing about others

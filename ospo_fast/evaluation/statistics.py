"""Confidence intervals by the bootstrap over prompts."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

RESAMPLES = 4000
_CHUNK = 2**22  # numbers in memory at once


def bootstrap_interval(
    sums: ArrayLike, counts: ArrayLike | None = None, *, level: float = 0.95, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, float] | None:
    """Return the percentile interval of a mean over resampled prompts.

    Of each resample of the N prompts, with replacement, the mean is Σ sums / Σ counts. Prompts are resampled as a
    whole, because the questions of one are not independent. Differences of two evaluations of the same prompts give the
    interval of a paired comparison.

    Args:
        sums: (N,) sum of the values of each prompt.
        counts: (N,) number of these values; default: one of each.
        level: share of the resamples between the limits.
        resamples: number of resamples.
        seed: seed of the resamples: the same numbers give the same interval.

    Returns:
        The limits; None for fewer than two prompts with values, which say nothing about others.

    """
    values: Any = np.asarray(sums, float)
    weights: Any = np.ones(len(values)) if counts is None else np.asarray(counts, float)
    if np.count_nonzero(weights) < 2:
        return None
    rng, size, means = np.random.default_rng(seed), len(values), []
    for start in range(0, resamples, step := max(1, _CHUNK // size)):
        drawn = rng.multinomial(size, np.full(size, 1 / size), min(step, resamples - start))
        total = drawn @ weights
        means.append((drawn @ values)[total > 0] / total[total > 0])
    low, high = np.quantile(np.concatenate(means), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)

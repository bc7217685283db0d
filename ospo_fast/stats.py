"""Standard errors of means."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike


def standard_error(values: ArrayLike, clusters: Sequence[int] | None = None) -> float:
    """Return the standard error of the mean of `values` (N,); NaN if there are too few.

    clusters: of each value the number of its cluster, such as its item. The values of a cluster are not independent, so
    their deviations from the mean are added before they are squared; the sum has the factor G / (G − 1) of G clusters.
    """
    samples: Any = np.asarray(values, float)
    if clusters is None:
        return float(samples.std(ddof=1) / math.sqrt(len(samples))) if len(samples) > 1 else math.nan
    count = len(set(clusters))
    if count < 2:
        return math.nan
    sums = np.bincount(clusters, samples - samples.mean())
    return float(np.sqrt((sums**2).sum() * count / (count - 1)) / len(samples))

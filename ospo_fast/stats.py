"""Standard errors of means."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike


def standard_error(values: ArrayLike, clusters: Sequence[int] | None = None) -> float:
    """Return the standard error of the mean of `values` (N,); NaN if there are too few.

    clusters: of each value the number of its cluster, such as its item. The values of a cluster are not independent, so
    their deviations from the mean are added before they are squared.
    """
    samples: Any = np.asarray(values, float)
    if clusters is None:
        return float(samples.std(ddof=1) / math.sqrt(len(samples))) if len(samples) > 1 else math.nan
    if not len(samples):
        return math.nan
    return float(np.sqrt((np.bincount(clusters, samples - samples.mean()) ** 2).sum()) / len(samples))

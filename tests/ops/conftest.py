"""Golden figures (tests/golden/README.md) and the criterion of error that the ops are held to."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture
def golden() -> Callable[[str], Any]:
    """Load a file of golden figures by name: arrays of an .npz as a dict, a .json as it is."""

    def load(name: str) -> Any:
        if name.endswith(".json"):
            return json.loads((GOLDEN / name).read_text())
        with np.load(GOLDEN / name) as arrays:
            return dict(arrays)

    return load


@pytest.fixture
def no_worse() -> Callable[..., None]:
    """Assert error(ours) <= 2 · error(eager) + a few roundings of the results, both against float64."""

    def check(ours: Tensor, eager: Tensor, exact: Tensor) -> None:
        assert ours.shape == exact.shape
        bound = 2 * (eager.double() - exact).abs().max() + 4 * torch.finfo(ours.dtype).eps * exact.abs().max()
        error = (ours.double() - exact).abs().max()
        assert error <= bound, f"error {error:.3e} above the bound {bound:.3e}"

    return check


@pytest.fixture
def poisoned() -> Any:
    """Memory that torch hands out uninitialised holds NaN (or the largest integer) instead."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)  # of the algorithms themselves nothing is asked
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]

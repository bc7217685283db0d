from collections.abc import Callable

import pytest
import torch
from torch import Tensor

# The interpreter truncates to bfloat16 where a GPU rounds to nearest.
UNITS = {torch.float32: 4, torch.bfloat16: 2, torch.float16: 2}


@pytest.fixture(autouse=True)
def _runs(request: pytest.FixtureRequest) -> None:
    """Kernels run on the GPU, or in the interpreter without one."""
    if not torch.cuda.is_available() and request.path.stem != "test_compile":
        request.getfixturevalue("interpreter")


@pytest.fixture
def assert_close() -> Callable[[Tensor, Tensor], None]:
    """Assert that a result is within a few units in the last place of the PyTorch reference."""

    def check(out: Tensor, reference: Tensor) -> None:
        bound = UNITS[out.dtype] * torch.finfo(out.dtype).eps * (reference.abs() + reference.abs().mean())
        assert ((out - reference).abs().float() <= bound.float()).all()

    return check

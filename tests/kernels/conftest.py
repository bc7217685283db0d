import pytest
import torch


@pytest.fixture(autouse=True)
def _runs(request: pytest.FixtureRequest) -> None:
    """Kernels run on the GPU, or in the interpreter where there is none."""
    if not torch.cuda.is_available() and request.path.stem != "test_compile":
        request.getfixturevalue("interpreter")

from collections.abc import Callable

import pytest
import torch

pytest.importorskip("triton", reason="Triton is only there on Linux")

from ospo_fast.kernels.rms_norm import add_rms_norm
from ospo_fast.ops.rms_norm import add_rms_norm as reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(2, 256), (3, 67), (1, 1)])
def test_add_rms_norm(shape: tuple[int, int], dtype: torch.dtype, assert_close: Callable[..., None]) -> None:
    weight = torch.randn(shape[1], device=DEVICE).to(dtype)
    for delta in (None, torch.randn(shape, device=DEVICE).to(dtype)):
        residual = torch.randn(shape, device=DEVICE).to(dtype)
        expected, out = residual.clone(), torch.full_like(residual, torch.nan)
        add_rms_norm(delta, residual, weight, 1e-6, out)
        reference(delta, expected, weight, 1e-6, backend="torch")
        assert_close(residual, expected)
        # The norm of the kernel's own sum, which the interpreter truncates.
        assert_close(out, reference(None, residual.clone(), weight, 1e-6, backend="torch"))

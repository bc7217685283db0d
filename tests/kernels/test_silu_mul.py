from collections.abc import Callable

import pytest
import torch

pytest.importorskip("triton", reason="Triton is only there on Linux")

from ospo_fast.kernels.silu_mul import silu_mul
from ospo_fast.ops.silu_mul import silu_mul as reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(2, 1200), (3, 67), (0, 5)])
def test_silu_mul(shape: tuple[int, int], dtype: torch.dtype, assert_close: Callable[..., None]) -> None:
    gate_up = torch.randn(shape[0], 2 * shape[1], device=DEVICE).to(dtype)
    out = gate_up.new_full(shape, torch.nan)
    silu_mul(gate_up, out)
    assert_close(out, reference(gate_up, backend="torch"))

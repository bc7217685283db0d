"""The elementwise Triton kernels on the largest and smallest numbers, infinities and NaN."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is only there on Linux")

import torch.nn.functional as F
from torch import Tensor

from ospo_fast.kernels import gelu, rms_norm, scale_rows, silu_mul
from ospo_fast.ops import rms_norm as rms_norm_op
from ospo_fast.ops import scale_rows as scale_rows_op
from ospo_fast.ops import silu_mul as silu_mul_op

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, in the interpreter
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# bfloat16 holds them all: the interpreter truncates where a GPU rounds. It makes 0 of results that are subnormal there.
NUMBERS = [0.0, 2.0**-120, 2.0**-100, 0.5, 1.0, 80.0, 88.0, 90.0, 2.0**40, 2.0**64, 2.0**126, 1.5 * 2.0**127, torch.inf]
NUMBERS = [sign * x for x in NUMBERS for sign in (1, -1)] + [torch.nan]
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def assert_equal(ours: Tensor, expected: Tensor) -> None:
    # A GPU may flush subnormal results to 0.
    unit = 2 * torch.finfo(ours.dtype).eps
    torch.testing.assert_close(ours.double(), expected.double(), rtol=unit, atol=2.0**-120, equal_nan=True)


@DTYPES
def test_silu_mul(dtype: torch.dtype) -> None:
    gate = torch.tensor(NUMBERS, device=DEVICE, dtype=dtype)
    gate_up = torch.stack((gate, torch.full_like(gate, 2.0**20)), 0).view(1, -1)
    out = torch.zeros(1, len(gate), device=DEVICE, dtype=dtype)
    silu_mul.silu_mul(gate_up, out)
    expected = silu_mul_op.silu_mul(gate_up, backend="torch")
    # Below -88 silu is subnormal.
    kept = ~((gate < -87) & (gate > -100))
    assert_equal(out[:, kept], expected[:, kept])


@DTYPES
def test_gelu(dtype: torch.dtype) -> None:
    x = torch.tensor(NUMBERS, device=DEVICE, dtype=dtype)
    x = x[x != -torch.inf].view(1, -1)  # 0 · infinity
    out = torch.zeros_like(x)
    gelu.gelu(x, None, out)
    exact = torch.where(x == torch.inf, torch.inf, F.gelu(x.double()))
    torch.testing.assert_close(out.double(), exact, rtol=0.01, atol=1e-6, equal_nan=True)


@DTYPES
def test_scale_rows(dtype: torch.dtype) -> None:
    scales = torch.tensor(NUMBERS, device=DEVICE)
    dhidden, packed_row = (
        scales.to(dtype).expand(len(scales), -1).contiguous(),
        torch.arange(len(scales), device=DEVICE),
    )
    out = torch.zeros_like(dhidden)
    scale_rows.scale_rows(dhidden, packed_row, scales, out)
    assert_equal(out, scale_rows_op.scale_rows(dhidden, packed_row, scales, "torch"))


@DTYPES
def test_add_rms_norm(dtype: torch.dtype) -> None:
    rows = torch.ones(len(NUMBERS), 16, device=DEVICE, dtype=dtype)
    rows[:, 0] = torch.tensor(NUMBERS)
    weight, out = torch.full_like(rows[0], 0.25), torch.zeros_like(rows)
    rms_norm.add_rms_norm(None, rows, weight, 0.5, out)
    assert_equal(out, rms_norm_op.add_rms_norm(None, rows.clone(), weight, 0.5, backend="torch"))

import pytest
import torch

pytest.importorskip("triton", reason="Triton is only there on Linux")

from torch import Tensor

from ospo_fast.kernels import scale_rows as kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # on the CPU by Triton's interpreter


def scaled(dhidden: Tensor, packed_row: list[int], scales: Tensor) -> Tensor:
    out = torch.full_like(dhidden, torch.nan)
    kernels.scale_rows(dhidden, torch.tensor(packed_row, dtype=torch.int64, device=dhidden.device), scales, out)
    return out


@pytest.mark.parametrize(
    ("rows", "width"),
    [
        (2, 2048),  # two blocks of columns
        (3, 1031),  # a prime width: the second block is nearly empty
        (1, 1),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_rows_are_scaled_to_one_ulp(rows: int, width: int, dtype: torch.dtype) -> None:
    dhidden = torch.randn(rows, width, dtype=torch.float64).to(DEVICE, dtype)
    scales = torch.randn(rows, dtype=torch.float64 if dtype == torch.float64 else torch.float32, device=DEVICE)
    exact = dhidden.double().flip(0) * scales[:, None].double()
    # Twice the error of rounding to nearest: the interpreter truncates to bfloat16.
    bound = exact.abs() * torch.finfo(dtype).eps + torch.finfo(dtype).tiny
    out = scaled(dhidden, list(range(rows))[::-1], scales)
    assert ((out.double() - exact).abs() <= bound).all()


def test_zero_scale_or_negative_packed_row_hides_nan() -> None:
    dhidden = torch.tensor([[float("nan"), 1.0]], device=DEVICE).expand(3, 2).contiguous()
    out = scaled(dhidden, [0, -1, 2], torch.tensor([0.0, 2.0, 2.0], device=DEVICE))
    assert out[:2].tolist() == [[0.0, 0.0], [0.0, 0.0]]
    assert out[2].isnan().tolist() == [True, False]


def test_empty_inputs() -> None:
    empty, scales = torch.empty(0, 8, device=DEVICE), torch.empty(0, device=DEVICE)
    assert scaled(empty, [], scales).shape == (0, 8)
    assert scaled(torch.empty(2, 0, device=DEVICE), [0, 1], torch.ones(2, device=DEVICE)).shape == (2, 0)

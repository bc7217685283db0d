import pytest
import torch

pytest.importorskip("triton", reason="Triton is only there on Linux")

from ospo_fast.kernels.scale_rows import scale_rows

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # on the CPU by Triton's interpreter


@pytest.mark.parametrize(
    ("rows", "width"),
    [
        (2, 2048),  # two blocks of columns
        (3, 1031),  # a prime width: the second block is nearly empty
        (1, 1),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_rows_are_scaled_to_one_unit_in_the_last_place(rows: int, width: int, dtype: torch.dtype) -> None:
    unit = torch.randn(rows, width, dtype=torch.float64).to(DEVICE, dtype)
    scale = torch.randn(rows, dtype=torch.float64 if dtype == torch.float64 else torch.float32, device=DEVICE)
    exact = unit.double() * scale[:, None].double()
    # Twice the error of rounding to nearest: the interpreter truncates to bfloat16.
    bound = exact.abs() * torch.finfo(dtype).eps + torch.finfo(dtype).tiny
    out = scale_rows(unit, scale)
    assert out.dtype == dtype
    assert ((out.double() - exact).abs() <= bound).all()


def test_a_zero_scale_silences_a_nan_row_and_only_that() -> None:
    unit = torch.tensor([[float("nan"), 1.0], [float("nan"), 1.0]], device=DEVICE)
    out = scale_rows(unit, torch.tensor([0.0, 2.0], device=DEVICE))
    assert out[0].tolist() == [0.0, 0.0]
    assert out[1].isnan().tolist() == [True, False]


def test_strided_inputs_and_empty_ones() -> None:
    unit, scale = torch.randn(6, 8, device=DEVICE), torch.randn(6, device=DEVICE)
    assert torch.equal(scale_rows(unit[::2, ::2], scale[::2]), unit[::2, ::2] * scale[::2, None])
    assert scale_rows(unit[:0], scale[:0]).shape == (0, 8)
    assert scale_rows(unit[:, :0], scale).shape == (6, 0)

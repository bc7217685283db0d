"""skinny_linear against float64 and the PyTorch reference: on a GPU, or in Triton's interpreter."""

from functools import partial
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is only there on Linux")

from ospo_fast.errors import OpError
from ospo_fast.experimental import _skinny_linear_kernel as kernels
from ospo_fast.experimental.skinny_linear import ROWS, skinny_linear
from ospo_fast.ops import _dispatch

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
pytestmark = [pytest.mark.gpu] if ON_GPU else [pytest.mark.usefixtures("interpreter")]
# The interpreter truncates to bfloat16 where a GPU rounds to nearest.
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if ON_GPU else [])]


@pytest.fixture(autouse=True)
def _everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(_dispatch._KERNELS, "skinny_linear", {"triton": DEVICE})


def arguments(rows: int, columns: int, depth: int, gated: bool, dtype: torch.dtype) -> list[torch.Tensor]:
    x, norm = torch.randn(rows, depth, device=DEVICE), torch.randn(depth, device=DEVICE)
    weight = torch.randn((1 + gated) * columns, depth, device=DEVICE) / depth**0.5
    return [tensor.to(dtype) for tensor in (x, weight, norm)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "normed", "gated", "add"),  # shape: rows, columns, depth
    [
        ((2, 64, 512), False, False, False),  # multiples of all blocks
        ((2, 64, 512), True, True, True),
        ((16, 37, 67), True, False, False),  # primes
        ((16, 37, 67), False, False, True),
        ((3, 128, 300), True, True, True),
        ((1, 1, 1), True, True, True),
    ],
)
def test_error_is_at_most_twice_that_of_separate_modules(
    shape: tuple[int, int, int], normed: bool, gated: bool, add: bool, dtype: torch.dtype
) -> None:
    def run(kind: torch.dtype, backend: str) -> torch.Tensor:
        out = residual.to(kind, copy=True) if add else torch.full_like(residual, torch.nan, dtype=kind)
        factor = norm.to(kind) if normed else None
        found = skinny_linear(
            x.to(kind), weight.to(kind), norm=factor, eps=1e-6, gated=gated, add=add, out=out, backend=backend
        )
        assert found is out
        return out.double()

    results = []
    for _ in range(16 if shape == (1, 1, 1) else 1):  # the error of a single number is random
        x, weight, norm = arguments(*shape, gated, dtype)
        residual = torch.randn(shape[0], shape[1], device=DEVICE).to(dtype)
        results.append([run(torch.float64, "torch"), run(dtype, "torch"), run(dtype, "triton")])
    exact, reference, ours = (torch.stack(found) for found in zip(*results, strict=True))
    rounding = 2 * torch.finfo(dtype).eps * exact.abs().max()
    assert (ours - exact).abs().max() <= 2 * (reference - exact).abs().max() + rounding


@pytest.mark.parametrize(("gated", "dtype"), [(False, torch.float32), *((True, dtype) for dtype in DTYPES[1:])])
def test_bits_of_a_row_depend_on_that_row_only(gated: bool, dtype: torch.dtype) -> None:
    x, weight, norm = arguments(ROWS, 40, 300, gated, dtype)
    run = partial(skinny_linear, weight=weight, norm=norm, eps=1e-6, gated=gated, backend="triton")
    whole = run(x)
    for rows in ([3], [15, 0], [5, 4, 3, 2, 1]):
        part = x[rows].contiguous()
        # The interpreter multiplies with the processor's library, which may round by position.
        tolerance = 0 if DEVICE == "cuda" else 1e-6
        torch.testing.assert_close(run(part), whole[rows], rtol=tolerance, atol=tolerance)
    x[7] = torch.nan
    with_nan = run(x)
    assert with_nan.isnan().all(1).tolist() == [row == 7 for row in range(ROWS)]


@pytest.mark.parametrize("tuning", [{"COLUMNS": 16}, {"DEPTH": 64, "STAGES": 6, "WARPS": 2}])
def test_other_constants(tuning: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, norm = arguments(5, 50, 200, True, torch.float32)
    options: dict[str, Any] = {"eps": 1e-6, "gated": True}
    exact = skinny_linear(x.double(), weight.double(), norm=norm.double(), backend="torch", **options)
    reference = skinny_linear(x, weight, norm=norm, backend="torch", **options)
    for name, value in tuning.items():
        monkeypatch.setattr(kernels, name, value)
    ours = skinny_linear(x, weight, norm=norm, **options)
    rounding = 2 * torch.finfo(torch.float32).eps * exact.abs().max()
    assert (ours - exact).abs().max() <= 2 * (reference - exact).abs().max() + rounding


def test_empty_input_and_wrong_arguments() -> None:
    x, weight, _ = arguments(3, 8, 16, False, torch.float32)
    assert skinny_linear(x[:0], weight).shape == (0, 8)
    with pytest.raises(OpError, match="x has 17 rows, expected at most 16"):
        skinny_linear(x.new_zeros(17, 16), weight)
    with pytest.raises(OpError, match="add=True needs out"):
        skinny_linear(x, weight, add=True)

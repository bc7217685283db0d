from typing import Any

import pytest
import torch
from torch import Tensor

from ospo_fast.errors import OpError
from ospo_fast.ops.rms_norm import add_rms_norm


def exact(delta: Tensor | None, residual: Tensor, weight: Tensor) -> Tensor:
    x = residual.double() if delta is None else (residual + delta).double()
    return weight.double() * x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


@pytest.mark.parametrize("backend", ["auto", "torch", pytest.param("triton", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("shape", [(32, 256), (3, 4099), (5, 7), (1, 1)])  # odd widths end in a partial vector
@pytest.mark.parametrize(("dtype", "add"), [(torch.float32, True), (torch.bfloat16, True), (torch.float32, False)])
def test_against_float64(backend: str, shape: tuple[int, int], dtype: torch.dtype, add: bool) -> None:
    device = "cuda" if backend == "triton" else "cpu"
    largest = torch.zeros(3, dtype=torch.float64, device=device)  # error, error of PyTorch, result
    for _ in range(16 if shape == (1, 1) else 1):  # the error of a single number is random
        delta, residual = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
        weight = torch.randn(shape[1], device=device).to(dtype)
        expected = exact(delta if add else None, residual, weight)
        summed = residual + delta if add else residual.clone()
        eager = add_rms_norm(None, summed.clone(), weight, 1e-6, backend="torch")
        out = torch.full_like(residual, torch.nan)
        assert add_rms_norm(delta if add else None, residual, weight, 1e-6, out=out, backend=backend) is out
        assert torch.equal(residual, summed)
        found = torch.stack([x.abs().max() for x in (out - expected, eager - expected, expected)])
        assert found.isfinite().all()
        largest = torch.maximum(largest, found)
    assert largest[0] <= 2 * largest[1] + torch.finfo(torch.float32).eps * largest[2]


def test_nan_stays_in_its_row_and_no_rows() -> None:
    residual = torch.randn(4, 20)
    residual[2] = torch.nan
    assert add_rms_norm(None, residual, torch.ones(20), 1e-6).isnan().all(1).tolist() == [False, False, True, False]
    assert add_rms_norm(None, residual[:0], torch.ones(20), 1e-6).shape == (0, 20)


@pytest.mark.parametrize("backend", ["cpp", "torch"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"residual": torch.ones(8)}, r"residual and weight are torch.float32 \(8,\) .*, expected \(M, D\) and \(D,\)"),
        ({"weight": torch.ones(7)}, r"residual and weight are .* and torch.float32 \(7,\) on cpu"),
        ({"weight": torch.ones(8, device="meta")}, "residual and weight are .* on meta, expected .* on one device"),
        ({"residual": torch.ones(8, 2).T}, r"residual is \(2, 8\) with strides \(1, 2\) on cpu, expected contiguous"),
        ({"delta": torch.ones(1, 8)}, r"delta is \(1, 8\) .*, expected contiguous \(2, 8\) on cpu"),
        ({"out": torch.ones(2, 4)}, r"out is \(2, 4\) .*, expected contiguous \(2, 8\) on cpu"),
        ({"out": torch.ones(2, 16)[:, ::2]}, r"out is \(2, 8\) with strides \(16, 2\)"),
    ],
)
def test_other_shapes_are_refused(backend: str, change: dict[str, Tensor], message: str) -> None:
    given: dict[str, Any] = {"delta": torch.ones(2, 8), "residual": torch.ones(2, 8), "weight": torch.ones(8)} | change
    with pytest.raises(OpError, match=f"add_rms_norm: {message}"):
        add_rms_norm(**given, eps=1e-6, backend=backend)
    assert bool((given["residual"] == 1).all())  # unchanged

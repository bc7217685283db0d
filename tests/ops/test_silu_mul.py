import pytest
import torch
import torch.nn.functional as F

from ospo_fast.errors import OpError
from ospo_fast.ops.silu_mul import silu_mul


@pytest.mark.parametrize("backend", ["auto", "torch", pytest.param("triton", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("shape", [(32, 768), (3, 1031), (5, 7), (1, 1), (0, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_against_float64(backend: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    rows, width = shape
    device = "cuda" if backend == "triton" else "cpu"
    largest = torch.zeros(3, dtype=torch.float64, device=device)  # error, error of PyTorch, result
    for _ in range(16 if shape == (1, 1) else 1):  # the error of a single number is random
        both = (torch.randn(rows, 2 * width, device=device) * 4).to(dtype)
        gate, up = both.split(width, 1)
        exact = F.silu(gate.double()) * up.double()
        out = both.new_full((rows, width), torch.nan)
        assert silu_mul(both, out=out, backend=backend) is out
        if rows:
            found = torch.stack([x.abs().max() for x in (out - exact, F.silu(gate) * up - exact, exact)])
            assert found.isfinite().all()
            largest = torch.maximum(largest, found)
    assert largest[0] <= 2 * largest[1] + torch.finfo(torch.float32).eps * largest[2]


@pytest.mark.parametrize("backend", ["cpp", "torch"])
def test_extremes(backend: str) -> None:
    gate = torch.tensor([-1e30, -100.0, -87.5, 0.0, 100.0, 1e30, torch.inf, torch.nan])
    out = silu_mul(torch.cat((gate, torch.ones(8)))[None], backend=backend)[0]
    assert out[:4].abs().max() < 1e-35
    assert out[4:7].tolist() == gate[4:7].tolist()
    assert out[7].isnan()


@pytest.mark.parametrize("backend", ["cpp", "torch"])
@pytest.mark.parametrize(
    ("gate_up", "out", "message"),
    [
        (torch.zeros(2, 7), None, r"gate_up is torch.float32 \(2, 7\), expected \(M, 2·I\)"),
        (torch.zeros(8), None, r"gate_up is torch.float32 \(8,\), expected"),
        (torch.zeros(8, 2).T, None, r"gate_up is \(2, 8\) with strides \(1, 2\) on cpu, expected contiguous \(2, 8\)"),
        (torch.zeros(2, 8), torch.zeros(1, 4), r"out is \(1, 4\) .*, expected contiguous \(2, 4\) on cpu"),
        (torch.zeros(2, 8), torch.zeros(2, 8)[:, ::2], r"out is \(2, 4\) with strides \(8, 2\)"),
        (torch.zeros(2, 8), torch.zeros(2, 4, device="meta"), r"out is .* on meta, expected .* on cpu"),
    ],
)
def test_other_shapes_are_refused(backend: str, gate_up: torch.Tensor, out: torch.Tensor | None, message: str) -> None:
    with pytest.raises(OpError, match=f"silu_mul: {message}"):
        silu_mul(gate_up, out=out, backend=backend)

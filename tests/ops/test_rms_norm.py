import pytest
import torch
from torch import Tensor

from ospo_fast.ops.rms_norm import add_rms_norm


def exact(delta: Tensor | None, stream: Tensor, weight: Tensor) -> Tensor:
    x = stream.double() if delta is None else (stream + delta).double()
    return weight.double() * x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


@pytest.mark.parametrize("backend", ["cpp", "torch", pytest.param("triton", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("shape", [(32, 256), (3, 4099), (5, 7), (1, 1)])  # odd widths have a rest behind the vectors
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("add", [True, False])
def test_against_float64(backend: str, shape: tuple[int, int], dtype: torch.dtype, add: bool) -> None:
    device = "cuda" if backend == "triton" else "cpu"
    worst = torch.zeros(3, dtype=torch.float64, device=device)  # error, error of PyTorch, size of the result
    for _ in range(16 if shape == (1, 1) else 1):  # the error of a single number is chance
        delta, stream = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
        weight = torch.randn(shape[1], device=device).to(dtype)
        wanted = exact(delta if add else None, stream, weight)
        moved = stream + delta if add else stream.clone()
        eager = add_rms_norm(None, moved.clone(), weight, 1e-6, backend="torch")
        out = torch.full_like(stream, torch.nan)
        assert add_rms_norm(delta if add else None, stream, weight, 1e-6, out=out, backend=backend) is out
        assert torch.equal(stream, moved)
        found = torch.stack([x.abs().max() for x in (out - wanted, eager - wanted, wanted)])
        assert found.isfinite().all()
        worst = torch.maximum(worst, found)
    assert worst[0] <= 2 * worst[1] + torch.finfo(torch.float32).eps * worst[2]


def test_a_row_of_nan_stays_alone_and_no_row_is_nothing() -> None:
    stream = torch.randn(4, 20)
    stream[2] = torch.nan
    assert add_rms_norm(None, stream, torch.ones(20), 1e-6).isnan().all(1).tolist() == [False, False, True, False]
    assert add_rms_norm(None, stream[:0], torch.ones(20), 1e-6).shape == (0, 20)

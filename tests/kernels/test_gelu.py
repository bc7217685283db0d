import pytest
import torch

pytest.importorskip("triton", reason="Triton is only there on Linux")

import torch.nn.functional as F

from ospo_fast.kernels import gelu as kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # on the CPU by Triton's interpreter


# A prime width of two blocks, the second nearly empty; no rows.
@pytest.mark.parametrize(("rows", "width"), [(3, 1031), (0, 3)])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_gelu_and_its_derivative(rows: int, width: int, has_bias: bool, dtype: torch.dtype) -> None:
    pre = (torch.randn(rows, width, device=DEVICE) * 3).to(dtype)
    bias = torch.randn(width, device=DEVICE).to(dtype) if has_bias else None
    grad = torch.randn(rows, width, device=DEVICE).to(dtype)
    exact = (pre.double() + (0 if bias is None else bias.double())).requires_grad_()
    F.gelu(exact).backward(grad.double())

    out = torch.full_like(pre, torch.nan)
    kernels.gelu(pre, bias, out)
    kernels.gelu_backward(grad, pre, bias)
    in_place = pre.clone()
    kernels.gelu(in_place, bias, in_place)
    assert torch.equal(in_place, out)
    # Twice the error of rounding to nearest (the interpreter truncates to bfloat16), and fp32's of 1 + erf near -1.
    for mine, best in ((out, F.gelu(exact.detach())), (grad, exact.grad)):
        bound = best.abs() * torch.finfo(dtype).eps + 8 * torch.finfo(torch.float32).eps
        assert ((mine.double() - best).abs() <= bound).all()

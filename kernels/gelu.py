"""The exact GELU and its derivative between the GEMMs of `token_logprobs`, with the bias of the first GEMM."""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


@triton.jit
def load_input(pre, bias, width, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr):
    """Offsets and mask of the program's part of a row, pre + bias there, and its normal CDF, in fp32."""
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    offsets = tl.program_id(0).to(tl.int64) * width + columns  # N·F can exceed 2³¹
    x = tl.load(pre + offsets, mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        x += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
    return offsets, inside, x, 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def gelu_kernel(
    pre,  # (N, F), contiguous
    bias,  # (F,)
    out,  # (N, F), contiguous; may be pre
    width,  # F
    HAS_BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    offsets, inside, x, cdf = load_input(pre, bias, width, HAS_BIAS, BLOCK)
    tl.store(out + offsets, (x * cdf).to(out.dtype.element_ty), mask=inside)


@triton.jit
def gelu_backward_kernel(
    grad,  # (N, F), contiguous
    pre,  # (N, F), contiguous
    bias,  # (F,)
    width,  # F
    HAS_BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    offsets, inside, x, cdf = load_input(pre, bias, width, HAS_BIAS, BLOCK)
    slope = cdf + x * tl.exp(-0.5 * x * x) * 0.3989422804014327
    values = tl.load(grad + offsets, mask=inside, other=0.0).to(tl.float32) * slope
    tl.store(grad + offsets, values.to(grad.dtype.element_ty), mask=inside)


def gelu(pre: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """Write GELU(pre + bias) to out. pre, out (N, F): contiguous float. bias: (F,) or None. out may be pre."""
    rows, width = pre.shape
    if pre.numel():
        with torch.cuda.device_of(pre):
            gelu_kernel[rows, triton.cdiv(width, BLOCK)](pre, bias, out, width, HAS_BIAS=bias is not None, BLOCK=BLOCK)


def gelu_backward(grad: Tensor, pre: Tensor, bias: Tensor | None) -> None:
    """Multiply grad in place by gelu′(pre + bias). grad, pre (N, F): contiguous float. bias: (F,) or None."""
    rows, width = pre.shape
    if pre.numel():
        with torch.cuda.device_of(pre):
            gelu_backward_kernel[rows, triton.cdiv(width, BLOCK)](
                grad, pre, bias, width, HAS_BIAS=bias is not None, BLOCK=BLOCK
            )

"""The exact GELU and its derivative between the GEMMs of `token_logprobs`, with the bias of the first GEMM."""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


@triton.jit
def _normal_cdf(x):
    return 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def gelu_kernel(
    pre,  # (N, F), contiguous
    bias,  # (F,)
    out,  # (N, F), contiguous; may be pre
    width,  # F
    HAS_BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    offsets = tl.program_id(0).to(tl.int64) * width + columns  # N·F passes 2³¹
    x = tl.load(pre + offsets, mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        x += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + offsets, (x * _normal_cdf(x)).to(out.dtype.element_ty), mask=inside)


@triton.jit
def gelu_backward_kernel(
    grad,  # (N, F), contiguous
    pre,  # (N, F), contiguous
    bias,  # (F,)
    width,
    HAS_BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    offsets = tl.program_id(0).to(tl.int64) * width + columns
    x = tl.load(pre + offsets, mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        x += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
    slope = _normal_cdf(x) + x * tl.exp(-0.5 * x * x) * 0.3989422804014327
    values = tl.load(grad + offsets, mask=inside, other=0.0).to(tl.float32) * slope
    tl.store(grad + offsets, values.to(grad.dtype.element_ty), mask=inside)


def gelu(pre: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """GELU of pre + bias, into out: pre, out (N, F) contiguous float, bias (F,) or None; out may be pre."""
    if pre.numel():
        with torch.cuda.device_of(pre):
            gelu_kernel[_grid(pre)](pre, bias, out, pre.shape[1], HAS_BIAS=bias is not None, BLOCK=BLOCK)


def gelu_backward(grad: Tensor, pre: Tensor, bias: Tensor | None) -> None:
    """Multiplies grad, in place, by gelu′(pre + bias): grad, pre (N, F) contiguous float, bias (F,) or None."""
    if pre.numel():
        with torch.cuda.device_of(pre):
            gelu_backward_kernel[_grid(pre)](grad, pre, bias, pre.shape[1], HAS_BIAS=bias is not None, BLOCK=BLOCK)


def _grid(pre: Tensor) -> tuple[int, int]:
    return pre.shape[0], triton.cdiv(pre.shape[1], BLOCK)

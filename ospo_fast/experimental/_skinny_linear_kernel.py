# mypy: ignore-errors
"""Triton kernel of `skinny_linear`: out = f(x)·Wᵀ for up to ROWS rows, reading W once, bound by that read.

A program computes COLUMNS columns over the whole depth. So no partial sum leaves it, and the bits of a row depend on
neither the other rows nor their number. It fuses what surrounds the products in a decoder layer: the RMS norm before
(its scale is one number per row, applied at the end), SwiGLU's gate and the residual sum after.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 16  # the minimum of tensor cores
# Swept by bench/skinny_linear.py: columns per program, depth per iteration, pipeline stages.
COLUMNS = 32
DEPTH = 256
STAGES = 4
WARPS = 4
UNEVEN_DEPTH = 64  # with masks the pipeline's reads are held in registers
MAX_REGISTERS = 255  # per thread; by default the assembler spills, for more blocks than shared memory allows


@triton.jit(do_not_specialize=["rows"])  # one kernel for all counts, so that the bits of a row do not depend on it
def skinny_linear_kernel(
    x,  # (M, K), contiguous
    weight,  # (N, K), contiguous; (2·N, K) where GATED, gate first
    norm,  # (K,); not read unless NORM
    out,  # (M, N), contiguous
    rows,
    width,  # N
    depth,  # K
    eps,
    NORM: tl.constexpr,
    GATED: tl.constexpr,
    ADD: tl.constexpr,
    EVEN: tl.constexpr,  # depth is a multiple of DEPTH, width of COLUMNS
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    STAGES: tl.constexpr,
):
    m = tl.arange(0, ROWS)
    n = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    is_row, is_column = m < rows, n < width
    # Element offsets of a large weight exceed 2³¹.
    x_row = x + m[:, None] * depth
    w_row = weight + n[:, None].to(tl.int64) * depth
    second = tl.cast(width, tl.int64) * depth  # a width of 1 is a constant, which has no .to
    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    acc_up = tl.zeros((ROWS, COLUMNS), tl.float32)
    squares = tl.zeros((ROWS,), tl.float32)
    for first in tl.range(0, depth, DEPTH, num_stages=STAGES):
        k = first + tl.arange(0, DEPTH)
        inside = k < depth
        if EVEN:
            a = tl.load(x_row + k[None, :], mask=is_row[:, None], other=0.0)
            w = tl.load(w_row + k[None, :])
        else:
            a = tl.load(x_row + k[None, :], mask=is_row[:, None] & inside[None, :], other=0.0)
            w = tl.load(w_row + k[None, :], mask=is_column[:, None] & inside[None, :], other=0.0)
        if NORM:
            wide = a.to(tl.float32)
            squares += tl.sum(wide * wide, 1)
            factor = tl.load(norm + k, mask=inside, other=0.0).to(tl.float32)
            a = (wide * factor[None, :]).to(a.dtype)
        acc = tl.dot(a, w.T, acc, input_precision="ieee")
        if GATED:
            if EVEN:
                up = tl.load(w_row + second + k[None, :])
            else:
                up = tl.load(w_row + second + k[None, :], mask=is_column[:, None] & inside[None, :], other=0.0)
            acc_up = tl.dot(a, up.T, acc_up, input_precision="ieee")
    if NORM:
        scale = tl.div_rn(1.0, tl.sqrt_rn(tl.div_rn(squares, depth * 1.0) + eps))[:, None]
        acc *= scale
        acc_up *= scale
    # Round where separate modules round: products, gate, sum.
    dtype = out.dtype.element_ty
    y = acc.to(dtype).to(tl.float32)
    if GATED:
        y = tl.div_rn(y, 1.0 + tl.exp(-y)).to(dtype).to(tl.float32) * acc_up.to(dtype).to(tl.float32)
    target = out + m[:, None] * width + n[None, :]
    mask = is_row[:, None] & is_column[None, :]
    if ADD:
        y = y.to(dtype).to(tl.float32) + tl.load(target, mask=mask, other=0.0).to(tl.float32)
    tl.store(target, y.to(dtype), mask=mask)


def skinny_linear(
    x: Tensor,  # (M, K), M up to ROWS
    weight: Tensor,  # (N, K) or (2·N, K)
    norm: Tensor | None,  # (K,)
    eps: float,
    gated: bool,
    add: bool,
    out: Tensor,  # (M, N)
) -> None:
    """Launch the kernel on contiguous tensors of one dtype."""
    rows, depth = x.shape
    width = out.shape[1]
    if not out.numel():
        return
    columns = COLUMNS // 2 if gated else COLUMNS  # of each half
    even = depth % DEPTH == 0 and width % columns == 0
    with torch.cuda.device_of(x):
        skinny_linear_kernel[(triton.cdiv(width, columns),)](
            x, weight, x if norm is None else norm, out, rows, width, depth, eps,
            NORM=norm is not None, GATED=gated, ADD=add, EVEN=even, ROWS=ROWS, COLUMNS=columns,
            DEPTH=DEPTH if even else UNEVEN_DEPTH, STAGES=STAGES, num_warps=WARPS, maxnreg=MAX_REGISTERS,
        )  # fmt: skip

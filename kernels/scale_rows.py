"""out[i, :] = unit[i, :] · scale[i]: the backward of `token_logprobs`, one read and one write of each row."""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


@triton.jit
def scale_rows_kernel(
    unit,  # (N, D), contiguous
    scale,  # (N,)
    out,  # (N, D), contiguous
    width,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)  # N·D passes 2³¹
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    factor = tl.load(scale + row)
    values = tl.load(unit + row * width + columns, mask=inside, other=0.0)
    # A row without a gradient is zero, even where its unit is NaN.
    scaled = tl.where(factor == 0, 0.0, values.to(factor.dtype) * factor)
    tl.store(out + row * width + columns, scaled.to(out.dtype.element_ty), mask=inside)


def scale_rows(unit: Tensor, scale: Tensor) -> Tensor:
    """Scales rows: unit (N, D) float, scale (N,) fp32 or fp64 → (N, D) in unit's dtype, multiplied in scale's."""
    unit, out = unit.contiguous(), torch.empty(unit.shape, dtype=unit.dtype, device=unit.device)
    rows, width = unit.shape
    if out.numel():
        scale_rows_kernel[rows, triton.cdiv(width, BLOCK)](unit, scale.contiguous(), out, width, BLOCK=BLOCK)
    return out


# What is compiled ahead of time: for each kernel its variants, as argument types and constants.
VARIANTS = {
    scale_rows_kernel: [
        ({"unit": f"*{dtype}", "scale": "*fp32", "out": f"*{dtype}", "width": "i32"}, {"BLOCK": BLOCK})
        for dtype in ("bf16", "fp16", "fp32")
    ],
}

"""out[i, :] = scales[i] · dhidden[packed_row[i], :]: the backward of `token_logprobs` with a frozen head."""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


@triton.jit
def scale_rows_kernel(
    dhidden,  # (N, D), contiguous
    packed_row,  # (N,)
    scales,  # (N,)
    out,  # (N, D), contiguous
    width,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)  # N·D can exceed 2³¹
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    source, scale = tl.load(packed_row + row), tl.load(scales + row)
    # A row without a gradient is zero. Its dhidden may be NaN, so it is not read.
    active = (source >= 0) & (scale != 0)
    inside = columns < width
    values = tl.load(dhidden + source * width + columns, mask=inside & active, other=0.0)
    scaled = tl.where(active, values.to(scale.dtype) * scale, 0.0)
    tl.store(out + row * width + columns, scaled.to(out.dtype.element_ty), mask=inside)


def scale_rows(dhidden: Tensor, packed_row: Tensor, scales: Tensor, out: Tensor) -> None:
    """Write scales[i]·dhidden[packed_row[i]] to out[i], or 0 where packed_row[i] < 0 or scales[i] is 0.

    dhidden, out (N, D) float; packed_row (N,) int64; scales (N,) fp32 or fp64, the product's dtype. All contiguous.
    """
    rows, width = out.shape
    if out.numel():
        with torch.cuda.device_of(out):
            scale_rows_kernel[rows, triton.cdiv(width, BLOCK)](dhidden, packed_row, scales, out, width, BLOCK=BLOCK)

"""out[i, :] = scales[i] · unit[places[i], :]: the backward of `token_logprobs`, one read and one write of each row."""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


@triton.jit
def scale_rows_kernel(
    unit,  # (N, D), contiguous
    places,  # (N,)
    scales,  # (N,)
    out,  # (N, D), contiguous
    width,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)  # N·D passes 2³¹
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    place, scale = tl.load(places + row), tl.load(scales + row)
    # A row without a gradient is zero, even where its unit is NaN, which is not read.
    wanted = (place >= 0) & (scale != 0)
    inside = columns < width
    values = tl.load(unit + place * width + columns, mask=inside & wanted, other=0.0)
    scaled = tl.where(wanted, values.to(scale.dtype) * scale, 0.0)
    tl.store(out + row * width + columns, scaled.to(out.dtype.element_ty), mask=inside)


def scale_rows(unit: Tensor, places: Tensor, scales: Tensor, out: Tensor) -> None:
    """Writes scales[i]·unit[places[i]] to out[i], 0 where places[i] < 0 or scales[i] is 0.

    unit, out (N, D) float and places (N,) int64, scales (N,) fp32 or fp64, in which the product is taken; contiguous.
    """
    rows, width = out.shape
    if out.numel():
        with torch.cuda.device_of(out):
            scale_rows_kernel[rows, triton.cdiv(width, BLOCK)](unit, places, scales, out, width, BLOCK=BLOCK)

"""stream += delta, out = weight · stream / sqrt(mean(stream²) + eps): one read and one write of each row."""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def add_rms_norm_kernel(
    delta,  # (M, D), contiguous; not read where ADD is false
    stream,  # (M, D), contiguous
    weight,  # (D,)
    out,  # (M, D), contiguous
    width,
    eps,
    ADD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    place = row * width + columns
    x = tl.load(stream + place, mask=inside, other=0.0)
    if ADD:
        # Rounded to the stream's type before it is squared, as the model's own sum would be.
        x = (x.to(tl.float32) + tl.load(delta + place, mask=inside, other=0.0).to(tl.float32)).to(x.dtype)
        tl.store(stream + place, x, mask=inside)
    values = x.to(tl.float32)
    # Rounded as the twin's: "/" and sqrt would be approximations.
    scale = tl.div_rn(1.0, tl.sqrt_rn(tl.div_rn(tl.sum(values * values, 0), width * 1.0) + eps))
    factor = tl.load(weight + columns, mask=inside, other=0.0)
    normed = (values * scale).to(x.dtype).to(tl.float32) * factor.to(tl.float32)
    tl.store(out + place, normed.to(out.dtype.element_ty), mask=inside)


def add_rms_norm(delta: Tensor | None, stream: Tensor, weight: Tensor, eps: float, out: Tensor) -> None:
    """The kernel on delta (M, D) or None, stream (M, D), weight (D,), out (M, D), contiguous and of one dtype."""
    rows, width = stream.shape
    if not stream.numel():
        return
    block = triton.next_power_of_2(width)
    with torch.cuda.device_of(stream):
        add_rms_norm_kernel[(rows,)](
            stream if delta is None else delta, stream, weight, out, width, eps,
            ADD=delta is not None, BLOCK=block, num_warps=_warps(block),
        )  # fmt: skip


def _warps(block: int) -> int:
    return min(16, max(1, block // 512))

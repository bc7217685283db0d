"""residual += delta, out = weight · residual / sqrt(mean(residual²) + eps): one read and one write of each row."""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def add_rms_norm_kernel(
    delta,  # (M, D), contiguous; not read unless ADD
    residual,  # (M, D), contiguous
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
    offsets = row * width + columns
    x = tl.load(residual + offsets, mask=inside, other=0.0)
    if ADD:
        # Round the sum to its dtype before squaring it, as the model does.
        x = (x.to(tl.float32) + tl.load(delta + offsets, mask=inside, other=0.0).to(tl.float32)).to(x.dtype)
        tl.store(residual + offsets, x, mask=inside)
    values = x.to(tl.float32)
    # div_rn and sqrt_rn round like the reference; "/" and sqrt are approximate.
    scale = tl.div_rn(1.0, tl.sqrt_rn(tl.div_rn(tl.sum(values * values, 0), width * 1.0) + eps))
    factor = tl.load(weight + columns, mask=inside, other=0.0)
    normed = (values * scale).to(x.dtype).to(tl.float32) * factor.to(tl.float32)
    tl.store(out + offsets, normed.to(out.dtype.element_ty), mask=inside)


def add_rms_norm(delta: Tensor | None, residual: Tensor, weight: Tensor, eps: float, out: Tensor) -> None:
    """Run the kernel. delta (M, D) or None, residual (M, D), weight (D,), out (M, D): contiguous, one dtype."""
    rows, width = residual.shape
    if not residual.numel():
        return
    block = triton.next_power_of_2(width)
    with torch.cuda.device_of(residual):
        add_rms_norm_kernel[(rows,)](
            residual if delta is None else delta, residual, weight, out, width, eps,
            ADD=delta is not None, BLOCK=block, num_warps=min(16, max(1, block // 512)),
        )  # fmt: skip

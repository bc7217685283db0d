"""out = silu(gate) · up; a row of the input is the gate, then up."""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


@triton.jit
def silu_mul_kernel(
    gate_up,  # (M, 2·I), contiguous
    out,  # (M, I), contiguous
    width,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    gate = tl.load(gate_up + 2 * row * width + columns, mask=inside, other=0.0)
    up = tl.load(gate_up + (2 * row + 1) * width + columns, mask=inside, other=0.0).to(tl.float32)
    x = gate.to(tl.float32)
    # Round silu to the dtype of the model before the multiplication, as the model does. "/" is approximate.
    silu = tl.div_rn(x, 1.0 + tl.exp(-x)).to(gate.dtype).to(tl.float32)
    tl.store(out + row * width + columns, (silu * up).to(out.dtype.element_ty), mask=inside)


def silu_mul(gate_up: Tensor, out: Tensor) -> None:
    """Run the kernel. gate_up (M, 2·I), out (M, I): contiguous, one dtype."""
    rows, width = out.shape
    if out.numel():
        with torch.cuda.device_of(out):
            silu_mul_kernel[rows, triton.cdiv(width, BLOCK)](gate_up, out, width, BLOCK=BLOCK)

"""Gate of a SwiGLU block: silu(gate) · up."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ospo_fast.errors import OpError
from ospo_fast.ops import _dispatch
from ospo_fast.ops._dispatch import check_plain, describe, pointer


def silu_mul(gate_up: Tensor, *, out: Tensor | None = None, backend: str = "auto") -> Tensor:
    """Compute silu(gate) · up (M, I), into `out` if given, of contiguous gate_up (M, 2·I), gate first. No gradient.

    `out` is contiguous, with the dtype and on the device of gate_up. Raises OpError otherwise.
    """
    if gate_up.dim() != 2 or gate_up.shape[1] % 2:
        raise OpError(f"silu_mul: gate_up is {describe(gate_up)}, expected (M, 2·I)")
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(rows, width) if out is None else out
    check_plain("silu_mul", "gate_up", gate_up, (rows, 2 * width), gate_up)
    check_plain("silu_mul", "out", out, (rows, width), gate_up)
    backend = _dispatch.resolve("silu_mul", backend, gate_up.device.type, refused=_dispatch.fp32_only(gate_up.dtype))
    if backend == "triton":
        _dispatch.triton("silu_mul").silu_mul(gate_up, out)
    elif backend == "cpp":
        pointers = pointer(gate_up, torch.float32), pointer(out, torch.float32)
        _dispatch.native().silu_mul(*pointers, rows, width, torch.get_num_threads())
    else:
        torch.mul(F.silu(gate_up[:, :width]), gate_up[:, width:], out=out)
    return out

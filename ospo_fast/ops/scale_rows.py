"""Backward of `token_logprobs` with a frozen head: scale the rows of the saved gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from ospo_fast.ops import _dispatch
from ospo_fast.ops._dispatch import register_op


@register_op(
    "scale_rows(Tensor dhidden, Tensor packed_row, Tensor scales, str backend) -> Tensor",
    fake=lambda dhidden, *_: dhidden.new_empty(dhidden.shape),
)
def scale_rows(dhidden: Tensor, packed_row: Tensor, scales: Tensor, backend: str) -> Tensor:
    """Return scales[i]·dhidden[packed_row[i]] for each i; 0 where packed_row[i] < 0 or scales[i] is 0, even of NaN.

    dhidden (N, D), packed_row (N,) int64, scales (N,) fp32 (fp64 with fp64) → a new tensor (N, D) of dhidden's dtype.
    """
    dhidden, packed_row, scales = (_dispatch.readable(t) for t in (dhidden, packed_row, scales))
    out = torch.empty_like(dhidden)
    if backend == "cuda":
        _dispatch.triton("scale_rows").scale_rows(dhidden, packed_row, scales, out)
    elif backend == "cpp":
        _dispatch.native().scale_rows(
            dhidden.data_ptr(), packed_row.data_ptr(), _dispatch.pointer(scales, torch.float32), out.data_ptr(),
            _dispatch.DTYPES[dhidden.dtype], *dhidden.shape, torch.get_num_threads(),
        )  # fmt: skip
    else:
        zero = ((packed_row < 0) | (scales == 0)).unsqueeze(1)
        rows = dhidden.index_select(0, packed_row.clamp(min=0)) if len(dhidden) else dhidden
        torch.mul(rows, scales.unsqueeze(1), out=out).masked_fill_(zero, 0)
    return out

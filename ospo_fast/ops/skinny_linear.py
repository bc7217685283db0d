"""Products of few rows with a large weight, where time is what it takes to read the weight."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ospo_fast.errors import OpError
from ospo_fast.ops import _dispatch
from ospo_fast.ops.rms_norm import add_rms_norm
from ospo_fast.ops.silu_mul import silu_mul

ROWS = 16


def skinny_linear(
    x: Tensor,  # (M, K), M up to ROWS
    weight: Tensor,  # (N, K); (2·N, K) if gated
    *,
    norm: Tensor | None = None,  # (K,)
    eps: float = 0.0,
    gated: bool = False,
    add: bool = False,
    out: Tensor | None = None,  # (M, N)
    backend: str = "auto",
) -> Tensor:
    """h·Wᵀ → (M, N), into `out` if given, with what stands around it in a decoder layer done in the same pass.

    norm: h = norm · x / sqrt(mean(x², -1) + eps), else h = x. gated: silu(h·W₁ᵀ) · (h·W₂ᵀ) for the halves of weight =
    [W₁; W₂]. add: `out`, which must be given, grows by the result. All contiguous and of one dtype; products are summed
    in fp32. A row's bits depend on neither the other rows nor their number. In fp16 x·norm must stay below 65504.
    Not differentiable.

    Raises OpError: more than 16 rows, or `add` without `out`.
    """
    rows, columns = x.shape[0], weight.shape[0] // (2 if gated else 1)
    if rows > ROWS:
        raise OpError(f"skinny_linear: x has {rows} rows, expected at most {ROWS}; take torch.nn.functional.linear")
    if out is None:
        if add:
            raise OpError("skinny_linear: add=True needs out, the tensor that grows")
        out = x.new_empty(rows, columns)
    if _dispatch.resolve("skinny_linear", backend, x.device.type) == "triton":
        _dispatch.triton("skinny_linear").skinny_linear(x, weight, norm, eps, gated, add, out)
        return out
    h = x if norm is None else add_rms_norm(None, x, norm, eps, backend="torch")
    y = F.linear(h, weight)
    if gated:
        y = silu_mul(y, backend="torch")
    return out.add_(y) if add else out.copy_(y)

"""Linear layers of few rows with a large weight: bound by the time to read the weight."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ospo_fast.errors import OpError
from ospo_fast.ops import _dispatch
from ospo_fast.ops.rms_norm import add_rms_norm
from ospo_fast.ops.silu_mul import silu_mul

ROWS = 16
_dispatch.register_kernels("skinny_linear", {"triton": "cuda"})


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
    """Compute h·Wᵀ (M, N), into `out` if given, fused with the norm, gate and residual sum of a decoder layer.

    All tensors are contiguous and of one dtype; products are summed in fp32. In the Triton kernel the bits of
    a row depend on neither the other rows nor their number. In fp16, x·norm must stay below 65504. No gradient.

    Args:
        x: (M, K).
        weight: (N, K), or [W₁; W₂] (2·N, K) if gated.
        norm: h = norm · x / sqrt(mean(x², -1) + eps); None: h = x.
        eps: of the norm.
        gated: compute silu(h·W₁ᵀ) · (h·W₂ᵀ).
        add: add the result to `out`, which is then required.
        out: (M, N).
        backend: "auto", "triton" or "torch".

    Raises:
        OpError: more than ROWS rows, or `add` without `out`.

    """
    rows, columns = x.shape[0], weight.shape[0] // (2 if gated else 1)
    if rows > ROWS:
        raise OpError(f"skinny_linear: x has {rows} rows, expected at most {ROWS}; use torch.nn.functional.linear")
    if out is None:
        if add:
            raise OpError("skinny_linear: add=True needs out, the tensor that the result is added to")
        out = x.new_empty(rows, columns)
    if _dispatch.resolve("skinny_linear", backend, x.device.type) == "triton":
        from ospo_fast.experimental import _skinny_linear_kernel

        _skinny_linear_kernel.skinny_linear(x, weight, norm, eps, gated, add, out)
        return out
    h = x if norm is None else add_rms_norm(None, x, norm, eps, backend="torch")
    y = F.linear(h, weight)
    if gated:
        y = silu_mul(y, backend="torch")
    return out.add_(y) if add else out.copy_(y)

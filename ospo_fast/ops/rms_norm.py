"""The residual sum and the RMS norm after it, in one pass over each row."""

from __future__ import annotations

import torch
from torch import Tensor

from ospo_fast.ops import _dispatch


def add_rms_norm(
    delta: Tensor | None,  # (M, D)
    stream: Tensor,  # (M, D)
    weight: Tensor,  # (D,)
    eps: float,
    *,
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """After `stream += delta`, in place: weight · stream / sqrt(mean(stream², -1) + eps) → (M, D), into `out` if given.

    All contiguous and of one dtype; the norm is taken in fp32 and rounded to that dtype before the weight comes in, as
    transformers' LlamaRMSNorm does it. delta None adds nothing. Not differentiable.
    """
    out = torch.empty_like(stream) if out is None else out
    chosen = _dispatch.resolve("add_rms_norm", backend, stream.device.type)
    if chosen == "triton":
        _dispatch.triton("rms_norm").add_rms_norm(delta, stream, weight, eps, out)
    elif chosen == "cpp" and stream.dtype == torch.float32:
        _dispatch.native().add_rms_norm(
            0 if delta is None else delta.data_ptr(), stream.data_ptr(), weight.data_ptr(), out.data_ptr(),
            *stream.shape, eps, torch.get_num_threads(),
        )  # fmt: skip
    else:
        if delta is not None:
            stream += delta
        wide = stream.to(torch.promote_types(stream.dtype, torch.float32))
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        torch.mul(weight, normed.to(stream.dtype), out=out)
    return out

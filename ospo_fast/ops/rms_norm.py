"""Residual sum and the RMS norm after it, in one pass over each row."""

from __future__ import annotations

import torch
from torch import Tensor

from ospo_fast.errors import OpError
from ospo_fast.ops import _dispatch
from ospo_fast.ops._dispatch import check_plain, describe, pointer, readable


def add_rms_norm(
    delta: Tensor | None,  # (M, D); None adds nothing
    residual: Tensor,  # (M, D), updated in place
    weight: Tensor,  # (D,)
    eps: float,
    *,
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Add residual += delta, then compute weight · residual / sqrt(mean(residual², -1) + eps), into `out` if given.

    All tensors are contiguous and of one dtype, but for a weight, which may be strided or of a narrower one. The norm
    is computed in fp32 and rounded to that dtype before the multiplication by the weight, like transformers'
    LlamaRMSNorm. Where the sum of squares exceeds fp32 (residuals above 1e19), the result is 0, as there. No gradient.

    Raises OpError for other shapes, layouts and devices, before it changes `residual`.
    """
    if residual.dim() != 2 or weight.shape != residual.shape[1:] or weight.device != residual.device:
        got = f"{describe(residual)} on {residual.device} and {describe(weight)} on {weight.device}"
        raise OpError(f"add_rms_norm: residual and weight are {got}, expected (M, D) and (D,) on one device")
    eps = _dispatch.check_float("add_rms_norm", "eps", eps)
    out = torch.empty_like(residual) if out is None else out
    for name, tensor in (("residual", residual), ("delta", delta), ("out", out)):
        if tensor is not None:
            check_plain("add_rms_norm", name, tensor, tuple(residual.shape), residual)
    backend = _dispatch.resolve(
        "add_rms_norm", backend, residual.device.type, refused=_dispatch.fp32_only(residual.dtype)
    )
    if backend != "torch":
        weight = readable(weight.to(residual.dtype))  # as the multiplication does
    if backend == "triton":
        _dispatch.triton("rms_norm").add_rms_norm(delta, residual, weight, eps, out)
    elif backend == "cpp":
        _dispatch.native().add_rms_norm(
            *(pointer(t, torch.float32) for t in (delta, residual, weight, out)), *residual.shape, eps,
            torch.get_num_threads(),
        )  # fmt: skip
    else:
        if delta is not None:
            residual += delta
        wide = residual.to(torch.promote_types(residual.dtype, torch.float32))
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        torch.mul(weight, normed.to(residual.dtype), out=out)
    return out

"""Per-token log-probabilities → one number per sequence."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ospo_fast.errors import OpError


def sequence_logprobs(
    logps: Tensor,  # (B, T)
    token_mask: Tensor,  # (B, T)
    weights: Tensor | None = None,  # (B, T)
    *,
    normalize: Literal["weights", "length"] = "weights",
) -> Tensor:
    """Mean of ℓ over the tokens in the mask, Σ w·ℓ / max(Σ w, 1) ("weights", official code) or Σ w·ℓ / max(|y|, 1)
    ("length", paper).

    logps (B, T) float, token_mask (B, T) bool, weights (B, T) or None for ones → (B,) fp32 (float64 for float64 logps).
    What stands outside the mask, NaN included, has no part; a row without tokens gives 0 and zero gradients.
    Raises OpError: shapes that differ, a mask that is not bool, an unknown `normalize`.
    """
    if normalize not in ("weights", "length"):
        raise OpError(f"sequence_logprobs: normalize is {normalize!r}, expected 'weights' or 'length'")
    if logps.dim() != 2 or not logps.is_floating_point():
        raise OpError(f"sequence_logprobs: logps is {logps.dtype} {tuple(logps.shape)}, expected float (B, T)")
    if token_mask.shape != logps.shape or token_mask.dtype != torch.bool:
        raise OpError(
            f"sequence_logprobs: token_mask is {token_mask.dtype} {tuple(token_mask.shape)}, "
            f"expected bool {tuple(logps.shape)} as logps"
        )
    if weights is not None and weights.shape != logps.shape:
        raise OpError(
            f"sequence_logprobs: weights have shape {tuple(weights.shape)}, expected {tuple(logps.shape)} as logps"
        )
    dtype = logps.dtype if logps.dtype == torch.float64 else torch.float32
    zero = logps.new_zeros((), dtype=dtype)
    w = token_mask.to(dtype) if weights is None else torch.where(token_mask, weights.to(dtype), zero)
    total = (w * torch.where(token_mask, logps.to(dtype), zero)).sum(1)
    norm = w.sum(1) if normalize == "weights" else token_mask.sum(1).to(dtype)
    return total / norm.clamp(min=1)

"""Reduce per-token log-probabilities to one number per sequence."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ospo_fast.errors import OpError
from ospo_fast.ops._dispatch import describe, result_dtype
from ospo_fast.ops._transfer import widen


def sequence_logprobs(
    logps: Tensor,
    token_mask: Tensor,
    weights: Tensor | None = None,
    *,
    normalize: Literal["weights", "length", "sum"] = "weights",
) -> Tensor:
    """Compute the weighted mean Σ w·ℓ / max(N, 1) over the tokens in the mask, or the weighted sum.

    Args:
        logps: (B, T) float, ℓ.
        token_mask: (B, T) bool. Values outside the mask, NaN included, reach no result.
        weights: (B, T) or None for ones, w.
        normalize: "weights", N = Σ w (official code), "length", N = number of tokens (paper), or "sum", N = 1 (DPO).

    Returns:
        (B,) fp32 (float64 for float64 logps). A row without tokens gives 0 and zero gradients.

    Raises:
        OpError: shapes that differ, a mask that is not bool, an unknown `normalize`.

    """
    if normalize not in ("weights", "length", "sum"):
        raise OpError(f"sequence_logprobs: normalize is {normalize!r}, expected 'weights', 'length' or 'sum'")
    if logps.dim() != 2 or not logps.is_floating_point():
        raise OpError(f"sequence_logprobs: logps is {describe(logps)}, expected float (B, T)")
    if token_mask.shape != logps.shape or token_mask.dtype != torch.bool:
        raise OpError(f"sequence_logprobs: token_mask is {describe(token_mask)}, expected bool {tuple(logps.shape)}")
    if weights is not None and weights.shape != logps.shape:
        raise OpError(f"sequence_logprobs: weights are {describe(weights)}, expected shape {tuple(logps.shape)}")
    values = widen(logps)  # sums of numbers close to the largest ones of fp32 are finite
    token_mask, zero = token_mask.to(values.device), values.new_zeros(())
    w = token_mask.to(values.dtype) if weights is None else torch.where(token_mask, widen(weights), zero)
    total = (w * torch.where(token_mask, values, zero)).sum(1)
    if normalize != "sum":
        total = total / (w.sum(1) if normalize == "weights" else token_mask.sum(1).to(values.dtype)).clamp(min=1)
    return total.to(logps.device, result_dtype(logps))

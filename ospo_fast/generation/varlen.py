"""Causal attention over packed sequences of any lengths in one launch, by torch's own CUDA kernel."""

from __future__ import annotations

import functools
import logging

import torch
import torch.nn.functional as F
from torch import Tensor

from ospo_fast.oom import out_of_memory

logger = logging.getLogger(__name__)


def varlen_attention(
    q: Tensor,  # (T, H, D)
    k: Tensor,  # (T, H, D)
    v: Tensor,  # (T, H, D)
    bounds: Tensor,  # (N + 1,) int32: first token of each sequence, and the end of the last
    longest: int,
    scale: float,
) -> Tensor:
    """Compute softmax(scale · q·Kᵀ)·V of each token over its sequence up to itself → (T, H, D), contiguous; CUDA."""
    mask = 1  # causal, aligned at the top left
    y: Tensor = torch.ops.aten._efficient_attention_forward(
        q[None], k[None], v[None], None, bounds, bounds, longest, longest, 0.0, mask, False, scale=scale
    )[0]
    return y[0]


def varlen_runs(device: torch.device, dtype: torch.dtype, width: int) -> bool:
    """Return whether `varlen_attention` works for heads of this width.

    torch may change the operator, so it is tested once.
    """
    return device.type == "cuda" and _matches_sdpa(device, dtype, width)


@functools.cache
def _matches_sdpa(device: torch.device, dtype: torch.dtype, width: int) -> bool:
    lengths = [5, 1, 70]
    bounds = torch.tensor([0, 5, 6, 76], dtype=torch.int32, device=device)
    # Not random: the user's generator stays as it is.
    q, k, v = (torch.linspace(-3, 3, 3 * 76 * 2 * width, device=device).sin().to(dtype).view(3, 76, 2, width)).unbind()
    try:
        result = varlen_attention(q, k, v, bounds, 70, width**-0.5)
        expected = [
            F.scaled_dot_product_attention(a[None], b[None], c[None], is_causal=True)
            for a, b, c in zip(*(x.float().transpose(0, 1).split(lengths, 1) for x in (q, k, v)), strict=True)
        ]
        error = (result.float() - torch.cat([y[0].transpose(0, 1) for y in expected])).abs().max()
        if bool(error <= 0.05):  # values reach 1: a larger error means other arguments, not rounding
            return True
        reason = f"its error is {float(error):.2g}"
    except (AttributeError, RuntimeError, TypeError) as problem:
        if out_of_memory(problem):
            raise  # undecided: a smaller batch tests it again
        reason = str(problem).splitlines()[0][:160]
    logger.warning("torch's attention over packed sequences cannot be used (%s): prompts run length by length", reason)
    return False

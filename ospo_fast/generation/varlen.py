"""Causal attention of packed sequences of any lengths in one launch, by torch's own kernel for it."""

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
    bounds: Tensor,  # (N + 1,) int32: where sequences begin, and the end of the last
    longest: int,
    scale: float,
) -> Tensor:
    """softmax(scale · q·Kᵀ)·V of each token over those of its sequence up to itself → (T, H, D), contiguous; CUDA."""
    causal = 1  # from the top left
    y: Tensor = torch.ops.aten._efficient_attention_forward(
        q[None], k[None], v[None], None, bounds, bounds, longest, longest, 0.0, causal, False, scale=scale
    )[0]
    return y[0]


def varlen_runs(device: torch.device, dtype: torch.dtype, width: int) -> bool:
    """Whether `varlen_attention` works for heads of that width: the operator is torch's own affair, so it is tried."""
    return device.type == "cuda" and _works(device, dtype, width)


@functools.cache
def _works(device: torch.device, dtype: torch.dtype, width: int) -> bool:
    lengths = [5, 1, 70]
    bounds = torch.tensor([0, 5, 6, 76], dtype=torch.int32, device=device)
    # Not from the generator that users seed.
    q, k, v = (torch.linspace(-3, 3, 3 * 76 * 2 * width, device=device).sin().to(dtype).view(3, 76, 2, width)).unbind()
    try:
        found = varlen_attention(q, k, v, bounds, 70, width**-0.5)
        wanted = [
            F.scaled_dot_product_attention(a[None], b[None], c[None], is_causal=True)
            for a, b, c in zip(*(x.float().transpose(0, 1).split(lengths, 1) for x in (q, k, v)), strict=True)
        ]
        error = (found.float() - torch.cat([y[0].transpose(0, 1) for y in wanted])).abs().max()
        if bool(error <= 0.05):  # values reach to 1: another meaning, not rounding
            return True
        reason = f"it is off by {float(error):.2g}"
    except (AttributeError, RuntimeError, TypeError) as problem:
        if out_of_memory(problem):
            raise  # which says nothing of the operator: a smaller batch tries it again
        reason = str(problem).splitlines()[0][:160]
    logger.warning(
        "prompts are run length by length: torch's attention for packed sequences does not serve (%s)", reason
    )
    return False

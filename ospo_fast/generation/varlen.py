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
    """Compute softmax(scale · q·Kᵀ)·V of each token over its sequence up to itself → (T, H, D), contiguous; CUDA.

    It has gradients.
    """
    mask = 1  # causal, aligned at the top left
    backward = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    y: Tensor = torch.ops.aten._efficient_attention_forward(
        q[None], k[None], v[None], None, bounds, bounds, longest, longest, 0.0, mask, backward, scale=scale
    )[0]
    return y[0]


def varlen_runs(device: torch.device, dtype: torch.dtype, width: int, *, backward: bool = False) -> bool:
    """Return whether `varlen_attention` works for heads of this width, with `backward` also its gradients.

    torch may change the operator, so it is tested once.
    """
    return device.type == "cuda" and _matches_sdpa(device, dtype, width, backward)


@functools.cache
@torch.enable_grad()
def _matches_sdpa(device: torch.device, dtype: torch.dtype, width: int, backward: bool = False) -> bool:
    lengths = [5, 1, 70]
    bounds = torch.tensor([0, 5, 6, 76], dtype=torch.int32, device=device)
    own = torch.Generator().manual_seed(0)  # the user's generator stays as it is
    q, k, v, upstream = torch.randn(4, 76, 2, width, generator=own).to(device, dtype).unbind()
    try:
        inputs = [x.clone().requires_grad_(backward) for x in (q, k, v)]
        result = varlen_attention(inputs[0], inputs[1], inputs[2], bounds, 70, width**-0.5)
        plain = [x.detach().float().requires_grad_(backward) for x in inputs]
        parts = [
            F.scaled_dot_product_attention(a[None], b[None], c[None], is_causal=True)
            for a, b, c in zip(*(x.transpose(0, 1).split(lengths, 1) for x in plain), strict=True)
        ]
        expected = torch.cat([y[0].transpose(0, 1) for y in parts])
        error = (result.float() - expected).abs().max()
        if backward:
            found = torch.autograd.grad(result, inputs, upstream)
            right = torch.autograd.grad(expected, plain, upstream.float())
            errors = [(x.float() - y).abs().max() / y.abs().max() for x, y in zip(found, right, strict=True)]
            error = torch.stack([error, *errors]).max()
        if bool(error <= 0.05):  # of values of 1 to 4: a larger error means other arguments, not rounding
            return True
        reason = f"its error is {float(error.detach()):.2g}"
    except (AttributeError, RuntimeError, TypeError) as problem:
        if out_of_memory(problem):
            raise  # undecided: a smaller batch tests it again
        reason = str(problem).splitlines()[0][:160]
    logger.warning(
        "torch's attention over packed sequences cannot be used (%s): sequences are padded, or run length by length",
        reason,
    )
    return False

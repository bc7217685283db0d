"""Object masks → token weights of the preference loss."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ospo_fast.errors import OpError
from ospo_fast.ops import _dispatch

LONGEST_BLUR = 31  # taps, of the compiled kernels
BLURRED_CELLS = 6144  # what the CUDA kernel can keep of one mask


def token_weights(
    mask: Tensor,  # (B, H, W)
    *,
    alpha: float = 1.0,
    gamma: float = 1.0,
    blur_size: int = 5,
    blur_sigma: float = 1.0,
) -> Tensor:
    """Weights 1 + alpha · m̃^gamma, with m̃ the mask after a Gaussian blur with zero padding and
    (x − min)/(max − min + 1e-8).

    mask (B, H, W) bool, integer or float → (B, H·W) fp32 (float64 for float64 masks), rows first. An all-zero mask
    gives ones; an all-one mask does not: the blur dims its border. blur_size=1 leaves the mask as it is (the paper's
    form has no blur). Computed in float64, in C++ on CPU and in one launch on CUDA; `token_weights_reference` is the
    PyTorch twin. Raises OpError: another number of dimensions, an even blur, negative alpha or gamma.
    """
    if mask.dim() != 3 or 0 in mask.shape[1:]:
        raise OpError(f"token_weights: mask has shape {tuple(mask.shape)}, expected (B, H, W)")
    check_weights(alpha, gamma, blur_size, blur_sigma)
    result: Tensor = torch.ops.ospo_fast.token_weights(
        mask.detach(), float(alpha), float(gamma), blur_size, float(blur_sigma)
    )
    return result


def token_weights_reference(
    mask: Tensor, *, alpha: float = 1.0, gamma: float = 1.0, blur_size: int = 5, blur_sigma: float = 1.0
) -> Tensor:
    """The PyTorch twin of `token_weights`, on any device."""
    # In float64: equal cells must stay equal through the min-max, else a gamma below 1 blows their rounding up.
    blurred = _blur(mask.double(), blur_size, blur_sigma).flatten(1)
    low, high = blurred.amin(1, keepdim=True), blurred.amax(1, keepdim=True)
    normalised = ((blurred - low) / (high - low + 1e-8)).clamp(0, 1)
    return (1 + alpha * normalised.pow(gamma)).to(_result_dtype(mask))


def check_weights(alpha: float, gamma: float, blur_size: int, blur_sigma: float) -> None:
    """OpError for an even or empty blur, and for a negative alpha or gamma."""
    if blur_size < 1 or blur_size % 2 == 0 or not blur_sigma > 0:
        raise OpError(
            f"token_weights: blur_size is {blur_size}, blur_sigma {blur_sigma}; "
            "expected an odd size and a positive sigma"
        )
    if not (alpha >= 0 and gamma >= 0):
        raise OpError(f"token_weights: alpha is {alpha}, gamma {gamma}; expected numbers >= 0")


torch.library.define(
    "ospo_fast::token_weights",
    "(Tensor mask, float alpha, float gamma, int blur_size, float blur_sigma) -> Tensor",
)


@torch.library.impl("ospo_fast::token_weights", "CompositeExplicitAutograd")
def _token_weights(mask: Tensor, alpha: float, gamma: float, blur_size: int, blur_sigma: float) -> Tensor:
    B, H, W = mask.shape
    backend = _dispatch.resolve("token_weights", "auto", mask.device.type)
    if mask.dtype == torch.float64 or blur_size > LONGEST_BLUR or (backend == "cuda" and H * W > BLURRED_CELLS):
        backend = "torch"
    if backend == "torch":
        return token_weights_reference(mask, alpha=alpha, gamma=gamma, blur_size=blur_size, blur_sigma=blur_sigma)
    x = mask.float().contiguous()
    weights = x.new_empty(B, H * W)
    arguments = (x.data_ptr(), weights.data_ptr(), B, H, W, alpha, gamma, blur_size, blur_sigma)
    if backend == "cpp":
        _dispatch.native().token_weights(*arguments, torch.get_num_threads())
    elif B:
        _dispatch.native().token_weights_cuda(*arguments, *_dispatch.device_and_stream(x.device))
    return weights


@torch.library.register_fake("ospo_fast::token_weights")
def _(mask: Tensor, alpha: float, gamma: float, blur_size: int, blur_sigma: float) -> Tensor:
    return mask.new_empty((mask.shape[0], mask.shape[1] * mask.shape[2]), dtype=_result_dtype(mask))


def _result_dtype(mask: Tensor) -> torch.dtype:
    return torch.float64 if mask.dtype == torch.float64 else torch.float32


def spread_weights(weights: Tensor, token_mask: Tensor, finite: Tensor | None = None) -> Tensor:
    """The weights of each row's image, in order, at the places of its image tokens; 0 elsewhere.

    weights (B, N), token_mask (B, S) bool → (B, S) of weights' dtype. A row has N tokens in its mask, or none.
    finite (B,) bool, or None: false refuses a row with image tokens, whose mask holds NaN or infinity.
    Raises OpError: a row with another number of image tokens, a row that is refused.
    """
    result: Tensor = torch.ops.ospo_fast.spread_weights(weights.detach(), token_mask, finite)
    return result


# An op, because its check looks at values: torch.compile(fullgraph=True) keeps it as one call.
torch.library.define(
    "ospo_fast::spread_weights",
    "(Tensor weights, Tensor token_mask, Tensor? finite) -> Tensor",
    tags=_dispatch.HOST_SYNC_TAGS,
)


@torch.library.impl("ospo_fast::spread_weights", "CompositeExplicitAutograd")
def _spread_weights(weights: Tensor, token_mask: Tensor, finite: Tensor | None) -> Tensor:
    order = token_mask.long().cumsum(1)
    counts = order[:, -1] if order.shape[1] else order.sum(1)
    miscounted = (counts != weights.shape[1]) & (counts != 0)
    wrong = miscounted if finite is None else miscounted | (~finite & (counts != 0))
    rows = wrong.nonzero()
    if len(rows):
        row = int(rows[0])
        if miscounted[row]:
            raise OpError(
                f"token_weights: row {row} has {int(counts[row])} image tokens, the object masks {weights.shape[1]} "
                "cells; expected one cell for each image token: make the masks on the model's grid"
            )
        raise OpError(
            f"token_weights: the object mask of row {row} holds NaN or infinity, one of {len(rows)} rows; expected "
            "finite numbers: look at what made the masks, or leave this item out"
        )
    spread = weights.gather(1, (order - 1).clamp(0, max(weights.shape[1] - 1, 0)))
    return torch.where(token_mask, spread, 0)


@torch.library.register_fake("ospo_fast::spread_weights")
def _(weights: Tensor, token_mask: Tensor, finite: Tensor | None) -> Tensor:
    return weights.new_empty(token_mask.shape)


def _blur(maps: Tensor, size: int, sigma: float) -> Tensor:
    """One axis after the other; cells at the same distance are added first: mirrored maps give mirrored bits."""
    taps = [math.exp(-0.5 * (t / sigma) ** 2) for t in range(size // 2 + 1)]
    total = sum((2 if t else 1) * tap for t, tap in enumerate(taps))
    for _ in range(2):
        maps = maps.mT
        length = maps.shape[-1]
        padded = F.pad(maps, (size // 2, size // 2))
        result = maps * (taps[0] / total)
        for t, tap in enumerate(taps[1:], 1):
            before, after = (padded.narrow(-1, size // 2 + shift, length) for shift in (-t, t))
            result = result + (before + after) * (tap / total)
        maps = result
    return maps

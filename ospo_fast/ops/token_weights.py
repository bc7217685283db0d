"""Compute the token weights of the preference loss from object masks."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ospo_fast.errors import OpError
from ospo_fast.ops import _dispatch
from ospo_fast.ops._dispatch import (
    INT64_MIN,
    check_float,
    check_int,
    describe,
    is_integer,
    pointer,
    readable,
    register_op,
    result_dtype,
)
from ospo_fast.ops._transfer import WITHOUT_FLOAT64

MAX_BLUR_SIZE = 31  # taps, of the compiled kernels
MAX_TAPS = 1023  # in PyTorch, where each one is a pass over the padded masks
MAX_BLURRED_CELLS = 6144  # of one mask, in the shared memory of the CUDA kernel


def token_weights(
    mask: Tensor, *, alpha: float = 1.0, gamma: float = 1.0, blur_size: int = 5, blur_sigma: float = 1.0
) -> Tensor:
    """Compute weights 1 + alpha · m̃^gamma, with m̃ the blurred mask after (x − min)/(max − min + 1e-8).

    The blur is Gaussian with zero padding. So an all-zero mask gives ones, but an all-one mask does not: the blur
    lowers its border. Computed in float64: in C++ on CPU, in one launch on CUDA, in PyTorch for masks of float64 or
    of integers of 32 or 64 bits, and for sizes that the kernels do not take (`token_weights_reference`).

    Args:
        mask: (B, H, W) bool, integer or float.
        alpha: height of the weights above 1.
        gamma: exponent.
        blur_size: taps of the blur, odd, at most 1023; 1 = no blur, as in the paper.
        blur_sigma: its standard deviation in cells.

    Returns:
        (B, H·W) fp32 (float64 for float64 masks), row by row.

    Raises:
        OpError: a wrong shape, a blur_size that is even or out of range, blur_sigma not positive, a negative alpha or
            gamma.

    """
    _check_mask(mask)
    alpha, gamma = check_float("token_weights", "alpha", alpha), check_float("token_weights", "gamma", gamma)
    blur_sigma = check_float("token_weights", "blur_sigma", blur_sigma)
    blur_size = check_int("token_weights", "blur_size", blur_size, 1, MAX_TAPS, ", and odd")
    if blur_size % 2 == 0 or not blur_sigma > 0:
        raise OpError(
            f"token_weights: blur_size is {blur_size}, blur_sigma {blur_sigma}; "
            "expected an odd size and a positive sigma"
        )
    if not (alpha >= 0 and gamma >= 0):
        raise OpError(f"token_weights: alpha is {alpha}, gamma {gamma}; expected numbers >= 0")
    return _token_weights(mask.detach(), alpha, gamma, blur_size, blur_sigma)


def token_weights_reference(
    mask: Tensor, *, alpha: float = 1.0, gamma: float = 1.0, blur_size: int = 5, blur_sigma: float = 1.0
) -> Tensor:
    """Compute `token_weights` in PyTorch, on any device."""
    _check_mask(mask)
    if mask.device.type in WITHOUT_FLOAT64:
        options: dict[str, Any] = {"alpha": alpha, "gamma": gamma, "blur_size": blur_size, "blur_sigma": blur_sigma}
        return token_weights_reference(mask.cpu(), **options).to(mask.device)
    # In float64: equal cells must stay equal through the min-max; a gamma below 1 would amplify their rounding.
    # A quarter, which changes no other bit, keeps sums and the range finite.
    if mask.dtype in (torch.int64, torch.uint64):  # float64 holds the differences, not the numbers
        cells, offset = _differences(mask)
        lost = _blur(torch.zeros_like(cells), blur_size, blur_sigma, outside=1)  # the part of the offset in the padding
        # What all cells lose does not count, and would round off the differences.
        blurred = (
            _blur(cells / 4, blur_size, blur_sigma) - offset / 4 * (lost - lost.amin((1, 2), keepdim=True))
        ).flatten(1)
    else:
        blurred = _blur(mask.double() / 4, blur_size, blur_sigma).flatten(1)
    low, high = blurred.amin(1, keepdim=True), blurred.amax(1, keepdim=True)
    normalized = ((blurred - low) / (high - low + 1e-8 / 4)).clamp(0, 1)
    return (1 + alpha * normalized.pow(gamma)).to(result_dtype(mask))


@register_op(
    "token_weights(Tensor mask, float alpha, float gamma, int blur_size, float blur_sigma) -> Tensor",
    fake=lambda mask, *_: mask.new_empty((mask.shape[0], mask.shape[1] * mask.shape[2]), dtype=result_dtype(mask)),
)
def _token_weights(mask: Tensor, alpha: float, gamma: float, blur_size: int, blur_sigma: float) -> Tensor:
    B, H, W = mask.shape
    if B == 0:  # no masks, whose cells may be too many for any memory
        return mask.new_empty((0, H * W), dtype=result_dtype(mask))
    backend = _dispatch.resolve("token_weights", "auto", mask.device.type, result_dtype(mask))
    too_large = blur_size > MAX_BLUR_SIZE or (backend == "cuda" and H * W > MAX_BLURRED_CELLS)
    # The kernels take fp32, which does not hold every integer of 32 or 64 bits.
    too_wide = not mask.is_floating_point() and mask.element_size() > 2
    if backend == "torch" or too_large or too_wide:
        return token_weights_reference(mask, alpha=alpha, gamma=gamma, blur_size=blur_size, blur_sigma=blur_sigma)
    x = readable(mask.float())
    weights = x.new_empty(B, H * W)
    arguments = (pointer(x), pointer(weights), B, H, W, alpha, gamma, blur_size, blur_sigma)
    if backend == "cuda":
        _dispatch.native().token_weights_cuda(*arguments, *_dispatch.device_and_stream(x.device))
    else:
        _dispatch.native().token_weights(*arguments, torch.get_num_threads())
    return weights


def _check_mask(mask: Tensor) -> None:
    if mask.dim() != 3 or 0 in mask.shape[1:]:
        raise OpError(f"token_weights: mask has shape {tuple(mask.shape)}, expected (B, H, W)")
    if not (mask.is_floating_point() or is_integer(mask) or mask.dtype == torch.bool):
        raise OpError(f"token_weights: mask is {describe(mask)}, expected bool, integer or float")


def _differences(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return integer masks of 64 bits less an offset of each, and the offsets (B, 1, 1), in float64.

    The offset is the minimum, but 0 for numbers of up to 32 bits: they get the same weights as in int32.
    """
    if unsigned := mask.dtype == torch.uint64:
        mask = mask.view(torch.int64) ^ INT64_MIN  # less 2^63, which keeps the order
    low = mask.amin((1, 2), keepdim=True)
    cells = _unsigned(mask - low)  # modulo 2^64, so its bits are those of the unsigned difference
    offset = _unsigned(low ^ INT64_MIN) if unsigned else low.double()
    numbers = cells + offset  # exact where they are used
    short = numbers.abs().amax((1, 2), keepdim=True) <= 2**32
    return torch.where(short, numbers, cells), torch.where(short, 0, offset)


def _unsigned(x: Tensor) -> Tensor:
    """Return int64 numbers, modulo 2^64, in float64."""
    return (x >> 32 & 0xFFFFFFFF).double() * 2**32 + (x & 0xFFFFFFFF).double()


def _blur(maps: Tensor, size: int, sigma: float, outside: float = 0) -> Tensor:
    """Blur one axis, then the other, padded with `outside`.

    Cells at the same distance are added first: mirrored maps give mirrored bits.
    """
    steps = [t / sigma for t in range(size // 2 + 1)]
    taps = [math.exp(-0.5 * (step * step)) for step in steps]  # a power would raise where the product is infinite
    total = sum((2 if t else 1) * tap for t, tap in enumerate(taps))
    for _ in range(2):
        length = maps.shape[-1]
        padded = F.pad(maps, (size // 2, size // 2), value=outside)
        result = maps * (taps[0] / total)
        for t, tap in enumerate(taps[1:], 1):
            before, after = (padded.narrow(-1, size // 2 + shift, length) for shift in (-t, t))
            result = result + (before + after) * (tap / total)
        maps = result.mT
    return maps


# An op, because its check reads values: torch.compile(fullgraph=True) keeps it as one call.
@register_op(
    "spread_weights(Tensor weights, Tensor token_mask, Tensor? finite=None) -> Tensor",
    fake=lambda weights, token_mask, finite=None: weights.new_empty(token_mask.shape),
    synchronizes=True,
)
def spread_weights(weights: Tensor, token_mask: Tensor, finite: Tensor | None = None) -> Tensor:
    """Put weights (B, N) of each row, in order, at its tokens in token_mask (B, S) bool; 0 elsewhere → (B, S).

    Raises OpError for a row that has tokens but not N, or that has tokens and is not `finite` (B,) bool. No gradient.
    """
    cells = weights.shape[1]
    order = token_mask.long().cumsum(1)
    counts = token_mask.sum(1)
    miscounted = (counts != cells) & (counts != 0)
    invalid = miscounted if finite is None else miscounted | (~finite & (counts != 0))
    rows = invalid.nonzero()
    if len(rows):
        row = int(rows[0])
        if miscounted[row]:
            raise OpError(
                f"token_weights: row {row} has {int(counts[row])} image tokens, the object masks {cells} cells; "
                "expected one cell per image token: compute the masks on the model's grid"
            )
        raise OpError(
            f"token_weights: the object mask of row {row} holds NaN or infinity, one of {len(rows)} rows; expected "
            "finite values: check what computed the masks, or skip this item"
        )
    spread = weights.gather(1, (order - 1).clamp(0, max(cells - 1, 0)))
    return torch.where(token_mask, spread, 0)

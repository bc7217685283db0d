"""Guidance, temperature, truncation and sampling of image codes, by counter-based random numbers.

An item's codes depend on its own seed and step alone: not on the batch, its size, the row in it or the device.

Random bits: Philox4x32-10 (Salmon et al. 2011), key = (low, high 32 bits of the seed), counter = (v // 4, low, high 32
bits of the step, 0); output word v % 4 belongs to code v. Uniform u = (word + 0.5)·2^-32 and Gumbel noise
g = −log(−log u) are float64, so that devices whose log differs in the last bit still choose the same code.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import OpError

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_LOW = 0xFFFFFFFF


def sample_codes(
    cond: Tensor,  # (B, V)
    uncond: Tensor | None = None,  # (B, V)
    *,
    guidance_scale: float = 1.0,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seeds: Tensor | Sequence[int],  # (B,)
    step: int | Tensor,
) -> Tensor:
    """argmax_v(z_v + g_v) with z = (uncond + guidance_scale·(cond − uncond))/temperature in fp32 and Gumbel noise g:
    a draw from softmax(z).

    cond, uncond (B, V) float logits → (B,) int64 codes. guidance_scale 1 or uncond None: the conditional logits alone.
    temperature 0: argmax. top_k > 0 keeps the k largest logits (and those equal to the k-th); then top_p < 1 the
    fewest whose probabilities reach it.
    seeds: (B,) int64 or a list, one per item; step: the position in the image, an int or (B,) for rows at their own.
    Raises OpError: shapes that do not fit, options out of range, rows with NaN, +inf or nothing but -inf.
    """
    B, V = _check(cond, uncond, temperature, top_k, top_p)
    z = cond.float()
    if uncond is not None and guidance_scale != 1:
        z = uncond.float()
        z = z + guidance_scale * (cond.float() - z)
    best = z.amax(1)
    if not bool(best.isfinite().all()):  # amax passes NaN on
        rows = (~best.isfinite()).nonzero().flatten().tolist()
        raise OpError(f"sample_codes: the logits of rows {rows} hold NaN, +inf or only -inf; expected finite logits")
    if temperature == 0:
        return z.argmax(1)
    z = z / temperature
    if 0 < top_k < V:
        z = z.masked_fill(z < z.topk(top_k, dim=1).values[:, -1:], -torch.inf)
    if top_p < 1:
        z = _keep_top_p(z, top_p)
    noise = gumbel_noise(_per_row("seeds", seeds, B, z.device), _per_row("step", step, B, z.device), V)
    return (z + noise).argmax(1)


def gumbel_noise(seeds: Tensor, steps: Tensor, num_codes: int) -> Tensor:
    """The noise of every code: seeds, steps (B,) int64 → (B, num_codes) float64, as the module's text says."""
    blocks = torch.arange((num_codes + 3) // 4, device=seeds.device).expand(len(seeds), -1)
    seeds, steps = seeds[:, None], steps[:, None]
    counter = (blocks, *((word & _LOW).expand_as(blocks) for word in (steps, steps >> 32)), torch.zeros_like(blocks))
    words = philox4x32(counter, (seeds & _LOW, (seeds >> 32) & _LOW))
    bits = torch.stack(words, -1).flatten(1)[:, :num_codes]
    return -(-((bits.double() + 0.5) * 2.0**-32).log()).log()


def philox4x32(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 on words of 32 bits in int64 tensors. A product wraps at 64 bits, which loses none of its bits."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        low, high = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (high >> 32 & _LOW) ^ c1 ^ k0, high & _LOW, (low >> 32 & _LOW) ^ c3 ^ k1, low & _LOW
        k0, k1 = k0 + _KEY_STEPS[0] & _LOW, k1 + _KEY_STEPS[1] & _LOW
    return c0, c1, c2, c3


def _keep_top_p(z: Tensor, top_p: float) -> Tensor:
    """-inf for all but the fewest codes whose probabilities reach top_p; of equal logits the first ones stay."""
    ordered, order = z.sort(dim=1, descending=True, stable=True)
    probs = ordered.double().softmax(1)
    dropped = probs.cumsum(1) - probs >= top_p
    return ordered.masked_fill(dropped, -torch.inf).gather(1, order.argsort(1))


def _per_row(name: str, value: Tensor | Sequence[int] | int, B: int, device: torch.device) -> Tensor:
    # A Python int may be a full unsigned 64-bit seed: taken modulo 2^64.
    if isinstance(value, int):
        value = [value] * B
    if not isinstance(value, Tensor):
        value = torch.tensor([(int(v) + 2**63) % 2**64 - 2**63 for v in value], dtype=torch.int64)
    if tuple(value.shape) != (B,) or value.is_floating_point() or value.dtype == torch.bool:
        raise OpError(f"sample_codes: {name} is {value.dtype} {tuple(value.shape)}, expected ({B},) int64")
    return value.to(device, torch.int64)


def _check(cond: Tensor, uncond: Tensor | None, temperature: float, top_k: int, top_p: float) -> tuple[int, int]:
    if cond.dim() != 2 or cond.shape[1] == 0 or not cond.is_floating_point():
        raise OpError(f"sample_codes: cond is {cond.dtype} {tuple(cond.shape)}, expected float (B, V)")
    if uncond is not None and (uncond.shape != cond.shape or uncond.device != cond.device):
        raise OpError(
            f"sample_codes: uncond is {tuple(uncond.shape)} on {uncond.device}, "
            f"expected {tuple(cond.shape)} on {cond.device} as cond"
        )
    if not (temperature >= 0 and math.isfinite(temperature)):
        raise OpError(f"sample_codes: temperature is {temperature}, expected a number >= 0 (0 = the likeliest code)")
    if top_k < 0:
        raise OpError(f"sample_codes: top_k is {top_k}, expected a number >= 0 (0 = all codes)")
    if not 0 < top_p <= 1:
        raise OpError(f"sample_codes: top_p is {top_p}, expected 0 < top_p <= 1 (1 = all codes)")
    return cond.shape[0], cond.shape[1]

"""Guidance, temperature, truncation and sampling of image codes, by counter-based random numbers.

An item's codes depend on its own seed and step alone: not on the batch, its size, the row in it or the device.

Random bits: Philox4x32-10 (Salmon et al. 2011), key = (low, high 32 bits of the seed), counter = (v // 4, low, high 32
bits of the step, 0); output word v % 4 belongs to code v. Uniform u = (word + 0.5)·2^-32 and Gumbel noise
g = −log(−log u) are float64, so that devices whose log differs in the last bit still choose the same code.

Truncation by top_p adds whole numbers, the probabilities relative to the largest one in units of 2^-40 (`_weights`):
their sums have no rounding, and what stays is the same on all devices, in whatever order they add.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ospo_fast.errors import OpError
from ospo_fast.ops import _dispatch

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
    temperature 0: argmax of all codes. top_k > 0 keeps the k largest logits (and those equal to the k-th); then
    top_p < 1 the fewest, from the largest on and of equal logits the first ones, whose probabilities reach it.
    seeds: (B,) int64 or a list, one per item; step: the position in the image, an int or (B,) for rows at their own.
    Raises OpError: shapes that do not fit, options out of range, rows with NaN, +inf or nothing but -inf.
    """
    B = _check(cond, uncond, guidance_scale, temperature, top_k, top_p)
    codes: Tensor = torch.ops.ospo_fast.sample_codes(
        cond.detach(),
        None if uncond is None or guidance_scale == 1 else uncond.detach(),
        float(guidance_scale),
        float(temperature),
        min(top_k, cond.shape[1]),
        float(top_p),
        _per_row("seeds", seeds, B, cond.device),
        _per_row("step", step, B, cond.device),
    )
    return codes


def sample_codes_reference(
    cond: Tensor,
    uncond: Tensor | None = None,
    *,
    guidance_scale: float = 1.0,
    temperature: float = 1.0,
    seeds: Sequence[int],
    step: int,
) -> Tensor:
    """The twin of `sample_codes` without truncation, in Python integers and floats, code by code; same arguments."""
    codes = []
    for row, seed in enumerate(seeds):
        z = cond[row].double()
        if uncond is not None:
            z = uncond[row].double() + guidance_scale * (z - uncond[row].double())
        if temperature:
            words = [_words(v // 4, step, seed)[v % 4] for v in range(len(z))]
            z = z / temperature - torch.tensor([math.log(-math.log((w + 0.5) / 2**32)) for w in words]).double()
        codes.append(int(z.argmax()))
    return torch.tensor(codes)


def _words(block: int, step: int, seed: int) -> list[int]:
    c, k = [block, step & _LOW, step >> 32 & _LOW, 0], [seed & _LOW, seed >> 32 & _LOW]
    for _ in range(10):
        low, high = c[0] * _MULTIPLIERS[0], c[2] * _MULTIPLIERS[1]
        c = [high >> 32 ^ c[1] ^ k[0], high & _LOW, low >> 32 ^ c[3] ^ k[1], low & _LOW]
        k = [k[0] + _KEY_STEPS[0] & _LOW, k[1] + _KEY_STEPS[1] & _LOW]
    return c


# ---------------------------------------------------------------- the op

torch.library.define(
    "ospo_fast::sample_codes",
    "(Tensor cond, Tensor? uncond, float guidance_scale, float temperature, int top_k, float top_p, Tensor seeds,"
    " Tensor steps) -> Tensor",
)


@torch.library.impl("ospo_fast::sample_codes", "CompositeExplicitAutograd")
def _sample_codes(
    cond: Tensor,
    uncond: Tensor | None,
    guidance_scale: float,
    temperature: float,
    top_k: int,
    top_p: float,
    seeds: Tensor,
    steps: Tensor,
) -> Tensor:
    untouched = torch.iinfo(torch.int64).min
    codes = torch.zeros(len(cond), dtype=torch.int64, device=cond.device)
    bad = torch.full_like(codes, untouched)
    draw_codes(
        cond,
        uncond,
        guidance_scale=guidance_scale,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seeds=seeds,
        steps=steps,
        codes=codes,
        bad=bad,
    )
    wrong = bad != untouched
    if bool(wrong.any()):
        rows = wrong.nonzero().flatten().tolist()
        raise OpError(f"sample_codes: the logits of rows {rows} hold NaN, +inf or only -inf; expected finite logits")
    return codes


def draw_codes(
    cond: Tensor,  # (B, V), rows contiguous
    uncond: Tensor | None = None,  # (B, V), strided as cond
    *,
    guidance_scale: float = 1.0,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seeds: Tensor,  # (B,) int64
    steps: Tensor,  # (B,) int64
    codes: Tensor,  # (B,) int64, written
    bad: Tensor,  # (B,) int64, -1 where all was well so far
    tokens: Tensor | None = None,  # (B, T) int64, written at steps
) -> None:
    """`sample_codes` without a host in the loop: it writes the codes, and into column steps[b] of row b of `tokens`.

    A row with NaN, +inf or nothing but -inf gets code 0, and bad[b] its step where it was negative: look once, at the
    end. Nothing is checked, nothing synchronises, so that a CUDA graph can hold it. Other arguments as `sample_codes`.
    """
    if top_k >= cond.shape[1]:
        top_k = 0
    chosen = _dispatch.resolve("sample_codes", "auto", cond.device.type)
    if chosen != "torch":
        _native(chosen, cond, uncond, guidance_scale, temperature, top_k, top_p, seeds, steps, codes, bad, tokens)
        return
    z = _logits(cond.float(), None if uncond is None else uncond.float(), guidance_scale)
    scores = z
    if temperature > 0:
        scores = z / z.new_full((), temperature)  # by a number, CUDA would multiply with its rounded reciprocal
        if top_k or top_p < 1:
            z = scores = _truncate(scores, top_k, top_p)
        scores = scores + gumbel_noise(seeds, steps, z.shape[1])
    wrong = ~z.amax(1).isfinite()  # amax is NaN where the row holds one
    codes.copy_(scores.argmax(1).masked_fill(wrong, 0))
    bad.copy_(torch.where(wrong & (bad < 0), steps, bad))
    if tokens is not None:
        tokens.scatter_(1, steps[:, None], codes[:, None])


@torch.library.register_fake("ospo_fast::sample_codes")
def _(cond: Tensor, *args: object) -> Tensor:
    return cond.new_empty(cond.shape[0], dtype=torch.int64)


def _native(
    backend: str,
    cond: Tensor,
    uncond: Tensor | None,
    guidance_scale: float,
    temperature: float,
    top_k: int,
    top_p: float,
    seeds: Tensor,
    steps: Tensor,
    codes: Tensor,
    bad: Tensor,
    tokens: Tensor | None,
) -> None:
    seeds, steps = seeds.contiguous(), steps.contiguous()
    if backend == "cpp":
        cond, uncond = cond.float().contiguous(), None if uncond is None else uncond.float().contiguous()
    else:
        kept = cond.dtype if cond.dtype in _dispatch.DTYPES else torch.float32
        cond, uncond = cond.to(kept).contiguous(), None if uncond is None else uncond.to(kept).contiguous()
    pointers = [
        seeds.data_ptr(),
        steps.data_ptr(),
        0 if tokens is None else tokens.data_ptr(),
        0 if tokens is None else tokens.stride(0),
        codes.data_ptr(),
        bad.data_ptr(),
        *cond.shape,
        guidance_scale,
        temperature,
        top_k,
        top_p,
    ]
    logits = (cond.data_ptr(), 0 if uncond is None else uncond.data_ptr())
    if backend == "cpp":
        _dispatch.native().sample_codes(*logits, *pointers, torch.get_num_threads())
    else:
        dtype = _dispatch.DTYPES[cond.dtype]
        place = _dispatch.device_and_stream(cond.device)
        _dispatch.native().sample_codes_cuda(dtype, *logits, cond.stride(0), *pointers, *place)


def _logits(cond: Tensor, uncond: Tensor | None, guidance_scale: float) -> Tensor:
    return cond if uncond is None else uncond + guidance_scale * (cond - uncond)


def gumbel_noise(seeds: Tensor, steps: Tensor, num_codes: int) -> Tensor:
    """The noise of every code: seeds, steps (B,) int64 → (B, num_codes) float64, as the module's text says."""
    blocks = torch.arange((num_codes + 3) // 4, device=seeds.device).expand(len(seeds), -1)
    seeds, steps = seeds[:, None], steps[:, None]
    low, high = ((word & _LOW).expand_as(blocks) for word in (steps, steps >> 32))
    words = philox4x32((blocks, low, high, torch.zeros_like(blocks)), (seeds & _LOW, (seeds >> 32) & _LOW))
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


def _truncate(z: Tensor, top_k: int, top_p: float) -> Tensor:
    """-inf for codes below the k-th largest logit, then for all but the fewest whose weights reach top_p of their sum;
    there the first ones of equal logits stay. A row whose largest is not finite is left with it.
    """
    if top_k:
        z = z.masked_fill(z < z.topk(top_k, dim=1).values[:, -1:], -torch.inf)
    if top_p == 1:
        return z
    ordered, order = z.sort(dim=1, descending=True, stable=True)
    weights = _weights(ordered, ordered[:, :1])
    total = weights.sum(1, keepdim=True)
    needed = (total.double() * top_p).ceil().long().minimum(total)  # a sum beyond 2^53 may round up
    dropped = (weights.cumsum(1) - weights >= needed) & ordered[:, :1].isfinite()
    return ordered.masked_fill(dropped, -torch.inf).gather(1, order.argsort(1))


def _weights(z: Tensor, most: Tensor) -> Tensor:
    """exp(z − most) rounded to units of 2^-40, as int64: sums of up to 2^22 fit.

    Its own exp, in additions and products that round alike everywhere: by 2^n and Taylor's series, to 2^-46.
    """
    t = (z.double() - most.double()).clamp(min=-30) * 1.4426950408889634  # e^-30 is less than half a unit
    n = t.round()
    r = (t - n) * 0.6931471805599453
    p = torch.full_like(r, 1 / math.factorial(11))
    for k in range(10, -1, -1):
        p.mul_(r).add_(1 / math.factorial(k))
    return (p * (n.long() + 1023 + 40 << 52).view(torch.float64)).round().long()


def _per_row(name: str, value: Tensor | Sequence[int] | int, B: int, device: torch.device) -> Tensor:
    # A Python int may be a full unsigned 64-bit seed: taken modulo 2^64.
    if isinstance(value, int):
        value = [value] * B
    if not isinstance(value, Tensor):
        value = torch.tensor([(int(v) + 2**63) % 2**64 - 2**63 for v in value], dtype=torch.int64)
    if tuple(value.shape) != (B,) or value.is_floating_point() or value.dtype == torch.bool:
        raise OpError(f"sample_codes: {name} is {value.dtype} {tuple(value.shape)}, expected ({B},) int64")
    return value.to(device, torch.int64)


def _check(
    cond: Tensor, uncond: Tensor | None, guidance_scale: float, temperature: float, top_k: int, top_p: float
) -> int:
    if cond.dim() != 2 or cond.shape[1] == 0 or not cond.is_floating_point():
        raise OpError(f"sample_codes: cond is {cond.dtype} {tuple(cond.shape)}, expected float (B, V)")
    if uncond is not None and (uncond.shape != cond.shape or uncond.device != cond.device):
        raise OpError(
            f"sample_codes: uncond is {tuple(uncond.shape)} on {uncond.device}, "
            f"expected {tuple(cond.shape)} on {cond.device} as cond"
        )
    if not math.isfinite(guidance_scale):
        raise OpError(f"sample_codes: guidance_scale is {guidance_scale}, expected a finite number (1 = no guidance)")
    if not (temperature >= 0 and math.isfinite(temperature)):
        raise OpError(f"sample_codes: temperature is {temperature}, expected a number >= 0 (0 = the likeliest code)")
    if top_k < 0:
        raise OpError(f"sample_codes: top_k is {top_k}, expected a number >= 0 (0 = all codes)")
    if not 0 < top_p <= 1:
        raise OpError(f"sample_codes: top_p is {top_p}, expected 0 < top_p <= 1 (1 = all codes)")
    return cond.shape[0]

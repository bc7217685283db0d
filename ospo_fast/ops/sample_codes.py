"""Sample image codes from logits: guidance, temperature, truncation, and counter-based random numbers.

The codes of an item depend on its seed and step only: not on the batch, its size, the row in it or the device.

Random bits: Philox4x32-10 (Salmon et al. 2011), key = (low, high 32 bits of the seed), counter = (v // 4, low, high 32
bits of the step, 0); output word v % 4 belongs to code v. Uniform u = (word + 0.5)·2^-32 and Gumbel noise
g = −log(−log u) are float64, so that devices with different last bits of log still choose the same code.

top_p sums integers: the probabilities relative to the largest one, in units of 2^-40 (`_weights`). These sums have no
rounding error, so all devices keep the same codes, in whichever order they add.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ospo_fast.errors import OpError
from ospo_fast.ops import _dispatch
from ospo_fast.ops._dispatch import (
    INT64_MAX,
    INT64_MIN,
    as_int64,
    check_float,
    check_int,
    describe,
    pointer,
    readable,
    register_op,
)
from ospo_fast.ops._transfer import WITHOUT_FLOAT64

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_LOW = 0xFFFFFFFF


def sample_codes(
    cond: Tensor,
    uncond: Tensor | None = None,
    *,
    guidance_scale: float = 1.0,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seeds: Tensor | Sequence[int],
    step: int | Tensor,
) -> Tensor:
    """Sample argmax(z + Gumbel noise) with z = (uncond + guidance_scale·(cond − uncond))/temperature: from softmax(z).

    z is fp32, the noise float64 (see the module).

    Args:
        cond: (B, V) float logits.
        uncond: (B, V) float logits of the unconditional prompt. None, or guidance_scale 1: `cond` alone.
        guidance_scale: weight of classifier-free guidance.
        temperature: 0 takes the argmax of all codes.
        top_k: keep the k largest logits and those equal to the k-th; 0 = all.
        top_p: then keep the fewest codes with probabilities that sum to it, largest first, and of equal logits the
            first ones; 1 = all.
        seeds: (B,) int64 or a list, one per item. Also unsigned numbers of 64 bits, modulo 2^64.
        step: position in the image, an int or (B,), one per row.

    Returns:
        (B,) int64 codes.

    Raises:
        OpError: wrong shapes, options out of range, rows of z with NaN, +inf or only -inf, also by overflow.

    """
    guidance_scale = check_float("sample_codes", "guidance_scale", guidance_scale)
    temperature = check_float("sample_codes", "temperature", temperature)
    top_p = check_float("sample_codes", "top_p", top_p)
    B = _check(cond, uncond, guidance_scale, temperature, top_k, top_p)
    return _sample_codes(
        cond.detach(),
        None if uncond is None or guidance_scale == 1 else uncond.detach(),
        guidance_scale,
        temperature,
        min(top_k, cond.shape[1]),
        top_p,
        _per_row("seeds", seeds, B, cond.device),
        _per_row("step", step, B, cond.device),
    )


def sample_codes_into(
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
    error_steps: Tensor,  # (B,) int64, written; negative: no invalid logits so far
    tokens: Tensor | None = None,  # (B, T) int64, written at steps
    logps: Tensor | None = None,  # (B,) fp32, written with top_k or top_p and a temperature, which it needs
) -> int | None:
    """Run `sample_codes` without checks of the options and without host synchronization, as a CUDA graph needs it.

    Writes the codes to `codes`, and to column steps[b] of row b of `tokens`. A row with NaN, +inf or only -inf gets
    code 0, and error_steps[b] = steps[b] if error_steps[b] was negative: read `error_steps` once, at the end. To
    `logps` it writes the log-probability of each code among those that top_k and top_p keep; NaN for such a row.

    Returns the number of these rows, or None where only the device knows it.

    Raises OpError for vectors or tokens of the wrong shape, and on a CPU for steps beyond the columns of `tokens`,
    which CUDA does not write.
    """
    B = cond.shape[0]
    if not seeds.shape == steps.shape == codes.shape == error_steps.shape == (B,):
        got = ", ".join(str(tuple(t.shape)) for t in (seeds, steps, codes, error_steps))
        raise OpError(f"sample_codes: seeds, steps, codes and error_steps are {got}; expected ({B},), one per row")
    if tokens is not None and (tokens.dim() != 2 or tokens.shape[0] != B or tokens.stride(1) != 1):
        got = f"{tuple(tokens.shape)} with strides {tokens.stride()}"
        raise OpError(f"sample_codes: tokens are {got}, expected ({B}, T) with contiguous rows")
    if top_k >= cond.shape[1]:
        top_k = 0
    backend = _dispatch.resolve("sample_codes", "auto", cond.device.type)
    if backend == "torch":
        sampled, invalid = sample_codes_reference(
            cond, uncond, guidance_scale=guidance_scale, temperature=temperature, top_k=top_k, top_p=top_p,
            seeds=seeds, steps=steps,
        )  # fmt: skip
        codes.copy_(sampled)
        error_steps.copy_(torch.where(invalid & (error_steps < 0), steps, error_steps))
        if tokens is not None:
            tokens.scatter_(1, steps[:, None], codes[:, None])
        if logps is not None:
            logps.copy_(_truncated_logprobs(cond, uncond, codes, guidance_scale, temperature, top_k, top_p))
        return None
    # The CUDA kernel reads half precision too.
    dtype = cond.dtype if backend == "cuda" and cond.dtype in _dispatch.DTYPES else torch.float32
    cond, uncond = readable(cond.to(dtype)), None if uncond is None else readable(uncond.to(dtype))
    seeds, steps = readable(seeds), readable(steps)
    columns = (0, 0) if tokens is None else (tokens.stride(0), tokens.shape[1])
    arguments = (
        pointer(seeds, torch.int64), pointer(steps, torch.int64), pointer(tokens, torch.int64), *columns,
        pointer(codes, torch.int64), pointer(error_steps, torch.int64), *cond.shape, guidance_scale, temperature, top_k,
        top_p,
    )  # fmt: skip
    logits = (pointer(cond), pointer(uncond))
    if backend == "cuda":
        stream = _dispatch.device_and_stream(cond.device)
        number = _dispatch.DTYPES[dtype]
        _dispatch.native().sample_codes_cuda(number, *logits, cond.stride(0), *arguments, *stream)
        if logps is not None:
            logps.copy_(_truncated_logprobs(cond, uncond, codes, guidance_scale, temperature, top_k, top_p))
        return None
    arguments += (pointer(logps, torch.float32), torch.get_num_threads())
    failed: int = _dispatch.run_checked(_dispatch.native().sample_codes, *logits, *arguments)
    return failed


def sample_codes_reference(
    cond: Tensor,  # (B, V)
    uncond: Tensor | None = None,
    *,
    guidance_scale: float = 1.0,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seeds: Tensor,  # (B,) int64
    steps: Tensor,  # (B,) int64
) -> tuple[Tensor, Tensor]:
    """Compute `sample_codes` in PyTorch: codes (B,), 0 for rows of invalid logits, and which rows these are, (B,)."""
    if cond.device.type in WITHOUT_FLOAT64:
        codes, invalid = sample_codes_reference(
            cond.cpu(), None if uncond is None else uncond.cpu(), guidance_scale=guidance_scale,
            temperature=temperature, top_k=top_k, top_p=top_p, seeds=seeds.cpu(), steps=steps.cpu(),
        )  # fmt: skip
        return codes.to(cond.device), invalid.to(cond.device)
    z = _guided(cond, uncond, guidance_scale)
    scores: Tensor = z
    if temperature > 0:
        z = z / z.new_full((), temperature)  # a tensor: CUDA would multiply by the rounded reciprocal of a number
        if top_k or top_p < 1:
            z = _truncate(z, top_k, top_p)
        scores = z + gumbel_noise(seeds, steps, z.shape[1])
    invalid = ~z.amax(1).isfinite()  # amax is NaN if the row holds NaN
    return scores.argmax(1).masked_fill(invalid, 0), invalid


def _guided(cond: Tensor, uncond: Tensor | None, guidance_scale: float) -> Tensor:
    z = cond.float()
    return z if uncond is None else uncond.float() + guidance_scale * (z - uncond.float())


def _truncated_logprobs(
    cond: Tensor,  # (B, V)
    uncond: Tensor | None,
    codes: Tensor,  # (B,) int64
    guidance_scale: float,
    temperature: float,
    top_k: int,
    top_p: float,
) -> Tensor:
    """Compute log p[code] (B,), p of what top_k and top_p keep. NaN for rows of invalid logits, without host sync."""
    z = _guided(cond, uncond, guidance_scale)
    z = _truncate(z / z.new_full((), temperature), top_k, top_p)
    return z.log_softmax(1).gather(1, codes[:, None])[:, 0]


@register_op(
    "sample_codes(Tensor cond, Tensor? uncond, float guidance_scale, float temperature, int top_k, float top_p,"
    " Tensor seeds, Tensor steps) -> Tensor",
    fake=lambda cond, *_: cond.new_empty(cond.shape[0], dtype=torch.int64),
)
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
    untouched = INT64_MIN  # steps may be any other number
    codes = cond.new_empty(len(cond), dtype=torch.int64)
    error_steps = torch.full_like(codes, untouched)
    invalid = sample_codes_into(
        cond, uncond, guidance_scale=guidance_scale, temperature=temperature, top_k=top_k, top_p=top_p,
        seeds=seeds, steps=steps, codes=codes, error_steps=error_steps,
    )  # fmt: skip
    if invalid is None and len(codes):
        invalid = error_steps.max().item() != untouched  # one look at all, cheaper than at each
    if invalid:
        rows = (error_steps != untouched).nonzero().flatten().tolist()
        raise OpError(
            f"sample_codes: the logits of rows {rows} hold NaN, +inf or only -inf; expected finite logits, "
            f"also after guidance ({guidance_scale:g}) and division by the temperature ({temperature:g}) in float32"
        )
    return codes


def gumbel_noise(seeds: Tensor, steps: Tensor, num_codes: int) -> Tensor:
    """Compute the noise of every code (see the module): seeds, steps (B,) int64 → (B, num_codes) float64."""
    blocks = torch.arange((num_codes + 3) // 4, device=seeds.device).expand(len(seeds), -1)
    seeds, steps = seeds[:, None], steps[:, None]
    low, high = ((word & _LOW).expand_as(blocks) for word in (steps, steps >> 32))
    words = philox4x32((blocks, low, high, torch.zeros_like(blocks)), (seeds & _LOW, (seeds >> 32) & _LOW))
    bits = torch.stack(words, -1).flatten(1)[:, :num_codes]
    return -(-((bits.double() + 0.5) * 2.0**-32).log()).log()


def philox4x32(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute Philox4x32-10 on 32-bit words in int64 tensors. Products wrap at 64 bits and lose no bit."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        low, high = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (high >> 32 & _LOW) ^ c1 ^ k0, high & _LOW, (low >> 32 & _LOW) ^ c3 ^ k1, low & _LOW
        k0, k1 = k0 + _KEY_STEPS[0] & _LOW, k1 + _KEY_STEPS[1] & _LOW
    return c0, c1, c2, c3


def _truncate(z: Tensor, top_k: int, top_p: float) -> Tensor:
    """Mask all but the top-k codes with -inf, then all but the fewest codes with weights that sum to top_p.

    Of equal logits top_p keeps the first ones. A row with a maximum that is not finite keeps it.
    """
    if top_k:
        z = z.masked_fill(z < z.topk(top_k, dim=1).values[:, -1:], -torch.inf)
    if top_p == 1:
        return z
    ordered, order = z.sort(dim=1, descending=True, stable=True)
    weights = _weights(ordered, ordered[:, :1])
    total = weights.sum(1, keepdim=True)
    needed = (total.double() * top_p).ceil().long().minimum(total)  # a sum above 2^53 may round up
    dropped = (weights.cumsum(1) - weights >= needed) & ordered[:, :1].isfinite()
    return ordered.masked_fill(dropped, -torch.inf).gather(1, order.argsort(1))


def _weights(z: Tensor, maximum: Tensor) -> Tensor:
    """Compute exp(z − maximum) rounded to units of 2^-40, as int64. Up to 2^22 of them can be summed.

    exp is 2^n times a Taylor series (error 2^-46), because additions and products round the same on every device.
    """
    t = (z.double() - maximum.double()).clamp(min=-30) * 1.4426950408889634  # e^-30 is less than half a unit
    n = t.round()
    r = (t - n) * 0.6931471805599453
    p = torch.full_like(r, 1 / math.factorial(11))
    for k in range(10, -1, -1):
        p.mul_(r).add_(1 / math.factorial(k))
    return (p * (n.long() + 1023 + 40 << 52).view(torch.float64)).round().long()


def wrap_int64(value: int) -> int:
    """Return an integer modulo 2^64 as int64. A seed may be an unsigned one of 64 bits, such as a hash."""
    return (value + 2**63) % 2**64 - 2**63


def _per_row(name: str, value: Tensor | Sequence[int] | int, B: int, device: torch.device) -> Tensor:
    if type(value) is int and name == "step":
        return torch.full((B,), check_int("sample_codes", name, value, INT64_MIN), dtype=torch.int64, device=device)
    if not hasattr(value, "__iter__"):
        value = [value] * B
    if not isinstance(value, Tensor):
        largest = 2**64 - 1 if name == "seeds" else INT64_MAX
        checked = [check_int("sample_codes", name, v, INT64_MIN, largest) for v in value]
        value = torch.tensor([wrap_int64(v) for v in checked], dtype=torch.int64)
    if tuple(value.shape) != (B,) or not _dispatch.is_integer(value):
        raise OpError(f"sample_codes: {name} is {describe(value)}, expected ({B},) int64")
    return value.to(device, torch.int64) if name == "seeds" else as_int64("sample_codes", name, value).to(device)


def _check(
    cond: Tensor, uncond: Tensor | None, guidance_scale: float, temperature: float, top_k: int, top_p: float
) -> int:
    for name, tensor in (("cond", cond), ("uncond", uncond)):
        if not isinstance(tensor, Tensor) and (tensor is not None or name == "cond"):
            raise OpError(f"sample_codes: {name} is {type(tensor).__name__}, expected a tensor")
    if cond.dim() != 2 or cond.shape[1] == 0 or not cond.is_floating_point():
        raise OpError(f"sample_codes: cond is {describe(cond)}, expected float (B, V)")
    if uncond is not None and (uncond.shape != cond.shape or uncond.device != cond.device):
        raise OpError(
            f"sample_codes: uncond is {tuple(uncond.shape)} on {uncond.device}, "
            f"expected {tuple(cond.shape)} on {cond.device} as cond"
        )
    if not math.isfinite(guidance_scale):
        raise OpError(f"sample_codes: guidance_scale is {guidance_scale}, expected a finite number (1 = no guidance)")
    if temperature != 0 and not 1e-30 <= temperature <= 1e30:  # the quotients must be finite in fp32
        raise OpError(
            f"sample_codes: temperature is {temperature}, expected 1e-30 to 1e30, or 0 for the most likely code"
        )
    check_int(
        "sample_codes", "top_k", min(top_k, INT64_MAX) if isinstance(top_k, int) else top_k, 0, hint=" (0 = all codes)"
    )
    if not 0 < top_p <= 1:
        raise OpError(f"sample_codes: top_p is {top_p}, expected 0 < top_p <= 1 (1 = all codes)")
    return cond.shape[0]

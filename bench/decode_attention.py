"""decode_attention with rotary embedding and cache write, against SDPA with a mask on the same cache.

`gb_s` counts the keys and values that must be read, and `share` is that over the bandwidth of a copy. On a GPU the
constants of the kernel are swept, and a cache that fits the L2 cache is read from memory, as in a step, where the
weights have replaced it.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from _measure import L2_BYTES, ceilings, chosen, dtype_name, interleaved, row, show, write
from torch import Tensor

from ospo_fast.ops import _dispatch
from ospo_fast.ops.decode_attention import decode_attention, rotate
from ospo_fast.packages import import_error

# rows, heads, head width, cached positions
CPU_SHAPES = [(32, 4, 64, 160), (2, 4, 64, 160)]
GPU_SHAPES = [(128, 32, 128, 640), (128, 16, 128, 640), (2, 32, 128, 640)]  # Janus-Pro-7B and 1B at 64 prompts, 7B at 1
# SPLIT, BLOCK, WARPS of the Triton kernel
SWEEP = [(128, 64, 4), (128, 32, 4), (128, 32, 2), (256, 64, 4), (256, 128, 8)]


def masked(qkv: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, slots: Tensor, lengths: Tensor):
    """As transformers with a static cache: the whole cache is read, and a mask hides positions that are not filled."""
    q, k, v = qkv.view(len(qkv), 3, -1, keys.shape[3]).unbind(1)
    c, s = cos[lengths, None], sin[lengths, None]
    keys[slots, :, lengths], values[slots, :, lengths] = rotate(k, c, s), v
    mask = torch.arange(keys.shape[2], device=qkv.device) <= lengths[:, None]
    y = F.scaled_dot_product_attention(rotate(q, c, s)[:, :, None], keys, values, attn_mask=mask[:, None, None])
    return y.flatten(1)


def flash_attn(heads: int, scale: float) -> Callable[..., Tensor]:
    """flash_attn_with_kvcache, as a peer."""
    from flash_attn import flash_attn_with_kvcache

    def run(
        qkv: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, slots: Tensor, lengths: Tensor
    ) -> Tensor:
        width = keys.shape[3]
        q, k, v = qkv.view(len(qkv), 1, -1, width).split((heads, keys.shape[1], keys.shape[1]), 2)
        y = flash_attn_with_kvcache(
            q, keys.transpose(1, 2), values.transpose(1, 2), k, v,
            rotary_cos=cos[:, : width // 2].contiguous(),
            rotary_sin=sin[:, width // 2 :].contiguous(),  # the half without the sign of rotate_half
            cache_seqlens=lengths.int(), cache_batch_idx=slots.int(), softmax_scale=scale, causal=True,
            rotary_interleaved=False, num_splits=-(-keys.shape[2] // 128),
        )  # fmt: skip
        return y.flatten(1)

    return run


def tuned(constants: tuple[int, int, int], **given: Any) -> Callable[..., Tensor]:
    """The Triton kernel with other constants."""
    from ospo_fast.kernels import decode_attention as kernels

    names = ("SPLIT", "BLOCK", "WARPS")

    def run(*arguments: Tensor) -> Tensor:
        before = [getattr(kernels, name) for name in names]
        for name, value in zip(names, constants, strict=True):
            setattr(kernels, name, value)
        try:
            return decode_attention(*arguments, backend="triton", **given)
        finally:
            for name, value in zip(names, before, strict=True):
                setattr(kernels, name, value)

    return run


def run(out: Path, quick: bool) -> None:
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    rows = []
    for M, H, D, L in [(4, 2, 16, 40)] if quick else GPU_SHAPES if device == "cuda" else CPU_SHAPES:
        if not chosen(f"{M} rows, {H} heads, {L} positions"):
            continue
        cache = torch.randn(2, M, H, L, D, device=device).to(dtype)
        cos, sin = torch.randn(2, L, D, device=device).to(dtype)
        slots, lengths = torch.arange(M, device=device), torch.full((M,), L - 1, device=device)
        variants = {"masked SDPA": masked}
        for name, available, _ in _dispatch.backends(device)["decode_attention"]:
            if available:
                variants[name] = partial(decode_attention, heads=H, scale=D**-0.5, backend=name)
        if device == "cuda" and not import_error("flash_attn"):
            variants["flash_attn"] = flash_attn(H, D**-0.5)
        if "triton" in variants and not quick:
            variants |= {
                "triton, split {}, block {}, {} warps".format(*constants): tuned(constants, heads=H, scale=D**-0.5)
                for constants in SWEEP
            }

        def inputs(M=M, H=H, D=D, rest=(cos, sin, *cache, slots, lengths)) -> tuple[Tensor, ...]:
            return torch.randn(M, 3 * H * D, device=device).to(dtype), *rest

        arguments = inputs()
        q64 = [x.double() if x.is_floating_point() else x for x in arguments]
        exact = masked(*q64)
        bound = 2 * (masked(*arguments) - exact).abs().max() + torch.finfo(dtype).eps * exact.abs().max()
        for name, function in variants.items():
            assert (function(*arguments) - exact).abs().max() <= bound, name
        limits = ceilings()
        floor = limits.floor_ms(bytes_moved=cache.nbytes)
        cold = cache.numel() * cache.element_size() < L2_BYTES
        for name, time in interleaved(variants, inputs, seconds=0.02 if quick else 0.3, cold=cold).items():
            gb_s = round(cache.numel() * cache.element_size() / time.median_ms / 1e6, 2)
            shapes = {"rows": M, "heads": H, "width": D, "length": L}
            more = limits.metrics(floor, time)
            rows.append(row("decode_attention", name, shapes, dtype_name(dtype), time, gb_s=gb_s, **more))
        write(rows, out, "decode_attention")
    show(rows)

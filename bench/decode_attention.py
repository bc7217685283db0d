"""decode_attention, rotary embedding and cache write included, against SDPA on the same cache and a mask.

`gb_s` counts the keys and values that must be read.
"""

from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from _measure import dtype_name, interleaved, row, show, write
from torch import Tensor

from ospo_fast.ops import _dispatch
from ospo_fast.ops.decode_attention import decode_attention, rotate

# rows, heads, head width, cached positions
CPU_SHAPES = [(32, 4, 64, 160), (2, 4, 64, 160)]
GPU_SHAPES = [(128, 32, 128, 640), (128, 16, 128, 640), (2, 32, 128, 640)]  # Janus-Pro-7B and 1B at 64 prompts, 7B at 1


def masked(qkv: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, slots: Tensor, lengths: Tensor):
    """As transformers does it with a static cache: the whole cache is read, and a mask hides what is not there yet."""
    q, k, v = qkv.view(len(qkv), 3, -1, keys.shape[3]).unbind(1)
    c, s = cos[lengths, None], sin[lengths, None]
    keys[slots, :, lengths], values[slots, :, lengths] = rotate(k, c, s), v
    mask = torch.arange(keys.shape[2], device=qkv.device) <= lengths[:, None]
    y = F.scaled_dot_product_attention(rotate(q, c, s)[:, :, None], keys, values, attn_mask=mask[:, None, None])
    return y.flatten(1)


def run(out: Path, quick: bool) -> None:
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    rows = []
    for M, H, D, L in [(4, 2, 16, 40)] if quick else GPU_SHAPES if device == "cuda" else CPU_SHAPES:
        cache = torch.randn(2, M, H, L, D, device=device).to(dtype)
        cos, sin = torch.randn(2, L, D, device=device).to(dtype)
        slots, lengths = torch.arange(M, device=device), torch.full((M,), L - 1, device=device)
        variants = {"masked SDPA": masked}
        for name, available, _ in _dispatch.backends(device)["decode_attention"]:
            if available:
                variants[name] = partial(decode_attention, heads=H, scale=D**-0.5, backend=name)

        def inputs(M=M, H=H, D=D, rest=(cos, sin, *cache, slots, lengths)) -> tuple[Tensor, ...]:
            return torch.randn(M, 3 * H * D, device=device).to(dtype), *rest

        arguments = inputs()
        q64 = [x.double() if x.is_floating_point() else x for x in arguments]
        exact = masked(*q64)
        bound = 2 * (masked(*arguments) - exact).abs().max() + torch.finfo(dtype).eps * exact.abs().max()
        for name, function in variants.items():
            assert (function(*arguments) - exact).abs().max() <= bound, name
        for name, time in interleaved(variants, inputs, seconds=0.02 if quick else 0.3).items():
            gb_s = round(cache.numel() * cache.element_size() / time.median_ms / 1e6, 2)
            shapes = {"rows": M, "heads": H, "width": D, "length": L}
            rows.append(row("decode_attention", name, shapes, dtype_name(dtype), time, gb_s=gb_s))
    write(rows, out, "decode_attention")
    show(rows)

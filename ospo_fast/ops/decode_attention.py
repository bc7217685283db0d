"""Attention of one new token per row against the keys and values of its slot."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ospo_fast.errors import OpError
from ospo_fast.ops import _dispatch


def decode_attention(
    qkv: Tensor,  # (M, (H + 2·Hkv)·D)
    cos: Tensor,  # (P, D)
    sin: Tensor,  # (P, D)
    keys: Tensor,  # (slots, Hkv, L, D)
    values: Tensor,
    slots: Tensor,  # (M,) int64
    lengths: Tensor,  # (M,) int64, −1 or more
    *,
    heads: int,
    scale: float,
    out: Tensor | None = None,
    shared_slots: bool = False,
    backend: str = "auto",
) -> Tensor:
    """softmax(scale · q·K)·V → (M, H·D), into `out` if given, with q and k of row m rotated at position lengths[m].

    A row holds query, key and value heads side by side. Its key and value are written at that position of slot
    slots[m], and it attends to positions 0 … lengths[m] of the slot: nothing behind them is read. Rotation:
    x·cos + shift(x)·sin with x shifted by D/2; `sin` carries the sign of rotate_half. Grouped queries where Hkv < H.
    A row of length −1 has no token: it gets zeros, and its slot is neither read nor written (flash-attn writes position
    0 of it). Not differentiable.

    shared_slots: rows may share a slot at different lengths, such as the next tokens of one sequence: all keys and
    values are written before any is read, so that each row has the bits of a call for itself after those before it.
    Without it no two rows with a token may share one.
    backend: "flash_attn" takes flash_attn_with_kvcache; "auto" does not, until a measurement shows it ahead.
    """
    rows, (_, kv_heads, _, width) = qkv.shape[0], keys.shape
    out = qkv.new_empty(rows, heads * width) if out is None else out
    chosen = _dispatch.resolve("decode_attention", backend, qkv.device.type)
    if not rows:
        return out
    arguments = (qkv, cos, sin, keys, values, slots, lengths, heads, scale, out)
    if chosen == "triton":
        _dispatch.triton("decode_attention").decode_attention(*arguments, shared_slots)
    elif chosen == "flash_attn":
        if shared_slots:
            raise OpError(
                "decode_attention: got shared_slots with backend='flash_attn', which writes as it reads; use 'auto'"
            )
        _flash(*arguments)
    elif chosen == "cpp" and qkv.dtype == torch.float32 and width % 16 == 0 and width <= 256:
        pointers = [tensor.data_ptr() for tensor in (qkv, cos, sin, keys, values, slots, lengths, out)]
        strides, threads = keys.stride(), torch.get_num_threads()
        sizes = (rows, heads, kv_heads, width, *strides[:2])
        _dispatch.native().decode_attention(*pointers, *sizes, scale, shared_slots, threads)
    else:
        decode_attention_reference(*arguments)
    return out


def decode_attention_reference(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    lengths: Tensor,
    heads: int,
    scale: float,
    out: Tensor,
) -> None:
    """The twin: SDPA on exact lengths, once for each run of rows of one length in neighbouring slots.

    Everything is written before anything is read: rows may share slots.
    """
    rows, (_, kv_heads, _, width) = len(qkv), keys.shape
    where, ends = slots.tolist(), lengths.tolist()
    index = lengths.to(cos.device).clamp(min=0)
    q, k, v = qkv.view(rows, -1, width).split((heads, kv_heads, kv_heads), 1)
    c, s = cos[index, None], sin[index, None]
    q, k = rotate(q, c, s), rotate(k, c, s)
    runs = []
    begin = 0
    while begin < rows:
        end = begin + 1
        while end < rows and ends[end] == ends[begin] and where[end] == where[end - 1] + 1:
            end += 1
        if ends[begin] < 0:
            out[begin:end] = 0
        else:
            runs.append((slice(begin, end), slice(where[begin], where[begin] + end - begin), ends[begin]))
        begin = end
    for run, part, length in runs:
        keys[part, :, length], values[part, :, length] = k[run], v[run]
    for run, part, length in runs:
        y = F.scaled_dot_product_attention(
            q[run, :, None],
            keys[part, :, : length + 1],
            values[part, :, : length + 1],
            scale=scale,
            enable_gqa=heads != kv_heads,
        )
        out[run] = y.flatten(1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x·cos + shift(x)·sin, the rotary embedding of Llama with its sign in the sine."""
    return x * cos + x.roll(x.shape[-1] // 2, -1) * sin


def _flash(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    lengths: Tensor,
    heads: int,
    scale: float,
    out: Tensor,
) -> None:
    from flash_attn import flash_attn_with_kvcache

    kv_heads, width = keys.shape[1], keys.shape[3]
    q, k, v = qkv.view(len(qkv), 1, -1, width).split((heads, kv_heads, kv_heads), 2)
    y = flash_attn_with_kvcache(
        q,
        keys.transpose(1, 2),
        values.transpose(1, 2),
        k,
        v,
        rotary_cos=cos[:, : width // 2].contiguous(),
        rotary_sin=sin[:, width // 2 :].contiguous(),  # the half that carries no sign
        cache_seqlens=lengths.clamp(min=0).int(),
        cache_batch_idx=slots.int(),
        softmax_scale=scale,
        causal=True,
        rotary_interleaved=False,
        num_splits=-(-keys.shape[2] // 128),
    )
    out.copy_(y.flatten(1).masked_fill(lengths[:, None] < 0, 0))

"""Attention of one new token per row over the cached keys and values of its slot."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ospo_fast.errors import OpError
from ospo_fast.ops import _dispatch
from ospo_fast.ops._dispatch import pointer


def decode_attention(
    qkv: Tensor,  # (M, (H + 2·Hkv)·D)
    cos: Tensor,  # (P, D)
    sin: Tensor,  # (P, D)
    keys: Tensor,  # (slots, Hkv, L, D)
    values: Tensor,
    slots: Tensor,  # (M,) int64
    lengths: Tensor,  # (M,) int64
    *,
    heads: int,
    scale: float,
    out: Tensor | None = None,
    shared_slots: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Compute softmax(scale · q·K)·V of each row after writing its own key and value to the cache.

    The key and value of row m go to position lengths[m] of slot slots[m]; the row attends to positions 0 … lengths[m]
    of that slot, and nothing after them is read. q and k are rotated: x·cos + shift(x)·sin at that position, with x
    shifted by D/2 (`rotate`). No gradient.

    Args:
        qkv: (M, (H + 2·Hkv)·D), the query, key and value heads of each row. Hkv < H: grouped queries.
        cos: (P, D), by position.
        sin: (P, D), with the sign of rotate_half.
        keys: (slots, Hkv, L, D), written.
        values: (slots, Hkv, L, D), written.
        slots: (M,) int64. Without `shared_slots`, rows with a token have different slots.
        lengths: (M,) int64. −1: the row has no token; it gets zeros, and its slot is neither read nor written.
        heads: H.
        scale: of the scores.
        out: (M, H·D).
        shared_slots: rows may share a slot at different lengths, such as the next tokens of one sequence. All keys and
            values are written before any is read, so each row has the same bits as in a separate call after the earlier
            rows.
        backend: "auto", "triton", "cpp" or "torch".

    Returns:
        (M, H·D), `out` if given.

    Raises:
        OpError: shapes that do not match, or a layout that no kernel reads; in C++ also slots or lengths beyond the
            cache, which are not read on CUDA, as a check would synchronize.

    """
    _check(qkv, cos, sin, keys, values, slots, lengths, heads, out)
    scale = _dispatch.check_float("decode_attention", "scale", scale)
    rows, (slot_count, kv_heads, positions, width) = qkv.shape[0], keys.shape
    out = qkv.new_empty(rows, heads * width) if out is None else out
    refused = _dispatch.fp32_only(qkv.dtype) or _refused_width(width)
    backend = _dispatch.resolve("decode_attention", backend, qkv.device.type, refused=refused)
    if not rows:
        return out
    arguments = (qkv, cos, sin, keys, values, slots, lengths, heads, scale, out)
    if backend == "triton":
        _dispatch.triton("decode_attention").decode_attention(*arguments, shared_slots)
    elif backend == "cpp":
        pointers = [pointer(t, torch.float32) for t in (qkv, cos, sin, keys, values)]
        pointers += [pointer(slots, torch.int64), pointer(lengths, torch.int64), pointer(out, torch.float32)]
        sizes = (rows, heads, kv_heads, width, slot_count, min(positions, len(cos)), *keys.stride()[:2])
        options = scale, shared_slots, torch.get_num_threads()
        _dispatch.run_checked(_dispatch.native().decode_attention, *pointers, *sizes, *options)
    else:
        decode_attention_reference(*arguments)
    return out


def _refused_width(width: int) -> dict[str, str]:
    if width % 16 or width > 256:
        return {"cpp": f"the heads have width {width}, expected a multiple of 16 up to 256"}
    return {}


def attends_row_by_row(width: int) -> bool:
    """Return whether fp32 heads of this width on a CPU have the same bits in any batch: in the compiled kernel."""
    return _dispatch.resolve("decode_attention", "auto", "cpu", refused=_refused_width(width)) == "cpp"


def _check(
    qkv: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, slots: Tensor, lengths: Tensor, heads: int,
    out: Tensor | None,
) -> None:  # fmt: skip
    """Raise OpError for shapes and layouts with which a kernel would leave the tensors."""
    op, rows = "decode_attention", qkv.shape[0]
    if keys.dim() != 4 or values.shape != keys.shape or values.stride() != keys.stride():
        got = f"{tuple(keys.shape)} and {tuple(values.shape)}"
        raise OpError(f"{op}: keys and values are {got}, expected one shape (slots, Hkv, L, D) with the same strides")
    kv_heads, width = keys.shape[1], keys.shape[3]
    if keys.stride(3) != 1 or keys.stride(2) != width:
        raise OpError(f"{op}: keys have strides {keys.stride()}, expected contiguous positions and heads (…, D, 1)")
    if heads < 1 or not kv_heads or heads % kv_heads:
        raise OpError(f"{op}: heads is {heads}, expected a multiple of the {kv_heads} heads of keys and values")
    if tuple(qkv.shape) != (rows, (heads + 2 * kv_heads) * width) or not qkv.is_contiguous():
        expected = (rows, (heads + 2 * kv_heads) * width)
        raise OpError(f"{op}: qkv is {tuple(qkv.shape)}, expected contiguous {expected} for {heads} heads")
    if not (cos.dim() == 2 and cos.shape == sin.shape and cos.shape[1] == width):
        raise OpError(f"{op}: cos and sin are {tuple(cos.shape)} and {tuple(sin.shape)}, expected (positions, {width})")
    if not slots.shape == lengths.shape == (rows,):
        got = f"{tuple(slots.shape)} and {tuple(lengths.shape)}"
        raise OpError(f"{op}: slots and lengths are {got}, expected ({rows},), one for each row of qkv")
    if out is not None and (tuple(out.shape) != (rows, heads * width) or not out.is_contiguous()):
        raise OpError(f"{op}: out is {tuple(out.shape)}, expected contiguous {(rows, heads * width)}")


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
    """Compute `decode_attention` with SDPA: one call per run of rows with equal lengths in consecutive slots.

    All keys and values are written before any is read, so rows may share slots.
    """
    rows, (_, kv_heads, _, width) = len(qkv), keys.shape
    slot, length = slots.tolist(), lengths.tolist()
    position = lengths.to(cos.device).clamp(min=0)
    q, k, v = qkv.view(rows, -1, width).split((heads, kv_heads, kv_heads), 1)
    c, s = cos[position, None], sin[position, None]
    q, k = rotate(q, c, s), rotate(k, c, s)
    runs: list[tuple[slice, slice, int]] = []  # rows, their slots, length
    begin = 0
    while begin < rows:
        end = begin + 1
        while end < rows and length[end] == length[begin] and slot[end] == slot[end - 1] + 1:
            end += 1
        if length[begin] < 0:
            out[begin:end] = 0
        else:
            runs.append((slice(begin, end), slice(slot[begin], slot[begin] + end - begin), length[begin]))
        begin = end
    for run, part, last in runs:
        keys[part, :, last], values[part, :, last] = k[run], v[run]
    for run, part, last in runs:
        y = F.scaled_dot_product_attention(
            q[run, :, None],
            keys[part, :, : last + 1],
            values[part, :, : last + 1],
            scale=scale,
            enable_gqa=heads != kv_heads,
        )
        if bool(((y == 0).all(-1) | ~y.isfinite().all(-1)).any()):
            # SDPA takes rows with only NaN or -inf as scores for masked ones and gives 0, and some of its products are
            # infinite because it scales them too late.
            y = _attend(q[run, :, None], keys[part, :, : last + 1], values[part, :, : last + 1], scale)
        out[run] = y.flatten(1)


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Compute softmax(scale · q·kᵀ)·v of q (M, H, 1, D) in at least fp32."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1).to(dtype) for x in (k, v))
    return (((q.to(dtype) * scale) @ k.mT).softmax(-1) @ v).to(q.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply Llama's rotary embedding, with its sign in `sin`: x·cos + shift(x)·sin."""
    return x * cos + x.roll(x.shape[-1] // 2, -1) * sin

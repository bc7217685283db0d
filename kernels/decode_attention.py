"""Attention of one new token per row to its cache slot: rotary embedding, cache write and split attention.

Each program attends to SPLIT positions, so that few rows still occupy the device. The number of splits depends on the
length of the row only, so the bits of a row do not depend on the batch. Two launches: split_kernel computes the
maximum, sum and weighted values of each split, combine_kernel combines them in order. Programs of rows of length -1
return at once. If rows share slots, store_kernel writes all new keys and values first.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# Swept by bench/decode_attention.py. Constants for all rows, because rows of different splits round differently.
SPLIT = 128
BLOCK = 64  # 16-bit positions read at once, half as many of 32 bits
WARPS = 4  # of a program of split_kernel
# Per thread of split_kernel: 16 warps fit a multiprocessor. By default the assembler aims at fewer and spills.
MAX_REGISTERS = 128


@triton.jit
def rotate(x, c, s, d, inside, WIDTH: tl.constexpr):
    """x·c + shift(x)·s in fp32 for one head at pointer x."""
    y = tl.load(x + d, mask=inside, other=0.0).to(tl.float32) * c
    y += tl.load(x + (d + WIDTH // 2) % WIDTH, mask=inside, other=0.0).to(tl.float32) * s
    return y


@triton.jit
def load_new(qkv, cos, sin, row, position, d, inside, GROUP: tl.constexpr, WIDTH: tl.constexpr):
    """Cosine and sine of the position, and the new rotated key and value of the program's key head."""
    kv_head, kv_heads = tl.program_id(1), tl.num_programs(1)
    c = tl.load(cos + position * WIDTH + d, mask=inside, other=0.0).to(tl.float32)
    s = tl.load(sin + position * WIDTH + d, mask=inside, other=0.0).to(tl.float32)
    key = qkv + (row * (GROUP + 2) * kv_heads + GROUP * kv_heads + kv_head) * WIDTH
    value = tl.load(key + kv_heads * WIDTH + d, mask=inside, other=0.0)
    return c, s, rotate(key, c, s, d, inside, WIDTH), value


@triton.jit(do_not_specialize=["slots", "lengths"])  # their alignment depends on the number of rows
def store_kernel(
    qkv,  # (M, (H + 2·Hkv)·D), contiguous
    cos,  # (P, D)
    sin,  # (P, D), with the sign of rotate_half
    keys,  # (slots, Hkv, L, D)
    values,
    slots,  # (M,) int64
    lengths,  # (M,) int64: the position of the new token; -1 for a row without one
    slot_stride,
    head_stride,
    GROUP: tl.constexpr,  # query heads per key head
    WIDTH: tl.constexpr,
    WIDTH_BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    position = tl.load(lengths + row)
    if position < 0:
        return
    d = tl.arange(0, WIDTH_BLOCK)
    inside = d < WIDTH
    _, _, k_new, v_new = load_new(qkv, cos, sin, row, position, d, inside, GROUP, WIDTH)
    target = tl.load(slots + row) * slot_stride + tl.program_id(1) * head_stride + position * WIDTH + d
    tl.store(keys + target, k_new.to(keys.dtype.element_ty), mask=inside)
    tl.store(values + target, v_new.to(values.dtype.element_ty), mask=inside)


@triton.jit
def attend_block(
    q,  # (WIDTH_BLOCK,)
    k_block,  # (LANES, WIDTH_BLOCK) pointers: the first position of each lane
    v_block,
    inside,  # (WIDTH_BLOCK,)
    count,  # positions of the block that are in the cache; None for all
    maximum,  # (LANES,)
    total,  # (LANES,)
    acc,  # (LANES, WIDTH_BLOCK)
    WIDTH: tl.constexpr,
    LANES: tl.constexpr,
    TILES: tl.constexpr,
):
    """Running maxima, sums and weighted values of each lane after a block of TILES · LANES positions."""
    # Tuples of 2D tiles: the layout of a 3D tensor depends on the version of Triton, and that of 3.6 exchanges every
    # block through shared memory. All loads come before the first use, so that as many are in flight as fit.
    keys, values, kept = (), (), ()
    for tile in tl.static_range(TILES):
        mask = inside[None, :]
        if count is not None:
            kept += (tile * LANES + tl.arange(0, LANES) < count,)
            mask &= kept[tile][:, None]
        keys += (tl.load(k_block + tile * LANES * WIDTH, mask=mask, other=0.0),)
        values += (tl.load(v_block + tile * LANES * WIDTH, mask=mask, other=0.0),)
    scores = ()
    larger = maximum
    for tile in tl.static_range(TILES):
        score = tl.sum(q[None, :] * keys[tile].to(tl.float32), 1)
        if count is not None:
            score = tl.where(kept[tile], score, float("-inf"))
        scores += (score,)
        larger = tl.maximum(larger, score)
    # Without a position so far, -inf − -inf would be NaN.
    shift = larger if count is None else tl.where(larger == float("-inf"), 0.0, larger)
    rescale = tl.exp2(maximum - shift)
    total *= rescale
    acc *= rescale[:, None]
    for tile in tl.static_range(TILES):
        p = tl.exp2(scores[tile] - shift)
        total += p
        acc += p[:, None] * values[tile].to(tl.float32)
    return larger, total, acc


@triton.jit(do_not_specialize=["slots", "lengths"])
def split_kernel(
    qkv,  # (M, (H + 2·Hkv)·D), contiguous
    cos,  # (P, D)
    sin,  # (P, D), with the sign of rotate_half
    keys,  # (slots, Hkv, L, D)
    values,
    slots,  # (M,) int64
    lengths,  # (M,) int64: the position of the new token; -1 for a row without one
    partial,  # (M, H, splits, D) fp32
    maxima,  # (M, H, splits) fp32
    sums,  # (M, H, splits) fp32
    slot_stride,
    head_stride,
    scale,
    GROUP: tl.constexpr,  # query heads per key head
    WIDTH: tl.constexpr,
    WIDTH_BLOCK: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,  # positions that all threads together read with one load each
    STORE: tl.constexpr,  # False: store_kernel has written the new keys and values
):
    row = tl.program_id(0).to(tl.int64)
    kv_head, kv_heads = tl.program_id(1), tl.num_programs(1)
    split, splits = tl.program_id(2), tl.num_programs(2)
    position = tl.load(lengths + row)
    begin = split * SPLIT
    if begin > position:
        return
    count = tl.minimum(position - begin, SPLIT).to(tl.int32)  # positions of this split that are in the cache
    full = count // BLOCK * BLOCK
    d = tl.arange(0, WIDTH_BLOCK)
    inside = d < WIDTH
    c, s, k_new, v_new = load_new(qkv, cos, sin, row, position, d, inside, GROUP, WIDTH)
    k_new, v_new = k_new.to(keys.dtype.element_ty), v_new.to(values.dtype.element_ty)
    cache = tl.load(slots + row) * slot_stride + kv_head * head_stride
    has_new = position < begin + SPLIT
    if STORE:  # noqa: SIM102 - at compile time
        if has_new:  # only this split attends to the new token, from registers
            tl.store(keys + cache + position * WIDTH + d, k_new, mask=inside)
            tl.store(values + cache + position * WIDTH + d, v_new, mask=inside)

    TILES: tl.constexpr = BLOCK // LANES
    block = cache + begin * WIDTH + tl.arange(0, LANES)[:, None] * WIDTH + d[None, :]
    for member in tl.static_range(GROUP):
        head = kv_head * GROUP + member
        q = rotate(qkv + (row * (GROUP + 2) * kv_heads + head) * WIDTH, c, s, d, inside, WIDTH)
        # Round to the dtype of the model, as the model does. log2(e) makes exp2 the exponential.
        q = q.to(qkv.dtype.element_ty).to(tl.float32) * (scale * 1.4426950408889634)
        maximum = tl.full((LANES,), float("-inf"), tl.float32)
        total = tl.zeros((LANES,), tl.float32)
        acc = tl.zeros((LANES, WIDTH_BLOCK), tl.float32)
        # Each lane has its own maximum, sum and values: threads exchange only the scores of a position within the loop.
        # The new token is added after the loop, so that no block needs a case for it.
        for first in range(0, full, BLOCK):
            k_block, v_block = keys + block + first * WIDTH, values + block + first * WIDTH
            maximum, total, acc = attend_block(
                q, k_block, v_block, inside, None, maximum, total, acc, WIDTH, LANES, TILES
            )
        if full < count:
            k_block, v_block = keys + block + full * WIDTH, values + block + full * WIDTH
            maximum, total, acc = attend_block(
                q, k_block, v_block, inside, count - full, maximum, total, acc, WIDTH, LANES, TILES
            )
        score = tl.where(has_new, tl.sum(q * k_new.to(tl.float32), 0), float("-inf"))
        larger = tl.maximum(tl.max(maximum, 0), score)
        rescale, p = tl.exp2(maximum - larger), tl.exp2(score - larger)
        total = tl.sum(total * rescale, 0) + p
        acc = tl.sum(acc * rescale[:, None], 0) + p * v_new.to(tl.float32)
        index = (row * GROUP * kv_heads + head) * splits + split
        tl.store(partial + index * WIDTH + d, acc, mask=inside)
        tl.store(maxima + index, larger)
        tl.store(sums + index, total)


@triton.jit(do_not_specialize=["lengths", "splits"])
def combine_kernel(
    partial,  # (M, H, splits, D) fp32
    maxima,  # (M, H, splits) fp32
    sums,  # (M, H, splits) fp32
    lengths,  # (M,) int64
    out,  # (M, H·D)
    splits,
    WIDTH: tl.constexpr,
    WIDTH_BLOCK: tl.constexpr,
    SPLIT: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    item = row * tl.num_programs(1) + tl.program_id(1)
    d = tl.arange(0, WIDTH_BLOCK)
    inside = d < WIDTH
    position = tl.load(lengths + row)
    used = tl.where(position < 0, 0, position // SPLIT + 1)
    maximum = tl.full((), float("-inf"), tl.float32)
    total = tl.zeros((), tl.float32)
    acc = tl.zeros((WIDTH_BLOCK,), tl.float32)
    for split in range(used):
        index = item * splits + split
        split_maximum = tl.load(maxima + index)
        larger = tl.maximum(maximum, split_maximum)
        rescale, grow = tl.exp2(maximum - larger), tl.exp2(split_maximum - larger)
        part = tl.load(partial + index * WIDTH + d, mask=inside, other=0.0)
        acc = acc * rescale + part * grow
        total = total * rescale + tl.load(sums + index) * grow
        maximum = larger
    y = tl.div_rn(acc, tl.where(position < 0, 1.0, total))  # "/" is approximate
    tl.store(out + item * WIDTH + d, y.to(out.dtype.element_ty), mask=inside)


def decode_attention(
    qkv: Tensor,  # (M, (H + 2·Hkv)·D)
    cos: Tensor,  # (P, D)
    sin: Tensor,  # (P, D)
    keys: Tensor,  # (slots, Hkv, L, D), the positions of each head contiguous
    values: Tensor,
    slots: Tensor,  # (M,) int64
    lengths: Tensor,  # (M,) int64
    heads: int,
    scale: float,
    out: Tensor,  # (M, H·D)
    shared_slots: bool = False,
) -> None:
    """Run the kernels. The workspace comes from torch's allocator, so that a captured graph keeps its own."""
    rows, (_, kv_heads, length, width), size = len(qkv), keys.shape, qkv.element_size()
    splits = triton.cdiv(length, SPLIT)
    partial = torch.empty(rows, heads, splits, width, dtype=torch.float32, device=qkv.device)
    maxima, sums = torch.empty(2, rows, heads, splits, dtype=torch.float32, device=qkv.device)
    tensors, strides = (qkv, cos, sin, keys, values, slots, lengths), keys.stride()[:2]
    width_block, group, block = triton.next_power_of_2(width), heads // kv_heads, BLOCK * 2 // size
    lanes = min(block, max(1, WARPS * 32 * 16 // (width_block * size)))  # 16 bytes per thread and load
    sizes = {"WIDTH": width, "WIDTH_BLOCK": width_block}
    with torch.cuda.device_of(qkv):
        if shared_slots:
            store_kernel[rows, kv_heads](*tensors, *strides, GROUP=group, num_warps=1, **sizes)
        split_kernel[rows, kv_heads, splits](
            *tensors, partial, maxima, sums, *strides, scale, GROUP=group, SPLIT=SPLIT, BLOCK=block, LANES=lanes,
            STORE=not shared_slots, num_warps=WARPS, maxnreg=MAX_REGISTERS, **sizes,
        )  # fmt: skip
        # One warp: each lane reads 16 bytes of a head of 128.
        combine_kernel[rows, heads](partial, maxima, sums, lengths, out, splits, SPLIT=SPLIT, num_warps=1, **sizes)

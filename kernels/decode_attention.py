"""One new token per row against the cache of its slot: rotary embedding, cache write and split attention.

Positions are split every SPLIT of them, so that few rows still fill the card, and the number of splits depends on
nothing but the row's own length: neither the batch nor its size changes a row's bits. Two launches: the splits, each
with its maximum, sum and weighted values, then their combination in order. Programs of rows of length -1 end at once.
Where rows share slots, a launch before them stores all new keys and values.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# What bench/decode_attention.py sweeps. Rows of different splits round differently, so they hold for all of them.
SPLIT = 128
BLOCK = 64  # positions of 16 bits read at once, half as many of 32 bits
WARPS = 4  # of a program that reads them
# Of a thread of split_kernel: 16 warps on a multiprocessor. Left to itself the assembler aims at fewer and spills.
MAX_REGISTERS = 128


@triton.jit
def rotated(x, c, s, d, shifted, inside):
    """x·c + shift(x)·s for a head at x, in fp32."""
    y = tl.load(x + d, mask=inside, other=0.0).to(tl.float32) * c
    y += tl.load(x + shifted, mask=inside, other=0.0).to(tl.float32) * s
    return y


@triton.jit
def store_kernel(
    qkv,  # (M, (H + 2·Hkv)·D), contiguous
    cos,  # (P, D)
    sin,  # (P, D), with the sign of rotate_half
    keys,  # (slots, Hkv, L, D)
    values,
    slots,  # (M,) int64
    lengths,  # (M,) int64: the position of the new token; -1 for a row that has none
    slot_stride,
    head_stride,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    WIDTH_BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    position = tl.load(lengths + row)
    if position < 0:
        return
    d = tl.arange(0, WIDTH_BLOCK)
    inside = d < WIDTH
    c = tl.load(cos + position * WIDTH + d, mask=inside, other=0.0).to(tl.float32)
    s = tl.load(sin + position * WIDTH + d, mask=inside, other=0.0).to(tl.float32)
    new = qkv + row * (HEADS + 2 * KV_HEADS) * WIDTH + (HEADS + kv_head) * WIDTH
    place = tl.load(slots + row) * slot_stride + kv_head * head_stride + position * WIDTH + d
    k_new = rotated(new, c, s, d, (d + WIDTH // 2) % WIDTH, inside)
    tl.store(keys + place, k_new.to(keys.dtype.element_ty), mask=inside)
    v_new = tl.load(new + KV_HEADS * WIDTH + d, mask=inside, other=0.0)
    tl.store(values + place, v_new.to(values.dtype.element_ty), mask=inside)


@triton.jit
def attend_block(
    q,  # (WIDTH_BLOCK,)
    k_place,  # (LANES, WIDTH_BLOCK) pointers: the first position of each lane
    v_place,
    inside,  # (WIDTH_BLOCK,)
    left,  # how many positions of the block are in the cache; None where all of them are
    peak,  # (LANES,)
    total,  # (LANES,)
    acc,  # (LANES, WIDTH_BLOCK)
    WIDTH: tl.constexpr,
    LANES: tl.constexpr,
    TILES: tl.constexpr,
):
    """Running maxima, sums and weighted values of each lane after a block of TILES · LANES positions."""
    # Tuples of 2D tiles: the layout of one 3D tensor depends on the version of Triton, and that of 3.6 exchanges every
    # block through shared memory. All loads come before the first use: as many are in flight as registers allow.
    keys, values, kept = (), (), ()
    for tile in tl.static_range(TILES):
        mask = inside[None, :]
        if left is not None:
            kept += (tile * LANES + tl.arange(0, LANES) < left,)
            mask &= kept[tile][:, None]
        keys += (tl.load(k_place + tile * LANES * WIDTH, mask=mask, other=0.0),)
        values += (tl.load(v_place + tile * LANES * WIDTH, mask=mask, other=0.0),)
    scores = ()
    higher = peak
    for tile in tl.static_range(TILES):
        score = tl.sum(q[None, :] * keys[tile].to(tl.float32), 1)
        if left is not None:
            score = tl.where(kept[tile], score, float("-inf"))
        scores += (score,)
        higher = tl.maximum(higher, score)
    # A lane that has no position yet has nothing to shift by.
    shift = higher if left is None else tl.where(higher == float("-inf"), 0.0, higher)
    shrink = tl.exp2(peak - shift)
    total *= shrink
    acc *= shrink[:, None]
    for tile in tl.static_range(TILES):
        p = tl.exp2(scores[tile] - shift)
        total += p
        acc += p[:, None] * values[tile].to(tl.float32)
    return higher, total, acc


@triton.jit(do_not_specialize=["splits"])  # of every length of a cache
def split_kernel(
    qkv,  # (M, (H + 2·Hkv)·D), contiguous
    cos,  # (P, D)
    sin,  # (P, D), with the sign of rotate_half
    keys,  # (slots, Hkv, L, D)
    values,
    slots,  # (M,) int64
    lengths,  # (M,) int64: the position of the new token; -1 for a row that has none
    partial,  # (M, H, splits, D) fp32
    peaks,  # (M, H, splits) fp32
    sums,  # (M, H, splits) fp32
    slot_stride,
    head_stride,
    splits,
    scale,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    WIDTH_BLOCK: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,  # positions that all threads together read with one load each
    STORE: tl.constexpr,  # False: store_kernel has written the new keys and values
):
    row = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    position = tl.load(lengths + row)
    begin = split * SPLIT
    if begin > position:
        return
    here = tl.minimum(position - begin, SPLIT).to(tl.int32)  # positions of this split that are in the cache
    full = here // BLOCK * BLOCK
    d = tl.arange(0, WIDTH_BLOCK)
    inside = d < WIDTH
    shifted = (d + WIDTH // 2) % WIDTH
    c = tl.load(cos + position * WIDTH + d, mask=inside, other=0.0).to(tl.float32)
    s = tl.load(sin + position * WIDTH + d, mask=inside, other=0.0).to(tl.float32)
    cache = tl.load(slots + row) * slot_stride + kv_head * head_stride

    new = qkv + row * (HEADS + 2 * KV_HEADS) * WIDTH + (HEADS + kv_head) * WIDTH
    k_new = rotated(new, c, s, d, shifted, inside).to(keys.dtype.element_ty)
    v_new = tl.load(new + KV_HEADS * WIDTH + d, mask=inside, other=0.0).to(values.dtype.element_ty)
    has_new = position < begin + SPLIT
    if STORE:  # noqa: SIM102 - at compile time
        if has_new:  # this split alone stores it, and takes it from registers
            tl.store(keys + cache + position * WIDTH + d, k_new, mask=inside)
            tl.store(values + cache + position * WIDTH + d, v_new, mask=inside)

    GROUP: tl.constexpr = HEADS // KV_HEADS
    TILES: tl.constexpr = BLOCK // LANES
    place = cache + begin * WIDTH + tl.arange(0, LANES)[:, None] * WIDTH + d[None, :]
    for member in tl.static_range(GROUP):
        head = kv_head * GROUP + member
        old = qkv + row * (HEADS + 2 * KV_HEADS) * WIDTH + head * WIDTH
        q = rotated(old, c, s, d, shifted, inside)
        # Rounded as the model rounds it; log2 e makes exp2 the exponential.
        q = q.to(qkv.dtype.element_ty).to(tl.float32) * (scale * 1.4426950408889634)
        peak = tl.full((LANES,), float("-inf"), tl.float32)
        total = tl.zeros((LANES,), tl.float32)
        acc = tl.zeros((LANES, WIDTH_BLOCK), tl.float32)
        # Each lane has its own maximum, sum and values, so that threads exchange nothing but the scores of a position
        # until the last block is done. The new token follows after it: no block has a case for it.
        for first in range(0, full, BLOCK):
            k_place, v_place = keys + place + first * WIDTH, values + place + first * WIDTH
            peak, total, acc = attend_block(q, k_place, v_place, inside, None, peak, total, acc, WIDTH, LANES, TILES)
        if full < here:
            k_place, v_place = keys + place + full * WIDTH, values + place + full * WIDTH
            left = here - full
            peak, total, acc = attend_block(q, k_place, v_place, inside, left, peak, total, acc, WIDTH, LANES, TILES)
        score = tl.where(has_new, tl.sum(q * k_new.to(tl.float32), 0), float("-inf"))
        higher = tl.maximum(tl.max(peak, 0), score)
        shrink, p = tl.exp2(peak - higher), tl.exp2(score - higher)
        total = tl.sum(total * shrink, 0) + p
        acc = tl.sum(acc * shrink[:, None], 0) + p * v_new.to(tl.float32)
        index = (row * HEADS + head) * splits + split
        tl.store(partial + index * WIDTH + d, acc, mask=inside)
        tl.store(peaks + index, higher)
        tl.store(sums + index, total)


@triton.jit(do_not_specialize=["splits"])
def combine_kernel(
    partial,  # (M, H, splits, D) fp32
    peaks,  # (M, H, splits) fp32
    sums,  # (M, H, splits) fp32
    lengths,  # (M,) int64
    out,  # (M, H·D)
    splits,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    WIDTH_BLOCK: tl.constexpr,
    SPLIT: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    d = tl.arange(0, WIDTH_BLOCK)
    inside = d < WIDTH
    position = tl.load(lengths + row)
    used = tl.where(position < 0, 0, position // SPLIT + 1)
    index = (row * HEADS + head) * splits
    peak = tl.full((), float("-inf"), tl.float32)
    total = tl.zeros((), tl.float32)
    acc = tl.zeros((WIDTH_BLOCK,), tl.float32)
    for split in range(used):
        here = tl.load(peaks + index + split)
        higher = tl.maximum(peak, here)
        shrink, grow = tl.exp2(peak - higher), tl.exp2(here - higher)
        part = tl.load(partial + (index + split) * WIDTH + d, mask=inside, other=0.0)
        acc = acc * shrink + part * grow
        total = total * shrink + tl.load(sums + index + split) * grow
        peak = higher
    y = tl.div_rn(acc, tl.where(position < 0, 1.0, total))  # "/" would approximate
    tl.store(out + (row * HEADS + head) * WIDTH + d, y.to(out.dtype.element_ty), mask=inside)


def splits(length: int) -> int:
    """How many splits caches of `length` positions need."""
    return triton.cdiv(length, SPLIT)


def blocking(width_block: int, size: int) -> dict[str, int]:
    """BLOCK and LANES of split_kernel for a cache of numbers of `size` bytes: 16 bytes for each thread and load."""
    block = BLOCK * 2 // size
    return {"BLOCK": block, "LANES": min(block, max(1, WARPS * 32 * 16 // (width_block * size)))}


def decode_attention(
    qkv: Tensor,  # (M, (H + 2·Hkv)·D)
    cos: Tensor,  # (P, D)
    sin: Tensor,  # (P, D)
    keys: Tensor,  # (slots, Hkv, L, D), each head's positions contiguous
    values: Tensor,
    slots: Tensor,  # (M,) int64
    lengths: Tensor,  # (M,) int64
    heads: int,
    scale: float,
    out: Tensor,  # (M, H·D)
    shared_slots: bool = False,
) -> None:
    """The kernels; the workspace comes from torch's allocator, so that a captured graph keeps its own."""
    rows, (_, kv_heads, length, width) = len(qkv), keys.shape
    count = splits(length)
    partial = torch.empty(rows, heads, count, width, dtype=torch.float32, device=qkv.device)
    peaks, sums = torch.empty(2, rows, heads, count, dtype=torch.float32, device=qkv.device)
    given, strides = (qkv, cos, sin, keys, values, slots, lengths), keys.stride()[:2]
    sizes = {"HEADS": heads, "WIDTH": width, "WIDTH_BLOCK": triton.next_power_of_2(width)}
    with torch.cuda.device_of(qkv):
        if shared_slots:
            store_kernel[rows, kv_heads](*given, *strides, KV_HEADS=kv_heads, num_warps=1, **sizes)
        split_kernel[rows, kv_heads, count](
            *given, partial, peaks, sums, *strides, count, scale, KV_HEADS=kv_heads, SPLIT=SPLIT,
            STORE=not shared_slots, num_warps=WARPS, maxnreg=MAX_REGISTERS, **sizes,
            **blocking(sizes["WIDTH_BLOCK"], qkv.element_size()),
        )  # fmt: skip
        # One warp: 16 bytes of a head of 128 to each lane.
        combine_kernel[rows, heads](partial, peaks, sums, lengths, out, count, SPLIT=SPLIT, num_warps=1, **sizes)

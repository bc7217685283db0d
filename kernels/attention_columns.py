"""Attention probabilities of a few key columns beside any attention: see `ospo_fast.ops.attention_columns`.

`row_lse_kernel` makes the log-sum-exp of the wanted rows where the attention that ran gave none: one program per
(rows, head, item), QKᵀ only, online maximum and sum. `columns_kernel` makes the maps: one program per (rows, item) that
goes through the heads, so that the sum over them has one order and needs no atomics. Where these are too few programs
for the device, each goes through a part of the heads, and `sum_parts_kernel` adds the parts up in their order.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E = 1.4426950408889634
MOST_COLUMNS = 32  # at a time
PROGRAMS = 2  # of columns_kernel for each multiprocessor, at least, where smaller blocks and parts of heads allow it
SUMMED = 256  # rows of a program of sum_parts_kernel
Bounds = tuple[Tensor, Tensor, Tensor, Tensor]


@triton.jit
def products(
    q,  # (rows, D), of one head, as k
    k,
    row,  # (ROWS,) indices and whether they are any, then (COLUMNS,) of k
    column,
    row_inside,
    column_inside,
    q_row,
    k_row,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PART: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """(ROWS, COLUMNS) fp32: the products of rows of q and k, summed over PART of their width at a time."""
    result = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(0, BLOCK_D, PART):
        d = first + tl.arange(0, PART)
        rows = tl.load(q + row[:, None] * q_row + d[None, :], mask=row_inside[:, None] & (d[None, :] < D), other=0.0)
        columns = tl.load(
            k + column[None, :] * k_row + d[:, None], mask=column_inside[None, :] & (d[:, None] < D), other=0.0
        )
        result = tl.dot(rows, columns, result, input_precision="ieee")
    return result


# What changes from batch to batch is no reason to compile again.
@triton.jit(do_not_specialize=["length"])
def row_lse_kernel(
    q,  # (B, Hq, S, D)
    k,  # (B, Hkv, S, D)
    lse,  # (B, Hq, length) fp32, contiguous
    row_start,  # (B,) int64, as the three below
    row_count,
    key_start,
    key_end,
    q_item,
    q_head,
    q_row,
    k_item,
    k_head,
    k_row,
    group,  # query heads per key head
    length,
    scale,  # times log2(e)
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PART: tl.constexpr,  # of BLOCK_D, as columns_kernel's
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    CAUSAL: tl.constexpr,
):
    head, item = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = i < tl.load(row_count + item)
    row = tl.load(row_start + item) + i
    # Of 32 bits as the step is: with others Triton before 3.6 makes no code for sm_100.
    first, last = tl.load(key_start + item).to(tl.int32), tl.load(key_end + item).to(tl.int32)
    end = tl.minimum(last, tl.max(tl.where(inside, row, -1), 0).to(tl.int32) + 1) if CAUSAL else last
    queries = q + item * q_item + head * q_head
    source = k + item * k_item + (head // group) * k_head
    most = tl.full((ROWS,), -float("inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    for begin in range(first, end, KEYS):
        j = begin + tl.arange(0, KEYS)
        there = j < end
        # Of 64 bits times a stride: element indices of long packed sequences pass 2³¹.
        wide = j.to(tl.int64)
        scores = products(queries, source, row, wide, inside, there, q_row, k_row, D, BLOCK_D, PART, ROWS, KEYS) * scale
        seen = there[None, :] & inside[:, None]
        if CAUSAL:
            seen = seen & (j[None, :] <= row[:, None])
        scores = tl.where(seen, scores, -float("inf"))
        larger = tl.maximum(most, tl.max(scores, 1))
        # A row that has seen nothing yet has nothing to shift by.
        shift = tl.where(larger == -float("inf"), 0.0, larger)
        total = total * tl.exp2(most - shift) + tl.sum(tl.exp2(scores - shift[:, None]), 1)
        most = larger
    # In base 2, as `columns_kernel` wants it.
    result = most + tl.log2(tl.where(total == 0.0, 1.0, total))
    tl.store(lse + (item * tl.num_programs(1) + head) * length + i, result, mask=i < length)


@triton.jit(do_not_specialize=["heads", "objects", "per_object", "begin", "length", "lse_item", "lse_head", "out_part"])
def columns_kernel(
    q,  # (B, Hq, S, D)
    k,  # (B, Hkv, S, D)
    lse,  # (B, Hq, S) fp32, or what row_lse_kernel made
    columns,  # (B, O·C) int64, contiguous, as the four below; -1 = none
    row_start,  # (B,)
    row_count,
    key_start,
    key_end,
    share,  # (B, O) fp32, contiguous
    out,  # (B, O, length) fp32
    q_item,
    q_head,
    q_row,
    k_item,
    k_head,
    k_row,
    lse_item,
    lse_head,
    lse_row,
    out_part,  # 0 where there is one
    out_item,
    out_object,
    out_row,
    heads,  # of each part
    group,
    objects,
    per_object,  # C
    begin,  # the first column of this launch
    length,
    scale,  # times log2(e)
    lse_scale,  # to base 2
    weight,  # over the number of all heads
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PART: tl.constexpr,  # of BLOCK_D at a time
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CAUSAL: tl.constexpr,
    RELATIVE: tl.constexpr,  # lse starts with the first wanted row
    ACCUMULATE: tl.constexpr,
):
    item = tl.program_id(1).to(tl.int64)
    part = tl.program_id(2)
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = i < tl.load(row_count + item)
    row = tl.load(row_start + item) + i
    n = begin + tl.arange(0, COLUMNS)
    column = tl.load(columns + item * objects * per_object + n, mask=n < objects * per_object, other=-1)
    seen = (column >= tl.load(key_start + item)) & (column < tl.load(key_end + item)) & (column >= 0)
    shown = seen[None, :] & inside[:, None]
    if CAUSAL:
        shown = shown & (column[None, :] <= row[:, None])
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    at = tl.where(seen, column, 0)
    place = i if RELATIVE else row
    norms = lse + item * lse_item + place * lse_row
    first, end = part * heads, (part + 1) * heads
    norm = tl.load(norms + first * lse_head, mask=inside, other=0.0)
    for head in range(first, end):
        # One head ahead: Triton's pipeline of loads holds only those of a product.
        following = tl.load(norms + (head + 1) * lse_head, mask=inside & (head + 1 < end), other=0.0)
        wide = tl.cast(head, tl.int64)  # heads of long packed sequences lie more than 2³¹ elements apart
        queries = q + item * q_item + wide * q_head
        source = k + item * k_item + (wide // group) * k_head
        scores = products(queries, source, row, at, inside, seen, q_row, k_row, D, BLOCK_D, PART, ROWS, COLUMNS) * scale
        total += tl.where(shown, tl.exp2(scores - norm[:, None] * lse_scale), 0.0)
        norm = following
    owner = n // per_object
    for o in range(objects):
        value = tl.sum(tl.where(owner[None, :] == o, total, 0.0), 1) * (tl.load(share + item * objects + o) * weight)
        where = out + part * out_part + item * out_item + o * out_object + i.to(tl.int64) * out_row
        if ACCUMULATE:
            value += tl.load(where, mask=i < length, other=0.0)
        tl.store(where, value, mask=i < length)


@triton.jit(do_not_specialize=["parts", "objects", "length"])
def sum_parts_kernel(
    partial,  # (parts, B, O, length) fp32, contiguous
    out,  # (B, O, length) fp32
    out_item,
    out_object,
    out_row,
    parts,
    objects,
    length,
    ROWS: tl.constexpr,
    ACCUMULATE: tl.constexpr,
):
    o, item, items = tl.program_id(1), tl.program_id(2).to(tl.int64), tl.num_programs(2)
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    value = tl.zeros((ROWS,), tl.float32)
    for part in range(parts):
        value += tl.load(partial + ((part * items + item) * objects + o) * length + i, mask=i < length, other=0.0)
    where = out + item * out_item + o * out_object + i.to(tl.int64) * out_row
    if ACCUMULATE:
        value += tl.load(where, mask=i < length, other=0.0)
    tl.store(where, value, mask=i < length)


def blocking(items: int, rows: int, heads: int, multiprocessors: int) -> tuple[int, int]:
    """Rows of a program of `columns_kernel`, and how many parts the heads are taken in.

    Large blocks of rows read the keys of the columns less often, so they come first; then small ones; then the fewest
    parts that give each multiprocessor PROGRAMS. heads: of the keys, so that queries of a group stay together.
    """
    wanted = PROGRAMS * multiprocessors
    if items * triton.cdiv(rows, 32) >= wanted:
        return 32, 1
    programs = items * triton.cdiv(rows, 16)
    divisors = (parts for parts in range(1, heads + 1) if heads % parts == 0)
    return 16, next((parts for parts in divisors if programs * parts >= wanted), heads)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Of a GPU; the interpreter takes the programs one by one."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _part(block_d: int, size: int) -> int:
    """What a product of numbers of `size` bytes sums at a time: float32 has no tensor cores, and its loops no room."""
    return block_d if size == 2 else 16


def _tile(block_d: int, size: int) -> int:
    """Rows and keys of a program of `row_lse_kernel`."""
    return 64 if size == 2 and block_d <= 128 else 32


def _warps(rows: int, size: int) -> int:
    """Warps of a program of `columns_kernel`: on tensor cores a warp takes 16 rows and 8 columns of a product."""
    return rows // 8 if size == 2 else 4


def attention_columns(
    out: Tensor,
    q: Tensor,
    k: Tensor,
    columns: Tensor,
    bounds: Bounds,
    share: Tensor,
    lse: Tensor | None,
    scale: float,
    causal: bool,
    weight: float,
    accumulate: bool,
) -> None:
    """Writes out (B, O, length) = or += weight · mean of the probabilities; arguments as of the op, already checked."""
    if q.shape[-1] > 256:
        raise ValueError(f"attention_columns: the Triton kernel takes heads of at most 256, got {q.shape[-1]}")
    q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
    (B, heads, _, D), kv, (_, objects, C), length = q.shape, k.shape[1], columns.shape, out.shape[2]
    block_d, given = max(16, triton.next_power_of_2(D)), lse is not None
    options = {"D": D, "BLOCK_D": block_d, "PART": _part(block_d, q.element_size()), "CAUSAL": causal}
    width = min(MOST_COLUMNS, max(16, triton.next_power_of_2(objects * C)))
    size, parts = blocking(B, length, kv, multiprocessors(q.device))
    with torch.cuda.device_of(q):
        if lse is None:
            lse = q.new_empty(B, heads, length, dtype=torch.float32)
            tile = _tile(block_d, q.element_size())
            row_lse_kernel[triton.cdiv(length, tile), heads, B](
                q, k, lse, *bounds, *q.stride()[:3], *k.stride()[:3], heads // kv, length, scale * LOG2E,
                **options, ROWS=tile, KEYS=tile,
            )  # fmt: skip
        lse = lse.float()  # a copy, where it is one, has strides of its own
        target = out if parts == 1 else out.new_empty(parts, *out.shape)
        for begin in range(0, objects * C, width):
            columns_kernel[triton.cdiv(length, size), B, parts](
                q, k, lse, columns, *bounds, share, target, *q.stride()[:3], *k.stride()[:3], *lse.stride(),
                *(0, *target.stride())[-4:], heads // parts, heads // kv, objects, C, begin, length, scale * LOG2E,
                LOG2E if given else 1.0, weight / heads,
                **options, ROWS=size, COLUMNS=width, RELATIVE=not given,
                ACCUMULATE=begin > 0 or (accumulate and parts == 1), num_warps=_warps(size, q.element_size()),
            )  # fmt: skip
        if parts > 1:
            sum_parts_kernel[triton.cdiv(length, SUMMED), objects, B](
                target, out, *out.stride(), parts, objects, length, ROWS=SUMMED, ACCUMULATE=accumulate
            )

"""Attention probabilities of a few key columns: see `ospo_fast.ops.attention_columns`.

`row_lse_kernel` computes the log-sum-exp of the requested rows if the attention that ran does not provide it: one
program per (rows, head, item), QKᵀ only, with an online maximum and sum. `columns_kernel` computes the maps: one
program per (rows, item) that loops over the heads, so that their sum has a fixed order and needs no atomics. If these
are too few programs for the device, each loops over a part of them, and `sum_parts_kernel` adds the parts in order.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E = 1.4426950408889634
MAX_COLUMNS = 32  # per launch of columns_kernel
MIN_PROGRAMS = 2  # of columns_kernel per multiprocessor, as far as smaller blocks and parts of heads allow
SUM_ROWS = 256  # of a program of sum_parts_kernel
Bounds = tuple[Tensor, Tensor, Tensor, Tensor]


@triton.jit
def products(
    q,  # (rows, D) of one head
    k,  # (keys, D) of one head
    row,  # (ROWS,)
    column,  # (COLUMNS,)
    row_inside,  # masks of row and column
    column_inside,
    q_row,
    k_row,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PART: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Products (ROWS, COLUMNS) in fp32 of rows of q and k, over PART of their width at a time."""
    result = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(0, BLOCK_D, PART):
        d = first + tl.arange(0, PART)
        rows = tl.load(q + row[:, None] * q_row + d[None, :], mask=row_inside[:, None] & (d[None, :] < D), other=0.0)
        columns = tl.load(
            k + column[None, :] * k_row + d[:, None], mask=column_inside[None, :] & (d[:, None] < D), other=0.0
        )
        result = tl.dot(rows, columns, result, input_precision="ieee")
    return result


# Not specialized, like all that changes from batch to batch: other values and alignments compile no other kernel.
BOUND_NAMES = ["row_start", "row_count", "key_start", "key_end"]


@triton.jit(do_not_specialize=[*BOUND_NAMES, "length"])
def row_lse_kernel(
    q,  # (B, Hq, S, D)
    k,  # (B, Hkv, S, D)
    lse,  # (B, Hq, length) fp32, contiguous
    row_start,  # (B,) int64, like the next three
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
    PART: tl.constexpr,  # of BLOCK_D at a time
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    CAUSAL: tl.constexpr,
):
    head, item = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = i < tl.load(row_count + item)
    row = tl.load(row_start + item) + i
    # 32 bits like the step: Triton before 3.6 cannot compile other bounds for sm_100.
    first, last = tl.load(key_start + item).to(tl.int32), tl.load(key_end + item).to(tl.int32)
    end = tl.minimum(last, tl.max(tl.where(inside, row, -1), 0).to(tl.int32) + 1) if CAUSAL else last
    queries = q + item * q_item + head * q_head
    source = k + item * k_item + (head // group) * k_head
    maximum = tl.full((ROWS,), -float("inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    for begin in range(first, end, KEYS):
        j = begin + tl.arange(0, KEYS)
        is_key = j < end
        # 64 bits: element offsets in long packed sequences exceed 2³¹.
        key = j.to(tl.int64)
        scores = products(queries, source, row, key, inside, is_key, q_row, k_row, D, BLOCK_D, PART, ROWS, KEYS) * scale
        visible = is_key[None, :] & inside[:, None]
        if CAUSAL:
            visible = visible & (j[None, :] <= row[:, None])
        scores = tl.where(visible, scores, -float("inf"))
        larger = tl.maximum(maximum, tl.max(scores, 1))
        # Without a visible key so far, -inf − -inf would be NaN.
        shift = tl.where(larger == -float("inf"), 0.0, larger)
        total = total * tl.exp2(maximum - shift) + tl.sum(tl.exp2(scores - shift[:, None]), 1)
        maximum = larger
    result = maximum + tl.log2(tl.where(total == 0.0, 1.0, total))  # to base 2
    tl.store(lse + (item * tl.num_programs(1) + head) * length + i, result, mask=i < length)


@triton.jit(
    do_not_specialize=[
        *BOUND_NAMES, "columns", "share", "lse_item", "lse_head", "out_part", "out_item", "out_object", "heads",
        "objects", "per_object", "begin", "length", "lse_offset", "accumulate",
    ]
)  # fmt: skip
def columns_kernel(
    q,  # (B, Hq, S, D)
    k,  # (B, Hkv, S, D)
    lse,  # (B, Hq, S) fp32, or (B, Hq, length) from row_lse_kernel
    columns,  # (B, O·C) int64, contiguous; -1 = none
    row_start,  # (B,) int64, like the next three
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
    out_part,  # 0 for a single part
    out_item,
    out_object,
    out_row,
    heads,  # per part
    group,  # query heads per key head
    objects,
    per_object,  # C
    begin,  # the first column of this launch
    length,
    scale,  # times log2(e)
    lse_scale,  # converts lse to base 2
    lse_offset,  # 1: the first row of lse is that of the sequence; 0: the first requested row
    weight,  # divided by the number of heads
    accumulate,  # 1: add to out; 0: overwrite it
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PART: tl.constexpr,  # of BLOCK_D at a time
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CAUSAL: tl.constexpr,
):
    item = tl.program_id(1).to(tl.int64)
    part = tl.program_id(2)
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = i < tl.load(row_count + item)
    start = tl.load(row_start + item)
    row = start + i
    n = begin + tl.arange(0, COLUMNS)
    column = tl.load(columns + item * objects * per_object + n, mask=n < objects * per_object, other=-1)
    is_key = (column >= tl.load(key_start + item)) & (column < tl.load(key_end + item)) & (column >= 0)
    visible = is_key[None, :] & inside[:, None]
    if CAUSAL:
        visible = visible & (column[None, :] <= row[:, None])
    key = tl.where(is_key, column, 0)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    norms = lse + item * lse_item + (start * lse_offset + i) * lse_row
    first, end = part * heads, (part + 1) * heads
    norm = tl.load(norms + first * lse_head, mask=inside, other=0.0)
    for head in range(first, end):
        # One head ahead: Triton pipelines only the loads of a product.
        next_norm = tl.load(norms + (head + 1) * lse_head, mask=inside & (head + 1 < end), other=0.0)
        head_64 = tl.cast(head, tl.int64)  # heads of long packed sequences are more than 2³¹ elements apart
        queries = q + item * q_item + head_64 * q_head
        source = k + item * k_item + (head_64 // group) * k_head
        scores = products(queries, source, row, key, inside, is_key, q_row, k_row, D, BLOCK_D, PART, ROWS, COLUMNS)
        total += tl.where(visible, tl.exp2(scores * scale - norm[:, None] * lse_scale), 0.0)
        norm = next_norm
    owner = n // per_object
    for o in range(objects):
        value = tl.sum(tl.where(owner[None, :] == o, total, 0.0), 1) * (tl.load(share + item * objects + o) * weight)
        target = out + part * out_part + item * out_item + o * out_object + i.to(tl.int64) * out_row
        value += tl.load(target, mask=(i < length) & (accumulate != 0), other=0.0)
        tl.store(target, value, mask=i < length)


@triton.jit(do_not_specialize=["out_item", "out_object", "parts", "objects", "length", "accumulate"])
def sum_parts_kernel(
    partial,  # (parts, B, O, length) fp32, contiguous
    out,  # (B, O, length) fp32
    out_item,
    out_object,
    out_row,
    parts,
    objects,
    length,
    accumulate,  # 1: add to out; 0: overwrite it
    ROWS: tl.constexpr,
):
    o, item, items = tl.program_id(1), tl.program_id(2).to(tl.int64), tl.num_programs(2)
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    value = tl.zeros((ROWS,), tl.float32)
    for part in range(parts):
        value += tl.load(partial + ((part * items + item) * objects + o) * length + i, mask=i < length, other=0.0)
    target = out + item * out_item + o * out_object + i.to(tl.int64) * out_row
    value += tl.load(target, mask=(i < length) & (accumulate != 0), other=0.0)
    tl.store(target, value, mask=i < length)


def blocking(items: int, rows: int, kv_heads: int, multiprocessors: int) -> tuple[int, int]:
    """Choose the rows per program of `columns_kernel`, and into how many parts to split the heads.

    Large blocks come first, because they read the keys less often; then small blocks; then the fewest parts that give
    each multiprocessor MIN_PROGRAMS programs. Key heads are split, so that the queries of a group stay together.
    """
    needed = MIN_PROGRAMS * multiprocessors
    if items * triton.cdiv(rows, 32) >= needed:
        return 32, 1
    programs = items * triton.cdiv(rows, 16)
    divisors = (parts for parts in range(1, kv_heads + 1) if kv_heads % parts == 0)
    return 16, next((parts for parts in divisors if programs * parts >= needed), kv_heads)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 1 for the interpreter, which runs one program at a time."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


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
    """Write out (B, O, length) = or += weight · mean of the probabilities, for checked arguments of the op."""
    q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
    (B, heads, _, D), kv, (_, objects, C), length = q.shape, k.shape[1], columns.shape, out.shape[2]
    block_d, is_half, computes_lse = max(16, triton.next_power_of_2(D)), q.element_size() == 2, lse is None
    # float32 has no tensor cores: a product over the whole width would spill registers.
    options = {"D": D, "BLOCK_D": block_d, "PART": block_d if is_half else 16, "CAUSAL": causal}
    width = min(MAX_COLUMNS, max(16, triton.next_power_of_2(objects * C)))
    rows, parts = blocking(B, length, kv, multiprocessors(q.device))
    with torch.cuda.device_of(q):
        if lse is None:
            lse = q.new_empty(B, heads, length, dtype=torch.float32)
            tile = 64 if is_half and block_d <= 128 else 32
            row_lse_kernel[triton.cdiv(length, tile), heads, B](
                q, k, lse, *bounds, *q.stride()[:3], *k.stride()[:3], heads // kv, length, scale * LOG2E,
                **options, ROWS=tile, KEYS=tile,
            )  # fmt: skip
        lse = lse.float()  # a copy may have other strides
        target = out if parts == 1 else out.new_empty(parts, *out.shape)
        for begin in range(0, objects * C, width):
            columns_kernel[triton.cdiv(length, rows), B, parts](
                q, k, lse, columns, *bounds, share, target, *q.stride()[:3], *k.stride()[:3], *lse.stride(),
                *(0, *target.stride())[-4:], heads // parts, heads // kv, objects, C, begin, length, scale * LOG2E,
                1.0 if computes_lse else LOG2E, int(not computes_lse), weight / heads,
                int(begin > 0 or (accumulate and parts == 1)), **options, ROWS=rows, COLUMNS=width,
                num_warps=rows // 8 if is_half else 4,  # a warp computes 16 rows and 8 columns on tensor cores
            )  # fmt: skip
        if parts > 1:
            sum_parts_kernel[triton.cdiv(length, SUM_ROWS), objects, B](
                target, out, *out.stride(), parts, objects, length, int(accumulate), ROWS=SUM_ROWS
            )

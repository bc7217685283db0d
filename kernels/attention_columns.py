"""Attention probabilities of a few key columns beside any attention: see `ospo_fast.ops.attention_columns`.

Two kernels. `row_lse_kernel` makes the log-sum-exp of the wanted rows where the attention that ran gave none: one
program per (rows, head, item), QKᵀ only, online maximum and sum. `columns_kernel` makes the maps: one program per
(rows, item) that goes through the heads, so that the sum over them has one order and needs no atomics.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E = 1.4426950408889634
MOST_COLUMNS = 32  # at a time
Bounds = tuple[Tensor, Tensor, Tensor, Tensor]


@triton.jit
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
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    CAUSAL: tl.constexpr,
):
    head, item = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = i < tl.load(row_count + item)
    row = tl.load(row_start + item) + i
    first, last = tl.load(key_start + item), tl.load(key_end + item)
    end = tl.minimum(last, tl.max(tl.where(inside, row, -1), 0) + 1) if CAUSAL else last
    d = tl.arange(0, BLOCK_D)
    rows = tl.load(
        q + item * q_item + head * q_head + row[:, None] * q_row + d[None, :],
        mask=inside[:, None] & (d[None, :] < D),
        other=0.0,
    )
    source = k + item * k_item + (head // group) * k_head
    most = tl.full((ROWS,), -float("inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    for begin in range(first, end, KEYS):
        j = begin + tl.arange(0, KEYS)
        keys = tl.load(source + j[None, :] * k_row + d[:, None], mask=(j[None, :] < end) & (d[:, None] < D), other=0.0)
        scores = tl.dot(rows, keys, input_precision="ieee") * scale
        seen = (j[None, :] < end) & inside[:, None]
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


@triton.jit
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
    out_item,
    out_object,
    out_row,
    heads,
    group,
    objects,
    per_object,  # C
    begin,  # the first column of this launch
    length,
    scale,  # times log2(e)
    lse_scale,  # to base 2
    weight,  # over the number of heads
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CAUSAL: tl.constexpr,
    RELATIVE: tl.constexpr,  # lse starts with the first wanted row
    ACCUMULATE: tl.constexpr,
):
    item = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = i < tl.load(row_count + item)
    row = tl.load(row_start + item) + i
    d = tl.arange(0, BLOCK_D)
    n = begin + tl.arange(0, COLUMNS)
    column = tl.load(columns + item * objects * per_object + n, mask=n < objects * per_object, other=-1)
    seen = (column >= tl.load(key_start + item)) & (column < tl.load(key_end + item)) & (column >= 0)
    shown = seen[None, :] & inside[:, None]
    if CAUSAL:
        shown = shown & (column[None, :] <= row[:, None])
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    at = tl.where(seen, column, 0)
    for head in range(heads):
        rows = tl.load(
            q + item * q_item + head * q_head + row[:, None] * q_row + d[None, :],
            mask=inside[:, None] & (d[None, :] < D),
            other=0.0,
        )
        keys = tl.load(
            k + item * k_item + (head // group) * k_head + at[None, :] * k_row + d[:, None],
            mask=seen[None, :] & (d[:, None] < D),
            other=0.0,
        )
        scores = tl.dot(rows, keys, input_precision="ieee") * scale
        place = i if RELATIVE else row
        norm = tl.load(lse + item * lse_item + head * lse_head + place * lse_row, mask=inside, other=0.0)
        total += tl.where(shown, tl.exp2(scores - norm[:, None] * lse_scale), 0.0)
    owner = n // per_object
    for o in range(objects):
        value = tl.sum(tl.where(owner[None, :] == o, total, 0.0), 1) * (tl.load(share + item * objects + o) * weight)
        where = out + item * out_item + o * out_object + i.to(tl.int64) * out_row
        if ACCUMULATE:
            value += tl.load(where, mask=i < length, other=0.0)
        tl.store(where, value, mask=i < length)


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
    options = {"D": D, "BLOCK_D": block_d, "CAUSAL": causal}
    width = min(MOST_COLUMNS, max(16, triton.next_power_of_2(objects * C)))
    # Few rows a program where there are few programs: each goes through all heads.
    size = 16 if B * triton.cdiv(length, 32) < 256 else 32
    with torch.cuda.device_of(q):
        if lse is None:
            lse = q.new_empty(B, heads, length, dtype=torch.float32)
            tile = 64 if block_d * q.element_size() <= 256 and q.element_size() == 2 else 32
            row_lse_kernel[triton.cdiv(length, tile), heads, B](
                q, k, lse, *bounds, *q.stride()[:3], *k.stride()[:3], heads // kv, length, scale * LOG2E,
                **options, ROWS=tile, KEYS=tile,
            )  # fmt: skip
        lse = lse.float()  # a copy, where it is one, has strides of its own
        for begin in range(0, objects * C, width):
            columns_kernel[triton.cdiv(length, size), B](
                q, k, lse, columns, *bounds, share, out, *q.stride()[:3], *k.stride()[:3], *lse.stride(),
                *out.stride(), heads, heads // kv, objects, C, begin, length, scale * LOG2E,
                LOG2E if given else 1.0, weight / heads,
                **options, ROWS=size, COLUMNS=width, RELATIVE=not given, ACCUMULATE=accumulate or begin > 0,
            )  # fmt: skip


_SHAPES = (("bf16", 128, 64), ("fp16", 256, 32), ("fp32", 64, 32))  # dtype, width of a head, rows and keys
_ROWS = dict.fromkeys(("row_start", "row_count", "key_start", "key_end"), "*i64")
_STRIDES = dict.fromkeys(("q_item", "q_head", "q_row", "k_item", "k_head", "k_row"), "i64")
_LSE_ARGUMENTS = {**_ROWS, **_STRIDES, "group": "i32", "length": "i32", "scale": "fp32"}
_COLUMN_ARGUMENTS = {
    "columns": "*i64",
    **_ROWS,
    "share": "*fp32",
    "out": "*fp32",
    **_STRIDES,
    **dict.fromkeys(("lse_item", "lse_head", "lse_row", "out_item", "out_object", "out_row"), "i64"),
    **dict.fromkeys(("heads", "group", "objects", "per_object", "begin", "length"), "i32"),
    **dict.fromkeys(("scale", "lse_scale", "weight"), "fp32"),
}

# What is compiled ahead of time: for each kernel its variants, as argument types and constants.
VARIANTS = {
    row_lse_kernel: [
        (
            {"q": f"*{dtype}", "k": f"*{dtype}", "lse": "*fp32", **_LSE_ARGUMENTS},
            {"D": width, "BLOCK_D": width, "ROWS": size, "KEYS": size, "CAUSAL": True},
        )
        for dtype, width, size in _SHAPES
    ],
    columns_kernel: [
        (
            {"q": f"*{dtype}", "k": f"*{dtype}", "lse": "*fp32", **_COLUMN_ARGUMENTS},
            {"D": width, "BLOCK_D": width, "ROWS": few, "COLUMNS": few, "CAUSAL": True}
            | {"RELATIVE": few == 16, "ACCUMULATE": True},
        )
        for dtype, width, _ in _SHAPES
        for few in (16, 32)
    ],
}

"""Attention probabilities of a few key columns, averaged over heads, without the attention matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from ospo_fast.errors import OpError
from ospo_fast.ops import _dispatch

Bounds = tuple["int | Tensor", "int | Tensor"]


def attention_columns(
    q: Tensor,  # (B, Hq, S, D)
    k: Tensor,  # (B, Hkv, S, D)
    columns: Tensor,  # (B, O, C)
    *,
    rows: Bounds,
    scale: float | None = None,
    lse: Tensor | None = None,  # (B, Hq, S)
    causal: bool = True,
    out: Tensor | None = None,  # (B, O, count)
    weight: float = 1.0,
    key_range: Bounds | None = None,
    backend: str = "auto",
) -> Tensor:
    """A[b,o,i] = mean over heads h and columns c of softmax_j(scale · q[b,h,start+i]·k[b,h,j])[c], for i < count.

    q, k float, after position encoding; Hq a multiple of Hkv (grouped queries); scale: D^-0.5 by default.
    columns integer, -1 = none: the mean is over the others, and an object without any gives 0. A column that the row
    does not see (causal, key_range) has probability 0.
    rows = (start, count), ints or (B,) tensors; with a tensor count the result has max(count) rows, 0 beyond each.
    key_range = (start, end), ints or (B,) tensors: the keys a sequence may see, so that left padding has no part;
    None: all. A row that sees no key gives 0.
    lse: natural-log-sum-exp of each row's scaled scores over the keys it sees, from the attention that ran (base-2
    values: times ln 2). With it only the columns' scores are computed; without, the rows' scores block by block.
    out: (B, O, count) fp32; weight · A is added to it, and it is returned. Without it: weight · A.
    Result fp32 (float64 for float64 inputs), not differentiable. The float64 twin is `attention_columns_reference`.
    Raises OpError: shapes, dtypes or devices that do not fit, columns or rows outside the sequence.
    """
    _dispatch.resolve("attention_columns", backend, q.device.type)
    start, count, first, last = _check(q, k, columns, rows, lse, key_range)
    length = _longest(rows[1])
    expected = (q.shape[0], columns.shape[1], length)
    if out is not None and (tuple(out.shape) != expected or out.dtype != _result_dtype(q) or out.device != q.device):
        raise OpError(
            f"attention_columns: out is {out.dtype} {tuple(out.shape)} on {out.device}, "
            f"expected {_result_dtype(q)} {expected} on {q.device}"
        )
    with torch.no_grad():
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        maps: Tensor = torch.ops.ospo_fast.attention_columns(
            q, k, columns, start, count, first, last, lse, float(scale), causal, length
        )
        return maps.mul_(weight) if out is None else out.add_(maps, alpha=weight)


def attention_columns_reference(
    q: Tensor,
    k: Tensor,
    columns: Tensor,
    *,
    rows: Bounds,
    scale: float | None = None,
    causal: bool = True,
    weight: float = 1.0,
    key_range: Bounds | None = None,
) -> Tensor:
    """The float64 twin of `attention_columns`: the whole softmax matrix, item by item, column by column."""
    start, count, first, last = _check(q, k, columns, rows, None, key_range)
    group, S = q.shape[1] // k.shape[1], q.shape[2]
    scores = q.double() @ k.double().repeat_interleave(group, 1).transpose(-1, -2)
    scores *= q.shape[-1] ** -0.5 if scale is None else scale
    result = scores.new_zeros(q.shape[0], columns.shape[1], _longest(rows[1]))
    position = torch.arange(S, device=q.device)
    for b in range(q.shape[0]):
        seen = ((position >= first[b]) & (position < last[b])).expand(S, S)
        if causal:
            seen = seen & (position <= position[:, None])
        probs = scores[b].masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num(0).mean(0)  # (S, S)
        window = probs[int(start[b]) : int(start[b] + count[b])]
        for o, wanted in enumerate(columns[b].tolist()):
            used = [c for c in wanted if c >= 0]
            if used:
                result[b, o, : len(window)] = weight * window[:, used].mean(-1)
    return result


def _longest(count: int | Tensor) -> int:
    if isinstance(count, Tensor):
        return int(count.max()) if count.numel() else 0
    return count


def _result_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _check(
    q: Tensor, k: Tensor, columns: Tensor, rows: Bounds, lse: Tensor | None, key_range: Bounds | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Row start, row count, first key, end of keys: (B,) int64 each, on q's device."""
    op = "attention_columns"
    if q.dim() != 4 or k.dim() != 4 or not q.is_floating_point() or q.dtype != k.dtype:
        raise OpError(
            f"{op}: q is {q.dtype} {tuple(q.shape)}, k {k.dtype} {tuple(k.shape)}; "
            "expected one floating dtype, (B, Hq, S, D) and (B, Hkv, S, D)"
        )
    B, heads, S, D = q.shape
    if (k.shape[0], k.shape[2], k.shape[3]) != (B, S, D) or k.shape[1] == 0 or heads % k.shape[1]:
        raise OpError(
            f"{op}: k has shape {tuple(k.shape)}, q {tuple(q.shape)}; "
            "expected k (B, Hkv, S, D) with Hq a multiple of Hkv"
        )
    if columns.dim() != 3 or columns.shape[0] != B or columns.is_floating_point() or columns.dtype == torch.bool:
        raise OpError(f"{op}: columns are {columns.dtype} {tuple(columns.shape)}, expected integer ({B}, O, C)")
    if not q.device == k.device == columns.device:
        raise OpError(
            f"{op}: q is on {q.device}, k on {k.device}, columns on {columns.device}; move them to one device"
        )
    if columns.numel() and (int(columns.min()) < -1 or int(columns.max()) >= S):
        raise OpError(f"{op}: columns reach from {int(columns.min())} to {int(columns.max())}, expected -1 to {S - 1}")
    if lse is not None and (tuple(lse.shape) != (B, heads, S) or not lse.is_floating_point()):
        raise OpError(
            f"{op}: lse is {lse.dtype} {tuple(lse.shape)}, "
            f"expected float {(B, heads, S)} (slice off a kernel's padding)"
        )
    start, count = _bounds("rows", rows, q)
    if B and (int(start.min()) < 0 or int(count.min()) < 0 or int((start + count).max()) > S):
        raise OpError(f"{op}: rows start at {start.tolist()} and count {count.tolist()}, beyond the {S} positions")
    first, last = _bounds("key_range", (0, S) if key_range is None else key_range, q)
    if B and (int(first.min()) < 0 or int(last.max()) > S or bool((first > last).any())):
        raise OpError(f"{op}: key_range is {first.tolist()} to {last.tolist()}, expected 0 <= start <= end <= {S}")
    return start, count, first, last


def _bounds(name: str, pair: Bounds, q: Tensor) -> tuple[Tensor, Tensor]:
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        raise OpError(f"attention_columns: {name} is {pair!r}, expected a pair of ints or (B,) integer tensors")
    B = q.shape[0]
    tensors = [torch.as_tensor(value, device=q.device) for value in pair]
    for value in tensors:
        if value.is_floating_point() or value.dtype == torch.bool or tuple(value.shape) not in ((), (B,)):
            raise OpError(
                f"attention_columns: {name} holds {value.dtype} {tuple(value.shape)}, "
                f"expected ints or ({B},) integer tensors"
            )
    return tensors[0].long().expand(B), tensors[1].long().expand(B)


# ---------------------------------------------------------------- the op

torch.library.define(
    "ospo_fast::attention_columns",
    "(Tensor q, Tensor k, Tensor columns, Tensor row_start, Tensor row_count, Tensor key_start, Tensor key_end,"
    " Tensor? lse, float scale, bool causal, SymInt length) -> Tensor",
)

_BLOCK_BYTES = 16 * 2**20  # of scores at a time: the speed choice on CPU, where it stays near the cache


@torch.library.impl("ospo_fast::attention_columns", "CompositeExplicitAutograd")
def _attention_columns(
    q: Tensor,
    k: Tensor,
    columns: Tensor,
    row_start: Tensor,
    row_count: Tensor,
    key_start: Tensor,
    key_end: Tensor,
    lse: Tensor | None,
    scale: float,
    causal: bool,
    length: int,
) -> Tensor:
    B, heads, S, D = q.shape
    kv, objects, dtype = k.shape[1], columns.shape[1], _result_dtype(q)
    maps = q.new_zeros(B, objects, length, dtype=dtype)
    if maps.numel() == 0 or columns.shape[2] == 0:
        return maps
    wanted = columns.reshape(B, -1).long()  # (B, O·C)
    gather = wanted.clamp(min=0)[:, None, :, None].expand(B, kv, -1, D)
    keys = k.gather(2, gather).to(dtype)  # (B, Hkv, O·C, D)
    used = (wanted >= 0).view(B, objects, -1)
    share = used.to(dtype) / (used.sum(-1, keepdim=True).clamp(min=1) * heads)
    visible = used & ((columns >= key_start.view(-1, 1, 1)) & (columns < key_end.view(-1, 1, 1)))
    everything = k.to(dtype) if lse is None else None
    position = torch.arange(S, device=q.device)
    block = max(1, _BLOCK_BYTES // max(1, B * heads * S * dtype.itemsize))
    for begin in range(0, length, block):
        i = torch.arange(begin, min(begin + block, length), device=q.device)
        inside = i < row_count[:, None]  # (B, R)
        at = torch.where(inside, row_start[:, None] + i, 0)
        picked = q.gather(2, at[:, None, :, None].expand(B, heads, -1, D)).to(dtype)
        picked = (picked * scale).view(B, kv, -1, D)  # heads of a group side by side: (B, Hkv, g·R, D)
        if everything is not None:
            scores = (picked @ everything.transpose(-1, -2)).view(B, heads, -1, S)
            seen = (position >= key_start[:, None]) & (position < key_end[:, None])
            seen = seen[:, None, :] & (position <= at[..., None]) if causal else seen[:, None, :]
            norm = scores.masked_fill_(~seen[:, None], -torch.inf).logsumexp(-1)  # (B, Hq, R)
        elif lse is not None:
            norm = lse.gather(2, at[:, None].expand(B, heads, -1)).to(dtype)
        probs = (picked @ keys.transpose(-1, -2)).view(B, heads, len(i), objects, -1)
        probs = probs.sub_(norm[..., None, None]).exp_()
        shown = visible[:, None] & inside[:, :, None, None]  # (B, R, O, C)
        if causal:
            shown = shown & (columns[:, None] <= at[:, :, None, None])
        probs = probs.masked_fill_(~shown[:, None], 0).sum(1)  # heads
        maps[:, :, begin : begin + len(i)] = (probs * share[:, None]).sum(-1).transpose(1, 2)
    return maps


@torch.library.register_fake("ospo_fast::attention_columns")
def _(q: Tensor, k: Tensor, columns: Tensor, *args: object) -> Tensor:
    length = args[-1]
    assert isinstance(length, (int, torch.SymInt))
    return q.new_empty(q.shape[0], columns.shape[1], length, dtype=_result_dtype(q))

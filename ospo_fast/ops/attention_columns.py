"""Compute attention probabilities of a few key columns, averaged over heads, without the attention matrix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ospo_fast.errors import OpError
from ospo_fast.ops import _dispatch
from ospo_fast.ops._dispatch import (
    INT64_MIN,
    as_int64,
    check_float,
    check_int,
    describe,
    pointer,
    register_op,
    result_dtype,
)
from ospo_fast.ops._transfer import to_device_packed

Bounds = tuple["int | Tensor", "int | Tensor"]
MAX_TRITON_WIDTH = 256  # of a head


def attention_columns(
    q: Tensor,
    k: Tensor,
    columns: Tensor,
    *,
    rows: Bounds,
    scale: float | None = None,
    lse: Tensor | None = None,
    causal: bool = True,
    out: Tensor | None = None,
    weight: float = 1.0,
    key_range: Bounds | None = None,
    backend: str = "auto",
) -> Tensor:
    """Compute A[b,o,i] = mean over heads h and columns c of softmax_j(scale · q[b,h,start+i]·k[b,h,j])[c], i < count.

    Results are deterministic. On CUDA the order of summation over heads depends on the number of sequences, and the
    checks of columns and rows synchronize with the device: for many layers, build a `ColumnRequest` once. The float64
    reference is `attention_columns_reference`. No gradient. NaN, +inf or only -inf among the scores of a row, also by
    overflow of fp32, gives NaN, as in softmax.

    Packed sequences: expand q and k (1, H, S, D) over the sequences, which copies nothing, and give each its rows and
    its key_range.

    Args:
        q: (B, Hq, S, D) float, after position encoding.
        k: (B, Hkv, S, D), after position encoding; Hq is a multiple of Hkv (grouped queries).
        columns: (B, O, C) integer key positions of each object, -1 = none. The mean is over the others; an object
            without columns gives 0. A column that a row does not attend to (causal, key_range) has probability 0.
        rows: (start, count), ints or (B,) tensors. The result has max(count) rows, 0 beyond the count of each sequence.
        scale: default D^-0.5.
        lse: (B, Hq, S) natural log-sum-exp of each row's scaled scores over its keys, from the attention that ran
            (base-2 values times ln 2). With it only the scores of the columns are computed; without it, those of all
            keys, block by block.
        causal: rows attend to keys up to their own position.
        out: (B, O, count) in the result's dtype; weight · A is added to it, and it is returned.
        weight: factor of the result.
        key_range: (start, end) of the keys of each sequence, ints or (B,) tensors, to exclude padding; None: all. A row
            without keys gives 0.
        backend: "auto", "triton" (CUDA, D <= 256), "cpp" (CPU) or "torch".

    Returns:
        (B, O, count) fp32 (float64 for float64 inputs).

    Raises:
        OpError: wrong shapes, dtypes or devices, columns or rows outside the sequence.

    """
    _check(q, k, lse)
    if q.device != columns.device:
        raise OpError(f"attention_columns: q is on {q.device}, columns on {columns.device}; move them to one device")
    request = ColumnRequest.from_args(columns, q.shape[0], q.shape[2], rows=rows, key_range=key_range, device=q.device)
    return request._run_checked(q, k, scale, lse, causal, out, weight, backend)


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
    """Compute `attention_columns` in float64, in PyTorch."""
    _check(q, k, None)
    r = ColumnRequest.from_args(columns, q.shape[0], q.shape[2], rows=rows, key_range=key_range, device=q.device)
    maps = q.new_zeros(*columns.shape[:2], r.length, dtype=torch.float64)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if maps.numel() and columns.shape[2]:
        _compute_torch(maps, q.double(), k.double(), None, r.tensors, scale, causal)
    return maps * weight


@dataclass(frozen=True, eq=False)
class ColumnRequest:
    """Checked arguments of `attention_columns`, on the device.

    Build it once and run it for every layer: it does not synchronize. All tensors but `share` are int64.
    """

    columns: Tensor  # (B, O, C)
    row_start: Tensor  # (B,), like the next three
    row_count: Tensor
    key_start: Tensor
    key_end: Tensor
    share: Tensor  # (B, O) fp32: 1 / number of an object's columns, 1 without columns
    length: int  # rows of the result
    positions: int  # S
    backend: str  # that "auto" resolves to

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """share, columns, row_start, row_count, key_start, key_end."""
        return self.share, self.columns, self.row_start, self.row_count, self.key_start, self.key_end

    @staticmethod
    def from_args(
        columns: Tensor,
        batch: int,
        positions: int,
        *,
        rows: Bounds,
        key_range: Bounds | None = None,
        device: torch.device | None = None,
    ) -> ColumnRequest:
        """Check arguments as in `attention_columns`, on any device, and move them to `device`, by default the CPU.

        Raises OpError.
        """
        op, S = "attention_columns", check_int("attention_columns", "positions", positions, 0)
        if columns.dim() != 3 or columns.shape[0] != batch or not _dispatch.is_integer(columns):
            raise OpError(f"{op}: columns are {describe(columns)}, expected integer ({batch}, O, C)")
        if columns.device.type != "meta":
            columns = as_int64(op, "columns", columns.cpu()).resolve_neg().clone()  # as in _bounds
        if columns.numel():
            lowest, highest = (int(bound) for bound in columns.aminmax())
            if lowest < -1 or highest >= S:
                raise OpError(f"{op}: columns are from {lowest} to {highest}, expected -1 to {S - 1}")
        (start, count), (starts, counts) = _bounds("rows", rows, batch)
        length = rows[1] if isinstance(rows[1], int) else max(counts, default=0)
        outside = any(
            first < 0 or number < 0 or first > S - number for first, number in zip(starts, counts, strict=True)
        )
        if outside or not 0 <= length <= S:
            raise OpError(f"{op}: rows start at {starts} and count {counts or length}, beyond the {S} positions")
        (first, end), (firsts, ends) = _bounds("key_range", (0, S) if key_range is None else key_range, batch)
        if any(low < 0 or high > S or low > high for low, high in zip(firsts, ends, strict=True)):
            raise OpError(f"{op}: key_range is {firsts} to {ends}, expected 0 <= start <= end <= {S}")
        share = (columns >= 0).sum(-1, dtype=torch.float32).clamp_(min=1).reciprocal_()
        device = torch.device("cpu") if device is None else device
        return _on_device((share, columns, start, count, first, end), length, S, device)

    def to(self, device: torch.device) -> ColumnRequest:
        """Move a request from the CPU to a device, in one transfer that does not synchronize."""
        return _on_device(self.tensors, self.length, self.positions, device)

    def run(
        self,
        q: Tensor,
        k: Tensor,
        *,
        scale: float | None = None,
        lse: Tensor | None = None,
        causal: bool = True,
        out: Tensor | None = None,
        weight: float = 1.0,
        backend: str = "auto",
    ) -> Tensor:
        """Compute `attention_columns` of q and k. Only shapes are checked."""
        _check(q, k, lse)
        return self._run_checked(q, k, scale, lse, causal, out, weight, backend)

    def _run_checked(
        self,
        q: Tensor,
        k: Tensor,
        scale: float | None,
        lse: Tensor | None,
        causal: bool,
        out: Tensor | None,
        weight: float,
        backend: str,
    ) -> Tensor:
        B, objects, _ = self.columns.shape
        if (q.shape[0], q.shape[2]) != (B, self.positions) or q.device != self.columns.device:
            raise OpError(
                f"attention_columns: q has shape {tuple(q.shape)} on {q.device}, the request is for "
                f"({B}, H, {self.positions}, D) on {self.columns.device}"
            )
        expected, dtype = (B, objects, self.length), result_dtype(q)
        if out is not None and (tuple(out.shape) != expected or out.dtype != dtype or out.device != q.device):
            got = f"{describe(out)} on {out.device}"
            raise OpError(f"attention_columns: out is {got}, expected {dtype} {expected} on {q.device}")
        with torch.no_grad():
            target = q.new_empty(expected, dtype=dtype) if out is None else out
            scale = q.shape[-1] ** -0.5 if scale is None else check_float("attention_columns", "scale", scale)
            weight = check_float("attention_columns", "weight", weight)
            backend = self._resolve(q, backend)
            accumulate = out is not None
            _attention_columns(
                target, q.detach(), k.detach(), self.tensors, lse, scale, causal, weight, accumulate, backend
            )
        return target

    def _resolve(self, q: Tensor, backend: str) -> str:
        refused, width = {}, q.shape[-1]
        if width > MAX_TRITON_WIDTH:
            refused = {"triton": f"the heads have width {width}, expected at most {MAX_TRITON_WIDTH}"}
        if backend == "auto":
            return self.backend if q.dtype in _dispatch.DTYPES and self.backend not in refused else "torch"
        return _dispatch.resolve("attention_columns", backend, q.device.type, q.dtype, refused=refused)


def _on_device(tensors: Sequence[Tensor], length: int, positions: int, device: torch.device) -> ColumnRequest:
    share, columns, start, count, first, end = to_device_packed(tensors, device)
    backend = _dispatch.resolve("attention_columns", "auto", device.type)
    return ColumnRequest(columns, start, count, first, end, share, length, positions, backend)


def _check(q: Tensor, k: Tensor, lse: Tensor | None) -> None:
    op = "attention_columns"
    if q.dim() != 4 or k.dim() != 4 or not q.is_floating_point() or q.dtype != k.dtype:
        raise OpError(
            f"{op}: q is {describe(q)}, k {describe(k)}; expected one floating dtype, (B, Hq, S, D) and (B, Hkv, S, D)"
        )
    B, heads, S, D = q.shape
    if (k.shape[0], k.shape[2], k.shape[3]) != (B, S, D) or 0 in (k.shape[1], heads) or heads % k.shape[1]:
        raise OpError(
            f"{op}: k has shape {tuple(k.shape)}, q {tuple(q.shape)}; "
            "expected k (B, Hkv, S, D) with Hq a multiple of Hkv, both at least 1"
        )
    if q.device != k.device or (lse is not None and lse.device != q.device):
        where = f"q is on {q.device}, k on {k.device}" + ("" if lse is None else f", lse on {lse.device}")
        raise OpError(f"{op}: {where}; move them to one device")
    if lse is not None and (tuple(lse.shape) != (B, heads, S) or not lse.is_floating_point()):
        raise OpError(f"{op}: lse is {describe(lse)}, expected float {(B, heads, S)} (slice off a kernel's padding)")


def _bounds(name: str, pair: Bounds, batch: int) -> tuple[tuple[Tensor, Tensor], tuple[list[int], list[int]]]:
    """Return both bounds as (B,) int64 on the CPU, and as lists."""
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        raise OpError(f"attention_columns: {name} is {pair!r}, expected a pair of ints or (B,) integer tensors")
    for value in pair:
        if isinstance(value, int):
            check_int("attention_columns", name, value, INT64_MIN)
    first, second = pair
    if type(first) is int and type(second) is int:  # at once, without the copies below
        begin, end = (torch.full((batch,), value, dtype=torch.int64, device="cpu") for value in (first, second))
        return (begin, end), ([first] * batch, [second] * batch)
    tensors = [torch.as_tensor(value).cpu() for value in pair]
    for value in tensors:
        if not _dispatch.is_integer(value) or tuple(value.shape) not in ((), (batch,)):
            expected = f"ints or ({batch},) integer tensors"
            raise OpError(f"attention_columns: {name} holds {describe(value)}, expected {expected}")
    # Copies: later changes of the caller's tensors must not reach a checked request.
    begin, end = (as_int64("attention_columns", name, value).resolve_neg().expand(batch).clone() for value in tensors)
    return (begin, end), (begin.tolist(), end.tolist())


_BLOCK_BYTES = 4 * 2**20  # of scores per block: the fastest size on CPU, where they stay in the cache


@register_op(
    "attention_columns_(Tensor(a!) out, Tensor q, Tensor k, Tensor[] request, Tensor? lse, float scale, bool causal,"
    " float weight, bool accumulate, str backend) -> ()",
    fake=lambda out, *_: None,
)
def _attention_columns(
    out: Tensor,
    q: Tensor,
    k: Tensor,
    request: Sequence[Tensor],  # `ColumnRequest.tensors`
    lse: Tensor | None,
    scale: float,
    causal: bool,
    weight: float,
    accumulate: bool,
    backend: str,
) -> None:
    share, columns, *bounds = request
    if out.numel() == 0 or columns.shape[2] == 0:
        if not accumulate:
            out.zero_()
        return
    if backend == "triton":
        kernels = _dispatch.triton("attention_columns")
        kernels.attention_columns(out, q, k, columns, bounds, share, lse, scale, causal, weight, accumulate)
        return
    in_place = not accumulate and out.is_contiguous()
    maps = out.zero_() if in_place else torch.zeros_like(out, memory_format=torch.contiguous_format)
    compute = _compute_native if backend == "cpp" else _compute_torch
    compute(maps, q, k, lse, request, scale, causal)
    if accumulate:
        out.add_(maps, alpha=weight)
    elif not in_place:
        torch.mul(maps, weight, out=out)
    elif weight != 1:
        out.mul_(weight)


def _compute_native(
    maps: Tensor, q: Tensor, k: Tensor, lse: Tensor | None, request: Sequence[Tensor], scale: float, causal: bool
) -> None:
    """Write the mean probabilities to maps (B, O, length), which holds zeros."""
    q, k = (x.float().resolve_neg() for x in (q, k))
    q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
    (B, heads, S, D), kv, (_, objects, length) = q.shape, k.shape[1], maps.shape
    sizes = [heads, kv, objects, request[1].shape[2], D, length, S]
    native, threads = _dispatch.native(), torch.get_num_threads()
    if lse is not None:
        lse = lse.float().resolve_neg()
        tensors = [pointer(t) for t in (q, k, lse, *request, maps)]
        strides = [stride for t in (q, k, lse) for stride in t.stride()[:3]]
        native.attention_columns(tensors, strides, [B, *sizes], scale, causal, threads)
        return
    # Without lse, GEMMs compute the scores of a block of rows with all their keys, and the kernel reduces each block
    # while it is in the cache.
    starts, counts, firsts, ends = (bound.tolist() for bound in request[2:])
    # All items at once if their scores are small, else one by one: their rows and keys may be far apart.
    items = B if B * heads * S * S * 4 <= _BLOCK_BYTES else 1
    for b in range(0, B, items):
        part = slice(b, b + items)
        low, high = min(starts[part]), max(s + c for s, c in zip(starts[part], counts[part], strict=True))
        first, end = min(firsts[part]), max(ends[part])
        step = max(1, _BLOCK_BYTES // (items * heads * max(end - first, 1) * 4))
        tensors = [pointer(t[part]) for t in (*request, maps)]
        for row in range(low, high, step):
            stop = min(row + step, high)
            keys = min(end, stop) if causal else end
            if keys <= first:
                continue
            # Scaled before the products, which may be infinite without it.
            queries = (q[part, :, row:stop] * scale).reshape(items * kv, -1, D)
            scores = torch.bmm(queries, k[part, :, first:keys].reshape(items * kv, keys - first, D).mT)
            block = [stop - row, keys - first, row, first]
            native.block_columns([pointer(scores), *tensors], block, [items, *sizes], causal, threads)


def _compute_torch(
    maps: Tensor, q: Tensor, k: Tensor, lse: Tensor | None, request: Sequence[Tensor], scale: float, causal: bool
) -> None:
    _, columns, row_start, row_count, key_start, key_end = request
    (B, heads, S, D), kv, (_, objects, length), dtype = q.shape, k.shape[1], maps.shape, maps.dtype
    count = (columns >= 0).sum(-1).clamp(min=1) * heads  # not `share`, which is fp32
    flat_columns = columns.reshape(B, -1)  # (B, O·C)
    index = flat_columns.clamp(min=0)[:, None, :, None].expand(B, kv, -1, D)
    column_keys = None if lse is None else k.gather(2, index).to(dtype)  # (B, Hkv, O·C, D)
    valid = (columns >= key_start.view(-1, 1, 1)) & (columns < key_end.view(-1, 1, 1)) & (columns >= 0)
    all_keys = k.to(dtype) if lse is None else None
    position = torch.arange(S, device=q.device)
    block = max(1, 4 * _BLOCK_BYTES // max(1, B * heads * S * dtype.itemsize))
    for begin in range(0, length, block):
        i = torch.arange(begin, min(begin + block, length), device=q.device)
        inside = i < row_count[:, None]  # (B, R)
        row = torch.where(inside, row_start[:, None] + i, 0)
        queries = q.gather(2, row[:, None, :, None].expand(B, heads, -1, D)).to(dtype)
        queries = (queries * scale).view(B, kv, -1, D)  # heads of a group side by side: (B, Hkv, g·R, D)
        if all_keys is not None:
            scores = (queries @ all_keys.transpose(-1, -2)).view(B, heads, -1, S)
            visible = ((position >= key_start[:, None]) & (position < key_end[:, None]))[:, None, :]
            visible = visible & (position <= row[..., None]) if causal else visible
            scores.masked_fill_(~visible[:, None], -torch.inf)
            # Not exp(score − lse), which loses as many digits as the lse has before its point.
            top = scores.amax(-1, keepdim=True)
            picked = scores.gather(-1, flat_columns.clamp(min=0)[:, None, None].expand(*scores.shape[:3], -1))
            probs = picked.sub_(top).exp_() / scores.sub_(top).exp_().sum(-1, keepdim=True)
        elif lse is not None and column_keys is not None:
            norm = lse.gather(2, row[:, None].expand(B, heads, -1)).to(dtype)
            probs = (queries @ column_keys.transpose(-1, -2)).view(B, heads, len(i), -1)
            probs = probs.sub_(norm[..., None]).exp_()
        probs = probs.view(B, heads, len(i), objects, -1)
        attended = valid[:, None] & inside[:, :, None, None]  # (B, R, O, C)
        if causal:
            attended = attended & (columns[:, None] <= row[:, :, None, None])
        probs = probs.masked_fill_(~attended[:, None], 0).sum(1).sum(-1)  # over heads and columns
        maps[:, :, begin : begin + len(i)] = (probs / count[:, None]).transpose(1, 2)

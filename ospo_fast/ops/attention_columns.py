"""Attention probabilities of a few key columns, averaged over heads, without the attention matrix."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ospo_fast.errors import OpError
from ospo_fast.ops import _dispatch
from ospo_fast.ops._transfer import to_device_packed

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
    None: all. A row that sees no key gives 0. Packed sequences: expand q and k (1, H, S, D) over the sequences, which
    copies nothing, and give each its rows and its key_range.
    lse: natural-log-sum-exp of each row's scaled scores over the keys it sees, from the attention that ran (base-2
    values: times ln 2). With it only the columns' scores are computed; without, the rows' scores block by block.
    out: (B, O, count) fp32; weight · A is added to it, and it is returned. Without it: weight · A.
    Result fp32 (float64 for float64 inputs), not differentiable, the same for every run; on CUDA the order in which
    heads are summed depends on the number of sequences. The float64 twin is `attention_columns_reference`. C++ on CPU,
    Triton on CUDA (D <= 256; there the check of columns and rows waits for the device: with several layers, make a
    `ColumnRequest` once).
    Raises OpError: shapes, dtypes or devices that do not fit, columns or rows outside the sequence.
    """
    _check(q, k, lse)
    if not q.device == columns.device:
        raise OpError(f"attention_columns: q is on {q.device}, columns on {columns.device}; move them to one device")
    request = ColumnRequest.from_args(columns, q.shape[0], q.shape[2], rows=rows, key_range=key_range, device=q.device)
    return request.run(q, k, scale=scale, lse=lse, causal=causal, out=out, weight=weight, backend=backend)


_TENSORS = ("columns", "row_start", "row_count", "key_start", "key_end", "share")  # of a ColumnRequest


@dataclass(frozen=True, eq=False)
class ColumnRequest:
    """What `attention_columns` is asked for, checked and on the device: made once, run for many layers, with no wait.

    columns (B, O, C), the rest (B,), all int64; share (B, O): 1 over the number of an object's columns, if any.
    """

    columns: Tensor
    row_start: Tensor
    row_count: Tensor
    key_start: Tensor
    key_end: Tensor
    share: Tensor
    length: int  # rows of the result
    positions: int  # S
    kernel: str  # what runs it with backend="auto"

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
        """Check and move; arguments as in `attention_columns`, on any device, and the result on the CPU by default.

        Raises OpError.
        """
        op, S = "attention_columns", positions
        if (
            columns.dim() != 3
            or columns.shape[0] != batch
            or columns.is_floating_point()
            or columns.dtype == torch.bool
        ):
            raise OpError(f"{op}: columns are {columns.dtype} {tuple(columns.shape)}, expected integer ({batch}, O, C)")
        if columns.device.type != "meta":
            columns = columns.cpu().long()
        if columns.numel() and (int(columns.min()) < -1 or int(columns.max()) >= S):
            raise OpError(
                f"{op}: columns reach from {int(columns.min())} to {int(columns.max())}, expected -1 to {S - 1}"
            )
        start, count = _bounds("rows", rows, batch)
        if batch and (int(start.min()) < 0 or int(count.min()) < 0 or int((start + count).max()) > S):
            raise OpError(f"{op}: rows start at {start.tolist()} and count {count.tolist()}, beyond the {S} positions")
        first, last = _bounds("key_range", (0, S) if key_range is None else key_range, batch)
        if batch and (int(first.min()) < 0 or int(last.max()) > S or bool((first > last).any())):
            raise OpError(f"{op}: key_range is {first.tolist()} to {last.tolist()}, expected 0 <= start <= end <= {S}")
        length = rows[1] if isinstance(rows[1], int) else int(count.max()) if batch else 0
        share = (1 / (columns >= 0).sum(-1).clamp(min=1).double()).float()
        return ColumnRequest(columns, start, count, first, last, share, length, S, "torch").to(
            torch.device("cpu") if device is None else device
        )

    def to(self, device: torch.device) -> ColumnRequest:
        """The same on a device, from the CPU, by one copy that nothing waits for."""
        kernel = _dispatch.resolve("attention_columns", "auto", device.type)
        columns, start, count, first, last, share = to_device_packed([getattr(self, name) for name in _TENSORS], device)
        return ColumnRequest(columns, start, count, first, last, share, self.length, self.positions, kernel)

    def repeated(self, times: int) -> ColumnRequest:
        """For `times` sequences, one after the other, in place of each: one for each of its heads."""
        if times == 1:
            return self
        return replace(self, **{name: getattr(self, name).repeat_interleave(times, 0) for name in _TENSORS})

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
        """`attention_columns` of these tensors; looks at shapes alone."""
        _check(q, k, lse)
        B, objects, _ = self.columns.shape
        if (q.shape[0], q.shape[2]) != (B, self.positions) or q.device != self.columns.device:
            raise OpError(
                f"attention_columns: q has shape {tuple(q.shape)} on {q.device}, the request is for "
                f"({B}, H, {self.positions}, D) on {self.columns.device}"
            )
        kernel = self._kernel(q, backend)
        expected, dtype = (B, objects, self.length), _result_dtype(q)
        if out is not None and (tuple(out.shape) != expected or out.dtype != dtype or out.device != q.device):
            raise OpError(
                f"attention_columns: out is {out.dtype} {tuple(out.shape)} on {out.device}, "
                f"expected {dtype} {expected} on {q.device}"
            )
        with torch.no_grad():
            target = q.new_empty(expected, dtype=dtype) if out is None else out
            torch.ops.ospo_fast.attention_columns_(
                target,
                q.detach(),
                k.detach(),
                self.columns,
                self.row_start,
                self.row_count,
                self.key_start,
                self.key_end,
                self.share,
                lse,
                q.shape[-1] ** -0.5 if scale is None else float(scale),
                causal,
                float(weight),
                out is not None,
                kernel,
            )
        return target

    def _kernel(self, q: Tensor, backend: str) -> str:
        """What runs it for q: float64 and heads that are too wide for Triton are the twin's."""
        op = "attention_columns"
        kernel = self.kernel if backend == "auto" else _dispatch.resolve(op, backend, q.device.type)
        if q.dtype == torch.float64 and kernel != "torch":
            if backend != "auto":
                raise OpError(
                    f"{op}: q is float64, which backend={backend!r} does not take; expected float32, float16 or "
                    "bfloat16, or use 'auto' or 'torch'"
                )
            return "torch"
        if kernel == "triton" and q.shape[-1] > 256:
            if backend != "auto":
                raise OpError(f"{op}: the Triton kernel takes heads of at most 256, got {q.shape[-1]}")
            return "torch"
        return kernel


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
    _check(q, k, None)
    asked = ColumnRequest.from_args(columns, q.shape[0], q.shape[2], rows=rows, key_range=key_range, device=q.device)
    start, count, first, last = asked.row_start, asked.row_count, asked.key_start, asked.key_end
    group, S = q.shape[1] // k.shape[1], q.shape[2]
    scores = q.double() @ k.double().repeat_interleave(group, 1).transpose(-1, -2)
    scores *= q.shape[-1] ** -0.5 if scale is None else scale
    result = scores.new_zeros(q.shape[0], columns.shape[1], asked.length)
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


def _result_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _check(q: Tensor, k: Tensor, lse: Tensor | None) -> None:
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
    if q.device != k.device or (lse is not None and lse.device != q.device):
        where = f"q is on {q.device}, k on {k.device}" + ("" if lse is None else f", lse on {lse.device}")
        raise OpError(f"{op}: {where}; move them to one device")
    if lse is not None and (tuple(lse.shape) != (B, heads, S) or not lse.is_floating_point()):
        raise OpError(
            f"{op}: lse is {lse.dtype} {tuple(lse.shape)}, "
            f"expected float {(B, heads, S)} (slice off a kernel's padding)"
        )


def _bounds(name: str, pair: Bounds, batch: int) -> tuple[Tensor, Tensor]:
    """Both bounds as (B,) int64 on the CPU."""
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        raise OpError(f"attention_columns: {name} is {pair!r}, expected a pair of ints or (B,) integer tensors")
    tensors = [torch.as_tensor(value).cpu() for value in pair]
    for value in tensors:
        if value.is_floating_point() or value.dtype == torch.bool or tuple(value.shape) not in ((), (batch,)):
            raise OpError(
                f"attention_columns: {name} holds {value.dtype} {tuple(value.shape)}, "
                f"expected ints or ({batch},) integer tensors"
            )
    return tensors[0].long().expand(batch), tensors[1].long().expand(batch)


# ---------------------------------------------------------------- the op

torch.library.define(
    "ospo_fast::attention_columns_",
    "(Tensor(a!) out, Tensor q, Tensor k, Tensor columns, Tensor row_start, Tensor row_count, Tensor key_start,"
    " Tensor key_end, Tensor share, Tensor? lse, float scale, bool causal, float weight, bool accumulate, str kernel)"
    " -> ()",
)

_BLOCK_BYTES = 4 * 2**20  # of scores at a time: the speed choice on CPU, where they stay in the cache


@torch.library.impl("ospo_fast::attention_columns_", "CompositeExplicitAutograd")
def _attention_columns(
    out: Tensor,
    q: Tensor,
    k: Tensor,
    columns: Tensor,
    row_start: Tensor,
    row_count: Tensor,
    key_start: Tensor,
    key_end: Tensor,
    share: Tensor,
    lse: Tensor | None,
    scale: float,
    causal: bool,
    weight: float,
    accumulate: bool,
    kernel: str,
) -> None:
    if out.numel() == 0 or columns.shape[2] == 0:
        if not accumulate:
            out.zero_()
        return
    bounds = (row_start, row_count, key_start, key_end)
    if kernel == "triton":
        kernels = _dispatch.triton("attention_columns")
        kernels.attention_columns(out, q, k, columns, bounds, share, lse, scale, causal, weight, accumulate)
        return
    twin = _native if kernel == "cpp" else _twin
    maps = twin(q, k, columns, bounds, share, lse, scale, causal, out.shape[2])
    if accumulate:
        out.add_(maps, alpha=weight)
    else:
        torch.mul(maps, weight, out=out)


@torch.library.register_fake("ospo_fast::attention_columns_")
def _(out: Tensor, *args: object) -> None:
    return None


RowBounds = tuple[Tensor, Tensor, Tensor, Tensor]  # row start, row count, key start, key end, (B,) int64


def _native(
    q: Tensor,
    k: Tensor,
    columns: Tensor,
    bounds: RowBounds,
    share: Tensor,
    lse: Tensor | None,
    scale: float,
    causal: bool,
    length: int,
) -> Tensor:
    q, k = (x.float() if x.stride(-1) == 1 else x.float().contiguous() for x in (q, k))
    (B, heads, _, D), objects = q.shape, columns.shape[1]
    maps, share = q.new_zeros(B, objects, length), share / heads
    sizes = [B, heads, k.shape[1], objects, columns.shape[2], D, length]
    if lse is None:
        _native_blocks(q, k, maps, (share, columns, *bounds), sizes, scale, causal)
        return maps
    lse = lse.float()
    _dispatch.native().attention_columns(
        [t.data_ptr() for t in (q, k, lse, share, columns, *bounds, maps)],
        [stride for t in (q, k, lse) for stride in t.stride()[:3]],
        sizes,
        scale,
        causal,
        torch.get_num_threads(),
    )
    return maps


def _native_blocks(
    q: Tensor, k: Tensor, maps: Tensor, asked: tuple[Tensor, ...], sizes: list[int], scale: float, causal: bool
) -> None:
    """Fills maps: GEMMs over blocks of rows, of all their keys, each reduced while it is in the cache."""
    B, heads, S, D = q.shape
    kv = k.shape[1]
    starts, counts, firsts, ends = (bound.tolist() for bound in asked[2:])
    # All items at once where their scores are small, else one by one: their rows and keys may lie far apart.
    together = B if B * heads * S * S * 4 <= _BLOCK_BYTES else 1
    for b in range(0, B, together):
        part = slice(b, b + together)
        low, high = min(starts[part]), max(s + c for s, c in zip(starts[part], counts[part], strict=True))
        first, end = min(firsts[part]), max(ends[part])
        size = min(together, B - b)
        step = max(1, _BLOCK_BYTES // (size * heads * max(end - first, 1) * 4))
        for row in range(low, high, step):
            stop = min(row + step, high)
            keys = min(end, stop) if causal else end
            if keys <= first:
                continue
            queries = q[part, :, row:stop].reshape(size * kv, -1, D)
            scores = torch.bmm(queries, k[part, :, first:keys].reshape(size * kv, keys - first, D).mT)
            _dispatch.native().block_columns(
                [t.data_ptr() for t in (scores, *(t[part] for t in asked), maps[part])],
                [stop - row, keys - first, row, first],
                [size, *sizes[1:]],
                scale,
                causal,
                torch.get_num_threads(),
            )


def _twin(
    q: Tensor,
    k: Tensor,
    columns: Tensor,
    bounds: RowBounds,
    share: Tensor,
    lse: Tensor | None,
    scale: float,
    causal: bool,
    length: int,
) -> Tensor:
    row_start, row_count, key_start, key_end = bounds
    B, heads, S, D = q.shape
    kv, objects, dtype = k.shape[1], columns.shape[1], _result_dtype(q)
    maps = q.new_zeros(B, objects, length, dtype=dtype)
    wanted = columns.reshape(B, -1)  # (B, O·C)
    gather = wanted.clamp(min=0)[:, None, :, None].expand(B, kv, -1, D)
    keys = k.gather(2, gather).to(dtype)  # (B, Hkv, O·C, D)
    visible = (columns >= key_start.view(-1, 1, 1)) & (columns < key_end.view(-1, 1, 1)) & (columns >= 0)
    everything = k.to(dtype) if lse is None else None
    position = torch.arange(S, device=q.device)
    block = max(1, 4 * _BLOCK_BYTES // max(1, B * heads * S * dtype.itemsize))
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
        probs = probs.masked_fill_(~shown[:, None], 0).sum(1).sum(-1)  # heads, columns
        maps[:, :, begin : begin + len(i)] = (probs * (share / heads)[:, None]).transpose(1, 2)
    return maps

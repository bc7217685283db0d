"""Gradients of a head and its inputs for given gradients of log-probabilities and entropies, chunk by chunk."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ospo_fast.errors import OpError
from ospo_fast.ops import _dispatch
from ospo_fast.ops._chunked_head import ChunkedHead, RowResults, RowScales, TokenLogprobsOptions, accumulate_product
from ospo_fast.ops._dispatch import result_dtype

Rows = Tensor | slice  # of a matrix
# Parts of the schemas of registered ops: the inputs, whose head has the tensors of `Call.head`, and the gradients.
INPUTS_SCHEMA = "Tensor x, Tensor labels, Tensor?[] head"
GRADS_SCHEMA = "Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor"


def head_gradients(
    needs_grad: Sequence[bool],
    scales: RowScales,  # (N,) each
    x: Tensor,
    labels: Tensor,  # (N,), `ignore_index` where ignored
    codes: Tensor,  # (N,), what the softmax step reads as labels
    head: Sequence[Any],
    kept: Tensor | None,  # (K, V) logits of the first K active rows
    in_place: bool,  # whether gradients may replace them
    options: TokenLogprobsOptions,
    logps: Tensor | None = None,  # (N,) zeros, to be overwritten by ℓ of the rows with a gradient
    *,
    wide: bool = False,  # return the gradients of the weights in fp32
) -> list[Tensor]:
    """Return the gradients of x and of the head's tensors for gradients of ℓ and of the entropies; empty if not needed.

    Rows without a gradient are skipped: they cost nothing, and a NaN in one of them cannot reach the weights.

    Where the logits of a chunk are, and the gradients that replace them:

        chunk                                 logits                     gradients
        kept, all its rows have a gradient    their rows of `kept`       the same if in_place, else the buffer
        kept, some rows have none             a copy of the others       that copy
        not kept                              recomputed: in the first   the same
                                              rows of `kept` if
                                              in_place, else the buffer

    Kept chunks come first, so the last line overwrites logits that are not read again.
    """
    active = labels != options.ignore_index
    if codes is labels and options.backend == "cpp":
        # Checked again: they may share the memory of an array that was changed since, which no version counter sees.
        active_rows(active, labels, len(head[0]), options)
    rows, count = active_rows(active & _has_gradient(scales), labels, None, options)
    spans = _spans(rows, count, active, kept, in_place, options.chunk_rows)
    chunked = ChunkedHead(head, max((_length(rows_of_x) for rows_of_x, _ in spans), default=0), options)
    weight, proj_weight = chunked.weight, chunked.proj_weight
    dtypes = list(wide_dtypes(x, head))
    if len(spans) <= 1 and not wide:  # a sum over rows is rounded once either way
        dtypes[1] = dtypes[3] = x.dtype
    grads = new_grads(x, head, needs_grad, dtypes)
    dx, dweight, dbias, dproj_weight, dproj_bias, *dlora = (
        g if needed else None for g, needed in zip(grads, needs_grad, strict=True)
    )
    with torch.autocast(x.device.type, enabled=False):
        for rows_of_x, kept_rows in spans:
            inputs = chunked.gather_rows(x, rows_of_x)
            pre, features = (inputs, inputs) if proj_weight is None else chunked.project_into_buffers(inputs)
            z, out = _logits(chunked, features, rows_of_x, kept, kept_rows, in_place)
            chunk_codes, *parts = (
                None if t is None else _dispatch.readable(t[rows_of_x])
                for t in (codes, scales.logps, scales.entropies, scales.others)
            )
            found = None if logps is None else logps.new_empty(len(z))
            assert chunk_codes is not None
            dlogits = chunked.softmax_step(z, chunk_codes, RowResults(found), RowScales(*parts), out)
            assert dlogits is not None
            if logps is not None and found is not None:
                logps[rows_of_x] = found
            _accumulate(dweight, dbias, dlogits, features)
            if any(needs_grad[5:]):
                chunked.lora_gradients(dlogits, rows_of_x, *dlora)
            # Products go into buffers that are not read again: dpre into features, dinputs into inputs.
            dlast, last_weight = dlogits, weight
            if proj_weight is not None and (needs_grad[0] or needs_grad[3] or needs_grad[4]):
                dlast, last_weight = torch.mm(dlogits, weight, out=features), proj_weight
                chunked.gelu_backward(dlast, pre)
                _accumulate(dproj_weight, dproj_bias, dlast, inputs)
            if dx is not None:
                if isinstance(rows_of_x, slice):
                    # inputs are a view of x itself, which must survive: their gradient goes straight to dx.
                    torch.mm(dlast, last_weight, out=dx[rows_of_x])
                else:
                    dx.index_copy_(0, rows_of_x, torch.mm(dlast, last_weight, out=inputs))
    if wide:
        return list(grads)
    return [g.to((x if t is None else t).dtype) for g, t in zip(grads, (x, *head), strict=True)]


def _spans(
    rows: Tensor | None, count: int, active: Tensor, kept: Tensor | None, merge: bool, size: int
) -> list[tuple[Rows, Rows | None]]:
    """Split the rows with a gradient into chunks: their rows of x, and their rows of `kept` or None.

    merge: take all kept logits as one chunk, if gradients of all of them are needed. They are in memory anyway, other
    buffers are small compared with them, and one product for each matrix is faster than several.
    """

    def rows_of_x(span: slice) -> Rows:
        return span if rows is None else rows[span]

    if kept is None:
        return [(rows_of_x(span), None) for span in chunks(count, size, 0)]
    # Kept logits are those of the first active rows. Rows with a gradient are among them in the same order.
    position = active.cumsum(0) - 1 if rows is None else (active.cumsum(0) - 1)[rows]
    in_kept = int((position < len(kept)).sum())
    if in_kept < len(kept):
        first: list[tuple[Rows, Rows | None]] = [(rows_of_x(s), position[s]) for s in chunks(in_kept, size, 0)]
    else:
        first = [(rows_of_x(s), s) for s in chunks(in_kept, in_kept if merge else size, 0)]
    others = (slice(in_kept + s.start, in_kept + s.stop) for s in chunks(count - in_kept, size, 0))
    return [*first, *((rows_of_x(span), None) for span in others)]


def _length(rows: Rows) -> int:
    return int(rows.stop - rows.start) if isinstance(rows, slice) else len(rows)


def _logits(
    chunked: ChunkedHead, features: Tensor, rows_of_x: Rows, kept: Tensor | None, kept_rows: Rows | None, in_place: bool
) -> tuple[Tensor, Tensor]:
    """Return the logits of a chunk, and the memory for their gradients."""
    if kept is None or kept_rows is None:
        # Chunks with kept logits come first. When these have been used up, they are memory for the other chunks.
        free = in_place and kept is not None and len(kept) >= len(features)
        z = chunked.logits(features, rows_of_x, kept[: len(features)] if free and kept is not None else None)
        return z, z
    if not isinstance(kept_rows, slice):
        z = kept.index_select(0, kept_rows)
        return z, z
    z = kept[kept_rows]
    return z, z if in_place else chunked.logits_buffer(len(z))


def _has_gradient(scales: RowScales) -> Tensor:
    given = [t != 0 for t in (scales.logps, scales.entropies) if t is not None]
    return functools.reduce(torch.logical_or, given)


def _accumulate(dweight: Tensor | None, dbias: Tensor | None, grad: Tensor, inputs: Tensor) -> None:
    """Add the gradients, if needed, of weight and bias of inputs @ weight.T + bias, given its own gradient."""
    if dweight is not None:
        accumulate_product(dweight, grad, inputs)
    if dbias is not None:
        dbias += grad.sum(0, dtype=dbias.dtype)


def wide_dtypes(x: Tensor, head: Sequence[Any]) -> tuple[torch.dtype, ...]:
    """Return the dtypes that gradients are summed in: fp32 for the weights, because half precision is too coarse."""
    sums = result_dtype(x)
    return x.dtype, sums, sums, sums, sums, x.dtype if head[5] is None else head[5].dtype, sums


def new_grads(
    x: Tensor, head: Sequence[Any], needs_grad: Sequence[bool], dtypes: Sequence[torch.dtype] | None = None
) -> tuple[Tensor, ...]:
    """Return zeros for each needed gradient of x and of the head's tensors; an empty tensor for each other."""
    return tuple(
        x.new_zeros(
            tensor.shape if tensor is not None and needed else 0, dtype=dtype or (x if tensor is None else tensor).dtype
        )
        for tensor, needed, dtype in zip((x, *head), needs_grad, dtypes or (None,) * 7, strict=True)
    )


def chunks(count: int, size: int, boundary: int) -> list[slice]:
    """Split range(count) into slices of at most `size`, none of which crosses `boundary`."""
    size = max(size, 1)
    starts = [*range(0, boundary, size), *range(boundary, count, size)]
    return [slice(begin, end) for begin, end in itertools.pairwise((*starts, count))]


def active_rows(
    active: Tensor, labels: Tensor, num_codes: int | None, options: TokenLogprobsOptions, op: str = "token_logprobs"
) -> tuple[Tensor | None, int]:
    """Return the indices of the active rows, None if all, and their number; check their labels against `num_codes`.

    Both counts reach the host in one copy: on a GPU the only synchronization of the op.
    """
    if num_codes is None:
        count = int(active.sum())
    elif options.backend == "cpp" and (counted := count_labels(labels, num_codes, options)) >= 0:
        count = counted
    else:
        invalid = active & ((labels < 0) | (labels >= num_codes))
        count, errors = torch.stack((active.sum(), invalid.sum())).tolist()
        if errors:
            row = int(invalid.nonzero()[0])
            raise OpError(
                f"{op}: labels[{row}] (flattened) is {int(labels[row])}, expected 0 <= label < {num_codes} "
                f"or ignore_index={options.ignore_index}; check that the codes are of the head's codebook"
            )
    return None if count == len(labels) else torch.nonzero_static(active, size=count).squeeze(1), count


def count_labels(labels: Tensor, num_codes: int, options: TokenLogprobsOptions) -> int:
    """Return the number of labels that are not ignored, -1 if one is invalid; one pass, where torch needs several."""
    labels = _dispatch.readable(labels)
    labels_at = _dispatch.pointer(labels, torch.int64)
    count: int = _dispatch.native().count_labels(labels_at, labels.numel(), options.ignore_index, num_codes)
    return count


def check_finite(op: str, logps: Tensor) -> None:
    """Raise OpError for a log-probability that is not finite."""
    invalid = ~logps.isfinite()
    if bool(invalid.any()):
        row = int(invalid.nonzero()[0])
        raise OpError(
            f"{op}: the log-probability of hidden[{row}] (flattened) is {float(logps[row])}, one of "
            f"{int(invalid.sum())} that are not finite; expected finite hidden states and weights, and logits within "
            "the range of their dtype (logits_dtype='fp32' widens it)"
        )

"""Log-probabilities with a head whose rows, the codes, are split over processes.

Each process computes the scores s of its own codes and, per row of hidden states, m = max s, t = Σ e and
w = Σ e · (s − m) with e = exp(s − m). Let M = max m over the processes and f = exp(m − M). Then

    T = Σ f·t,  W = Σ f·(w + (m − M)·t),  ℓ = s[label] − M − log T,  H = log T − W / T

where Σ and s[label] are exchanged in one sum. The gradient of c·ℓ + h·H for the logits of a process is, with its own
softmax q = e / t, the softmax step's (see `_chunked_head`) for

    scales = c,  entropy_scales = g·h,  others = g·(c + h·(m − M − log T + H)),  g = f·t / T
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ospo_fast.errors import OpError
from ospo_fast.ops._autograd import edges, first_derivative_only, keeps_graph
from ospo_fast.ops._chunked_head import ChunkedHead, RowResults, RowScales
from ospo_fast.ops._dispatch import readable, result_dtype
from ospo_fast.ops._head_gradients import active_rows, check_finite, chunks, head_gradients
from ospo_fast.ops._logprob_call import Call
from ospo_fast.ops._sharded_weights import gathered_parameters
from ospo_fast.ops.token_logprobs import rows_to_keep

_SHARDED = (False, True, True, False, False, False, True)  # x, weight, bias, projection (2), lora_inputs, lora_weight


def vocab_parallel_logprobs(
    call: Call, group: Any, return_entropy: bool, keep_logits: bool | None
) -> tuple[Tensor, Tensor]:
    """Return ℓ and the entropies (N,), the same on all processes of the group."""
    grad_enabled = torch.is_grad_enabled()  # a Function cannot tell
    given = call, group, return_entropy, keep_logits if grad_enabled else False, grad_enabled, edges(call.x, *call.head)
    return _VocabParallel.apply(*given, call.x, *call.head)  # type: ignore[no-any-return,no-untyped-call]


class _VocabParallel(torch.autograd.Function):
    """As `_TrainedHead`, also for a frozen head: its gradient needs the sums over all codes before its products."""

    @staticmethod
    def forward(
        ctx: Any,
        call: Call,
        group: Any,
        return_entropy: bool,
        keep_logits: bool | None,
        grad_enabled: bool,
        leads: tuple[Tensor, ...],
        x: Tensor,
        *head: Any,
    ) -> tuple[Tensor, Tensor | None]:
        options, labels, num_codes = call.options, readable(call.labels), len(head[0])
        needs_grad = [needed and grad_enabled for needed in ctx.needs_input_grad[6:]]
        first, total = _position(group, call, labels, num_codes, needs_grad)
        rows, count = active_rows(labels != options.ignore_index, labels, total, options)
        elsewhere = (labels < first) | (labels >= first + num_codes)
        codes = torch.where(elsewhere, -1, labels - first)
        keep_rows = min(rows_to_keep(keep_logits, len(x), head[0], options), count) if any(needs_grad) else 0
        chunked = ChunkedHead(head, min(options.chunk_rows, count), options)
        statistics = x.new_empty(count, 4, dtype=result_dtype(x))
        kept = x.new_empty(keep_rows, num_codes, dtype=chunked.logits_dtype)
        for chunk in chunks(count, options.chunk_rows, keep_rows):
            rows_of_x = chunk if rows is None else rows[chunk]
            results = RowResults(statistics=statistics[chunk])
            chunked.forward(
                x, rows_of_x, codes[rows_of_x].contiguous(), results,
                kept=kept[chunk] if chunk.start < keep_rows else None,
            )  # fmt: skip
        local_max, local_total, local_weighted, target = statistics.unbind(1)
        top = local_max.clone()
        dist.all_reduce(top, dist.ReduceOp.MAX, group)
        below = local_max - top
        factor = below.exp()
        # Where all codes of a process are masked (−inf), its sums are NaN, and it adds nothing.
        own = torch.where(factor == 0, 0, factor * local_total)
        weighted = torch.where(factor == 0, 0, factor * (local_weighted + below * local_total))
        sums = torch.stack((own, weighted, target))
        dist.all_reduce(sums, dist.ReduceOp.SUM, group)
        log_total = sums[0].log()
        entropy = log_total - sums[1] / sums[0]
        logps = sums[2] - top - log_total
        share = own / sums[0]
        ctx.save_for_backward(x, labels, codes, kept if keep_rows else None, share, below - log_total + entropy, *head)
        ctx.rows, ctx.group, ctx.options, ctx.check_adapters = rows, group, options, call.check_adapters
        ctx.set_materialize_grads(False)
        ctx.edges = leads
        results_of_rows = (logps, entropy)
        if rows is not None:
            results_of_rows = tuple(r.new_zeros(len(labels)).index_copy_(0, rows, r) for r in results_of_rows)  # type: ignore[assignment]
        if options.check_finite:
            check_finite("token_logprobs", results_of_rows[0])
        return results_of_rows[0], results_of_rows[1] if return_entropy else None

    @staticmethod
    @first_derivative_only("token_logprobs")
    def backward(ctx: Any, grad: Tensor | None, grad_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        x, labels, codes, kept, share, log_offset, *head = ctx.saved_tensors
        if ctx.check_adapters is not None:
            ctx.check_adapters()
        needs_grad = ctx.needs_input_grad[6:]
        if grad is None and grad_entropy is None:
            return (None,) * (6 + len(needs_grad))
        if ctx.rows is not None:
            share, log_offset = (t.new_zeros(len(labels)).index_copy_(0, ctx.rows, t) for t in (share, log_offset))
        c = torch.zeros_like(share) if grad is None else grad
        # Rows of which this process has neither probability nor the label have no gradient here. They are skipped,
        # because its softmax is NaN where all of its codes are masked (−inf).
        c = torch.where((share == 0) & (codes < 0), 0, c)
        if grad_entropy is None:
            scales = RowScales(c, None, share * c)
        else:
            h = torch.where(grad_entropy == 0, 0, share * grad_entropy)  # also where share is NaN
            scales = RowScales(c, h, share * c + h * log_offset)
        with gathered_parameters(head):
            grads = head_gradients(needs_grad, scales, x, labels, codes, head, kept, not keeps_graph(), ctx.options)
        results: list[Tensor | None] = []
        for gradient, needed, sharded in zip(grads, needs_grad, _SHARDED, strict=True):
            if needed and not sharded:
                dist.all_reduce(gradient, dist.ReduceOp.SUM, ctx.group)
            results.append(gradient if needed else None)
        return (None,) * 6 + tuple(results)


def _position(group: Any, call: Call, labels: Tensor, num_codes: int, needs_grad: Sequence[bool]) -> tuple[int, int]:
    """Return the first code of this process and the number of all codes; raise OpError if the processes disagree."""
    active = labels != call.options.ignore_index
    in_order = torch.arange(1, len(labels) + 1, device=labels.device)
    exchanged = [needed and not sharded for needed, sharded in zip(needs_grad, _SHARDED, strict=True)]
    sizes_of_this = [num_codes, len(labels), sum(flag << i for i, flag in enumerate(exchanged))]
    checksum = torch.where(active, (labels + 1) * in_order, 0).sum()  # overflows to the same number everywhere
    sums = torch.stack([*_sums(call.x, active), *_sums(call.head[4], active)])
    scores = sums.new_tensor([call.options.temperature, call.options.softcap])
    mine = torch.cat(
        (labels.new_tensor(sizes_of_this), checksum.unsqueeze(0), sums.view(torch.int64), scores.view(torch.int64))
    )
    every = mine.new_empty(dist.get_world_size(group), len(mine))
    dist.all_gather(list(every.unbind()), mine, group)
    every = every.cpu()
    sizes, rows, flags, checksums = every[:, :4].t().tolist()
    # As torch.chunk and DTensor split rows: equal parts, of which the last ones may be smaller or missing.
    size, total = sizes[0], sum(sizes)
    expected = [max(0, min(size, total - i * size)) for i in range(len(sizes))]
    if sizes != expected:
        raise OpError(
            f"token_logprobs: the processes' heads have {sizes} codes, expected equal numbers, or less on the last "
            "processes as torch.chunk splits V; pass each process its rows of one weight"
        )
    same = (("number of rows", rows), ("checksum of the labels", checksums), ("inputs that require grad (bits)", flags))
    for name, values in same:
        if len(set(values)) > 1:
            raise OpError(
                f"token_logprobs: the processes of process_group have {values} as their {name}, expected the same "
                "hidden states and labels on all of them; process_group is that of tensor parallelism, not of the data"
            )
    x_sum, x_scale, lora_sum, lora_scale, *settings = every[:, 4:].contiguous().view(torch.float64).unbind(1)
    for name, given in zip(("temperature", "softcap (0: None)"), settings, strict=True):
        if len(set(given.tolist())) > 1:
            raise OpError(
                f"token_logprobs: the processes of process_group have {given.tolist()} as their {name}, expected the "
                "same on all of them"
            )
    for name, given, scale in (("hidden", x_sum, x_scale), ("LoRA's A (or its dropout)", lora_sum, lora_scale)):
        # Equal up to rounding. Of other numbers the sums differ by about `scale`.
        if float(given.max() - given.min()) > 0.03 * float(scale.max()):
            raise OpError(
                f"token_logprobs: {name} differs on the processes of process_group (checksums {given.tolist()}), "
                "expected the same on all of them; broadcast it from one process, and give dropout the same seed"
            )
    return dist.get_rank(group) * size, total


def _sums(tensor: Tensor | None, active: Tensor) -> tuple[Tensor, Tensor]:
    """Return a weighted sum over the active rows (N, D), and how much that of other rows would differ; 0 for None."""
    if tensor is None:
        zero = torch.zeros((), dtype=torch.float64, device=active.device)
        return zero, zero
    weights = torch.arange(tensor.shape[1], device=tensor.device).cos().to(tensor.dtype)
    rows = torch.where(active, torch.mv(tensor.detach(), weights), 0).nan_to_num(0, 0, 0).double()
    return rows.sum(), rows.square().sum().sqrt()

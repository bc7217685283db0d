"""Compute a loss that is linear in per-token log-probabilities, and its gradients in the same pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ospo_fast.errors import OpError
from ospo_fast.ops._autograd import edges, first_derivative_only, keeps_graph
from ospo_fast.ops._chunked_head import OPTIONS_SCHEMA, RowScales, TokenLogprobsOptions
from ospo_fast.ops._dispatch import readable, register_op, result_dtype
from ospo_fast.ops._head_gradients import (
    GRADS_SCHEMA,
    INPUTS_SCHEMA,
    active_rows,
    check_finite,
    head_gradients,
    new_grads,
    wide_dtypes,
)
from ospo_fast.ops._logprob_call import Call, prepare
from ospo_fast.ops._sharded_weights import gathered_parameters
from ospo_fast.ops.head import Head
from ospo_fast.ops.token_logprobs import IGNORE_INDEX, token_logprobs_op


def cross_entropy(
    hidden: Tensor,
    head: Head | nn.Module,
    labels: Tensor,
    *,
    weights: Tensor | None = None,
    reduction: Literal["mean", "sum"] = "mean",
    ignore_index: int = IGNORE_INDEX,
    chunk_rows: int | None = None,
    logits_dtype: torch.dtype | str | None = None,
    backend: str = "auto",
    check_finite: bool = False,
    temperature: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """Compute −Σ w·ℓ / N with gradients that the forward computes: no logits are kept or recomputed.

    This is for losses that are linear in ℓ (see `token_logprobs`) with weights that do not depend on it: SFT, distilled
    labels, policy gradients. A step with a trained head costs 3 matrix products of its size, as with all logits in
    memory, and memory for one chunk. Differentiable once, in `hidden` and in the head's weights; not in `weights`.

    Args:
        hidden: (..., D) float.
        head: see `token_logprobs`.
        labels: (...) integer, as there.
        weights: (...) float or None for ones, w.
        reduction: "mean", N = number of labels that are not ignored, at least 1, or "sum", N = 1.
        ignore_index: see `token_logprobs`, as the other arguments.
        chunk_rows: as there.
        logits_dtype: as there.
        backend: as there.
        check_finite: as there.
        temperature: as there.
        softcap: as there.

    Returns:
        () fp32 (float64 for float64 inputs); 0 without labels.

    Raises:
        OpError: as `token_logprobs`; weights of another shape, or that require grad; an unknown reduction.

    """
    op = "cross_entropy"
    if reduction not in ("mean", "sum"):
        raise OpError(f"{op}: reduction is {reduction!r}, expected 'mean' or 'sum'")
    if weights is not None and not isinstance(weights, Tensor):
        raise OpError(f"{op}: weights are {type(weights).__name__}, expected a tensor of one number per label")
    if weights is not None and weights.device != labels.device:
        raise OpError(f"{op}: weights are on {weights.device}, labels on {labels.device}; move them to one device")
    if weights is not None and weights.shape != labels.shape:
        raise OpError(f"{op}: weights have shape {tuple(weights.shape)}, expected that of labels {tuple(labels.shape)}")
    if weights is not None and weights.requires_grad and torch.is_grad_enabled():
        raise OpError(f"{op}: weights require grad, expected constants; use token_logprobs, or weights.detach()")
    call = prepare(
        op, hidden, head, labels, ignore_index=ignore_index, chunk_rows=chunk_rows, logits_dtype=logits_dtype,
        backend=backend, check_finite=check_finite, temperature=temperature, softcap=softcap, process_group=None,
    )  # fmt: skip
    active = call.labels != ignore_index
    wide = result_dtype(call.x)
    scales = active.to(wide) if weights is None else torch.where(active, weights.reshape(-1).to(wide), 0)
    if reduction == "mean":
        scales = scales / active.sum().clamp(min=1)
    return -weighted_logprobs(call, scales)[0]


def weighted_logprobs(call: Call, scales: Tensor) -> tuple[Tensor, Tensor]:
    """Return Σ scales·ℓ, whose gradient is computed here, and ℓ (N,) without gradient, 0 where scales are 0.

    scales (N,) have the dtype of ℓ, see `result_dtype`.
    """
    if call.autocast:
        with torch.autocast(call.x.device.type, enabled=False):
            return weighted_logprobs(replace(call, autocast=False), scales)
    if torch.is_grad_enabled() and call.needs_grad:
        function: Any = _LinearLoss
        more = call.check_adapters, edges(call.x, *call.head)
        total, logps = function.apply(call.options, more, scales, call.x, call.labels, *call.head)
        return total, logps
    labels = torch.where(scales == 0, call.options.ignore_index, call.labels)
    logps = token_logprobs_op(False, False, 0, call.x, labels, call.head, *call.options)[0]
    return (scales * logps).sum(), logps


class _LinearLoss(torch.autograd.Function):
    """Compute Σ scales·ℓ and its gradients in one pass over the chunks.

    Gradients are computed for scales of at most 1 and kept in fp32, those of the hidden states in their dtype. The
    largest scale and the upstream gradient, which may be that of a scaled loss, come before the only rounding to half
    precision. Until then they are attributes, not saved tensors: a second reference would make autograd copy what
    becomes .grad.
    """

    @staticmethod
    def forward(
        ctx: Any,
        options: TokenLogprobsOptions,
        more: tuple[Callable[[], None] | None, tuple[Tensor, ...]],
        scales: Tensor,
        x: Tensor,
        labels: Tensor,
        *head: Any,
    ) -> tuple[Tensor, Tensor]:
        _, _, _, x_needs_grad, _, *head_needs_grad = ctx.needs_input_grad
        needs_grad = [x_needs_grad, *head_needs_grad]
        largest = scales.abs().amax() if len(scales) else scales.sum()
        largest = torch.where((largest > 0) & largest.isfinite(), largest, 1)  # else other rows would get NaN
        unit = scales / largest
        *grads, logps = _linear_loss(needs_grad, unit, x, labels, head, *options)
        ctx.grads = [g if needed else None for g, needed in zip(grads, needs_grad, strict=True)]
        ctx.dtypes = [None if t is None else t.dtype for t in (x, *head)]
        ctx.largest, (ctx.check_adapters, ctx.edges), ctx.head = largest, more, head
        ctx.mark_non_differentiable(logps)
        return (scales * logps).sum(), logps

    @staticmethod
    @first_derivative_only("cross_entropy")
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.check_adapters is not None:
            ctx.check_adapters()
        gathered_parameters(ctx.head)  # refuses weights that ZeRO-3 has partitioned, which no gradient can reach
        if ctx.grads is None:
            raise OpError(
                "cross_entropy: a second backward through the same graph, whose gradients were given away by the first "
                "one; pass retain_graph=True to the first"
            )
        grads, keep, factor = ctx.grads, keeps_graph(), grad * ctx.largest
        if not keep:
            ctx.grads = None
        for i, g in enumerate(grads):
            if g is not None:
                in_place = g.dtype == factor.dtype and not keep
                scaled = g.mul_(factor) if in_place else g.to(factor.dtype) * factor
                grads = [*grads[:i], scaled.to(ctx.dtypes[i]), *grads[i + 1 :]]
        dx, *dhead = grads
        return None, None, None, dx, None, *dhead


@register_op(
    f"linear_loss(bool[] needs_grad, Tensor scales, {INPUTS_SCHEMA}, {OPTIONS_SCHEMA})"
    f" -> ({GRADS_SCHEMA}, Tensor logps)",
    fake=lambda needs_grad, scales, x, labels, head, *_: (
        *new_grads(x, head, needs_grad, wide_dtypes(x, head)),
        x.new_empty(labels.shape, dtype=result_dtype(x)),
    ),
    synchronizes=True,
)
def _linear_loss(
    needs_grad: list[bool], scales: Tensor, x: Tensor, labels: Tensor, head: Sequence[Any], *flat_options: Any
) -> tuple[Tensor, ...]:
    """Return the gradients of Σ scales·ℓ, of the weights in fp32, and ℓ (N,), which is 0 where scales are 0."""
    options = TokenLogprobsOptions(*flat_options)
    labels = readable(labels)
    active_rows(labels != options.ignore_index, labels, len(head[0]), options, "cross_entropy")  # checks the labels
    logps = x.new_zeros(labels.shape, dtype=result_dtype(x))
    row_scales = RowScales(scales.contiguous())
    grads = head_gradients(needs_grad, row_scales, x, labels, labels, head, None, False, options, logps, wide=True)
    if options.check_finite:
        check_finite("cross_entropy", logps)
    return *grads, logps

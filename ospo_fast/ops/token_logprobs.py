"""Compute per-token log-probabilities of image codes from hidden states, without all logits in memory.

With a frozen head, any loss that depends on hidden states x_t only through ℓ_t = log softmax(z_t)[y_t] has the gradient
dL/dx_t = ∂L/∂ℓ_t · U_t, where U_t = ∂ℓ_t/∂x_t. For z = W₂·gelu(W₁·x + b₁) + b₂

    U_t = [((onehot(y_t) − softmax(z_t))·W₂) ⊙ gelu′(W₁·x_t + b₁)]·W₁

The forward keeps U (`dhidden`, the size of x) and the backward scales its rows. A trained head needs ∂L/∂ℓ before its
GEMMs, so its backward needs the logits again. The forward keeps those of some rows, and the backward recomputes the
others (`keep_logits`). Where ∂L/∂ℓ is known in advance, `cross_entropy` does neither.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypedDict, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ospo_fast.ops import _dispatch
from ospo_fast.ops._autograd import edges, first_derivative_only, keeps_graph
from ospo_fast.ops._chunked_head import OPTIONS_SCHEMA, ChunkedHead, RowResults, RowScales, TokenLogprobsOptions
from ospo_fast.ops._dispatch import register_op, result_dtype
from ospo_fast.ops._few_rows import few_rows
from ospo_fast.ops._head_gradients import (
    GRADS_SCHEMA,
    INPUTS_SCHEMA,
    active_rows,
    check_finite,
    chunks,
    head_gradients,
    new_grads,
)
from ospo_fast.ops._logprob_call import Call, prepare
from ospo_fast.ops._sharded_weights import gathered_parameters
from ospo_fast.ops.head import Head
from ospo_fast.ops.scale_rows import scale_rows

logger = logging.getLogger(__name__)
IGNORE_INDEX = -100  # the label of positions without a code, as in torch's cross_entropy
# Logits that a trained head keeps on a CPU: of three quarters of the rows, of at most 1 GiB.
KEPT_SHARE, KEPT_BYTES = 3 / 4, 2**30
_FEW_ROWS_BACKENDS = ("auto", "cpp")


if TYPE_CHECKING:
    from typing_extensions import Unpack

    class _Options(TypedDict, total=False):
        ignore_index: int
        chunk_rows: int | None
        logits_dtype: torch.dtype | str | None
        backend: str
        check_finite: bool
        temperature: float
        softcap: float | None
        keep_logits: bool | None
        process_group: Any
        batch_invariant: bool


@overload
def token_logprobs(
    hidden: Tensor,
    head: Head | nn.Module,
    labels: Tensor,
    *,
    return_entropy: Literal[False] = False,
    **options: Unpack[_Options],
) -> Tensor: ...
@overload
def token_logprobs(
    hidden: Tensor,
    head: Head | nn.Module,
    labels: Tensor,
    *,
    return_entropy: Literal[True],
    **options: Unpack[_Options],
) -> tuple[Tensor, Tensor]: ...
def token_logprobs(
    hidden: Tensor,
    head: Head | nn.Module,
    labels: Tensor,
    *,
    ignore_index: int = IGNORE_INDEX,
    chunk_rows: int | None = None,
    logits_dtype: torch.dtype | str | None = None,
    backend: str = "auto",
    check_finite: bool = False,
    temperature: float = 1.0,
    softcap: float | None = None,
    return_entropy: bool = False,
    keep_logits: bool | None = None,
    process_group: Any = None,
    batch_invariant: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute ℓ = log p[labels], p = softmax(s), with the logits z = head(hidden) of `chunk_rows` rows in memory.

    The scores are s = softcap · tanh(z / softcap) / temperature; s = z by default. Differentiable once, in `hidden` and
    in the head's weights that require grad. Ignored rows are not computed, and NaN in them reaches no result. Set the
    labels of rows with weight 0 to `ignore_index`, too. `token_logprobs_reference` of this module is in float64.

    What a step costs, in matrix products of the head's size (all logits in memory: 2 with a frozen head, 3 with a
    trained one):

    - frozen head: 2. The forward computes ∂ℓ/∂hidden, the backward scales its rows.
    - trained head: 3, and 1 more for the share of rows whose logits are recomputed in the backward (`keep_logits`). The
      logger `ospo_fast.ops.token_logprobs` says at level INFO which rows are kept, and why, once for each reason.
    - the entropy as a metric: no more. In the loss, its gradient needs the logits of a frozen head, too: 2 more, or
      none with `keep_logits=True`.

    Args:
        hidden: (..., D) float.
        head: nn.Linear, a Linear-GELU-Linear module or `Head`, in the dtype of `hidden`. Autocast casts both. Modules
            may have LoRA adapters of peft, be wrapped by its `modules_to_save`, and be sharded by FSDP2, which gathers
            their weights for the call. With a process group: this process' rows of the output layer.
        labels: (...) integer. The code predicted FROM each hidden state (shift before), or `ignore_index`.
        ignore_index: label of the rows to ignore.
        chunk_rows: rows per chunk. None: as many as fill 32 MiB of logits on CPU, 196 MiB elsewhere.
        logits_dtype: None keeps the logits in the dtype of `hidden`; the softmax is always fp32. "fp32" widens
            half-precision logits, for magnitudes above 16.
        backend: "auto", "cuda", "cpp" or "torch".
        check_finite: refuse results that are not finite. Otherwise a hidden state with NaN or infinity gets ℓ = NaN,
            and no other row is affected.
        temperature: divides the scores.
        softcap: bounds the logits by this magnitude before the division. None: no bound.
        return_entropy: return the entropies −Σ p·log p, too.
        keep_logits: where the backward needs the logits (a head with weights that require grad, or an entropy in the
            loss): keep those of all rows (N·V elements), or recompute them. None: recompute those of a frozen head, and
            all on a GPU and under torch.compile; on a CPU keep three quarters of the rows, of at most 1 GiB.
        process_group: processes that share the codes of a vocab-parallel head, in the order of their rows. `hidden`,
            `labels` and the loss must be the same on all of them. They exchange (rows,) numbers in two all-reduces, and
            in the backward the gradients of what is not split.
        batch_invariant: give ℓ of a row the same bits with any other rows, in any order, `chunk_rows` and number of
            threads, by products that sum in one order; for fp32 on a CPU. Without it BLAS chooses kernels by the number
            of rows. ℓ has the bits of `ImageGenerator.generate(return_logps=True)`, see docs/images.md.

    Returns:
        (...) fp32 (float64 for float64 inputs), 0 where ignored; with `return_entropy` a pair of ℓ and the entropies.

    Raises:
        OpError: wrong shapes, dtypes or devices, labels outside [0, V), a temperature or soft-cap that is not positive,
            an unsupported head, `batch_invariant` where it cannot hold, processes that disagree on V or on the number
            of rows, results that `check_finite` refuses; in the backward an adapter that was disabled or merged since;
            in a second derivative.

    """
    usual = chunk_rows is None and logits_dtype is None and softcap is None and process_group is None
    usual = usual and not batch_invariant
    if usual and backend in _FEW_ROWS_BACKENDS and not (check_finite or return_entropy):
        logps = few_rows(hidden, head, labels, ignore_index, temperature)
        if logps is not None:
            return logps  # type: ignore[no-any-return]
    call = prepare(
        "token_logprobs", hidden, head, labels, ignore_index=ignore_index, chunk_rows=chunk_rows,
        logits_dtype=logits_dtype, backend=backend, check_finite=check_finite, temperature=temperature,
        softcap=softcap, process_group=process_group, batch_invariant=batch_invariant,
    )  # fmt: skip
    if call.autocast:
        with torch.autocast(hidden.device.type, enabled=False):  # the inputs are cast already
            logps, entropy = _compute(call, return_entropy, keep_logits, process_group)
    else:
        logps, entropy = _compute(call, return_entropy, keep_logits, process_group)
    if labels.dim() != 1:
        logps = logps.reshape(labels.shape)
    if not return_entropy:
        return logps
    assert entropy is not None
    return logps, entropy.reshape(labels.shape)


def token_logprobs_reference(
    hidden: Tensor,
    head: Head | nn.Module,
    labels: Tensor,
    *,
    ignore_index: int = IGNORE_INDEX,
    temperature: float = 1.0,
    softcap: float | None = None,
    return_entropy: bool = False,
) -> Any:
    """Compute `token_logprobs` in float64 from all logits at once, with plain autograd."""
    scores = Head.of(head).to(torch.float64)(hidden.double())
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    every = F.log_softmax(scores / temperature, dim=-1)
    active = labels != ignore_index
    logps = every.gather(-1, labels.long().masked_fill(~active, 0).unsqueeze(-1)).squeeze(-1)
    logps = torch.where(active, logps, 0)
    if not return_entropy:
        return logps
    # A masked code has probability 0 and log-probability −inf or the lowest number.
    entropy = -(every.exp() * every.clamp(min=-1e4)).sum(-1)
    return logps, torch.where(active, entropy, 0)


def rows_to_keep(keep_logits: bool | None, rows: int, weight: Tensor | None, options: TokenLogprobsOptions) -> int:
    """Return of how many rows a trained head keeps the logits, and log why at the first call for each reason.

    An eager step holds three matrices of the size of all logits: the logits or their log-softmax, and two gradients.
    Three quarters of one such matrix, and a recomputation for the other rows, are faster than that on a CPU, where the
    passes over these matrices cost as much as the recomputation.
    """
    assert weight is not None
    if torch.compiler.is_compiling():
        return 0  # the shape of what is kept depends on the labels
    if keep_logits is None:
        if weight.device.type != "cpu":
            kept, reason = 0, "memory is what this op saves on a GPU"
        else:
            row_bytes = weight.shape[0] * (4 if options.fp32_logits else weight.element_size())
            kept = min(math.ceil(rows * KEPT_SHARE), KEPT_BYTES // row_bytes)
            reason = f"{KEPT_SHARE:.0%} of the rows, of at most {KEPT_BYTES >> 20} MiB, are the default on a CPU"
    else:
        kept, reason = rows if keep_logits else 0, f"keep_logits={keep_logits}"
    _log_path(kept > 0, kept < rows, reason)
    return kept


@functools.cache
def _log_path(keeps: bool, recomputes: bool, reason: str) -> None:
    what = "keeps the logits" if keeps else "recomputes the logits in the backward"
    what = "keeps the logits of some rows and recomputes the others" if keeps and recomputes else what
    logger.info("token_logprobs: the head is trained, so it %s: %s; keep_logits changes this", what, reason)


def _compute(
    call: Call, return_entropy: bool, keep_logits: bool | None, process_group: Any
) -> tuple[Tensor, Tensor | None]:
    """Return ℓ (N,) and the entropies (N,), which may be None if they are not asked for."""
    if process_group is not None:
        from ospo_fast.ops._vocab_parallel import vocab_parallel_logprobs

        return vocab_parallel_logprobs(call, process_group, return_entropy, keep_logits)
    x, labels, head, options = call.x, call.labels, call.head, call.options
    if not (torch.is_grad_enabled() and call.needs_grad):
        return token_logprobs_op(False, return_entropy, 0, x, labels, head, *options)[:2]
    function: Any
    results: tuple[Tensor, Tensor | None]
    if call.trained or (return_entropy and keep_logits):
        function, keep_rows = _TrainedHead, rows_to_keep(keep_logits, len(x), head[0], options)
        more = call.check_adapters, edges(x, *head)
        results = function.apply(options, return_entropy, more, keep_rows, x, labels, *head)
    else:
        function = _FrozenHead
        more = call.check_adapters, edges(x, *head)
        results = function.apply(options, return_entropy, more, x, labels, *head)
    return results


# ---------------------------------------------------------------- autograd, outside the ops: cheaper than inside

_NO_GRADS = (None,) * 6  # of the head's tensors


class _FrozenHead(torch.autograd.Function):
    """Keep dhidden in the forward; scale its rows in the backward."""

    @staticmethod
    def forward(
        ctx: Any,
        options: TokenLogprobsOptions,
        return_entropy: bool,
        more: tuple[Callable[[], None] | None, tuple[Tensor, ...]],
        x: Tensor,
        labels: Tensor,
        *head: Any,
    ) -> tuple[Tensor, Tensor | None]:
        logps, entropy, dhidden, packed_row, _ = token_logprobs_op(True, return_entropy, 0, x, labels, head, *options)
        ctx.save_for_backward(dhidden, packed_row, *((x, labels, *head) if return_entropy else ()))
        ctx.options, (ctx.check_adapters, ctx.edges) = options, more
        ctx.set_materialize_grads(False)
        return logps, entropy if return_entropy else None

    @staticmethod
    @first_derivative_only("token_logprobs")
    def backward(ctx: Any, grad: Tensor | None, grad_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        dhidden, packed_row, *inputs = ctx.saved_tensors
        if ctx.check_adapters is not None:
            ctx.check_adapters()
        dx = None
        if grad_entropy is not None:  # needs the logits again
            x, labels, *head = inputs
            needs_grad = [True] + [False] * 6
            with gathered_parameters(head):
                dx = _token_logprobs_backward(
                    needs_grad, grad, grad_entropy, None, False, x, labels, head, *ctx.options
                )[0]
        elif grad is not None:
            dx = scale_rows(dhidden, packed_row, grad, ctx.options.backend)
        return None, None, None, dx, None, *_NO_GRADS


class _TrainedHead(torch.autograd.Function):
    """Keep the inputs, and the logits of the first rows, in the forward; recompute the other logits in the backward."""

    @staticmethod
    def forward(
        ctx: Any,
        options: TokenLogprobsOptions,
        return_entropy: bool,
        more: tuple[Callable[[], None] | None, tuple[Tensor, ...]],
        keep_rows: int,
        x: Tensor,
        labels: Tensor,
        *head: Any,
    ) -> tuple[Tensor, Tensor | None]:
        logps, entropy, _, _, kept = token_logprobs_op(False, return_entropy, keep_rows, x, labels, head, *options)
        ctx.save_for_backward(x, labels, kept if keep_rows else None, *head)
        ctx.options, (ctx.check_adapters, ctx.edges) = options, more
        ctx.set_materialize_grads(False)
        return logps, entropy if return_entropy else None

    @staticmethod
    @first_derivative_only("token_logprobs")
    def backward(ctx: Any, grad: Tensor | None, grad_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        x, labels, kept, *head = ctx.saved_tensors
        if ctx.check_adapters is not None:
            ctx.check_adapters()
        if grad is None and grad_entropy is None:
            return None, None, None, None, None, None, *_NO_GRADS
        _, _, _, _, x_needs_grad, _, *head_needs_grad = ctx.needs_input_grad
        needs_grad = [x_needs_grad, *head_needs_grad]
        with gathered_parameters(head):
            grads = _token_logprobs_backward(
                needs_grad, grad, grad_entropy, kept, not keeps_graph(), x, labels, head, *ctx.options
            )
        dx, *dhead = [g if needed else None for g, needed in zip(grads, needs_grad, strict=True)]
        return None, None, None, None, dx, None, *dhead


# ---------------------------------------------------------------- the ops


def _new_results(
    needs_dhidden: bool, return_entropy: bool, keep_rows: int, x: Tensor, labels: Tensor, head: Sequence[Any], *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return (
        x.new_empty(labels.shape, dtype=result_dtype(x)),
        x.new_empty(labels.shape if return_entropy else 0, dtype=result_dtype(x)),
        x.new_empty(x.shape if needs_dhidden else (0, x.shape[1])),
        labels.new_empty(labels.shape if needs_dhidden else 0),
        x.new_empty(0, head[0].shape[0]),
    )


@register_op(
    f"token_logprobs(bool needs_dhidden, bool return_entropy, int keep_rows, {INPUTS_SCHEMA}, {OPTIONS_SCHEMA})"
    " -> (Tensor logps, Tensor entropy, Tensor dhidden, Tensor packed_row, Tensor kept)",
    fake=_new_results,
    synchronizes=True,
)
def token_logprobs_op(
    needs_dhidden: bool,
    return_entropy: bool,
    keep_rows: int,  # 0 where shapes must not depend on the labels
    x: Tensor,  # (N, D)
    labels: Tensor,  # (N,)
    head: Sequence[Any],
    *flat_options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return ℓ (N,), the entropies (N,), and if needed ∂ℓ/∂x of the active rows and where it is.

    dhidden (N, D) holds the active rows first, without gaps, then zeros: its chunks are contiguous, so GEMMs write into
    them. packed_row (N,) is the row of dhidden that belongs to each row of x, -1 for an ignored one. kept (K, V) holds
    the logits of the first K = min(keep_rows, number of active rows) active rows, without bias.
    """
    options = TokenLogprobsOptions(*flat_options)
    labels = _dispatch.readable(labels)
    active = labels != options.ignore_index
    rows, count = active_rows(active, labels, len(head[0]), options)
    active_labels = labels if rows is None else labels.index_select(0, rows)
    chunked = ChunkedHead(head, min(options.chunk_rows, count), options)
    logps = x.new_empty(count, dtype=result_dtype(x))
    entropies = x.new_empty(count if return_entropy else 0, dtype=logps.dtype)
    dhidden = x.new_empty(x.shape if needs_dhidden else (0, x.shape[1]))
    keep_rows = min(keep_rows, count)
    kept = x.new_empty(keep_rows, len(head[0]), dtype=chunked.logits_dtype)
    for chunk in chunks(count, options.chunk_rows, keep_rows):
        rows_of_x = chunk if rows is None else rows[chunk]
        results = RowResults(logps[chunk], entropies[chunk] if return_entropy else None)
        chunked.forward(
            x, rows_of_x, active_labels[chunk], results, dhidden[chunk] if needs_dhidden else None,
            kept[chunk] if chunk.start < keep_rows else None,
        )  # fmt: skip
    if count < len(dhidden):
        dhidden[count:].zero_()
    if rows is not None:
        logps = logps.new_zeros(len(labels)).index_copy_(0, rows, logps)
        if return_entropy:
            entropies = entropies.new_zeros(len(labels)).index_copy_(0, rows, entropies)
    if options.check_finite:
        check_finite("token_logprobs", logps)
    packed_row = labels.new_empty(0)
    if needs_dhidden:
        packed_row = (
            torch.arange(count, device=x.device) if rows is None else torch.where(active, active.cumsum(0) - 1, -1)
        )
    return logps, entropies, dhidden, packed_row, kept


@register_op(
    "token_logprobs_backward(bool[] needs_grad, Tensor? grad, Tensor? grad_entropy, Tensor(a!)? kept, bool in_place,"
    f" {INPUTS_SCHEMA}, {OPTIONS_SCHEMA}) -> ({GRADS_SCHEMA})",
    fake=lambda needs_grad, grad, grad_entropy, kept, in_place, x, labels, head, *_: new_grads(x, head, needs_grad),
    synchronizes=True,
)
def _token_logprobs_backward(
    needs_grad: list[bool],  # of x and of the tensors of the head
    grad: Tensor | None,  # (N,)
    grad_entropy: Tensor | None,  # (N,)
    kept: Tensor | None,
    in_place: bool,  # whether dlogits may replace the kept logits
    x: Tensor,
    labels: Tensor,
    head: Sequence[Any],
    *flat_options: Any,
) -> tuple[Tensor, ...]:
    options = TokenLogprobsOptions(*flat_options)
    scales = RowScales(
        labels.new_zeros(labels.shape, dtype=result_dtype(x)) if grad is None else grad.contiguous(),
        None if grad_entropy is None else grad_entropy.contiguous(),
    )
    return tuple(head_gradients(needs_grad, scales, x, labels, labels, head, kept, in_place, options))

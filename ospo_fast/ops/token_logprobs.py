"""Compute per-token log-probabilities of image codes from hidden states, without all logits in memory.

With a frozen head, any loss that depends on hidden states x_t only through ℓ_t = log softmax(z_t)[y_t] has the gradient
dL/dx_t = ∂L/∂ℓ_t · U_t, where U_t = ∂ℓ_t/∂x_t. For z = W₂·gelu(W₁·x + b₁) + b₂

    U_t = [((onehot(y_t) − softmax(z_t))·W₂) ⊙ gelu′(W₁·x_t + b₁)]·W₁

The forward keeps U (`dhidden`, the size of x) and the backward scales its rows. A trainable head needs ∂L/∂ℓ before its
GEMMs, so its backward recomputes the logits of each chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ospo_fast.errors import OpError
from ospo_fast.ops import _dispatch
from ospo_fast.ops._chunked_head import ChunkedHead
from ospo_fast.ops._dispatch import register_op, result_dtype
from ospo_fast.ops.head import Head
from ospo_fast.ops.scale_rows import scale_rows

IGNORE_INDEX = -100  # the label of positions without a code, as in torch's cross_entropy
# Whether addmm can accumulate in a wider dtype than that of its factors.
_ADDMM_WIDENS = torch.torch_version.TorchVersion(torch.__version__) >= "2.10"
_FP32_NAMES = ("fp32", "float32", torch.float32)


@dataclass(frozen=True)
class TokenLogprobsOptions:
    """Options of the registered ops. Their schemas are flat and list these fields as in `_OPTIONS`."""

    ignore_index: int
    chunk_rows: int
    fp32_logits: bool
    backend: str
    check_finite: bool

    def flat(self) -> tuple[Any, ...]:
        """Return the fields in the order of the schemas."""
        return self.ignore_index, self.chunk_rows, self.fp32_logits, self.backend, self.check_finite


_OPTIONS = "int ignore_index, int chunk_rows, bool fp32_logits, str backend, bool check_finite"


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
) -> Tensor:
    """Compute ℓ = log softmax(head(hidden))[labels] with the logits of at most `chunk_rows` rows in memory.

    Differentiable once, in `hidden` and in the head's weights that require grad. Ignored rows are not computed, and NaN
    in them reaches no result. Set the labels of rows with weight 0 to `ignore_index`, too. The float64 reference is
    `token_logprobs_reference`.

    Args:
        hidden: (..., D) float.
        head: nn.Linear, a Linear-GELU-Linear module or `Head`, in the dtype of `hidden`. Autocast casts both.
        labels: (...) integer. The code predicted FROM each hidden state (shift before), or `ignore_index`.
        ignore_index: label of the rows to ignore.
        chunk_rows: rows per chunk. None: as many as fill 32 MiB of logits on CPU, 196 MiB elsewhere.
        logits_dtype: None keeps the logits in the dtype of `hidden`; the softmax is always fp32. "fp32" widens
            half-precision logits, for magnitudes above 16.
        backend: "auto", "cuda", "cpp" or "torch".
        check_finite: refuse results that are not finite. Otherwise a hidden state with NaN or infinity gets ℓ = NaN,
            and no other row is affected.

    Returns:
        (...) fp32 (float64 for float64 inputs), 0 where ignored.

    Raises:
        OpError: wrong shapes, dtypes or devices, labels outside [0, V), an unsupported head, or results that
            `check_finite` refuses.

    """
    head = Head.of(head)
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and hidden.dtype != torch.float64:
        hidden, head = hidden.to(torch.get_autocast_dtype(device)), head.to(torch.get_autocast_dtype(device))
    _check(hidden, head, labels, chunk_rows, logits_dtype)
    fp32_logits = hidden.dtype in (torch.float16, torch.bfloat16) and logits_dtype in _FP32_NAMES
    if chunk_rows is None:
        chunk_rows = _default_chunk_rows(head.num_codes, 4 if fp32_logits else hidden.element_size(), device)
    backend = _dispatch.resolve("token_logprobs", backend, device, hidden.dtype)
    options = TokenLogprobsOptions(ignore_index, chunk_rows, fp32_logits, backend, check_finite)
    x, flat_labels = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1).long()
    with torch.autocast(device, enabled=False):
        logps: Tensor
        if torch.is_grad_enabled() and (head.trainable or hidden.requires_grad):
            function: Any = _TrainableHead if head.trainable else _FrozenHead
            logps = function.apply(options, x, flat_labels, *head.tensors)
        else:
            logps = _token_logprobs(False, x, flat_labels, head.tensors, *options.flat())[0]
    return logps.reshape(labels.shape)


def token_logprobs_reference(
    hidden: Tensor, head: Head | nn.Module, labels: Tensor, *, ignore_index: int = IGNORE_INDEX
) -> Tensor:
    """Compute `token_logprobs` in float64 from all logits at once, with plain autograd."""
    logits = Head.of(head).to(torch.float64)(hidden.double())
    active = labels != ignore_index
    logps = F.log_softmax(logits, dim=-1).gather(-1, labels.long().clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return torch.where(active, logps, torch.zeros_like(logps))


def _default_chunk_rows(num_codes: int, itemsize: int, device: str) -> int:
    """Rows for 32 MiB of logits on CPU, at least 256, as GEMMs of fewer rows are slow; for 196 MiB on a GPU.

    On a GPU that is 6272 = 49·128 rows of 16384 half-precision logits, a third of 16 pairs of Janus-Pro-7B. Peak at
    that size: 257 MB logits and features + 151 MB dhidden + 34 MB cuBLAS < 0.5 GB.
    """
    mebibytes, minimum = (32, 256) if device == "cpu" else (196, 128)
    return max(minimum, mebibytes * 2**20 // (itemsize * num_codes) // 128 * 128)


def _check(
    hidden: Tensor, head: Head, labels: Tensor, chunk_rows: int | None, logits_dtype: torch.dtype | str | None
) -> None:
    op = "token_logprobs"
    if not hidden.is_floating_point():
        raise OpError(f"{op}: hidden is {hidden.dtype}, expected a floating dtype")
    if hidden.dim() == 0 or hidden.shape[-1] != head.width:
        raise OpError(f"{op}: hidden has shape {tuple(hidden.shape)}, expected (..., {head.width}), the head's width")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise OpError(f"{op}: labels are {labels.dtype}, expected int64 codes")
    if labels.shape != hidden.shape[:-1]:
        got = f"labels have shape {tuple(labels.shape)}, hidden {tuple(hidden.shape)}"
        raise OpError(f"{op}: {got}; expected one label for each hidden state")
    if hidden.dtype != head.weight.dtype:
        got = f"hidden is {hidden.dtype}, the head is {head.weight.dtype}"
        raise OpError(f"{op}: {got}; cast one of them or run under torch.autocast")
    if not hidden.device == labels.device == head.weight.device:
        got = f"hidden is on {hidden.device}, labels on {labels.device}, the head on {head.weight.device}"
        raise OpError(f"{op}: {got}; move them to one device")
    if chunk_rows is not None and chunk_rows < 1:
        raise OpError(f"{op}: chunk_rows is {chunk_rows}, expected a positive number or None")
    if logits_dtype is not None and logits_dtype not in _FP32_NAMES and logits_dtype != hidden.dtype:
        raise OpError(f"{op}: logits_dtype is {logits_dtype!r}, expected None or 'fp32'")


# ---------------------------------------------------------------- autograd, outside the ops: cheaper than inside


class _FrozenHead(torch.autograd.Function):
    """Keep dhidden in the forward; scale its rows in the backward."""

    @staticmethod
    def forward(ctx: Any, options: TokenLogprobsOptions, x: Tensor, labels: Tensor, *head: Any) -> Tensor:
        logps, dhidden, packed_row = _token_logprobs(True, x, labels, head, *options.flat())
        ctx.save_for_backward(dhidden, packed_row)
        ctx.backend = options.backend
        return logps

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        dhidden, packed_row = ctx.saved_tensors
        dx = scale_rows(dhidden, packed_row, grad, ctx.backend)
        return None, dx, None, None, None, None, None


class _TrainableHead(torch.autograd.Function):
    """Keep the inputs in the forward; recompute the logits of each chunk in the backward."""

    @staticmethod
    def forward(ctx: Any, options: TokenLogprobsOptions, x: Tensor, labels: Tensor, *head: Any) -> Tensor:
        ctx.save_for_backward(x, labels, *head)
        ctx.options = options
        return _token_logprobs(False, x, labels, head, *options.flat())[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, labels, *head = ctx.saved_tensors
        _, x_needs_grad, _, *head_needs_grad = ctx.needs_input_grad
        needs_grad = [x_needs_grad, *head_needs_grad]
        grads = _token_logprobs_backward(needs_grad, grad, x, labels, head, *ctx.options.flat())
        dx, *dhead = [g if needed else None for g, needed in zip(grads, needs_grad, strict=True)]
        return None, dx, None, *dhead


# ---------------------------------------------------------------- the ops

_INPUTS = "Tensor x, Tensor labels, Tensor?[] head"  # of `Head.tensors`


def _new_results(needs_dhidden: bool, x: Tensor, labels: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return (
        x.new_empty(labels.shape, dtype=result_dtype(x)),
        x.new_empty(x.shape if needs_dhidden else (0, x.shape[1])),
        labels.new_empty(labels.shape if needs_dhidden else 0),
    )


@register_op(
    f"token_logprobs(bool needs_dhidden, {_INPUTS}, {_OPTIONS}) -> (Tensor logps, Tensor dhidden, Tensor packed_row)",
    fake=_new_results,
    synchronizes=True,
)
def _token_logprobs(
    needs_dhidden: bool,
    x: Tensor,  # (N, D)
    labels: Tensor,  # (N,)
    head: Sequence[Any],
    ignore_index: int,
    chunk_rows: int,
    fp32_logits: bool,
    backend: str,
    check_finite: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return ℓ (N,) and, if needed, ∂ℓ/∂x of the active rows and where it is.

    dhidden (N, D) holds the active rows first, without gaps, then zeros: its chunks are contiguous, so GEMMs write into
    them. packed_row (N,) is the row of dhidden that belongs to each row of x, -1 for an ignored one.
    """
    labels = labels.contiguous()  # kernels read it by address
    rows, count = _active_rows(labels, ignore_index, len(head[0]))
    active_labels = labels if rows is None else labels.index_select(0, rows)
    chunked = ChunkedHead(head, min(chunk_rows, count), fp32_logits, backend)
    logps = x.new_empty(count, dtype=result_dtype(x))
    dhidden = x.new_empty(x.shape if needs_dhidden else (0, x.shape[1]))
    for begin in range(0, count, chunk_rows):
        chunk = slice(begin, min(begin + chunk_rows, count))
        rows_of_x = chunk if rows is None else rows[chunk]
        chunked.forward(x, rows_of_x, active_labels[chunk], logps[chunk], dhidden[chunk] if needs_dhidden else None)
    dhidden[count:].zero_()
    if rows is not None:
        logps = logps.new_zeros(len(labels)).index_copy_(0, rows, logps)
    if check_finite:
        _check_finite(logps)
    packed_row = labels.new_empty(0)
    if needs_dhidden:
        active = labels != ignore_index
        packed_row = torch.where(active, active.cumsum(0) - 1, -1)
    return logps, dhidden, packed_row


@register_op(
    f"token_logprobs_backward(bool[] needs_grad, Tensor grad, {_INPUTS}, {_OPTIONS})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=lambda needs_grad, grad, x, labels, head, *_: _new_grads(x, head, needs_grad, (x.dtype,) * 5),
    synchronizes=True,
)
def _token_logprobs_backward(
    needs_grad: list[bool],  # x, weight, bias, proj_weight, proj_bias
    grad: Tensor,  # (N,)
    x: Tensor,
    labels: Tensor,
    head: Sequence[Any],
    ignore_index: int,
    chunk_rows: int,
    fp32_logits: bool,
    backend: str,
    check_finite: bool,  # of the forward
) -> tuple[Tensor, ...]:
    # Rows without a gradient are ignored too: they cost nothing, and a NaN in one of them cannot reach the weights.
    labels, grad = torch.where(grad == 0, ignore_index, labels).contiguous(), grad.contiguous()
    rows, count = _active_rows(labels, ignore_index, len(head[0]))
    chunked = ChunkedHead(head, min(chunk_rows, count), fp32_logits, backend)
    weight, proj_weight = chunked.weight, chunked.proj_weight
    # Sums over rows and over chunks are kept in fp32: half precision is too coarse for them.
    wide = result_dtype(x)
    weights_dtype = x.dtype if count <= chunk_rows else wide
    grads = _new_grads(x, head, needs_grad, (x.dtype, weights_dtype, wide, weights_dtype, wide))
    dx, dweight, dbias, dproj_weight, dproj_bias = grads
    with torch.autocast(x.device.type, enabled=False):
        for begin in range(0, count, chunk_rows):
            chunk = slice(begin, min(begin + chunk_rows, count))
            rows_of_x = chunk if rows is None else rows[chunk]
            inputs = chunked.gather_rows(x, rows_of_x)
            pre, features = (inputs, inputs) if proj_weight is None else chunked.project_into_buffers(inputs)
            dlogits = chunked.logits_grad(features, labels[rows_of_x], grad[rows_of_x])
            _accumulate(dweight, dbias, needs_grad[1:3], dlogits, features)
            # Products go into buffers that are not read again: dpre into features, dinputs into inputs.
            dlast, last_weight = dlogits, weight
            if proj_weight is not None and (needs_grad[0] or needs_grad[3] or needs_grad[4]):
                dlast, last_weight = torch.mm(dlogits, weight, out=features), proj_weight
                chunked.gelu_backward(dlast, pre)
                _accumulate(dproj_weight, dproj_bias, needs_grad[3:5], dlast, inputs)
            if needs_grad[0]:
                # A slice is a view of x itself, which must survive: its gradient goes straight to dx.
                dinputs = torch.mm(dlast, last_weight, out=dx[chunk] if rows is None else inputs)
                if rows is not None:
                    dx.index_copy_(0, rows[chunk], dinputs)
    return (*(g.to(x.dtype) for g in grads),)


def _accumulate(dweight: Tensor, dbias: Tensor, needs_grad: list[bool], grad: Tensor, inputs: Tensor) -> None:
    """Add the weight and bias gradients of inputs @ weight.T + bias, given its own gradient."""
    if needs_grad[0]:
        if dweight.dtype == grad.dtype:
            dweight.addmm_(grad.t(), inputs)
        elif grad.is_cuda and _ADDMM_WIDENS:
            torch.ops.aten.addmm.dtype_out(dweight, grad.t(), inputs, dweight.dtype, out=dweight)
        elif grad.is_cuda:
            dweight += torch.mm(grad.t(), inputs, out_dtype=dweight.dtype)
        else:
            dweight += grad.t() @ inputs
    if needs_grad[1]:
        dbias += grad.sum(0, dtype=dbias.dtype)


def _new_grads(
    x: Tensor, head: Sequence[Any], needs_grad: list[bool], dtypes: tuple[torch.dtype, ...]
) -> tuple[Tensor, ...]:
    """Zeros for each needed gradient of x and of the head's tensors; an empty tensor for each other."""
    return tuple(
        x.new_zeros(tensor.shape if tensor is not None and needed else 0, dtype=dtype)
        for tensor, needed, dtype in zip((x, *head), needs_grad, dtypes, strict=True)
    )


def _active_rows(labels: Tensor, ignore_index: int, num_codes: int) -> tuple[Tensor | None, int]:
    """Check the labels; return the indices of the rows that are not ignored, None if all, and their number.

    Both counts reach the host in one copy: on a GPU the only synchronization of the op.
    """
    active = labels != ignore_index
    invalid = active & ((labels < 0) | (labels >= num_codes))
    count, errors = torch.stack((active.sum(), invalid.sum())).tolist()
    if errors:
        row = int(invalid.nonzero()[0])
        raise OpError(
            f"token_logprobs: labels[{row}] (flattened) is {int(labels[row])}, expected "
            f"0 <= label < {num_codes} or ignore_index={ignore_index}; check that the codes are of the head's codebook"
        )
    return None if count == len(labels) else torch.nonzero_static(active, size=count).squeeze(1), count


def _check_finite(logps: Tensor) -> None:
    invalid = ~logps.isfinite()
    if bool(invalid.any()):
        row = int(invalid.nonzero()[0])
        raise OpError(
            f"token_logprobs: the log-probability of hidden[{row}] (flattened) is {float(logps[row])}, one of "
            f"{int(invalid.sum())} that are not finite; expected finite hidden states and weights, and logits within "
            "the range of their dtype (logits_dtype='fp32' widens it)"
        )

"""Hidden states → log-probability of each image code, without the logits in memory.

Key fact: with a frozen head every loss of the hidden states x_t through ℓ_t = log softmax(z_t)[y_t] alone has
dL/dx_t = ∂L/∂ℓ_t · U_t, where for z = W₂·gelu(W₁·x + b₁) + b₂

    U_t = [((onehot(y_t) − softmax(z_t))·W₂) ⊙ gelu′(W₁·x_t + b₁)]·W₁

So the forward keeps U, which has the size of x, and the backward scales its rows. A trainable head needs ∂L/∂ℓ before
its GEMMs: its backward recomputes the logits chunk by chunk.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ospo_fast.errors import OpError
from ospo_fast.ops import _dispatch
from ospo_fast.ops._chunked_head import ChunkedHead, scale_rows
from ospo_fast.ops.head import Head

# Whether addmm's sum may be wider than its factors.
_ADDS_WIDER = torch.torch_version.TorchVersion(torch.__version__) >= "2.10"
_FP32_NAMES = ("fp32", "float32", torch.float32)


def token_logprobs(
    hidden: Tensor,  # (..., D)
    head: Head | nn.Module,
    labels: Tensor,  # (...)
    *,
    ignore_index: int = -100,
    chunk_rows: int | None = None,
    logits_dtype: torch.dtype | str | None = None,
    backend: str = "auto",
    check_finite: bool = False,
) -> Tensor:
    """ℓ = log softmax(head(hidden))[labels], the logits never held for more than `chunk_rows` rows at a time.

    hidden (..., D) float; labels (...) integer, each the code predicted FROM that hidden state (shift before), or
    `ignore_index`; head: nn.Linear, a Linear-GELU-Linear module or `Head`, of hidden's dtype (autocast casts both).
    Returns (...) fp32 (float64 for float64 inputs), 0 where ignored. Differentiable once in hidden and, where they
    require grad, in the head's weights. Ignored rows cost nothing and their contents, NaN included, touch nothing: give
    `ignore_index` also to rows that your loss weighs with zero.

    chunk_rows: rows whose logits are held at a time; None takes logits of 32 MiB on CPU, 196 MiB elsewhere.
    logits_dtype: None keeps hidden's dtype for the logits (softmax is fp32 always); "fp32" is for half precision with
    logits beyond ±16. backend: "auto", "cuda", "cpp" or "torch". The float64 twin is `token_logprobs_reference`.
    check_finite: refuse a result that is not finite. Without it a row of hidden states with NaN or infinity has ℓ of
    NaN, and touches no other row.
    Raises OpError: shapes, dtypes or devices that do not fit, labels outside [0, V), a head that cannot be taken.
    """
    head = Head.of(head)
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and hidden.dtype != torch.float64:
        hidden, head = hidden.to(torch.get_autocast_dtype(device)), head.to(torch.get_autocast_dtype(device))
    fp32_logits = _check(hidden, head, labels, chunk_rows, logits_dtype)
    backend = _backend(backend, hidden.dtype, device)
    x = hidden.reshape(-1, hidden.shape[-1])
    chunk = chunk_rows or _default_chunk_rows(head.num_codes, 4 if fp32_logits else hidden.element_size(), device)
    args = (x, labels.reshape(-1).long(), *head.tensors, ignore_index, chunk, fp32_logits, backend, check_finite)
    with torch.autocast(device, enabled=False):
        logps: Tensor
        if torch.is_grad_enabled() and (head.trainable or hidden.requires_grad):
            function: Any = _TrainableHead if head.trainable else _FrozenHead
            logps = function.apply(*args)
        else:
            logps = torch.ops.ospo_fast.token_logprobs(*args, False)[0]
    return logps.reshape(labels.shape)


def token_logprobs_reference(
    hidden: Tensor, head: Head | nn.Module, labels: Tensor, *, ignore_index: int = -100
) -> Tensor:
    """The float64 twin of `token_logprobs`: all logits at once, plain autograd; same arguments, float64 result."""
    logits = Head.of(head).to(torch.float64)(hidden.double())
    active = labels != ignore_index
    logps = F.log_softmax(logits, dim=-1).gather(-1, labels.long().clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return torch.where(active, logps, torch.zeros_like(logps))


def _default_chunk_rows(num_codes: int, itemsize: int, device: str) -> int:
    """Rows whose logits fill 32 MiB on CPU, but 256 rows or more, on which GEMMs are fast; and 196 MiB on a GPU: for
    16384 codes in half precision 6272 = 49·128 rows, a third of 16 pairs of Janus-Pro-7B. There the chunk takes 257 MB
    with its features, U 151 and cuBLAS 34: half a gigabyte is not passed.
    """
    size, least = (32, 256) if device == "cpu" else (196, 128)
    return max(least, size * 2**20 // (itemsize * num_codes) // 128 * 128)


@torch.compiler.assume_constant_result
def _backend(backend: str, dtype: torch.dtype, device: str) -> str:
    if dtype in _dispatch.DTYPES or backend == "torch":
        return _dispatch.resolve("token_logprobs", backend, device)
    if backend == "auto":
        return "torch"
    raise OpError(
        f"token_logprobs: hidden is {dtype}, which backend={backend!r} does not take; "
        "expected float32, float16 or bfloat16, or use 'auto' or 'torch'"
    )


def _check(
    hidden: Tensor, head: Head, labels: Tensor, chunk_rows: int | None, logits_dtype: torch.dtype | str | None
) -> bool:
    if not hidden.is_floating_point():
        raise OpError(f"token_logprobs: hidden is {hidden.dtype}, expected a floating dtype")
    if hidden.dim() == 0 or hidden.shape[-1] != head.width:
        raise OpError(
            f"token_logprobs: hidden has shape {tuple(hidden.shape)}, expected (..., {head.width}), the head's width"
        )
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise OpError(f"token_logprobs: labels are {labels.dtype}, expected int64 codes")
    if labels.shape != hidden.shape[:-1]:
        raise OpError(
            f"token_logprobs: labels have shape {tuple(labels.shape)}, hidden {tuple(hidden.shape)}; "
            "expected one label for each hidden state"
        )
    if hidden.dtype != head.weight.dtype:
        raise OpError(
            f"token_logprobs: hidden is {hidden.dtype}, the head is {head.weight.dtype}; "
            "cast one of them or run under torch.autocast"
        )
    if not hidden.device == labels.device == head.weight.device:
        raise OpError(
            f"token_logprobs: hidden is on {hidden.device}, labels on {labels.device}, the head on "
            f"{head.weight.device}; move them to one device"
        )
    if chunk_rows is not None and chunk_rows < 1:
        raise OpError(f"token_logprobs: chunk_rows is {chunk_rows}, expected a positive number or None")
    if logits_dtype is not None and logits_dtype not in _FP32_NAMES and logits_dtype != hidden.dtype:
        raise OpError(f"token_logprobs: logits_dtype is {logits_dtype!r}, expected None or 'fp32'")
    return hidden.dtype in (torch.float16, torch.bfloat16) and logits_dtype in _FP32_NAMES


# ---------------------------------------------------------------- autograd, outside the ops: cheaper than inside


class _FrozenHead(torch.autograd.Function):
    """Keeps U from the forward; the backward scales its rows."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        logps: Tensor
        logps, unit, places = torch.ops.ospo_fast.token_logprobs(*args, True)
        ctx.save_for_backward(unit, places)
        ctx.backend = args[9]
        return logps

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        unit, places = ctx.saved_tensors
        return torch.ops.ospo_fast.scale_rows(unit, places, grad, ctx.backend), *[None] * 10


class _TrainableHead(torch.autograd.Function):
    """Keeps the inputs; the backward recomputes the logits of each chunk."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        ctx.save_for_backward(*args[:6])
        ctx.options = args[6:10]
        logps: Tensor = torch.ops.ospo_fast.token_logprobs(*args, False)[0]
        return logps

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, labels, *head = ctx.saved_tensors
        wanted = [ctx.needs_input_grad[i] for i in (0, 2, 3, 4, 5)]
        grads = torch.ops.ospo_fast.token_logprobs_backward(grad, x, labels, *head, *ctx.options, wanted)
        dx, *dhead = [g if w else None for g, w in zip(grads, wanted, strict=True)]
        return dx, None, *dhead, *[None] * 5


# ---------------------------------------------------------------- the ops

_HEAD_ARGS = "Tensor weight, Tensor? bias, Tensor? proj_weight, Tensor? proj_bias"
_OPTIONS = "int ignore_index, int chunk_rows, bool fp32_logits, str backend"
torch.library.define(
    "ospo_fast::token_logprobs",
    f"(Tensor x, Tensor labels, {_HEAD_ARGS}, {_OPTIONS}, bool check_finite, bool with_unit)"
    " -> (Tensor logps, Tensor unit, Tensor places)",
    tags=_dispatch.HOST_SYNC_TAGS,
)
torch.library.define(
    "ospo_fast::token_logprobs_backward",
    f"(Tensor grad, Tensor x, Tensor labels, {_HEAD_ARGS}, {_OPTIONS}, bool[] wanted)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=_dispatch.HOST_SYNC_TAGS,
)
torch.library.define("ospo_fast::scale_rows", "(Tensor unit, Tensor places, Tensor scales, str backend) -> Tensor")
torch.library.impl("ospo_fast::scale_rows", "CompositeExplicitAutograd")(scale_rows)


@torch.library.impl("ospo_fast::token_logprobs", "CompositeExplicitAutograd")
def _token_logprobs(
    x: Tensor,  # (N, D)
    labels: Tensor,  # (N,)
    weight: Tensor,  # (V, F)
    bias: Tensor | None,
    proj_weight: Tensor | None,  # (F, D)
    proj_bias: Tensor | None,
    ignore_index: int,
    chunk_rows: int,
    fp32_logits: bool,
    backend: str,
    check_finite: bool,
    with_unit: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """ℓ (N,) and, if asked for, U of the active rows, one after another from the top of unit (N, D), which ends in
    zeros; places (N,) says where that of each row is, -1 for an ignored one.
    """
    labels = labels.contiguous()  # kernels read it from its address on
    rows, count = _active_rows(labels, ignore_index, weight.shape[0])
    active_labels = labels if rows is None else labels.index_select(0, rows)
    chain = ChunkedHead(weight, bias, proj_weight, proj_bias, min(chunk_rows, count), fp32_logits, backend)
    logps = x.new_empty(count, dtype=_result_dtype(x))
    unit = x.new_empty(x.shape if with_unit else (0, x.shape[1]))
    for begin in range(0, count, chunk_rows):
        chunk = slice(begin, min(begin + chunk_rows, count))
        of_x = chunk if rows is None else rows[chunk]
        chain.forward(x, of_x, active_labels[chunk], logps[chunk], unit[chunk] if with_unit else None)
    unit[count:].zero_()
    if rows is not None:
        logps = logps.new_zeros(len(labels)).index_copy_(0, rows, logps)
    if check_finite:
        _check_finite(logps)
    places = labels.new_empty(0)
    if with_unit:
        active = labels != ignore_index
        places = torch.where(active, active.cumsum(0) - 1, -1)
    return logps, unit, places


@torch.library.impl("ospo_fast::token_logprobs_backward", "CompositeExplicitAutograd")
def _token_logprobs_backward(
    grad: Tensor,  # (N,)
    x: Tensor,
    labels: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    proj_weight: Tensor | None,
    proj_bias: Tensor | None,
    ignore_index: int,
    chunk_rows: int,
    fp32_logits: bool,
    backend: str,
    wanted: list[bool],  # x, weight, bias, proj_weight, proj_bias
) -> tuple[Tensor, ...]:
    # Rows without a gradient are left out: they cost nothing, and a NaN in one of them cannot reach the weights.
    labels, grad = torch.where(grad == 0, ignore_index, labels).contiguous(), grad.contiguous()
    rows, count = _active_rows(labels, ignore_index, weight.shape[0])
    chain = ChunkedHead(weight, bias, proj_weight, proj_bias, min(chunk_rows, count), fp32_logits, backend)
    head = (weight, bias, proj_weight, proj_bias)
    # Sums over rows and over chunks are kept in fp32: half precision is too coarse for them.
    wide = _result_dtype(x)
    dx, *sums = grads = _new_grads(x, head, wanted, x.dtype if count <= chunk_rows else wide, wide)
    with torch.autocast(x.device.type, enabled=False):
        for begin in range(0, count, chunk_rows):
            chunk = slice(begin, min(begin + chunk_rows, count))
            of_x = chunk if rows is None else rows[chunk]
            inputs = chain.take(x, of_x)
            pre, features = (inputs, inputs) if proj_weight is None else chain.projected(inputs)
            dlogits = chain.residual(features, labels[of_x], grad[of_x])
            _accumulate(sums[0], sums[1], wanted[1:3], dlogits, features)
            # What follows is written over what is not read again.
            last = dlogits, weight
            if proj_weight is not None and (wanted[0] or wanted[3] or wanted[4]):
                dpre = torch.mm(dlogits, weight, out=features)
                chain.gelu_backward(dpre, pre)
                _accumulate(sums[2], sums[3], wanted[3:5], dpre, inputs)
                last = dpre, proj_weight
            if wanted[0]:
                dinputs = torch.mm(*last, out=dx[chunk] if rows is None else inputs)
                if rows is not None:
                    dx.index_copy_(0, rows[chunk], dinputs)
    return (*(g.to(x.dtype) for g in grads),)


def _accumulate(dweight: Tensor, dbias: Tensor, wanted: list[bool], grad: Tensor, inputs: Tensor) -> None:
    """Adds the gradients of inputs @ weight.T + bias, whose own gradient is `grad`."""
    if wanted[0]:
        if dweight.dtype == grad.dtype:
            dweight.addmm_(grad.t(), inputs)
        elif grad.is_cuda and _ADDS_WIDER:
            torch.ops.aten.addmm.dtype_out(dweight, grad.t(), inputs, dweight.dtype, out=dweight)
        elif grad.is_cuda:
            dweight += torch.mm(grad.t(), inputs, out_dtype=dweight.dtype)
        else:
            dweight += grad.t() @ inputs
    if wanted[1]:
        dbias += grad.sum(0, dtype=dbias.dtype)


@torch.library.register_fake("ospo_fast::token_logprobs")
def _(x: Tensor, labels: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    with_unit = args[-1]
    return (
        x.new_empty(labels.shape, dtype=_result_dtype(x)),
        x.new_empty(x.shape if with_unit else (0, x.shape[1])),
        labels.new_empty(labels.shape if with_unit else 0),
    )


@torch.library.register_fake("ospo_fast::token_logprobs_backward")
def _(grad: Tensor, x: Tensor, labels: Tensor, *args: Any) -> tuple[Tensor, ...]:
    return _new_grads(x, args[:4], args[-1], x.dtype, x.dtype)


@torch.library.register_fake("ospo_fast::scale_rows")
def _(unit: Tensor, places: Tensor, scales: Tensor, backend: str) -> Tensor:
    return unit.new_empty(unit.shape)


def _result_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _new_grads(
    x: Tensor,
    head: tuple[Tensor | None, ...],
    wanted: list[bool],
    weights_dtype: torch.dtype,
    biases_dtype: torch.dtype,
) -> tuple[Tensor, ...]:
    """Zeros for each wanted gradient; an empty tensor for each other."""
    dtypes = (x.dtype, weights_dtype, biases_dtype, weights_dtype, biases_dtype)
    return tuple(
        x.new_zeros(tensor.shape if tensor is not None and want else 0, dtype=dtype)
        for tensor, want, dtype in zip((x, *head), wanted, dtypes, strict=True)
    )


def _active_rows(labels: Tensor, ignore_index: int, num_codes: int) -> tuple[Tensor | None, int]:
    """Indices of the rows that have a label, None when all have one, and how many these are, after a check of the
    labels. The numbers travel to the host at once: on a GPU this is the one place where it waits.
    """
    active = labels != ignore_index
    wrong = active & ((labels < 0) | (labels >= num_codes))
    count, errors = torch.stack((active.sum(), wrong.sum())).tolist()
    if errors:
        row = int(wrong.nonzero()[0])
        raise OpError(
            f"token_logprobs: labels[{row}] (flattened) is {int(labels[row])}, expected "
            f"0 <= label < {num_codes} or ignore_index={ignore_index}; are these codes of another codebook?"
        )
    return None if count == len(labels) else torch.nonzero_static(active, size=count).squeeze(1), count


def _check_finite(logps: Tensor) -> None:
    wrong = ~logps.isfinite()
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0])
        raise OpError(
            f"token_logprobs: the log-probability of hidden[{row}] (flattened) is {float(logps[row])}, one of "
            f"{int(wrong.sum())} that are not finite; expected hidden states and a head without NaN and infinity, and "
            "logits within the range of their dtype (logits_dtype='fp32' widens it)"
        )

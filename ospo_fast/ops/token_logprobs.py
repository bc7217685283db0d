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
from torch.autograd.function import FunctionCtx, once_differentiable

from ospo_fast.errors import OpError
from ospo_fast.ops import _dispatch
from ospo_fast.ops.head import Head

_HALF = (torch.float16, torch.bfloat16)
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
) -> Tensor:
    """ℓ = log softmax(head(hidden))[labels], the logits never held for more than `chunk_rows` rows at a time.

    hidden (..., D) float; labels (...) integer, each the code predicted FROM that hidden state (shift before), or
    `ignore_index`; head: nn.Linear, a Linear-GELU-Linear module or `Head`, of hidden's dtype (autocast casts both).
    Returns (...) fp32 (float64 for float64 inputs), 0 where ignored. Differentiable once in hidden and, where they
    require grad, in the head's weights. Ignored rows cost nothing and their contents, NaN included, touch nothing.

    chunk_rows: rows per chunk; None takes a workspace of about 16 MB on CPU, 256 MB elsewhere.
    logits_dtype: None keeps hidden's dtype for the logits (softmax is fp32 always); "fp32" is for half precision with
    logits beyond ±16. The float64 twin is `token_logprobs_reference`.
    Raises OpError: shapes, dtypes or devices that do not fit, labels outside [0, V), a head that cannot be taken.
    """
    _dispatch.resolve("token_logprobs", backend, hidden.device.type)
    head = Head.of(head)
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and hidden.dtype != torch.float64:
        hidden, head = hidden.to(torch.get_autocast_dtype(device)), head.to(torch.get_autocast_dtype(device))
    fp32_logits = _check(hidden, head, labels, chunk_rows, logits_dtype)
    x = hidden.reshape(-1, hidden.shape[-1])
    chunk = chunk_rows or _default_chunk_rows(head.num_codes, device)
    args = (x, labels.reshape(-1).long(), *head.tensors, ignore_index, chunk, fp32_logits)
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


def _default_chunk_rows(num_codes: int, device: str) -> int:
    return max(64, (16 if device == "cpu" else 256) * 2**20 // (4 * num_codes))


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
    return hidden.dtype in _HALF and logits_dtype in _FP32_NAMES


# ---------------------------------------------------------------- autograd, outside the ops: cheaper than inside


class _FrozenHead(torch.autograd.Function):
    """Keeps U from the forward; the backward scales its rows."""

    @staticmethod
    def forward(ctx: FunctionCtx, *args: Any) -> Tensor:
        logps: Tensor
        logps, unit = torch.ops.ospo_fast.token_logprobs(*args, True)
        ctx.save_for_backward(unit)
        return logps

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (unit,) = ctx.saved_tensors
        return torch.ops.ospo_fast.scale_rows(unit, grad), *[None] * 8


class _TrainableHead(torch.autograd.Function):
    """Keeps the inputs; the backward recomputes the logits of each chunk."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        ctx.save_for_backward(*args[:6])
        ctx.options = args[6:]
        logps: Tensor = torch.ops.ospo_fast.token_logprobs(*args, False)[0]
        return logps

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, labels, *head = ctx.saved_tensors
        wanted = [ctx.needs_input_grad[i] for i in (0, 2, 3, 4, 5)]
        grads = torch.ops.ospo_fast.token_logprobs_backward(grad, x, labels, *head, *ctx.options, wanted)
        dx, *dhead = [g if w else None for g, w in zip(grads, wanted, strict=True)]
        return dx, None, *dhead, None, None, None


# ---------------------------------------------------------------- the ops

_HEAD_ARGS = "Tensor weight, Tensor? bias, Tensor? proj_weight, Tensor? proj_bias"
_OPTIONS = "int ignore_index, int chunk_rows, bool fp32_logits"
torch.library.define(
    "ospo_fast::token_logprobs",
    f"(Tensor x, Tensor labels, {_HEAD_ARGS}, {_OPTIONS}, bool with_unit) -> (Tensor logps, Tensor unit)",
)
torch.library.define(
    "ospo_fast::token_logprobs_backward",
    f"(Tensor grad, Tensor x, Tensor labels, {_HEAD_ARGS}, {_OPTIONS}, bool[] wanted)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
torch.library.define("ospo_fast::scale_rows", "(Tensor unit, Tensor scale) -> Tensor")


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
    with_unit: bool,
) -> tuple[Tensor, Tensor]:
    rows = _active_rows(labels, ignore_index, weight.shape[0])
    chain = _Chain(weight, bias, proj_weight, proj_bias, min(chunk_rows, len(rows)), fp32_logits)
    logps = x.new_zeros(len(labels), dtype=_result_dtype(x))
    unit = x.new_zeros(x.shape) if with_unit else x.new_empty(0, x.shape[1])
    for chunk in _chunks(rows, chunk_rows):
        values, residual, pre, _ = chain.forward(x.index_select(0, chunk), labels.index_select(0, chunk), with_unit)
        logps.index_copy_(0, chunk, values)
        if with_unit:
            unit.index_copy_(0, chunk, chain.to_input(chain.cast(residual), pre)[0])
    return logps, unit


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
    wanted: list[bool],  # x, weight, bias, proj_weight, proj_bias
) -> tuple[Tensor, ...]:
    # Rows without a gradient are left out: they cost nothing, and a NaN in one of them cannot reach the weights.
    rows = _active_rows(torch.where(grad == 0, ignore_index, labels), ignore_index, weight.shape[0])
    chain = _Chain(weight, bias, proj_weight, proj_bias, min(chunk_rows, len(rows)), fp32_logits)
    grads = _new_grads(x, (weight, bias, proj_weight, proj_bias), wanted)
    dx, dweight, dbias, dproj, dproj_bias = grads
    for chunk in _chunks(rows, chunk_rows):
        inputs = x.index_select(0, chunk)
        _, dlogits, pre, features = chain.forward(inputs, labels.index_select(0, chunk), True)
        dlogits.mul_(grad.index_select(0, chunk).unsqueeze(1))
        if wanted[2]:
            dbias += dlogits.sum(0)
        dlogits = chain.cast(dlogits)
        if wanted[1]:
            dweight.addmm_(dlogits.t(), features)
        if not (wanted[0] or wanted[3] or wanted[4]):
            continue
        dinputs, dpre = chain.to_input(dlogits, pre)
        if wanted[0]:
            dx.index_copy_(0, chunk, dinputs)
        if wanted[3]:
            dproj.addmm_(dpre.t(), inputs)
        if wanted[4]:
            dproj_bias += dpre.sum(0, dtype=dproj_bias.dtype)
    return (*(g.to(x.dtype) for g in grads),)


@torch.library.impl("ospo_fast::scale_rows", "CompositeExplicitAutograd")
def _scale_rows(unit: Tensor, scale: Tensor) -> Tensor:
    # A new tensor each time (a second backward needs `unit` as it is); a zero coefficient silences even a NaN row.
    scale = scale.unsqueeze(1)
    return torch.mul(unit, scale, out=torch.empty_like(unit)).masked_fill_(scale == 0, 0)


@torch.library.register_fake("ospo_fast::token_logprobs")
def _(x: Tensor, labels: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(labels.shape, dtype=_result_dtype(x)), x.new_empty(x.shape if args[-1] else (0, x.shape[1]))


@torch.library.register_fake("ospo_fast::token_logprobs_backward")
def _(grad: Tensor, x: Tensor, labels: Tensor, *args: Any) -> tuple[Tensor, ...]:
    return (*(g.to(x.dtype) for g in _new_grads(x, args[:4], args[-1])),)


@torch.library.register_fake("ospo_fast::scale_rows")
def _(unit: Tensor, scale: Tensor) -> Tensor:
    return torch.empty_like(unit)


def _result_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _new_grads(x: Tensor, head: tuple[Tensor | None, ...], wanted: list[bool]) -> tuple[Tensor, ...]:
    """Zeros for each wanted gradient, the biases' in the result dtype; an empty tensor for each other."""
    dtypes = (x.dtype, x.dtype, _result_dtype(x), x.dtype, _result_dtype(x))
    return tuple(
        x.new_zeros(tensor.shape if tensor is not None and want else 0, dtype=dtype)
        for tensor, want, dtype in zip((x, *head), wanted, dtypes, strict=True)
    )


def _chunks(rows: Tensor, size: int) -> list[Tensor]:
    return [rows[begin : begin + size] for begin in range(0, len(rows), size)]


def _active_rows(labels: Tensor, ignore_index: int, num_codes: int) -> Tensor:
    """Indices of the rows that have a label, after a check of these labels."""
    rows = (labels != ignore_index).nonzero().squeeze(1)
    active = labels.index_select(0, rows)
    wrong = ((active < 0) | (active >= num_codes)).nonzero()
    if len(wrong):
        first = wrong[0, 0]
        raise OpError(
            f"token_logprobs: labels[{int(rows[first])}] (flattened) is {int(active[first])}, expected "
            f"0 <= label < {num_codes} or ignore_index={ignore_index}; are these codes of another codebook?"
        )
    return rows


class _Chain:
    """The head's GEMM chain over one chunk of rows, in buffers that every chunk uses again."""

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        proj_weight: Tensor | None,
        proj_bias: Tensor | None,
        rows: int,
        fp32_logits: bool,
    ) -> None:
        self.weight, self.proj_weight, self.proj_bias = weight, proj_weight, proj_bias
        work = torch.float32 if fp32_logits else weight.dtype
        self.out_weight, self.out_bias = weight.to(work), None if bias is None else bias.to(work)
        self.logits = weight.new_empty(rows, weight.shape[0], dtype=work)
        # fp32 scratch for the softmax; for fp32 and fp64 logits it is their own buffer.
        self.scratch = torch.empty_like(self.logits, dtype=torch.float32) if work in _HALF else self.logits
        self.narrow = torch.empty_like(self.logits, dtype=weight.dtype) if fp32_logits else self.logits

    def forward(self, x: Tensor, labels: Tensor, with_residual: bool) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        """ℓ, onehot − softmax (if asked for), the GELU's input and the features before the last GEMM."""
        pre, features = None, x
        if self.proj_weight is not None:
            pre = F.linear(x, self.proj_weight, self.proj_bias)
            features = F.gelu(pre)
        n, labels = len(x), labels.unsqueeze(1)
        z, work = self.logits[:n], features.to(self.out_weight.dtype)
        if self.out_bias is None:
            torch.mm(work, self.out_weight.t(), out=z)
        else:
            torch.addmm(self.out_bias, work, self.out_weight.t(), out=z)
        p = self.scratch[:n]
        if p.dtype != z.dtype:
            p.copy_(z)
        # Subtracting the maximum first keeps the error of ℓ that of |z − max|, as log_softmax does.
        p.sub_(p.amax(dim=1, keepdim=True))
        target = p.gather(1, labels)
        p.exp_()
        total = p.sum(dim=1, keepdim=True)
        logps = (target - total.log()).squeeze(1)
        if with_residual:
            p.div_(total.neg_()).scatter_add_(1, labels, torch.ones_like(target))
        return logps, p, pre, features

    def cast(self, residual: Tensor) -> Tensor:
        """The residual in the weights' dtype, for the GEMMs."""
        return residual if residual.dtype == self.weight.dtype else self.narrow[: len(residual)].copy_(residual)

    def to_input(self, dlogits: Tensor, pre: Tensor | None) -> tuple[Tensor, Tensor]:
        """Gradients of the head's input and of the GELU's input, from that of the logits."""
        dfeatures = dlogits @ self.weight
        if pre is None or self.proj_weight is None:
            return dfeatures, dfeatures
        dpre = torch.ops.aten.gelu_backward(dfeatures, pre)
        return dpre @ self.proj_weight, dpre

"""`token_logprobs` of a few rows of a frozen linear head on a CPU, where checks cost more than the products.

Only the usual call is taken. What is unusual or wrong goes to the general path, which has the error messages.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ospo_fast.ops import _dispatch
from ospo_fast.ops._autograd import first_derivative_only
from ospo_fast.ops._head_modules import is_plain_linear
from ospo_fast.ops.head import Head

MAX_ROWS = 64  # at most the rows of a chunk
_EVERY_ROW = np.arange(MAX_ROWS, dtype=np.int64)  # NumPy's, because torch's may be made under a mode or on a device
_EVERY_ROW_AT = _EVERY_ROW.ctypes.data
_FLOAT, _LONG, _STRIDED = torch.float32, torch.int64, torch.strided


def few_rows(hidden: Tensor, head: Head | nn.Module, labels: Tensor, ignore_index: int, temperature: float) -> Any:
    """Return ℓ in the shape of labels, or None if this is not such a call; all labels must be codes."""
    if torch.compiler.is_compiling() or type(hidden) is not Tensor or type(labels) is not Tensor:
        return None
    if type(head) is nn.Linear:
        if not is_plain_linear(head):
            return None
        parameters = head._parameters
        weight, bias = parameters["weight"], parameters["bias"]
    elif type(head) is Head and head.proj_weight is None:
        weight, bias = head.weight, head.bias  # type: ignore[assignment]
    else:
        return None
    if type(weight) not in (nn.Parameter, Tensor) or weight is None or weight.dim() != 2:
        return None
    (codes, width), shape, rows = weight.shape, hidden.shape, labels.numel()
    if not (
        0 < rows <= MAX_ROWS and codes and width and shape[-1:] == (width,) and shape[:-1] == labels.shape
        and hidden.dtype is _FLOAT and weight.dtype is _FLOAT and labels.dtype is _LONG
        and hidden.is_cpu and weight.is_cpu and labels.is_cpu
        and hidden.layout is _STRIDED and labels.is_contiguous() and not weight.is_neg()
    ):  # fmt: skip
        return None
    bias_at = 0
    if bias is not None:
        if type(bias) not in (nn.Parameter, Tensor) or bias.dtype is not _FLOAT or bias.shape != (codes,):
            return None
        if not (bias.is_cpu and bias.is_contiguous()) or bias.is_neg():
            return None
        bias_at = bias.data_ptr()
        if not bias_at:  # its memory has been freed
            return None
    needs_grad = False
    if torch.is_grad_enabled():
        if weight.requires_grad or (bias is not None and bias.requires_grad):
            return None
        needs_grad = hidden.requires_grad
    native = _dispatch._native()[0]
    if (
        native is None or type(ignore_index) is not int or type(temperature) is not float
        or not _dispatch.INT64_MIN <= ignore_index <= _dispatch.INT64_MAX
        or not 1e-37 <= temperature <= 1e37 or torch.is_autocast_enabled("cpu") or not _dispatch.nothing_traces()
    ):  # fmt: skip
        return None
    labels_at = labels.data_ptr()
    if native.count_labels(labels_at, rows, ignore_index, codes) != rows:
        return None
    if len(shape) != 2:
        hidden = hidden.reshape(rows, width)
    arguments = native, weight, bias_at, labels_at, 1 / temperature
    run: Any = _FewRows.apply if needs_grad else _compute
    logps: Tensor = run(hidden, arguments)
    return logps if len(shape) == 2 else logps.view(labels.shape)


def _compute(hidden: Tensor, arguments: Any) -> Tensor:
    native, weight, bias_at, labels_at, factor = arguments
    logits = F.linear(hidden, weight)
    rows, codes = logits.shape
    logps = logits.new_empty(rows)
    native.token_logprobs(
        logits.data_ptr(), 0, bias_at, labels_at, factor, 0.0, 0, 0, 0, logps.data_ptr(), 0, 0, 0, 0, rows, codes,
        torch.get_num_threads(),
    )  # fmt: skip
    return logps


class _FewRows(torch.autograd.Function):
    """Keep ∂ℓ/∂hidden in the forward; scale its rows in the backward."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, arguments: Any) -> Tensor:
        native, weight, bias_at, labels_at, factor = arguments
        logits = F.linear(hidden, weight)
        rows, codes = logits.shape
        logps, logits_at = logits.new_empty(rows), logits.data_ptr()
        native.token_logprobs(
            logits_at, 0, bias_at, labels_at, factor, 0.0, 0, 0, 0, logps.data_ptr(), 0, 0, logits_at, 0, rows, codes,
            torch.get_num_threads(),
        )  # fmt: skip
        ctx.save_for_backward(torch.mm(logits, weight))  # the gradients have replaced the logits
        # The hidden states lead to their own graph. They are few, so keeping them costs less than an empty clone.
        ctx.native, ctx.edges = arguments[0], (hidden,)
        return logps

    @staticmethod
    @first_derivative_only("token_logprobs")
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (dhidden,) = ctx.saved_tensors
        # Hooks of saved tensors may return another dtype, which the kernel would read beyond its end.
        if dhidden.dtype is not _FLOAT:
            dhidden = dhidden.float()
        grad, dhidden = _dispatch.readable(grad), _dispatch.readable(dhidden)
        out = torch.empty_like(dhidden)
        ctx.native.scale_rows(
            dhidden.data_ptr(), _EVERY_ROW_AT, _dispatch.pointer(grad, _FLOAT), out.data_ptr(), 0, *out.shape,
            torch.get_num_threads(),
        )  # fmt: skip
        return out, None

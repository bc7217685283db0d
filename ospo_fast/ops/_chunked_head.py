"""GEMMs of the head over chunks of rows, and the softmax step between them: the core of `token_logprobs`.

The softmax step takes the logits z (n, V) of a chunk without their bias, destroys them, and computes

    logps = log softmax(z + bias)[labels]                           (n,) fp32, into a given tensor
    dlogits = scales · (onehot(labels) − softmax(z + bias))         (n, V) in the weights' dtype, on request

Compiled steps write dlogits in place, over the logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ospo_fast.errors import OpError
from ospo_fast.ops import _dispatch


class ChunkedHead:
    """Head weights and the buffers of one call. All chunks, of up to `chunk_rows` rows, share the buffers."""

    def __init__(self, head: Sequence[Any], chunk_rows: int, fp32_logits: bool, backend: str) -> None:
        weight: Tensor = head[0]
        _, bias, proj_weight, proj_bias = head  # the tensors of a `Head`
        self.weight, self.proj_weight = weight, proj_weight
        self.proj_bias = None if proj_bias is None else proj_bias.contiguous()
        self.chunk_rows, self.backend = chunk_rows, backend
        logits_dtype = torch.float32 if fp32_logits else weight.dtype
        # cuBLAS writes fp32 logits from half-precision factors; elsewhere the factors have to be fp32.
        self.logits_weight = weight if weight.is_cuda else weight.to(logits_dtype)
        self.logits = weight.new_empty(chunk_rows, weight.shape[0], dtype=logits_dtype)
        if bias is not None:
            # The CUDA step reads the bias in the dtype of the logits, the others in fp32 or fp64.
            wide = torch.promote_types(logits_dtype, torch.float32)
            bias = bias.to(logits_dtype if backend == "cuda" else wide).contiguous()
        self.bias = bias
        self.features = None if proj_weight is None else weight.new_empty(chunk_rows, proj_weight.shape[0])
        self.buffers: dict[str, Tensor] = {}

    def forward(
        self, x: Tensor, rows: Tensor | slice, labels: Tensor, logps: Tensor, dhidden: Tensor | None = None
    ) -> None:
        """Write the log-probabilities of x[rows] to `logps` and, if given, ∂logps/∂x to `dhidden` (n, D).

        Buffers are shared between values that are never needed at the same time. With a projection:

            step                          reads             writes           in the buffer
            gather_rows                   x                 inputs           features if F = D, else dhidden
            project, GEMM                 inputs            pre              dhidden if F = D, else "pre"
            project, GELU                 pre               features         features: inputs are dead
            GEMM, softmax step            features          logits, dlogits  logits: dlogits replace them
            GEMM                          dlogits           dfeatures        features: dead after the logits
            gelu_backward                 dfeatures, pre    dpre             features: in place
            GEMM                          dpre              dhidden          dhidden: pre or inputs are dead

        So dhidden, which the caller keeps anyway, saves a buffer of (n, F) or (n, D).
        """
        if self.features is None:
            inputs = self.gather_rows(x, rows, out=dhidden)  # dead when dhidden is written
            dlogits = self._logps(inputs, labels, None, logps, needs_grad=dhidden is not None)
            if dlogits is not None:
                torch.mm(dlogits, self.weight, out=dhidden)
            return
        features = self.features[: len(logps)]
        square = features.shape[1] == x.shape[1]
        if dhidden is None:
            inputs, pre = self.gather_rows(x, rows), features  # without a backward the GELU runs in place
        elif square:
            inputs, pre = self.gather_rows(x, rows, out=features), dhidden
        else:
            inputs, pre = self.gather_rows(x, rows, out=dhidden), self._buffer("pre", *features.shape)
        self.project(inputs, pre, features)
        dlogits = self._logps(features, labels, None, logps, needs_grad=dhidden is not None)
        if dlogits is not None:
            dpre = torch.mm(dlogits, self.weight, out=features)
            self.gelu_backward(dpre, pre)
            torch.mm(dpre, self.proj_weight, out=dhidden)

    def gather_rows(self, x: Tensor, rows: Tensor | slice, out: Tensor | None = None) -> Tensor:
        """Return x[rows]: a view for a slice; for an index a copy, in `out` or in the buffer "inputs"."""
        if isinstance(rows, slice):
            return x[rows]
        out = self._buffer("inputs", len(rows), x.shape[1]) if out is None else out
        return torch.index_select(x, 0, rows, out=out)

    def project_into_buffers(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Project rows x (n, D); return the buffers (n, F) of the GELU's input, for `gelu_backward`, and its output."""
        assert self.features is not None
        features = self.features[: len(x)]
        pre = self._buffer("pre", *features.shape)
        self.project(x, pre, features)
        return pre, features

    def logits_grad(self, features: Tensor, labels: Tensor, dlogps: Tensor) -> Tensor:
        """Recompute the logits of `features` (n, F) and return ∂L/∂logits (n, V) for ∂L/∂logps (n,), in a buffer."""
        dlogits = self._logps(features, labels, dlogps, dlogps.new_empty(len(features)), needs_grad=True)
        assert dlogits is not None
        return dlogits

    def project(self, x: Tensor, pre: Tensor, features: Tensor) -> None:
        """Compute features = gelu(proj_weight·x + proj_bias), and `pre`, which is what `gelu_backward` reads."""
        if self.backend == "cuda":
            torch.mm(x, self.proj_weight.t(), out=pre)
            _dispatch.triton("gelu").gelu(pre, self.proj_bias, features)
            return
        if self.proj_bias is None:
            torch.mm(x, self.proj_weight.t(), out=pre)
        else:
            torch.addmm(self.proj_bias, x, self.proj_weight.t(), out=pre)
        torch.ops.aten.gelu.out(pre, out=features)

    def gelu_backward(self, grad: Tensor, pre: Tensor) -> None:
        """Multiply `grad` by the GELU's derivative, in place."""
        if self.backend == "cuda":
            _dispatch.triton("gelu").gelu_backward(grad, pre, self.proj_bias)
        else:
            torch.ops.aten.gelu_backward.grad_input(grad, pre, grad_input=grad)

    def _buffer(self, name: str, rows: int, width: int) -> Tensor:
        if name not in self.buffers:
            self.buffers[name] = self.weight.new_empty(self.chunk_rows, width)
        return self.buffers[name][:rows]

    def _logps(
        self, features: Tensor, labels: Tensor, scales: Tensor | None, logps: Tensor, *, needs_grad: bool
    ) -> Tensor | None:
        """Compute logits and softmax step; return dlogits if asked for."""
        z = self._logits(features)
        step = _softmax_torch if self.backend == "torch" else _softmax_native
        return step(z, self.bias, labels, scales, logps, self.weight.dtype if needs_grad else None)

    def _logits(self, features: Tensor) -> Tensor:
        z, weight = self.logits[: len(features)], self.logits_weight.t()
        if z.dtype == weight.dtype:
            return torch.mm(features.to(z.dtype), weight, out=z)
        torch.ops.aten.mm.dtype_out(features, weight, z.dtype, out=z)
        return z


def _softmax_torch(
    z: Tensor, bias: Tensor | None, labels: Tensor, scales: Tensor | None, logps: Tensor, dtype: torch.dtype | None
) -> Tensor | None:
    """Softmax step in PyTorch; `dtype` is that of dlogits, None for no dlogits."""
    p = z.float() if z.dtype in (torch.float16, torch.bfloat16) else z
    if bias is not None:
        p.add_(bias)
    # Subtracting the maximum first keeps the error of logps that of |z − max|, as log_softmax does.
    p.sub_(p.amax(dim=1, keepdim=True))
    labels = labels.unsqueeze(1)
    target = p.gather(1, labels)
    total = p.exp_().sum(dim=1, keepdim=True)
    torch.sub(target.squeeze(1), total.log().squeeze(1), out=logps)
    if dtype is None:
        return None
    p.div_(total.neg_()).scatter_add_(1, labels, torch.ones_like(target))
    if scales is not None:
        p.mul_(scales.unsqueeze(1))
    return z.copy_(p) if z.dtype == dtype else p.to(dtype)


def _softmax_native(
    z: Tensor, bias: Tensor | None, labels: Tensor, scales: Tensor | None, logps: Tensor, dtype: torch.dtype | None
) -> Tensor | None:
    native, pointer, numbers = _dispatch.native(), _dispatch.pointer, _dispatch.DTYPES
    arguments = (
        z.data_ptr(), numbers[z.dtype], pointer(bias), labels.data_ptr(), pointer(scales), logps.data_ptr(),
        numbers[dtype or z.dtype], dtype is not None, *z.shape,
    )  # fmt: skip
    if z.is_cuda:
        try:
            native.token_logprobs_cuda(*arguments, *_dispatch.device_and_stream(z.device))
        except RuntimeError as error:
            raise OpError(
                f"token_logprobs: the CUDA kernel failed on logits of {z.dtype} {tuple(z.shape)} on {z.device}: "
                f"{error}; use backend='torch'"
            ) from error
    else:
        native.token_logprobs(*arguments, torch.get_num_threads())
    # dlogits in half precision fill the first half of each row of fp32 logits.
    return None if dtype is None else z.view(dtype)[:, : z.shape[1]]

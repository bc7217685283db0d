"""The head's chain of GEMMs over chunks of rows, and the softmax step between them: what `token_logprobs` consists of.

The softmax step of n rows, on each backend, takes logits z (n, V) without their bias, which it destroys, and

    logps = log softmax(z + bias)[labels]                      (n,) fp32, into a given tensor
    residual = scales · (onehot(labels) − softmax(z + bias))   (n, V) in the dtype of the weights; if `write`

The compiled steps write the residual in the place of the logits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ospo_fast.errors import OpError
from ospo_fast.ops import _dispatch

_HALF = (torch.float16, torch.bfloat16)


class ChunkedHead:
    """Head and buffers of one call; each chunk of at most `rows` rows uses the same buffers."""

    def __init__(
        self,
        weight: Tensor,  # (V, F)
        bias: Tensor | None,
        proj_weight: Tensor | None,  # (F, D)
        proj_bias: Tensor | None,
        rows: int,
        fp32_logits: bool,
        backend: str,
    ) -> None:
        self.weight, self.proj_weight = weight, proj_weight
        self.proj_bias = None if proj_bias is None else proj_bias.contiguous()
        self.backend, self.dtype = backend, weight.dtype
        work = torch.float32 if fp32_logits else weight.dtype
        # cuBLAS writes fp32 logits from half-precision factors; elsewhere the factors have to be fp32.
        self.out_weight = weight if weight.is_cuda else weight.to(work)
        self.logits = weight.new_empty(rows, weight.shape[0], dtype=work)
        if bias is not None:
            bias = bias.to(work if backend == "cuda" else torch.promote_types(work, torch.float32)).contiguous()
        self.bias = bias
        self.features = None if proj_weight is None else weight.new_empty(rows, proj_weight.shape[0])
        self.spare: dict[str, Tensor] = {}

    def forward(
        self, x: Tensor, rows: Tensor | slice, labels: Tensor, logps: Tensor, unit: Tensor | None = None
    ) -> None:
        """ℓ of x[rows], into logps, and their U, into unit (n, D) where one is given.

        Until U is known, `unit` is one of the buffers: of the GELU's input where that has its width, else of x[rows].
        """
        n, width = len(logps), x.shape[1]
        features = None if self.features is None else self.features[:n]
        square = features is not None and features.shape[1] == width
        if isinstance(rows, slice):
            inputs = x[rows]
        else:
            room = self._buffer("inputs", n, width) if unit is None else features if square else unit
            inputs = torch.index_select(x, 0, rows, out=room)
        if features is None:
            self._logits(inputs, n)
            residual = self._softmax(labels, None, logps, write=unit is not None)
            if residual is not None:
                torch.mm(residual, self.weight, out=unit)
            return
        # Without a backward the GELU is taken in place.
        pre = features if unit is None else unit if square else self._buffer("pre", n, features.shape[1])
        self.project(inputs, pre, features)
        self._logits(features, n)
        residual = self._softmax(labels, None, logps, write=unit is not None)
        if residual is not None:
            assert self.proj_weight is not None
            dpre = torch.mm(residual, self.weight, out=features)
            self.gelu_backward(dpre, pre)
            torch.mm(dpre, self.proj_weight, out=unit)

    def take(self, x: Tensor, rows: Tensor | slice) -> Tensor:
        """x[rows]: a slice as it is, the rows of an index in a buffer."""
        if isinstance(rows, slice):
            return x[rows]
        return torch.index_select(x, 0, rows, out=self._buffer("inputs", len(rows), x.shape[1]))

    def projected(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Buffers with what `gelu_backward` needs of the rows x, and with their features."""
        assert self.features is not None
        pre, features = self._buffer("pre", len(x), self.features.shape[1]), self.features[: len(x)]
        self.project(x, pre, features)
        return pre, features

    def residual(self, features: Tensor, labels: Tensor, scales: Tensor) -> Tensor:
        """Scales · (onehot − softmax) of the rows of `features`: with ∂L/∂ℓ as scales, ∂L/∂logits."""
        self._logits(features, len(features))
        residual = self._softmax(labels, scales, scales.new_empty(len(features)), write=True)
        assert residual is not None
        return residual

    def project(self, x: Tensor, pre: Tensor, features: Tensor) -> None:
        """Computes features = gelu(proj_weight·x + proj_bias) and keeps in `pre` what `gelu_backward` needs."""
        assert self.proj_weight is not None
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
        """In place, grad ← grad · gelu′."""
        if self.backend == "cuda":
            _dispatch.triton("gelu").gelu_backward(grad, pre, self.proj_bias)
        else:
            torch.ops.aten.gelu_backward.grad_input(grad, pre, grad_input=grad)

    def _buffer(self, name: str, rows: int, width: int) -> Tensor:
        """Room (rows, width) in the dtype of the weights, the same for each chunk."""
        if name not in self.spare:
            self.spare[name] = self.weight.new_empty(len(self.logits), width)
        return self.spare[name][:rows]

    def _logits(self, features: Tensor, rows: int) -> None:
        self.rows = rows
        z, weight = self.logits[:rows], self.out_weight.t()
        if z.dtype == weight.dtype:
            torch.mm(features.to(z.dtype), weight, out=z)
        else:
            torch.ops.aten.mm.dtype_out(features, weight, z.dtype, out=z)

    def _softmax(self, labels: Tensor, scales: Tensor | None, logps: Tensor, *, write: bool) -> Tensor | None:
        step = _softmax_torch if self.backend == "torch" else _softmax_native
        return step(self.logits[: self.rows], self.bias, labels, scales, logps, self.dtype, write)


def _softmax_torch(
    z: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    scales: Tensor | None,
    logps: Tensor,
    dtype: torch.dtype,
    write: bool,
) -> Tensor | None:
    p = z.float() if z.dtype in _HALF else z
    if bias is not None:
        p.add_(bias)
    # Subtracting the maximum first keeps the error of ℓ that of |z − max|, as log_softmax does.
    p.sub_(p.amax(dim=1, keepdim=True))
    labels = labels.unsqueeze(1)
    target = p.gather(1, labels)
    total = p.exp_().sum(dim=1, keepdim=True)
    torch.sub(target.squeeze(1), total.log().squeeze(1), out=logps)
    if not write:
        return None
    p.div_(total.neg_()).scatter_add_(1, labels, torch.ones_like(target))
    if scales is not None:
        p.mul_(scales.unsqueeze(1))
    return z.copy_(p) if z.dtype == dtype else p.to(dtype)


def _softmax_native(
    z: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    scales: Tensor | None,
    logps: Tensor,
    dtype: torch.dtype,
    write: bool,
) -> Tensor | None:
    native, numbers = _dispatch.native(), _dispatch.DTYPES
    tensors = z.data_ptr(), numbers[z.dtype], _pointer(bias), labels.data_ptr(), _pointer(scales), logps.data_ptr()
    arguments = *tensors, numbers[dtype], write, *z.shape
    if not z.is_cuda:
        native.token_logprobs(*arguments, torch.get_num_threads())
    else:
        try:
            native.token_logprobs_cuda(*arguments, *_dispatch.device_and_stream(z.device))
        except RuntimeError as error:
            raise OpError(
                f"token_logprobs: the CUDA kernel failed on logits of {z.dtype} {tuple(z.shape)} on {z.device}: "
                f"{error}; backend='torch' does without it"
            ) from error
    return z.view(dtype)[:, : z.shape[1]] if write else None


def _pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def scale_rows(unit: Tensor, places: Tensor, scales: Tensor, backend: str) -> Tensor:
    """out[i] = scales[i]·unit[places[i]]; 0 where places[i] < 0 or scales[i] is 0, even of a NaN. A new tensor.

    unit (N, D), places (N,) int64, scales (N,) fp32 (fp64 with fp64) → (N, D) in unit's dtype.
    """
    unit, places, scales = unit.contiguous(), places.contiguous(), scales.contiguous()
    out = torch.empty_like(unit)
    if backend == "cuda":
        _dispatch.triton("scale_rows").scale_rows(unit, places, scales, out)
        return out
    if backend == "torch":
        silent = ((places < 0) | (scales == 0)).unsqueeze(1)
        rows = unit.index_select(0, places.clamp(min=0)) if len(unit) else unit
        return torch.mul(rows, scales.unsqueeze(1), out=out).masked_fill_(silent, 0)
    _dispatch.native().scale_rows(
        unit.data_ptr(),
        places.data_ptr(),
        scales.data_ptr(),
        out.data_ptr(),
        _dispatch.DTYPES[unit.dtype],
        *unit.shape,
        torch.get_num_threads(),
    )
    return out

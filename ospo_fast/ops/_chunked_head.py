"""GEMMs of the head over chunks of rows, and the softmax step between them: the core of `token_logprobs`.

The softmax step takes the logits z (n, V) of a chunk without their bias, and computes from the scores
s = softcap · tanh((z + bias) / softcap) / temperature, with p = softmax(s), H the entropy of p and e = exp(s − max s)

    logps = log p[labels], entropies = H                            (n,) fp32
    statistics = max s, Σ e, Σ e · (s − max s), s[labels]           (n, 4) fp32
    dlogits = ∂s/∂z · (scales · onehot(labels) − p · (others + entropy_scales · (s − max s)))

others = scales + entropy_scales · (H − log Σ e) unless given. Then dlogits is the gradient of scales · logps +
entropy_scales · H. Statistics and `others` are for heads that are split over processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ospo_fast.errors import OpError
from ospo_fast.ops import _dispatch
from ospo_fast.ops.linear import LinearWeights, PackedLinear, gelu_

# Whether addmm can accumulate in a wider dtype than that of its factors.
_ADDMM_WIDENS = torch.torch_version.TorchVersion(torch.__version__) >= "2.10"


# Named tuples: a call makes several of these, and they take a fraction of the time of frozen dataclasses.
class TokenLogprobsOptions(NamedTuple):
    """Options of the registered ops. Their schemas are flat and list these fields as in `OPTIONS_SCHEMA`."""

    ignore_index: int
    chunk_rows: int
    fp32_logits: bool
    backend: str
    check_finite: bool
    temperature: float
    softcap: float  # 0: none
    batch_invariant: bool = False


OPTIONS_SCHEMA = (
    "int ignore_index, int chunk_rows, bool fp32_logits, str backend, bool check_finite, float temperature, "
    "float softcap, bool batch_invariant"
)


class RowResults(NamedTuple):
    """Where the softmax step writes its results; None for what is not needed."""

    logps: Tensor | None = None  # (n,)
    entropies: Tensor | None = None  # (n,)
    statistics: Tensor | None = None  # (n, 4)


class RowScales(NamedTuple):
    """Upstream gradients of the rows of a chunk: see `dlogits` above."""

    logps: Tensor | None = None  # (n,), None for 1
    entropies: Tensor | None = None  # (n,), None for 0
    others: Tensor | None = None  # (n,), None to derive it


LORA_ROWS = 1024  # rows of logits that are widened at once, for adapters in a wider dtype than the head


class ChunkedHead:
    """Head weights and the buffers of one call. All chunks, of up to `chunk_rows` rows, share the buffers.

    Args:
        head: the tensors of a `Head`, then `lora_inputs` (rows, R) and `lora_weight` (V, R) or None. They add
            lora_inputs · lora_weightᵀ to the logits, in a wider dtype than theirs if the adapters have it.
        chunk_rows: rows of the buffers.
        options: see `token_logprobs`.

    """

    def __init__(self, head: Sequence[Any], chunk_rows: int, options: TokenLogprobsOptions) -> None:
        weight: Tensor = head[0]
        _, bias, proj_weight, proj_bias, self.lora_inputs, lora_weight = head
        self.weight, self.proj_weight, self.lora_weight = weight, proj_weight, lora_weight
        self.proj_bias = None if proj_bias is None else _dispatch.readable(proj_bias)
        self.chunk_rows, self.options, self.backend = chunk_rows, options, options.backend
        self.logits_dtype = torch.float32 if options.fp32_logits else weight.dtype
        # cuBLAS writes fp32 logits from half-precision factors; elsewhere the factors have to be fp32.
        self.logits_weight = weight if weight.is_cuda else weight.to(self.logits_dtype)
        if bias is not None:
            # The CUDA step reads the bias in the dtype of the logits, the others in fp32 or fp64.
            wide = torch.promote_types(self.logits_dtype, torch.float32)
            bias = _dispatch.readable(bias.to(self.logits_dtype if self.backend == "cuda" else wide))
        self.bias = bias
        self.packed = self.packed_proj = None
        if options.batch_invariant:
            self.packed = PackedLinear([LinearWeights(weight)])
            if proj_weight is not None:
                self.packed_proj = PackedLinear([LinearWeights(proj_weight, self.proj_bias)])
        self.features = None if proj_weight is None else weight.new_empty(chunk_rows, proj_weight.shape[0])
        self.buffers: dict[str, Tensor] = {}

    def forward(
        self,
        x: Tensor,
        rows: Tensor | slice,
        labels: Tensor,
        results: RowResults,
        dhidden: Tensor | None = None,
        kept: Tensor | None = None,
    ) -> None:
        """Write the results of x[rows] and, if given, ∂logps/∂x to `dhidden` (n, D) or the logits to `kept` (n, V).

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
            dlogits = self._logps(inputs, rows, labels, results, kept, needs_grad=dhidden is not None)
            if dlogits is not None:
                torch.mm(dlogits, self.weight, out=dhidden)
            return
        features = self.features[: len(labels)]
        square = features.shape[1] == x.shape[1]
        if dhidden is None:
            inputs, pre = self.gather_rows(x, rows), features  # without a backward the GELU runs in place
        elif square:
            inputs, pre = self.gather_rows(x, rows, out=features), dhidden
        else:
            inputs, pre = self.gather_rows(x, rows, out=dhidden), self._buffer("pre", *features.shape)
        self.project(inputs, pre, features)
        dlogits = self._logps(features, rows, labels, results, kept, needs_grad=dhidden is not None)
        if dlogits is not None:
            dpre = torch.mm(dlogits, self.weight, out=features)
            self.gelu_backward(dpre, pre)
            torch.mm(dpre, self.proj_weight, out=dhidden)

    def _logps(
        self, features: Tensor, rows: Tensor | slice, labels: Tensor, results: RowResults, kept: Tensor | None,
        needs_grad: bool,
    ) -> Tensor | None:  # fmt: skip
        z = self.logits(features, rows, kept)
        if self.options.batch_invariant and results.entropies is not None:  # the step of entropies rounds differently
            self.softmax_step(z, labels, RowResults(results.logps), RowScales(), out=None)
            results = results._replace(logps=None)
        if kept is not None and self.backend == "torch":
            z = z.clone()  # the reference destroys them
        return self.softmax_step(z, labels, results, RowScales(), out=z if needs_grad else None)

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

    def project(self, x: Tensor, pre: Tensor, features: Tensor) -> None:
        """Compute features = gelu(proj_weight·x + proj_bias), and `pre`, which is what `gelu_backward` reads."""
        if self.packed_proj is not None:
            gelu_(features.copy_(self.packed_proj(_dispatch.readable(x), pre)))
            return
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

    def logits(self, features: Tensor, rows: Tensor | slice, out: Tensor | None = None) -> Tensor:
        """Compute the logits (n, V) of `features` (n, F), which belong to x[rows], without bias."""
        z = self.logits_buffer(len(features)) if out is None else out
        if self.packed is not None:
            return self.packed(_dispatch.readable(features), z)
        weight = self.logits_weight.t()
        if z.dtype == weight.dtype:
            torch.mm(features.to(z.dtype), weight, out=z)
        else:
            torch.ops.aten.mm.dtype_out(features, weight, z.dtype, out=z)
        if self.lora_weight is not None:
            self._add_lora(z, self.lora_inputs[rows])
        return z

    def _add_lora(self, z: Tensor, inputs: Tensor) -> None:
        dtype = torch.promote_types(z.dtype, self.lora_weight.dtype)
        factor = self.lora_weight.t().to(dtype)
        if dtype == z.dtype:
            z.addmm_(inputs.to(dtype), factor)
            return
        for part, part_inputs in zip(z.split(LORA_ROWS), inputs.split(LORA_ROWS), strict=True):
            part.add_(torch.mm(part_inputs.to(dtype), factor))  # rounded once, as the sum of both

    def lora_gradients(
        self, dlogits: Tensor, rows: Tensor | slice, dinputs: Tensor | None, dweight: Tensor | None
    ) -> None:
        """Write the gradient of lora_inputs[rows] to `dinputs` (N, R), and add that of lora_weight to `dweight`."""
        inputs = self.lora_inputs[rows]
        dtype, size = inputs.dtype, len(inputs) if inputs.dtype == dlogits.dtype else LORA_ROWS
        if dinputs is not None:
            parts = [torch.mm(part.to(dtype), self.lora_weight) for part in dlogits.split(max(size, 1))]
            dinputs[rows] = torch.cat(parts)
        if dweight is not None:
            for part, part_inputs in zip(dlogits.split(max(size, 1)), inputs.split(max(size, 1)), strict=True):
                accumulate_product(dweight, part.to(dtype), part_inputs)

    def logits_buffer(self, rows: int) -> Tensor:
        """Return the buffer of logits, as (rows, V)."""
        return self._buffer("logits", rows, self.weight.shape[0], self.logits_dtype)

    def softmax_step(
        self, z: Tensor, labels: Tensor, results: RowResults, scales: RowScales, out: Tensor | None
    ) -> Tensor | None:
        """Run the step above on z (n, V); return dlogits (n, V) in the weights' dtype if `out` is given.

        out: (n, V) memory in the dtype of z, which may be z itself, in which dlogits are placed.
        """
        step = _softmax_torch if self.backend == "torch" else _softmax_native
        return step(z, self.bias, labels, results, scales, self.options, out, self.weight.dtype)

    def _buffer(self, name: str, rows: int, width: int, dtype: torch.dtype | None = None) -> Tensor:
        if name not in self.buffers:
            self.buffers[name] = self.weight.new_empty(self.chunk_rows, width, dtype=dtype)
        return self.buffers[name][:rows]


def logits_logprobs(logits: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """Return log softmax(logits / temperature)[labels] (n,) of fp32 logits (n, V), as `token_logprobs` computes it."""
    backend = _dispatch.resolve("token_logprobs", "auto", logits.device.type, logits.dtype)
    options = TokenLogprobsOptions(0, len(logits), False, backend, False, temperature, 0.0)
    logps = logits.new_empty(len(logits))
    step = _softmax_torch if backend == "torch" else _softmax_native
    z = logits.clone() if backend == "torch" else logits  # the reference destroys them
    step(z, None, labels, RowResults(logps), RowScales(), options, None, logits.dtype)
    return logps


def _softmax_torch(
    z: Tensor, bias: Tensor | None, labels: Tensor, results: RowResults, scales: RowScales,
    options: TokenLogprobsOptions, out: Tensor | None, dtype: torch.dtype,
) -> Tensor | None:  # fmt: skip
    """Softmax step in PyTorch. Destroys z, unless it is half precision or `out` is other memory."""
    p = z.float() if z.dtype in (torch.float16, torch.bfloat16) else z if out is None or out is z else out.copy_(z)
    if bias is not None:
        p.add_(bias)
    derivative: Tensor | float = 1 / options.temperature  # ∂s/∂z
    if options.softcap:
        t = p.div_(options.softcap).tanh_()
        derivative = (1 - t * t).div_(options.temperature)
        p.mul_(options.softcap)
    # Subtracting the maximum first keeps the error of logps that of |s − max|, as log_softmax does. The division comes
    # after it, because quotients of large logits by a low temperature may be infinite.
    top = p.amax(dim=1, keepdim=True)
    local = labels.unsqueeze(1).clamp(min=0)
    present = (labels >= 0).unsqueeze(1)
    own_score = p.gather(1, local) if results.statistics is not None else None
    p.sub_(top)
    if options.temperature != 1:
        p.div_(options.temperature)
    target = p.gather(1, local)
    # A masked code has e = 0 and s − max s = −inf. Their product is 0.
    weighs = results.entropies is not None or results.statistics is not None or scales.entropies is not None
    below = p.clamp(min=-1e4) if weighs else None
    total = p.exp_().sum(dim=1, keepdim=True)
    log_total = total.log()
    if results.logps is not None:
        torch.sub(target.squeeze(1), log_total.squeeze(1), out=results.logps)
    weighted = (p * below).sum(dim=1, keepdim=True) if below is not None else torch.zeros_like(total)
    entropy = log_total - weighted / total
    if results.entropies is not None:
        results.entropies.copy_(entropy.squeeze(1))
    if results.statistics is not None and own_score is not None:
        found = top / options.temperature, total, weighted, torch.where(present, own_score / options.temperature, 0)
        torch.cat(found, dim=1, out=results.statistics)
    if out is None:
        return None
    p.div_(total.neg_())  # −p from here on
    if below is None and scales.others is None:
        p.scatter_add_(1, local, torch.ones_like(target))
        if scales.logps is not None:
            p.mul_(scales.logps.unsqueeze(1))
    else:
        own = torch.ones_like(target) if scales.logps is None else scales.logps.unsqueeze(1).to(p.dtype)
        entropy_scale = torch.zeros_like(own) if scales.entropies is None else scales.entropies.unsqueeze(1)
        other = own + entropy_scale * (entropy - log_total) if scales.others is None else scales.others.unsqueeze(1)
        p.mul_(other if below is None else below.mul_(entropy_scale).add_(other))
        p.scatter_add_(1, local, torch.where(present, own, 0).to(p.dtype))
    if options.softcap or options.temperature != 1:
        p.mul_(derivative)
    return out.copy_(p) if z.dtype == dtype else p.to(dtype)


def _softmax_native(
    z: Tensor, bias: Tensor | None, labels: Tensor, results: RowResults, scales: RowScales,
    options: TokenLogprobsOptions, out: Tensor | None, dtype: torch.dtype,
) -> Tensor | None:  # fmt: skip
    native, pointer, numbers = _dispatch.native(), _dispatch.pointer, _dispatch.DTYPES
    per_row = (scales.logps, scales.others, scales.entropies, *results)
    arguments = (
        z.data_ptr(), numbers[z.dtype], pointer(bias), pointer(labels, torch.int64), 1 / options.temperature,
        options.softcap, *(pointer(t, torch.float32) for t in per_row), pointer(out, z.dtype), numbers[dtype], *z.shape,
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
    return None if out is None else out.view(dtype)[:, : z.shape[1]]


def accumulate_product(total: Tensor, grad: Tensor, inputs: Tensor) -> None:
    """Add gradᵀ · inputs to `total`, which may have a wider dtype."""
    if total.dtype == grad.dtype:
        total.addmm_(grad.t(), inputs)
    elif grad.is_cuda and _ADDMM_WIDENS:
        torch.ops.aten.addmm.dtype_out(total, grad.t(), inputs, total.dtype, out=total)
    elif grad.is_cuda:
        total += torch.mm(grad.t(), inputs, out_dtype=total.dtype)
    else:
        total += grad.t() @ inputs

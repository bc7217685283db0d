"""Checked and flattened inputs of `token_logprobs` and `cross_entropy`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ospo_fast.errors import OpError
from ospo_fast.ops import _dispatch
from ospo_fast.ops._chunked_head import TokenLogprobsOptions
from ospo_fast.ops._head_modules import resolve_head
from ospo_fast.ops.head import Head

_FP32_NAMES = ("fp32", "float32", torch.float32)


@dataclass(eq=False, slots=True)  # not frozen, which would take longer to make
class Call:
    """Checked inputs of a call."""

    x: Tensor  # (N, D)
    labels: Tensor  # (N,) int64
    head: tuple[Tensor | None, ...]  # tensors of a `Head`, then lora_inputs (N, R) and lora_weight (V, R) or None
    options: TokenLogprobsOptions
    autocast: bool
    check_adapters: Callable[[], None] | None  # raises if adapters are no longer those of the call

    @property
    def trained(self) -> bool:
        """Whether the head has a gradient, or adapters, which are treated as if they had."""
        return any(tensor is not None and tensor.requires_grad for tensor in self.head) or self.head[5] is not None

    @property
    def needs_grad(self) -> bool:
        """Whether any input requires grad."""
        return self.x.requires_grad or any(tensor is not None and tensor.requires_grad for tensor in self.head)


def prepare(
    op: str,
    hidden: Tensor,
    head: Head | nn.Module,
    labels: Tensor,
    *,
    ignore_index: int,
    chunk_rows: int | None,
    logits_dtype: torch.dtype | str | None,
    backend: str,
    check_finite: bool,
    temperature: float,
    softcap: float | None,
    process_group: Any,
    batch_invariant: bool = False,
) -> Call:
    """Check and flatten the inputs of an op; resolve its head and options."""
    if type(hidden) is not Tensor or type(labels) is not Tensor:
        _check_tensor(op, "hidden", hidden)
        _check_tensor(op, "labels", labels)
    if process_group is not None and not isinstance(process_group, torch.distributed.ProcessGroup):
        got = type(process_group).__name__
        remedy = "; use mesh.get_group()" if hasattr(process_group, "get_group") else ""
        raise OpError(f"{op}: process_group is {got}, expected a torch.distributed.ProcessGroup or None{remedy}")
    resolved = resolve_head(op, head, hidden, process_group)
    device = "cpu" if hidden.is_cpu else hidden.device.type
    if torch._C._functorch.peek_interpreter_stack() is not None and not torch.compiler.is_compiling():
        raise OpError(f"{op}: called inside torch.func (grad, vmap, jvp), expected plain autograd; use torch.autograd")
    if hidden.layout != torch.strided:
        raise OpError(f"{op}: hidden has layout {hidden.layout}, expected a dense tensor; use hidden.to_dense()")
    ignore_index = _dispatch.check_int(op, "ignore_index", ignore_index, _dispatch.INT64_MIN)
    if device == "meta":
        raise OpError(f"{op}: hidden is on the meta device, expected values; move it to a device")
    autocast = torch.is_autocast_enabled(device)
    if autocast and hidden.dtype != torch.float64:
        resolved = resolved.to(torch.get_autocast_dtype(device))
    x, weights = resolved.hidden, resolved.head
    _check(op, x, weights, labels, chunk_rows, logits_dtype)
    if type(temperature) is not float or not 1e-37 <= temperature <= 1e37:
        temperature = _positive(op, "temperature", temperature, "1 leaves the logits as they are")
    softcap = 0.0 if softcap is None else _positive(op, "softcap", softcap, "None for no bound")
    if softcap / temperature > 1e38:
        raise OpError(
            f"{op}: softcap / temperature is {softcap:g} / {temperature:g}, expected at most 1e38, which fp32 holds; "
            "use softcap=None for no bound"
        )
    fp32_logits = x.dtype in (torch.float16, torch.bfloat16) and logits_dtype in _FP32_NAMES
    if chunk_rows is None:
        chunk_rows = default_chunk_rows(weights.num_codes, 4 if fp32_logits else x.element_size(), device)
    chunk_rows = min(chunk_rows, _dispatch.INT64_MAX)
    backend = _dispatch.resolve("token_logprobs", backend, device, x.dtype)
    if batch_invariant:
        _check_invariant(op, x, backend, resolved.lora_weight is not None, process_group)
    options = TokenLogprobsOptions(
        ignore_index, chunk_rows, fp32_logits, backend, check_finite, temperature, softcap, batch_invariant
    )
    if labels.dim() != 1:
        x, labels = x.reshape(-1, x.shape[-1]), labels.reshape(-1)
    return Call(
        x, labels if labels.dtype is torch.int64 else _dispatch.as_int64(op, "labels", labels), (
            weights.weight, weights.bias, weights.proj_weight, weights.proj_bias, resolved.lora_inputs,
            resolved.lora_weight,
        ), options, autocast,
        resolved.check_adapters,
    )  # fmt: skip


def _check_invariant(op: str, x: Tensor, backend: str, has_adapters: bool, process_group: Any) -> None:
    """Raise OpError where products depend on the number of rows."""
    got = ""
    if x.dtype != torch.float32 or backend != "cpp":
        got = f"hidden is {x.dtype} on {x.device}, with backend {backend!r}"
    elif has_adapters:
        got = "the head has LoRA adapters"
    elif process_group is not None:
        got = "the head is split over processes"
    if got:
        raise OpError(
            f"{op}: batch_invariant=True, but {got}; expected float32 on cpu, the compiled module ('cpp') and a whole, "
            "plain head; leave it out, and compare with a tolerance"
        )


def _positive(op: str, name: str, value: Any, neutral: str) -> float:
    """Return a positive number whose inverse fp32 holds, too."""
    if isinstance(value, Tensor) and value.numel() == 1 and not value.requires_grad:
        value = value.item()
    if isinstance(value, Tensor):
        got = "requires grad, which it would not get" if value.requires_grad else f"has shape {tuple(value.shape)}"
        raise OpError(f"{op}: {name} is a tensor that {got}; expected one number; divide or cap before, in hidden")
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 1e-37 <= value <= 1e37:
        raise OpError(f"{op}: {name} is {value!r}, expected a positive number from 1e-37 to 1e37; {neutral}")
    return float(value)


def _check_tensor(op: str, name: str, tensor: Any) -> None:
    if not isinstance(tensor, Tensor):
        raise OpError(f"{op}: {name} is {type(tensor).__name__}, expected a tensor")
    if hasattr(tensor, "placements"):
        raise OpError(
            f"{op}: {name} is a DTensor with placements {tensor.placements}, expected a plain tensor; use "
            f"{name}.to_local() for the rows of this process, or {name}.full_tensor() for all"
        )


def default_chunk_rows(num_codes: int, itemsize: int, device: str) -> int:
    """Rows for 32 MiB of logits on CPU, at least 256, as GEMMs of fewer rows are slow; for 196 MiB on a GPU.

    On a GPU that is 6272 = 49·128 rows of 16384 half-precision logits, a third of 16 pairs of Janus-Pro-7B. Peak at
    that size: 257 MB logits and features + 151 MB dhidden + 34 MB cuBLAS < 0.5 GB.
    """
    mebibytes, minimum = (32, 256) if device == "cpu" else (196, 128)
    return max(minimum, mebibytes * 2**20 // (itemsize * num_codes) // 128 * 128)


def _check(
    op: str, hidden: Tensor, head: Head, labels: Tensor, chunk_rows: int | None, logits_dtype: torch.dtype | str | None
) -> None:
    shape, weight = hidden.shape, head.weight
    usual = hidden.dtype is weight.dtype and labels.dtype is torch.int64 and chunk_rows is None and logits_dtype is None
    if usual and hidden.device == labels.device == weight.device and shape == (*labels.shape, head.width):
        return
    if not hidden.is_floating_point():
        raise OpError(f"{op}: hidden is {hidden.dtype}, expected a floating dtype")
    if hidden.dim() == 0 or hidden.shape[-1] != head.width:
        raise OpError(f"{op}: hidden has shape {tuple(hidden.shape)}, expected (..., {head.width}), the head's width")
    if not _dispatch.is_integer(labels):
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
    if chunk_rows is not None and (type(chunk_rows) is bool or not isinstance(chunk_rows, int) or chunk_rows < 1):
        raise OpError(f"{op}: chunk_rows is {chunk_rows}, expected a positive number or None")
    if logits_dtype is not None and logits_dtype not in _FP32_NAMES and logits_dtype != hidden.dtype:
        raise OpError(f"{op}: logits_dtype is {logits_dtype!r}, expected None or 'fp32'")

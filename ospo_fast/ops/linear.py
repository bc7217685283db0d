"""Linear layers on the CPU with a packed copy of the weight: x·Wᵀ + b.

BLAS libraries choose kernels by the number of rows, and with them the last bits of each row. Here every sum runs over k
in the same order, so a row has the same bits in any batch and with any number of threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ospo_fast.errors import OpError
from ospo_fast.ops import _dispatch
from ospo_fast.ops._dispatch import pointer


class PackedLinear:
    """Map x (M, K) fp32 to x·Wᵀ + b (M, N), with W and b the stacked weights and biases of the modules.

    Raises OpError: no compiled module, or modules that are not float32 on the CPU.
    """

    def __init__(self, modules: Sequence[nn.Linear]) -> None:
        _dispatch.resolve("linear", "cpp", "cpu")
        if any(m.weight.dtype != torch.float32 or m.weight.device.type != "cpu" for m in modules):
            found = ", ".join(f"{m.weight.dtype} on {m.weight.device}" for m in modules)
            raise OpError(f"linear: the weights are {found}; expected float32 on cpu")
        self._modules = list(modules)
        self.columns = sum(m.out_features for m in modules)
        self.depth = modules[0].in_features
        panel = _dispatch.native().linear_columns()
        self._packed = _empty(-(-self.columns // panel) * panel * self.depth)
        self._bias = _empty(self.columns) if any(m.bias is not None for m in modules) else None
        self._pointers = pointer(self._packed), pointer(self._bias)
        self._run = _dispatch.native().linear
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Copy the modules' weights again, after an update."""
        if any(m.weight.dtype != torch.float32 or m.weight.shape[1] != self.depth for m in self._modules):
            found = ", ".join(f"{m.weight.dtype} {tuple(m.weight.shape)}" for m in self._modules)
            raise OpError(f"linear: the weights are {found} now, expected float32 (…, {self.depth}); build it again")
        weight = torch.cat(tuple(m.weight for m in self._modules))
        if len(weight) != self.columns:
            raise OpError(f"linear: the weights have {len(weight)} rows now, expected {self.columns}; build it again")
        _dispatch.native().pack_linear(
            pointer(weight, torch.float32), self._packed.data_ptr(), self.columns, self.depth
        )
        if self._bias is not None:
            torch.cat([bias_or_zeros(m) for m in self._modules], out=self._bias)

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies pack the weights of their own modules."""
        return PackedLinear, (self._modules,)

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """Compute (M, N), into `out` if given, of x (M, K) with contiguous rows."""
        rows, threads = x.shape[0], torch.get_num_threads()
        out = _empty(rows, self.columns) if out is None else out
        if x.shape != (rows, self.depth) or out.shape != (rows, self.columns) or not x.stride(1) == out.stride(1) == 1:
            raise OpError(
                f"linear: x is {tuple(x.shape)} and out {tuple(out.shape)}, expected (M, {self.depth}) and "
                f"(M, {self.columns}) with contiguous rows"
            )
        target = pointer(out, torch.float32), out.stride(0)
        source = pointer(x, torch.float32), x.stride(0)
        self._run(*source, *self._pointers, *target, rows, self.columns, self.depth, threads)
        return out


def _empty(*shape: int) -> Tensor:
    """Return uninitialized memory for the compiled module, under any default dtype and device of torch."""
    return torch.empty(shape, dtype=torch.float32, device="cpu")


def bias_or_zeros(module: nn.Linear) -> Tensor:
    """Return the module's bias (N,), or zeros."""
    bias: Tensor | None = module.bias
    return module.weight.new_zeros(module.out_features) if bias is None else bias.detach()


def packed_linear_runs() -> bool:
    """Return whether the compiled module has vector instructions, without which `PackedLinear` is no gain."""
    if _dispatch.resolve("linear", "auto", "cpu") != "cpp":
        return False
    return bool(_dispatch.native().build_info()["simd"] != "baseline")


def gelu_(x: Tensor) -> Tensor:
    """Compute x · Φ(x) in place: contiguous fp32 on the CPU, with the same bits at any position."""
    _dispatch.native().gelu(pointer(x, torch.float32), x.numel(), torch.get_num_threads())
    return x

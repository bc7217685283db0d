"""Products of few rows with a weight that stays: x·Wᵀ + b on the CPU, from a packed copy of W.

BLAS libraries change kernels with the number of rows, and with them a row's last bits. Here every sum runs over k in
the same order, so a row gives the same bits in any batch and with any number of threads.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ospo_fast.errors import OpError
from ospo_fast.ops import _dispatch


class PackedLinear:
    """x (M, K) fp32 → x·Wᵀ + b (M, N), with W the modules' weights stacked, and their biases.

    Raises OpError: the compiled module is missing, or the modules are not float32 on the CPU.
    """

    def __init__(self, modules: Sequence[nn.Linear]) -> None:
        _dispatch.resolve("linear", "cpp", "cpu")
        if any(m.weight.dtype != torch.float32 or m.weight.device.type != "cpu" for m in modules):
            found = ", ".join(f"{m.weight.dtype} on {m.weight.device}" for m in modules)
            raise OpError(f"linear: the weights are {found}; expected float32 on cpu")
        self._modules = list(modules)
        self.columns = sum(m.out_features for m in modules)
        self.depth = modules[0].in_features
        width = _dispatch.native().linear_columns()
        self._packed = torch.empty(-(-self.columns // width) * width * self.depth)
        self._bias = torch.zeros(self.columns) if any(m.bias is not None for m in modules) else None
        self._pointers = self._packed.data_ptr(), 0 if self._bias is None else self._bias.data_ptr()
        self._run = _dispatch.native().linear
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Read the modules' weights again: they may have been trained since."""
        weight = torch.cat(tuple(m.weight for m in self._modules))
        _dispatch.native().pack_linear(weight.data_ptr(), self._packed.data_ptr(), self.columns, self.depth)
        if self._bias is not None:
            torch.cat([bias_or_zeros(m) for m in self._modules], out=self._bias)

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """X (M, K), rows contiguous → (M, N), into `out` if given."""
        rows, threads = x.shape[0], torch.get_num_threads()
        out = torch.empty(rows, self.columns) if out is None else out
        place, step = out.data_ptr(), out.stride(0)
        self._run(x.data_ptr(), x.stride(0), *self._pointers, place, step, rows, self.columns, self.depth, threads)
        return out


def bias_or_zeros(module: nn.Linear) -> Tensor:
    """The module's bias (N,), zeros where it has none."""
    bias: Tensor | None = module.bias
    return module.weight.new_zeros(module.out_features) if bias is None else bias.detach()


def packed_linear_runs() -> bool:
    """Whether this processor has the vector instructions that make `PackedLinear` worth its copy."""
    if any(name == "cpp" and not available for name, available, _ in _dispatch.backends()["linear"]):
        return False
    return bool(_dispatch.native().build_info()["simd"] != "baseline")


def gelu_(x: Tensor) -> Tensor:
    """In place, x · Φ(x): fp32 on the CPU and contiguous; element by element, so that no bit depends on the place."""
    _dispatch.native().gelu(x.data_ptr(), x.numel(), torch.get_num_threads())
    return x

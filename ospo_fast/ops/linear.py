"""Linear layers on the CPU with a packed copy of the weight: x·Wᵀ + b.

BLAS libraries choose kernels by the number of rows, and with them the last bits of each row. Here every sum runs over k
in the same order, so a row has the same bits in any batch and with any number of threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ospo_fast.errors import OpError
from ospo_fast.ops import _dispatch
from ospo_fast.ops._autograd import first_derivative_only
from ospo_fast.ops._dispatch import pointer


@dataclass(frozen=True, eq=False)
class LinearWeights:
    """Weights of a linear layer with LoRA adapters: W + Σ scaling · B·A, and a bias."""

    base: Tensor  # W (N, K)
    bias: Tensor | None = None  # (N,)
    adapters: tuple[tuple[Tensor, Tensor, float], ...] = ()  # A (R, K), B (N, R), scaling

    @property
    def weight(self) -> Tensor:
        """The sum (N, K), without gradient: the same bits with any number of threads."""
        total = self.base.detach()
        for a, b, scaling in self.adapters:
            # Two operations: one with a factor rounds differently in vectors and at their ends.
            total = total + PackedLinear([LinearWeights(a.detach().t().contiguous())])(b.detach()) * scaling
        return total

    @property
    def out_features(self) -> int:
        """N."""
        return self.base.shape[0]

    @property
    def in_features(self) -> int:
        """K."""
        return self.base.shape[1]


class PackedLinear:
    """Map x (M, K) fp32 to x·Wᵀ + b (M, N), with W and b the stacked weights and biases of the modules.

    Raises OpError: no compiled module, or modules that are not float32 on the CPU.
    """

    def __init__(self, modules: Sequence[nn.Linear | LinearWeights]) -> None:
        _dispatch.resolve("linear", "cpp", "cpu")
        weights = [m.base if isinstance(m, LinearWeights) else m.weight for m in modules]
        if any(w.dtype != torch.float32 or w.device.type != "cpu" for w in weights):
            found = ", ".join(f"{w.dtype} on {w.device}" for w in weights)
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
        weights = [m.weight for m in self._modules]
        if any(w.dtype != torch.float32 or w.shape[1] != self.depth for w in weights):
            found = ", ".join(f"{w.dtype} {tuple(w.shape)}" for w in weights)
            raise OpError(f"linear: the weights are {found} now, expected float32 (…, {self.depth}); build it again")
        weight = torch.cat(weights)
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

    def differentiable(self, x: Tensor) -> Tensor:
        """Compute the product with gradients of x and of the weights, biases and adapters that require them."""
        parts = [m if isinstance(m, LinearWeights) else LinearWeights(m.weight, m.bias) for m in self._modules]
        tensors = [t for part in parts for t in (part.base, part.bias, *(t for a in part.adapters for t in a[:2]))]
        y: Tensor = _Product.apply(self, parts, x, *tensors)  # type: ignore[no-untyped-call]
        return y


class _Product(torch.autograd.Function):
    """`PackedLinear`, whose gradients are ordinary products. Those of an adapter need no gradient of the whole W."""

    @staticmethod
    def forward(ctx: Any, product: PackedLinear, parts: list[LinearWeights], x: Tensor, *tensors: Any) -> Tensor:
        ctx.save_for_backward(x, *tensors)
        # Sizes and numbers alone: what is saved is checked for changes, what the parts hold is not.
        ctx.parts, ctx.edges = [(p.out_features, [s for *_, s in p.adapters]) for p in parts], (x, *tensors)
        return product(_dispatch.readable(x))

    @staticmethod
    @first_derivative_only("linear")
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *tensors = ctx.saved_tensors
        needs, given = iter(ctx.needs_input_grad[3:]), iter(tensors)
        dx = torch.zeros_like(x) if ctx.needs_input_grad[2] else None
        grads: list[Tensor | None] = []
        for g, (_, scalings) in zip(grad.split([size for size, _ in ctx.parts], 1), ctx.parts, strict=True):
            base, _ = next(given), next(given)
            grads += [g.t() @ x if next(needs) else None, g.sum(0) if next(needs) else None]
            if dx is not None:
                dx.addmm_(g, base)
            for scaling in scalings:
                a, b = next(given), next(given)
                low = g @ b * scaling
                grads += [low.t() @ x if next(needs) else None, g.t() @ (x @ a.t()) * scaling if next(needs) else None]
                if dx is not None:
                    dx.addmm_(low, a)
        return None, None, dx, *grads


class _Gelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        ctx.edges = (x,)
        return gelu_(x.clone(memory_format=torch.contiguous_format))

    @staticmethod
    @first_derivative_only("gelu")
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor]:
        (x,) = ctx.saved_tensors
        return (torch.ops.aten.gelu_backward(grad, x),)


def invariant_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute x·Wᵀ + b (…, N) of x (…, K), fp32 on the CPU, with the same bits in any batch. Differentiable once."""
    rows = PackedLinear([LinearWeights(weight, bias)]).differentiable(x.reshape(-1, x.shape[-1]))
    return rows.view(*x.shape[:-1], len(weight))


def invariant_gelu(x: Tensor) -> Tensor:
    """Compute x · Φ(x), fp32 on the CPU, with the same bits at any position. Differentiable once."""
    y: Tensor = _Gelu.apply(x)  # type: ignore[no-untyped-call]
    return y


def _empty(*shape: int) -> Tensor:
    """Return uninitialized memory for the compiled module, under any default dtype and device of torch."""
    return torch.empty(shape, dtype=torch.float32, device="cpu")


def bias_or_zeros(module: nn.Linear | LinearWeights) -> Tensor:
    """Return the module's bias (N,), or zeros."""
    bias: Tensor | None = module.bias
    if bias is not None:
        return bias.detach()
    weight = module.base if isinstance(module, LinearWeights) else module.weight
    return weight.new_zeros(module.out_features)


def packed_linear_runs() -> bool:
    """Return whether the compiled module has vector instructions, without which `PackedLinear` is no gain."""
    if _dispatch.resolve("linear", "auto", "cpu") != "cpp":
        return False
    return bool(_dispatch.native().build_info()["simd"] != "baseline")


def gelu_(x: Tensor) -> Tensor:
    """Compute x · Φ(x) in place: contiguous fp32 on the CPU, with the same bits at any position."""
    _dispatch.native().gelu(pointer(x, torch.float32), x.numel(), torch.get_num_threads())
    return x

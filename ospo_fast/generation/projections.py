"""The matrix products of a decoder: fused and packed where its layers are plain, called as they are where not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ospo_fast.ops.linear import PackedLinear, bias_or_zeros, gelu_


class Projection(Protocol):
    """x (M, K) → (M, N), into `out` if given."""

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """Apply it."""
        ...

    def refresh(self) -> None:
        """Read the model's weights again: they may have been trained since."""
        ...


Kind = Callable[[Sequence[nn.Linear]], Projection]
"""How plain layers of one input are read: `PackedLinear`, `FusedProjection` or `UnfusedProjection`."""


def is_plain(module: Any) -> bool:
    """Whether a module is nn.Linear and nothing more: no adapter, quantisation, parametrisation or hook."""
    return type(module) is nn.Linear and not module._forward_hooks and not module._forward_pre_hooks


class FusedProjection:
    """Plain linear layers of one input as one product. A single layer is read in place; several are copied together."""

    def __init__(self, modules: Sequence[nn.Linear]) -> None:
        self._modules = list(modules)
        first = modules[0]
        if len(modules) == 1:
            self.weight = first.weight.detach()
        else:
            self.weight = first.weight.new_empty(sum(m.out_features for m in modules), first.in_features)
        biased = any(m.bias is not None for m in modules)
        self.bias = torch.cat([bias_or_zeros(m) for m in modules]) if biased else None
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """See `Projection`."""
        if len(self._modules) > 1:
            torch.cat(tuple(m.weight for m in self._modules), out=self.weight)
        if self.bias is not None:
            torch.cat([bias_or_zeros(m) for m in self._modules], out=self.bias)

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """See `Projection`."""
        weight = self.weight.t()
        return torch.mm(x, weight, out=out) if self.bias is None else torch.addmm(self.bias, x, weight, out=out)


class UnfusedProjection:
    """Plain linear layers of one input, each read in place: for models whose weights fit the memory only once."""

    def __init__(self, modules: Sequence[nn.Linear]) -> None:
        self._parts: list[tuple[Tensor, Tensor | None]]
        self._parts = [(m.weight.detach(), None if m.bias is None else bias_or_zeros(m)) for m in modules]
        self._columns = sum(m.out_features for m in modules)

    def refresh(self) -> None:
        """See `Projection`: nothing was copied."""

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """See `Projection`."""
        out = x.new_empty(x.shape[0], self._columns) if out is None else out
        begin = 0
        for weight, bias in self._parts:
            part = out[:, begin : begin + weight.shape[0]]
            begin += weight.shape[0]
            if bias is None:
                torch.mm(x, weight.t(), out=part)
            else:
                torch.addmm(bias, x, weight.t(), out=part)
        return out


class ModuleProjection:
    """Modules as they are, adapters and hooks in force."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._modules = list(modules)

    def refresh(self) -> None:
        """See `Projection`: nothing was copied."""

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """See `Projection`."""
        found: list[Tensor] = [module(x) for module in self._modules]
        if len(found) == 1:
            return found[0] if out is None else out.copy_(found[0])
        return torch.cat(found, -1, out=out)


def projection(modules: Sequence[nn.Module], kind: Kind) -> Projection:
    """The product of `modules`, which share their input; `kind` says how plain ones are fused."""
    plain = [module for module in modules if isinstance(module, nn.Linear) and is_plain(module)]
    if len(plain) < len(modules):
        return ModuleProjection(modules)
    return kind(plain)


class PackedHead:
    """A Linear-GELU-Linear head of image codes, packed."""

    def __init__(self, first: nn.Linear, last: nn.Linear) -> None:
        self._first, self._last = PackedLinear([first]), PackedLinear([last])
        self._inner: Tensor | None = None  # the hidden layer of as many rows as last time

    def refresh(self) -> None:
        """See `Projection`."""
        self._first.refresh()
        self._last.refresh()

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """Hidden (M, D) → logits (M, V)."""
        if self._inner is None or len(self._inner) != len(x):
            self._inner = x.new_empty(len(x), self._first.columns)
        return self._last(gelu_(self._first(x, self._inner)), out)


def head_projection(head: nn.Module, packed: bool) -> Projection:
    """The head of image codes: packed where that is wanted and it is transformers' plain one, else called."""
    first, last = getattr(head, "proj_out", None), getattr(head, "vision_head", None)
    plain = is_plain(first) and is_plain(last) and not head._forward_hooks and not head._forward_pre_hooks
    if packed and plain and type(getattr(head, "activation_fn", None)).__name__ == "GELUActivation":
        assert isinstance(first, nn.Linear)
        assert isinstance(last, nn.Linear)
        return PackedHead(first, last)
    return ModuleProjection([head])

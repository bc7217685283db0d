"""Matrix products of a decoder: fused or packed where its layers are plain, by the modules themselves elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ospo_fast.generation.overrides import is_changed
from ospo_fast.ops.head import Head
from ospo_fast.ops.linear import LinearWeights, PackedLinear, bias_or_zeros, gelu_


class Projection(Protocol):
    """Matrix product x (M, K) → (M, N), into `out` if given."""

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """Compute the product."""
        ...

    def refresh(self) -> None:
        """Reload the model's weights, which may have been trained."""
        ...


Kind = Callable[[Sequence[Any]], Projection]
"""`PackedLinear`, `FusedProjection` or `UnfusedProjection`: how plain layers with the same input are computed."""


def is_plain(module: Any) -> bool:
    """Return whether a module is nn.Linear without adapter, quantization, parametrization, hook or patched forward."""
    return type(module) is nn.Linear and type(module.weight) is nn.Parameter and not is_changed(module)


def with_adapters(module: Any) -> nn.Linear | LinearWeights | None:
    """Return a plain layer, or the weights of one with plain LoRA adapters of peft; None for others.

    Adapters of other dtypes, merged ones that are disabled, variants of LoRA, and biases of adapters are others.
    """
    if is_plain(module):
        return module  # type: ignore[no-any-return]
    kind = type(module)
    if (kind.__module__, kind.__name__) != ("peft.tuners.lora.layer", "Linear") or is_changed(module):
        return None
    base = module.get_base_layer()
    if not is_plain(base) or (module.disable_adapters and module.merged):
        return None
    inactive = module.disable_adapters or module.merged
    names = [] if inactive else [name for name in module.active_adapters if name in module.lora_A]
    layers = [(module.lora_A[name], module.lora_B[name]) for name in names]
    plain = all(is_plain(part) and part.weight.dtype == base.weight.dtype for pair in layers for part in pair)
    if not plain or module.lora_variant.keys() & set(names) or any(b.bias is not None for _, b in layers):
        return None
    adapters = [(a.weight, b.weight, float(module.scaling[n])) for n, (a, b) in zip(names, layers, strict=True)]
    return LinearWeights(base.weight, base.bias, tuple(adapters))


class FusedProjection:
    """Plain layers with the same input as one product. One layer is read in place, several are copied together."""

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
    """Plain layers with the same input, each read in place: for weights that fit the memory only once."""

    def __init__(self, modules: Sequence[nn.Linear]) -> None:
        self._parts = [FusedProjection([module]) for module in modules]
        self._sizes = [module.out_features for module in modules]

    def refresh(self) -> None:
        """See `Projection`."""
        for part in self._parts:
            part.refresh()

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """See `Projection`."""
        out = x.new_empty(x.shape[0], sum(self._sizes)) if out is None else out
        for part, columns in zip(self._parts, out.split(self._sizes, 1), strict=True):
            part(x, columns)
        return out


class ModuleProjection:
    """Modules with the same input, called as they are: adapters and hooks stay in force."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._modules = list(modules)

    def refresh(self) -> None:
        """See `Projection`: nothing was copied."""

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """See `Projection`."""
        results: list[Tensor] = [module(x) for module in self._modules]
        if len(results) > 1:
            return torch.cat(results, -1, out=out)
        return results[0] if out is None else out.copy_(results[0])


def build_projection(modules: Sequence[nn.Module], kind: Kind) -> Projection:
    """Return the product of modules with the same input, of `kind` if all of them are plain.

    `PackedLinear` copies weights anyway, and so takes those of LoRA adapters, too.
    """
    if kind is PackedLinear:
        found = [layer for module in modules if (layer := with_adapters(module)) is not None]
        return kind(found) if len(found) == len(modules) else ModuleProjection(modules)
    plain = [module for module in modules if isinstance(module, nn.Linear) and is_plain(module)]
    return kind(plain) if len(plain) == len(modules) else ModuleProjection(modules)


class PackedHead:
    """A Linear-GELU-Linear head of image codes, packed."""

    def __init__(self, first: nn.Linear, last: nn.Linear) -> None:
        self._first, self._last = PackedLinear([first]), PackedLinear([last])

    def refresh(self) -> None:
        """See `Projection`."""
        self._first.refresh()
        self._last.refresh()

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """Compute logits (M, V) of hidden states (M, D)."""
        return self._last(gelu_(self._first(x)), out)


class GuidedHead:
    """Logits of classifier-free guidance with the bits of `Head.guided` and `token_logprobs` (batch_invariant=True)."""

    def __init__(self, head: Head) -> None:
        weight, self._bias, proj_weight, proj_bias = head.tensors
        self._first = None if proj_weight is None else PackedLinear([LinearWeights(proj_weight, proj_bias)])
        self._last = PackedLinear([LinearWeights(weight)])

    def refresh(self) -> None:
        """See `Projection`."""
        if self._first is not None:
            self._first.refresh()
        self._last.refresh()

    def __call__(self, hidden: Tensor, scale: float, branches: int) -> Tensor:
        """Compute logits (M, V) of hidden states (branches · M, D), the conditional ones first."""
        features = hidden if self._first is None else gelu_(self._first(hidden))
        if branches == 2:
            c, u = features.chunk(2)
            features = u + (c - u) * scale
        logits = self._last(features)  # the bias is added to the sum, as the softmax step does
        return logits if self._bias is None else logits.add_(self._bias)


def head_projection(head: nn.Module, packed: bool) -> Projection:
    """Return the head of image codes: packed if `packed` and it is transformers' own, else the module itself."""
    # Its own parts: wrappers of peft have the attributes of the module that is active now.
    first, last = head._modules.get("proj_out"), head._modules.get("vision_head")
    activation: Any = head._modules.get("activation_fn")
    kind = type(head)
    own = kind.__name__ == "JanusVQVAEHead" and kind.__module__.startswith("transformers.")
    own = own and head._modules.keys() == {"proj_out", "vision_head", "activation_fn"}
    known = own and is_plain(first) and is_plain(last) and type(activation).__name__ == "GELUActivation"
    if packed and known and not is_changed(head) and not is_changed(activation):
        assert isinstance(first, nn.Linear)
        assert isinstance(last, nn.Linear)
        return PackedHead(first, last)
    return ModuleProjection([head])

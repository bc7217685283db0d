"""What the autograd functions of the ops share."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ospo_fast.errors import OpError

Backward = Callable[..., tuple[Any, ...]]


def edges(*tensors: Tensor | None) -> tuple[Tensor, ...]:
    """Return tensors without elements that lead to those of the given ones that require grad, for `ctx.edges`."""
    if torch.compiler.is_compiling():
        return ()
    return tuple(t[:0].clone() for t in tensors if t is not None and t.requires_grad)


def first_derivative_only(op: str) -> Callable[[Backward], Backward]:
    """Make the gradients of a backward raise OpError when they are differentiated for any of `ctx.edges`.

    torch's `once_differentiable` does so only if the upstream gradient requires grad. Otherwise, as for the sum of an
    op's results, it returns gradients that seem not to depend on the inputs.
    """

    def decorate(backward: Backward) -> Backward:
        @functools.wraps(backward)
        def run(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
            if not torch.compiler.is_compiling() and any(g is not None and _is_batched(g) for g in grads):
                raise OpError(
                    f"{op}: its backward got a batch of gradients (is_grads_batched, vectorize=True), expected one at "
                    "a time; call torch.autograd.grad for each, or pass vectorize=False"
                )
            if not torch.is_grad_enabled():  # no create_graph
                return backward(ctx, *grads)
            with torch.no_grad():
                results = backward(ctx, *grads)
            if torch.compiler.is_compiling():
                return results
            sources = (*ctx.edges, *(g for g in grads if g is not None and g.requires_grad))
            return tuple(None if r is None else _Refuse.apply(op, r, *sources) for r in results)  # type: ignore[no-untyped-call]

        return run

    return decorate


def _is_batched(grad: Tensor) -> bool:
    functorch = torch._C._functorch
    return functorch.is_functorch_wrapped_tensor(grad) or functorch.is_legacy_batchedtensor(grad)


class _Refuse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, op: str, gradient: Tensor, *sources: Tensor) -> Tensor:
        ctx.op = op
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor | None, ...]:
        raise OpError(
            f"{ctx.op}: got a second derivative, expected at most a first one; compute this term from all logits "
            "(log_softmax and gather), or without create_graph=True"
        )


def keeps_graph() -> bool:
    """Return whether another backward through the same graph may follow, so that what it needs must not change."""
    return torch.compiler.is_compiling() or bool(torch._C._autograd._get_current_graph_task_keep_graph())

"""Compute verl's log-probabilities and entropies with `token_logprobs`: `use_ospo_fast(model)`, or its functions.

verl patches a model's forward to call, with the weight of its head, either `FusedLinearForPPO` (backends "torch" and
"liger") or `linear_cross_entropy` (backend "triton", and Megatron). Both contracts are here. For Megatron, assign
`linear_cross_entropy` in the verl modules that import it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial, wraps
from typing import Any

from torch import Tensor, nn

from ospo_fast.errors import OpError, UsageError
from ospo_fast.integrations._patch import Enabled, running_head
from ospo_fast.ops import Head, token_logprobs

_TORCH = "verl.utils.experimental.torch_functional"
_TRITON = "verl.utils.kernel.linear_cross_entropy"


class FusedLinearForPPO(nn.Module):
    """`verl.utils.experimental.torch_functional.FusedLinearForPPO` by `token_logprobs`.

    Args:
        chunk_size: rows of logits in memory; None: see `token_logprobs`.
        impl_backend: ignored.
        head: computes the logits in place of the weight that `forward` gets. None: this weight.

    """

    def __init__(
        self, chunk_size: int | None = None, impl_backend: str = "torch", *, head: Head | nn.Module | None = None
    ) -> None:
        super().__init__()
        self.chunk_size, self.impl_backend = chunk_size, impl_backend
        self._head = (head,)  # in a tuple, so that the head's parameters do not become those of this module

    def forward(
        self, hidden_states: Tensor, vocab_weights: Tensor, input_ids: Tensor, temperature: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """Compute log softmax(hidden_states · vocab_weightsᵀ / temperature)[input_ids] and the entropy.

        Args:
            hidden_states: (T, D) or (B, T, D) float.
            vocab_weights: (V, D) float.
            input_ids: (T,) or (B, T) integer: the token predicted FROM each hidden state, -100 where ignored.
            temperature: > 0.

        Returns:
            log_probs and entropy, (T,) or (B, T) fp32 each, both differentiable.

        Raises:
            OpError: see `token_logprobs`.

        """
        return token_logprobs(
            hidden_states,
            self._head[0] or Head(vocab_weights),
            input_ids,
            temperature=float(temperature),
            return_entropy=True,
            chunk_rows=self.chunk_size,
        )


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    temperature: float = 1.0,
    reduction: str = "none",
    dist_process_group: Any = None,
    *,
    head: Head | nn.Module | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute what `verl.utils.kernel.linear_cross_entropy.linear_cross_entropy` does: log-probabilities and entropies.

    Args:
        hidden: (T, D) or (B, T, D) float.
        weight: (V, D) float, with `dist_process_group` the (V / ranks, D) of this rank.
        labels: (T,) or (B, T) integer: the token predicted FROM each hidden state.
        temperature: > 0.
        reduction: of the log-probabilities: "none", "sum" or "mean".
        dist_process_group: the ranks that hold one part of the vocabulary each, in order. None: this one holds all.
        head: computes the logits in place of `weight`. None: `weight`.

    Returns:
        log_probs (B·T,), or a scalar with a reduction, and entropy (B·T,), fp32, both differentiable. With
        `dist_process_group` the gradients of hidden are to be added up over the ranks, as Megatron's sequence
        parallelism does.

    Raises:
        OpError: another reduction, and the errors of `token_logprobs`.

    """
    if reduction.lower() not in ("none", "sum", "mean"):
        raise OpError(f"linear_cross_entropy: reduction is {reduction!r}, expected 'none', 'sum' or 'mean'")
    hidden = hidden.reshape(-1, hidden.shape[-1])
    if dist_process_group is not None and hidden.requires_grad:
        # Sequence parallelism adds up the gradients of the ranks. Those of token_logprobs are whole on each rank.
        ranks = dist_process_group.size()
        hidden = hidden.view_as(hidden)
        hidden.register_hook(lambda grad: grad / ranks)
    log_probs, entropy = token_logprobs(
        hidden,
        head or Head(weight),
        labels.reshape(-1),
        temperature=float(temperature),
        return_entropy=True,
        process_group=dist_process_group,
    )
    if reduction.lower() != "none":
        log_probs = log_probs.sum() if reduction.lower() == "sum" else log_probs.mean()
    return log_probs, entropy


def use_ospo_fast(model: nn.Module) -> Enabled:
    """Let a model that verl has patched (`use_fused_kernels=True`) compute its log-probabilities with `token_logprobs`.

    Call it once per worker, after verl's `apply_monkey_patch` and after PEFT, and keep the handle. The head itself is
    used, not only its weight, so adapters on the head get exact gradients.

    Args:
        model: a causal language model, also wrapped.

    Returns:
        A handle. Its `undo()`, or the end of a `with` block, restores verl's functions.

    Raises:
        UsageError: a verl without these functions, or a model that verl has not patched.

    """
    places = _find_functions()
    if not any(hasattr(module, "_verl_fused_kernels_backend") for module in model.modules()):
        raise UsageError(
            f"use_ospo_fast: verl has not patched {type(model).__name__}, expected a model with fused kernels; set "
            "actor_rollout_ref.model.use_fused_kernels=True"
        )
    from ospo_fast.integrations._deferred_logits import find_causal_lm

    ours: tuple[Callable[..., Any], ...] = FusedLinearForPPO, linear_cross_entropy
    functions = [(*place, partial(_dispatching, own)) for place, own in zip(places, ours, strict=True)]
    return Enabled([find_causal_lm(model)], functions)


def _find_functions() -> list[tuple[Any, str]]:
    """Return the modules of verl that are loaded and hold one of the functions, and its name there."""
    found = []
    for name, attribute in ((_TORCH, "FusedLinearForPPO"), (_TRITON, "linear_cross_entropy")):
        try:
            module = importlib.import_module(name)
        except Exception as error:  # packages with binaries that do not fit raise anything
            raise UsageError(f"use_ospo_fast: {name} cannot be imported ({error}); install verl==0.9.1") from error
        if not hasattr(module, attribute):
            raise UsageError(f"use_ospo_fast: verl has no {name}.{attribute}, expected verl 0.9; install verl==0.9.1")
        found.append((module, attribute))
    return found


def _dispatching(ours: Callable[..., Any], theirs: Callable[..., Any]) -> Callable[..., Any]:
    """Return a replacement of a function of verl that computes with the head of the running model."""

    @wraps(theirs, updated=())  # not the attributes of a class
    def call(*args: Any, **kwargs: Any) -> Any:
        head = running_head()
        return theirs(*args, **kwargs) if head is None else ours(*args, head=head, **kwargs)

    return call

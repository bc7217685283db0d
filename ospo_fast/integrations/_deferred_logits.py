"""Run a causal language model of transformers without its head, and give hidden states and head to a loss.

The model's own forward runs, with its wrappers, adapters and auxiliary losses. Only the head returns a placeholder. It
records what the model does to its logits before the loss: scales and soft caps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ospo_fast.errors import OpError, UsageError
from ospo_fast.integrations._patch import ABSENT, replaced

_REMEDY = "use the model's own loss for this model"


@dataclass(frozen=True, eq=False)
class DeferredLogits:
    """Placeholder of the scores softcap·tanh(z/softcap)/temperature, or z/temperature, for z = head(hidden)."""

    hidden: Tensor  # (..., D)
    head: nn.Module
    temperature: float = 1.0
    softcap: float | None = None

    def __truediv__(self, divisor: float) -> DeferredLogits:
        if isinstance(divisor, bool) or not isinstance(divisor, (int, float)) or not divisor > 0:
            raise OpError(f"fused loss: the model scales its logits by {divisor!r}, expected a number > 0; {_REMEDY}")
        return replace(self, temperature=self.temperature * divisor)

    def __mul__(self, factor: float) -> DeferredLogits:
        if isinstance(factor, bool) or not isinstance(factor, (int, float)) or not factor > 0:
            raise OpError(f"fused loss: the model scales its logits by {factor!r}, expected a number > 0; {_REMEDY}")
        return replace(self, temperature=self.temperature / factor)

    __rmul__ = __mul__

    def _refuse(self, *_: Any) -> Any:
        raise OpError(f"fused loss: the model changes its logits, expected scales and a soft cap alone; {_REMEDY}")

    __add__ = __radd__ = __sub__ = __rsub__ = __neg__ = __pow__ = __rtruediv__ = __matmul__ = _refuse
    __getitem__ = __setitem__ = __iadd__ = __isub__ = __len__ = __iter__ = _refuse

    def __bool__(self) -> bool:
        return True  # by default, Python would ask for the length

    def tanh(self) -> DeferredLogits:
        """Bound the scores: those of a temperature T become T·tanh(z/T) / T."""
        if self.softcap is not None:
            raise OpError(f"fused loss: the model applies tanh to its logits twice, expected one soft cap; {_REMEDY}")
        return replace(self, softcap=self.temperature)

    def float(self) -> DeferredLogits:
        """Return the placeholder as it is: log-probabilities are computed in fp32 anyway."""
        return self

    def contiguous(self) -> DeferredLogits:
        """Return the placeholder as it is."""
        return self

    def to(self, *_: Any, **__: Any) -> DeferredLogits:
        """Return the placeholder as it is: the loss is computed where the hidden states are."""
        return self

    @classmethod
    def __torch_function__(cls, function: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in (torch.tanh, nn.functional.tanh):
            return args[0].tanh()
        name = getattr(function, "__name__", function)
        raise OpError(f"fused loss: the model applies {name} to its logits, expected scales and a soft cap; {_REMEDY}")

    def __getattr__(self, name: str) -> Any:
        # AttributeError, because hasattr() must work on a placeholder, too.
        raise AttributeError(
            f"fused loss: the model or its caller uses `{name}` of logits that do not exist; {_REMEDY}"
        )


def find_causal_lm(model: nn.Module) -> Any:
    """Return the model with an output head inside wrappers such as DDP and PEFT.

    Raises:
        UsageError: there is none.

    """
    from transformers import PreTrainedModel

    for module in model.modules():  # the outer ones come first
        if isinstance(module, PreTrainedModel) and module.get_output_embeddings() is not None:
            return module
    raise UsageError(
        f"model: {type(model).__name__} holds no transformers model with output embeddings, expected a causal language "
        "model; call ospo_fast.cross_entropy or ospo_fast.token_logprobs in a training loop of your own"
    )


@contextmanager
def deferred_logits(model: nn.Module, loss: Callable[..., Tensor]) -> Iterator[None]:
    """Let calls of the model with `labels` return `loss(logits, labels, **kwargs)` for `DeferredLogits`.

    Args:
        model: a causal language model, also wrapped.
        loss: called inside the model's forward, where FSDP2 holds the head's weights whole.

    Raises:
        UsageError: see `find_causal_lm`.

    """
    causal_lm = find_causal_lm(model)
    head: nn.Module = causal_lm.get_output_embeddings()
    own_forward = vars(head).get("forward", ABSENT)

    def run_loss(logits: Any, labels: Tensor, vocab_size: Any = None, **kwargs: Any) -> Tensor:
        if not isinstance(logits, DeferredLogits):
            raise OpError(
                f"fused loss: {type(causal_lm).__name__} does not compute its logits by its output embeddings, "
                f"got {type(logits).__name__}; {_REMEDY}"
            )
        try:
            with replaced(head, "forward", own_forward):
                return loss(logits, labels, **kwargs)
        except OpError as error:  # whose remedy may be to change the call, which is not the user's
            raise OpError(f"{error}; or {_REMEDY}") from error

    def defer(hidden: Tensor, **options: Any) -> DeferredLogits:
        if options:
            raise OpError(f"fused loss: the head is called with {', '.join(options)}, expected none; {_REMEDY}")
        return DeferredLogits(hidden, head)

    with (
        replaced(head, "forward", defer),
        replaced(causal_lm, "_loss_function", run_loss),
    ):
        yield

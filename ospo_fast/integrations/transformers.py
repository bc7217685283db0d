"""Train a causal language model with transformers, without logits: `FusedLossTrainer`, or one call in another loop."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ospo_fast.errors import OpError, UsageError
from ospo_fast.integrations._deferred_logits import DeferredLogits, deferred_logits, find_causal_lm
from ospo_fast.ops import IGNORE_INDEX, cross_entropy
from ospo_fast.packages import required_by

with required_by("ospo_fast.integrations.transformers", "transformers", "accelerate"):
    from transformers import Trainer
    from transformers.loss.loss_utils import ForCausalLMLoss


def fused_causal_lm_loss(
    model: nn.Module, inputs: Mapping[str, Any], num_items_in_batch: Tensor | int | None = None
) -> Tensor:
    """Compute the loss of `model(**inputs)` without its logits.

    The model's own forward runs, so that DDP, FSDP2, PEFT and autocast see the same call. Scales and soft caps of its
    logits, and auxiliary losses of its experts, are part of the loss.

    Args:
        model: a causal language model of transformers whose loss is the cross-entropy of the next token. It may be
            wrapped.
        inputs: keyword arguments of its forward, with `labels` (B, S) int64, unshifted, -100 where ignored.
        num_items_in_batch: divisor of the summed loss, for gradient accumulation. None: the labels that count here.

    Returns:
        Scalar loss.

    Raises:
        UsageError: no labels, no causal language model, or a model with a loss of its own.
        OpError: a model that computes other things from its logits, and the errors of `token_logprobs`.

    """
    if inputs.get("labels") is None:
        raise UsageError(
            "fused_causal_lm_loss: inputs have no labels, expected (B, S) token ids; pass labels=input_ids"
        )
    with _fused_loss(model, num_items_in_batch):
        loss: Tensor | None = model(**inputs)["loss"]
    if loss is None:
        raise OpError("fused_causal_lm_loss: the model returned no loss for its labels; use the model's own loss")
    return loss


class FusedLossTrainer(Trainer):
    """`Trainer` of a causal language model that computes its loss without logits, in training and in evaluation.

    Evaluation with metrics or predictions needs logits. It computes them as `Trainer` does.

    Raises:
        UsageError: label smoothing, a `compute_loss_func`, no causal language model, or a model with another loss.

    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.args.label_smoothing_factor:
            raise UsageError(
                f"FusedLossTrainer: label_smoothing_factor is {self.args.label_smoothing_factor}, expected 0; "
                "use Trainer for label smoothing"
            )
        if self.compute_loss_func is not None:
            raise UsageError(
                "FusedLossTrainer: got a compute_loss_func, which needs logits; use Trainer, or remove it for the "
                "cross-entropy of the next token"
            )
        _check_loss(find_causal_lm(self.model))

    def training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        """Run `Trainer.training_step` without logits."""
        with _fused_loss(model):
            loss: Tensor = super().training_step(model, *args, **kwargs)
        return loss

    def prediction_step(
        self, model: nn.Module, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Any, Any, Any]:
        """Run `Trainer.prediction_step`, without logits where only the loss is asked for."""
        context: AbstractContextManager[None] = _fused_loss(model) if prediction_loss_only else nullcontext()
        with context:
            result: tuple[Any, Any, Any] = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        return result


@contextmanager
def _fused_loss(model: nn.Module, num_items_in_batch: Tensor | int | None = None) -> Iterator[None]:
    """Let calls of the model with labels compute no logits."""
    _check_loss(find_causal_lm(model))
    # Not an argument of the model: not every forward takes it.
    divisor: dict[str, Any] = {} if num_items_in_batch is None else {"num_items_in_batch": num_items_in_batch}
    with deferred_logits(model, partial(_next_token_loss, **divisor)):
        yield


def _check_loss(causal_lm: Any) -> None:
    if causal_lm.loss_function is not ForCausalLMLoss:
        name = getattr(causal_lm.loss_function, "__name__", causal_lm.loss_function)
        raise UsageError(
            f"model: {type(causal_lm).__name__} has the loss {name}, expected transformers' ForCausalLMLoss; "
            "use the model's own loss"
        )


def _next_token_loss(
    logits: DeferredLogits,
    labels: Tensor,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = IGNORE_INDEX,
    shift_labels: Tensor | None = None,
    **_: Any,
) -> Tensor:
    if shift_labels is None:
        # Shift the labels, not the hidden states: these stay contiguous and are not copied.
        shift_labels = F.pad(labels[..., 1:], (0, 1), value=ignore_index)
    loss = cross_entropy(
        logits.hidden,
        logits.head,
        shift_labels.to(logits.hidden.device),
        reduction="mean" if num_items_in_batch is None else "sum",
        ignore_index=ignore_index,
        temperature=logits.temperature,
        softcap=logits.softcap,
    )
    if num_items_in_batch is None:
        return loss
    return loss / (num_items_in_batch.to(loss.device) if isinstance(num_items_in_batch, Tensor) else num_items_in_batch)

"""Backbone, head and loss in one module, as DDP, FSDP2, Lightning and Accelerate want it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ospo_fast.errors import OpError, UsageError
from ospo_fast.loss import OSPOLoss
from ospo_fast.ops import IGNORE_INDEX, Head, cross_entropy

# What configurations of transformers do to logits after the head: the option that does it here, and no change.
_LOGIT_SETTINGS: dict[str, tuple[str, float | None]] = {
    "final_logit_softcapping": ("softcap", None),
    "logit_scale": ("temperature", 1.0),
    "logits_scaling": ("temperature", 1.0),
    "lm_head_multiplier": ("temperature", 1.0),
    "output_multiplier": ("temperature", 1.0),
    "logits_mup_width_multiplier": ("temperature", 1.0),
}


class LossModule(nn.Module):
    """Compute a loss from hidden states inside one forward.

    Wrap this module, not the backbone: DDP and FSDP2 average and gather what is used inside the forward of the module
    that they wrap. A loss on `ddp.module.backbone(…)` trains each process by itself.

        module = LossModule(model.model, model.lm_head, OSPOLoss())
        ddp = DistributedDataParallel(module)
        ddp({"input_ids": ids, "attention_mask": attention_mask}, labels, object_masks=masks).loss.backward()

    Args:
        backbone: returns hidden states (B, S, D), or an output with `last_hidden_state`.
        head: see `token_logprobs`. It may share its weight with the backbone's embedding.
        loss: called as loss(hidden, labels, head, **loss_inputs), such as `OSPOLoss` or `next_token_loss`.

    Raises:
        UsageError: `OSPOLoss` or `next_token_loss` for a model whose configuration has a soft cap or scale of the
            logits, or an auxiliary loss, that this loss does not apply.

    """

    def __init__(self, backbone: nn.Module, head: nn.Module, loss: Callable[..., Any]) -> None:
        super().__init__()
        _check_loss(backbone, loss)
        self.backbone, self.head, self.loss = backbone, head, loss

    def forward(self, inputs: Tensor | Mapping[str, Any], labels: Tensor, **loss_inputs: Any) -> Any:
        """Compute the loss of a batch.

        Args:
            inputs: of the backbone: one positional argument, or keyword arguments.
            labels: of the loss.
            **loss_inputs: further arguments of the loss.

        Returns:
            What the loss returns.

        Raises:
            UsageError: a backbone that returns no hidden states.

        """
        output = self.backbone(**inputs) if isinstance(inputs, Mapping) else self.backbone(inputs)
        hidden = output if isinstance(output, Tensor) else getattr(output, "last_hidden_state", None)
        if hidden is None:
            raise UsageError(
                f"LossModule: the backbone returned {type(output).__name__}, expected hidden states (B, S, D) or an "
                "output with last_hidden_state; use the model without its head, such as model.model"
            )
        return self.loss(hidden, labels, self.head, **loss_inputs)


def _check_loss(backbone: nn.Module, loss: Callable[..., Any]) -> None:
    """Raise UsageError if a model does more between head and loss than a loss of this package."""
    options = loss.keywords if isinstance(loss, partial) else {}
    function: Any = loss.func if isinstance(loss, partial) else loss
    config: Any = next((m.config for m in backbone.modules() if hasattr(m, "config")), None)
    if (function is not next_token_loss and not isinstance(function, OSPOLoss)) or config is None:
        return
    if hasattr(config, "get_text_config"):
        config = config.get_text_config(decoder=True)
    name = "OSPOLoss" if isinstance(function, OSPOLoss) else "next_token_loss"
    for setting, (option, neutral) in _LOGIT_SETTINGS.items():
        value = getattr(config, setting, neutral)
        number = isinstance(value, (int, float)) and not isinstance(value, bool)  # MPT's is the name of a rule
        if number and value != neutral and option not in options:
            call = "functools.partial(next_token_loss, " if name == "next_token_loss" else "a loss on token_logprobs("
            example = (
                f"softcap={value})" if option == "softcap" else "temperature=…), 1/scale where the model multiplies"
            )
            raise UsageError(
                f"LossModule: the model's configuration has {setting}={value}, which {name} does not apply, expected a "
                f"loss that does; pass {call}{example}; if the hidden states have it already, pass a function of your "
                "own around the loss"
            )
    if getattr(config, "output_router_logits", False):
        raise UsageError(
            f"LossModule: the model's configuration has output_router_logits=True, but {name} has no load-balancing "
            "loss; use ospo_fast.integrations.transformers, or set it to False"
        )


def next_token_loss(hidden: Tensor, labels: Tensor, head: Head | nn.Module, **options: Any) -> Tensor:
    """Compute the cross-entropy of the next token, without logits in memory.

    Args:
        hidden: (B, S, D) float.
        labels: (B, S) int64, unshifted: the token AT each position, -100 where ignored.
        head: see `token_logprobs`.
        **options: of `cross_entropy`. Its weights (B, S), too, are those of the tokens AT each position.

    Returns:
        Scalar: the mean over the labels that count.

    Raises:
        OpError: see `cross_entropy`.

    """
    if labels.dim() != 2:
        raise OpError(f"next_token_loss: labels have shape {tuple(labels.shape)}, expected (B, S), unshifted")
    # Shift the labels, not the hidden states: these stay contiguous and are not copied.
    targets = F.pad(labels[:, 1:], (0, 1), value=options.get("ignore_index", IGNORE_INDEX))
    if isinstance(weights := options.get("weights"), Tensor):
        if weights.shape != labels.shape:
            raise OpError(
                f"next_token_loss: weights have shape {tuple(weights.shape)}, expected that of labels "
                f"{tuple(labels.shape)}"
            )
        options["weights"] = F.pad(weights[:, 1:], (0, 1))
    return cross_entropy(hidden, head, targets, **options)


def split_loss(output: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Return loss and metrics of what `LossModule` returned: a scalar, or an output such as `OSPOLossOutput`."""
    if isinstance(output, Tensor):
        return output, {}
    return output.loss, dict(getattr(output, "metrics", {}))

"""TRL's trainer of pairs (CPO, SimPO) on image tokens with `OSPOLoss`: without logits, with object masks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ospo_fast.errors import OpError, UsageError
from ospo_fast.integrations._deferred_logits import DeferredLogits, deferred_logits, find_causal_lm
from ospo_fast.loss import OSPOLoss, OSPOLossConfig, OSPOLossOutput
from ospo_fast.packages import required_by

with required_by("ospo_fast.integrations.trl_ospo", "trl", "transformers", extra="trl"):
    from trl.experimental.cpo import CPOTrainer

_METRICS = {
    "rewards/chosen": "chosen_rewards",
    "rewards/rejected": "rejected_rewards",
    "rewards/accuracies": "accuracy",
    "rewards/margins": "margin",
    "logps/chosen": "chosen_logps",
    "logps/rejected": "rejected_logps",
    "nll_loss": "sft",
}


_SIDES = ("chosen", "rejected")


class OSPOTrainer(CPOTrainer):
    """`CPOTrainer` with `loss_type="simpo"`, computed by `OSPOLoss` inside the model's forward.

    The model is a causal language model whose vocabulary holds the image codes. A row of the dataset is either text, as
    for `CPOTrainer`, or tokenized, as its `tokenize_row` returns it: `chosen_input_ids`, `chosen_attention_mask` and
    `chosen_labels` (-100 on prompt and text), the same for `rejected`. Rows may have `chosen_object_mask` and
    `rejected_object_mask`, (H, W) each on the grid of the image tokens. The tokens of rows without one weigh the same.

    Args:
        *args: of `CPOTrainer`.
        loss_config: coefficients of the loss. None: beta, simpo_gamma, cpo_alpha and label_smoothing of `CPOConfig`.
        **kwargs: of `CPOTrainer`.

    Raises:
        UsageError: another loss_type without loss_config, an encoder-decoder, a conditional term, and the errors of
            `OSPOLossConfig`.

    """

    _tag_names = ("trl", "ospo")
    _name = "OSPO"

    def __init__(self, *args: Any, loss_config: OSPOLossConfig | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.is_encoder_decoder:
            raise UsageError("OSPOTrainer: the model is an encoder-decoder, expected a causal language model")
        find_causal_lm(self.model)
        self.ospo_loss = OSPOLoss(_from_args(self.args) if loss_config is None else loss_config)
        if self.ospo_loss.config.cond_weight > 0:
            raise UsageError(
                f"OSPOTrainer: loss_config has cond_weight {self.ospo_loss.config.cond_weight}, expected 0, because "
                "rows hold no swapped sequences; set cond_weight=0 or call OSPOLoss in a training loop of your own"
            )
        if self.ospo_loss.config.reference:
            raise UsageError(
                "OSPOTrainer: loss_config has reference=True, expected False, because rows hold no log-probabilities "
                "of a reference model; use TRL's DPOTrainer or call OSPOLoss in a training loop of your own"
            )

    def tokenize_row(self, feature: Any, model: Any = None) -> Any:
        """Return a tokenized row as it is; tokenize a row of text as `CPOTrainer` does."""
        return dict(feature) if "chosen_input_ids" in feature else super().tokenize_row(feature, model)

    def get_batch_loss_metrics(
        self, model: nn.Module, batch: dict[str, Any], train_eval: str = "train"
    ) -> tuple[Tensor, dict[str, float]]:
        """Return the loss of a batch and its metrics. There are no `logits/*` metrics."""
        inputs = self.concatenated_inputs(batch, padding_value=self.pad_token_id, device=self.accelerator.device)
        masks = _object_masks(batch)
        masks = None if masks is None else masks.to(self.accelerator.device)
        outputs: list[OSPOLossOutput] = []

        def pair_loss(logits: DeferredLogits, labels: Tensor, **_: Any) -> Tensor:
            if logits.temperature != 1 or logits.softcap is not None:
                raise OpError(
                    f"OSPOTrainer: the model divides its logits by {logits.temperature} and caps them at "
                    f"{logits.softcap}, expected neither; use CPOTrainer for this model"
                )
            outputs.append(self.ospo_loss(logits.hidden, labels, logits.head, object_masks=masks))
            return outputs[0].loss

        with deferred_logits(model, pair_loss):
            loss = model(
                input_ids=inputs["concatenated_input_ids"],
                attention_mask=inputs["concatenated_attention_mask"],
                labels=inputs["concatenated_labels"],
                use_cache=False,
            )["loss"]
        prefix = "eval_" if train_eval == "eval" else ""
        metrics = {
            f"{prefix}{name}": self.accelerator.gather_for_metrics(outputs[0].metrics[key]).mean().item()
            for name, key in _METRICS.items()
        }
        return loss, metrics

    def prediction_step(
        self, model: nn.Module, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Any, Any, Any]:
        """Compute the loss and the metrics of a batch. There are no logits to return."""
        result: tuple[Any, Any, Any] = super().prediction_step(model, inputs, True, ignore_keys)
        return result


def _object_masks(batch: dict[str, Any]) -> Tensor | None:
    """Return the masks (2·B, H, W) of a batch, with zeros, which leave all weights at 1, for images without one."""
    masks: list[Tensor | None] = []
    for side in _SIDES:
        found = batch.get(f"{side}_object_mask")
        rows = [None] * len(batch[f"{side}_input_ids"]) if found is None else found
        masks += [None if mask is None else torch.as_tensor(mask) for mask in rows]
    given = [mask for mask in masks if mask is not None]
    if not given:
        return None
    shapes = {tuple(mask.shape) for mask in given}
    if len(shapes) > 1 or given[0].dim() != 2:
        raise OpError(f"OSPOTrainer: the object masks of a batch have shapes {sorted(shapes)}, expected one (H, W)")
    return torch.stack([torch.zeros_like(given[0]) if mask is None else mask for mask in masks])  # of the widest dtype


def _from_args(args: Any) -> OSPOLossConfig:
    """Return the coefficients of `CPOConfig`."""
    if args.loss_type != "simpo" or args.alpha:
        raise UsageError(
            f"OSPOTrainer: loss_type is {args.loss_type!r} with alpha {args.alpha}, expected 'simpo' with alpha 0; "
            "set loss_type='simpo' or give loss_config"
        )
    return OSPOLossConfig(
        beta=args.beta,
        gamma_beta_ratio=args.simpo_gamma / args.beta,
        sft_weight=args.cpo_alpha,
        label_smoothing=args.label_smoothing,
    )

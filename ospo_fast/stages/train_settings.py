"""What the configuration says about training. Light to import: `ospo_fast.stages.train` imports torch."""

from __future__ import annotations

import dataclasses
from typing import Any

from ospo_fast.config import Config, TrainConfig
from ospo_fast.errors import UsageError
from ospo_fast.loss_config import OSPOLossConfig

VALIDATION = ("loss", "accuracy", "margin", "chosen_logps", "rejected_logps")  # metrics of the held-out pairs
_OF_PAIRS = ("simpo_weight", "cond_weight", "sft_weight")  # of the loss
_CHOOSING = ("validation/accuracy", "validation/margin", "validation/loss")  # those that early stopping can go by


def loss_config(config: Config) -> OSPOLossConfig:
    """Return the loss of the preset with the values that `train.loss` sets."""
    try:
        return dataclasses.replace(OSPOLossConfig.preset(config.preset), **config.train.loss)
    except UsageError as error:
        raise UsageError(str(error).replace("OSPOLossConfig: ", "train.loss.")) from None


def trains_groups(config: Config) -> bool:
    """Return whether training is by GRPO, on images that it generates itself, and not on pairs."""
    return loss_config(config).group_size > 0


def is_dual(config: Config) -> bool:
    """Return whether the score of an image is the likelihood of its prompt, and not that of answers."""
    return config.select.rule == "likeliest"


def uses_masks(config: Config) -> bool:
    """Return whether the loss weights tokens by object masks."""
    return config.masks.enabled and loss_config(config).mask_alpha > 0


def uses_stored_masks(config: Config) -> bool:
    """Return whether the loss weights tokens by the masks of the masks stage."""
    return uses_masks(config) and config.train.masks == "stored"


def check_early_stopping(train: TrainConfig, evaluation: Any) -> None:
    """Raise UsageError for a metric that neither the evaluation nor the held-out pairs have, or that is not measured.

    evaluation: its `metrics` names those that it has; without this attribute they are not known. None: there is none.
    """
    metric, own = train.early_stopping, getattr(evaluation, "metrics", None)
    validates = metric in _CHOOSING
    if metric is None or (evaluation is not None and own is None and not validates):
        return
    known = [*(own or ()), *(_CHOOSING if train.validation_pairs else ())]
    if metric not in known and (known or validates):
        names = f" or a metric of the evaluation: {', '.join(known)}" if known else ""
        remedy = "; or hold pairs out by train.validation_pairs" if validates else ""
        raise UsageError(f"train.early_stopping: got {metric!r}, expected null{names}{remedy}.")
    if validates and not train.eval_every:
        raise UsageError(
            f"train.eval_every: got 0 with train.early_stopping={metric}, expected 1 or more: the steps between two "
            "values of it."
        )


def input_stage(config: Config) -> str:
    """Return the stage whose records training reads."""
    if trains_groups(config):
        return "questions"
    return "masks" if uses_stored_masks(config) else "select"


def check_preference(config: Config) -> None:
    """Raise UsageError for a loss of pairs that trains nothing, or whose two sides would have other token weights.

    And for images of both forms of a prompt, which no pair has.
    """
    loss = loss_config(config)
    check_form(config)
    if not (loss.simpo_weight or loss.cond_weight or loss.sft_weight):
        raise UsageError(
            "train.loss: got simpo_weight, cond_weight and sft_weight of 0, expected one above 0 with group_size=0 "
            f"(preset {config.preset})."
        )
    if loss.kl_weight:
        raise UsageError(
            f"train.loss.kl_weight: got {loss.kl_weight:g} with group_size=0, expected 0: no group trains; pairs "
            "have train.loss.reference."
        )
    if loss.reference and config.train.lora_dropout and not config.train.full:
        raise UsageError(
            f"train.lora_dropout: got {config.train.lora_dropout:g} with train.loss.reference=true, expected 0: both "
            "sides of a ratio are the same network."
        )
    if loss.reference and uses_masks(config) and config.train.masks == "online":
        raise UsageError(
            "train.masks: got online with train.loss.reference=true, expected stored: the reference has the token "
            "weights from before training."
        )


def check_form(config: Config) -> None:
    """Raise UsageError if images of pairs are to have prompts of both forms."""
    if config.images.prompts == "both":
        raise UsageError(
            "images.prompts: got both, expected dense or plain: images of a pair have prompts of one form; both is for "
            "training by GRPO, which generates its own images."
        )


def reward_settings(config: Config) -> dict[str, Any]:
    """Return the settings of other sections that GRPO depends on, and other training does not."""
    if not trains_groups(config):
        return {}
    return {
        "images.temperature": config.images.temperature,
        "images.prompts": prompt_form(config),
        "score.reward": reward_name(config),
    }


def prompt_form(config: Config) -> str:
    """Return the form of the prompts that GRPO trains: plain, or both; dense is of the images of pairs."""
    return "both" if config.images.prompts == "both" else "plain"


def reward_name(config: Config) -> str:
    """Return how settings of results name the score of an image."""
    return "dual" if is_dual(config) else "vqa"


def check_grpo(config: Config) -> None:
    """Raise UsageError for settings that GRPO cannot follow."""
    train, images, loss = config.train, config.images, loss_config(config)
    found: list[tuple[str, Any, Any, str]] = [
        ("train.full", train.full, False, "the judge of the images is the model before training, which LoRA keeps"),
        ("train.validation_pairs", train.validation_pairs, 0, "there are no pairs"),
        ("score.model", config.score.model, None, "the model that trains is the judge"),
        ("train.lora_dropout", train.lora_dropout, 0.0, "the policy that trains is the one that generates"),
        *((f"train.loss.{name}", getattr(loss, name), 0.0, "it has no pairs") for name in _OF_PAIRS),
        ("train.loss.reference", loss.reference, False, "kl_weight has the divergence from the reference"),
        ("images.top_k", images.top_k, 0, "all codes of the distribution train"),
        ("images.top_p", images.top_p, 1.0, "all codes of the distribution train"),
    ]
    if uses_masks(config):
        found.append(("train.masks", train.masks, "online", "the images that train have no stored masks"))
        found.append(("images.prompts", prompt_form(config), "plain", "masks are of the objects in the plain prompt"))
        auto = "auto" in (config.masks.layers, config.masks.heads)
        found.append(
            ("masks.layers", "auto" if auto else None, None, "there are no pairs to choose by; name the layers")
        )
    for key, value, expected, reason in found:
        if value != expected:
            expected = "null" if expected is None else str(expected).lower()
            value = str(value).lower() if isinstance(value, bool) else value
            raise UsageError(f"{key}: got {value} with group_size={loss.group_size}, expected {expected}: {reason}.")


def mask_settings(config: Config) -> dict[str, Any]:
    """Return the settings of section `masks` that training depends on."""
    section = dataclasses.asdict(config.masks)
    used = section if config.train.masks == "online" else {"enabled": config.masks.enabled}
    return {f"masks.{key}": value for key, value in used.items() if key != "batch_size"}

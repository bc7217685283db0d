"""What the configuration says about training. Light to import: `ospo_fast.stages.train` imports torch."""

from __future__ import annotations

import dataclasses
from typing import Any

from ospo_fast.config import Config
from ospo_fast.loss_config import OSPOLossConfig


def loss_config(config: Config) -> OSPOLossConfig:
    """Return the loss of the preset with the values that `train.loss` sets."""
    return dataclasses.replace(OSPOLossConfig.preset(config.preset), **config.train.loss)


def uses_masks(config: Config) -> bool:
    """Return whether the loss weights tokens by object masks."""
    return config.masks.enabled and loss_config(config).mask_alpha > 0


def uses_stored_masks(config: Config) -> bool:
    """Return whether the loss weights tokens by the masks of the masks stage."""
    return uses_masks(config) and config.train.masks == "stored"


def input_stage(config: Config) -> str:
    """Return the stage whose records training reads."""
    return "masks" if uses_stored_masks(config) else "select"


def mask_settings(config: Config) -> dict[str, Any]:
    """Return the settings of section `masks` that training depends on."""
    section = dataclasses.asdict(config.masks)
    used = section if config.train.masks == "online" else {"enabled": config.masks.enabled}
    return {f"masks.{key}": value for key, value in used.items() if key != "batch_size"}

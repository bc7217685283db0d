"""The coefficients of the loss. Light to import: `ospo_fast.loss`, which uses them, imports torch."""

import math
from dataclasses import dataclass, fields
from typing import Any, Literal

from ospo_fast.errors import UsageError
from ospo_fast.fields import expect, setting

# Of `ospo_fast.ops.token_weights`, which imports torch.
_MAX_TAPS = 1023
_MAX = 1e6  # of a coefficient: products with log-probabilities and with each other are numbers of float32


def _is_taps(value: Any) -> bool:
    return type(value) is int and 0 < value <= _MAX_TAPS and value % 2 == 1


_POSITIVE = expect("a positive number", lambda value: value > 0)
_AT_LEAST_0 = expect("a number >= 0", lambda value: value >= 0)
_SMOOTHING = expect("0 to 0.5", lambda value: 0 <= value <= 0.5)
_NORMALIZE = expect("'weights', 'length' or 'sum'", lambda value: value in ("weights", "length", "sum"))
_TAPS = expect(f"an odd number (1: no blur), at most {_MAX_TAPS}", _is_taps)


def _unmet(item: Any, value: Any) -> str:
    """Return what a field must be, if this value is not; else an empty string."""
    if item.type in (float, float | None):
        if value is None and item.type != float:  # noqa: E721 (types are compared)
            return ""
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            return "a finite number"
        if abs(value) > _MAX:
            return f"a number of at most {_MAX:g} in size"
    accepts = item.metadata.get("accepts")
    return "" if accepts is None or accepts(value) else str(item.metadata["expected"])


@dataclass(frozen=True)
class OSPOLossConfig:
    """Coefficients of the loss; `preset` gives the published ones. The default is "v3" (CVPR 2026).

    Raises UsageError for a field of the wrong type or out of range.
    """

    beta: float = setting(5.0, "beta of the preference between images.", _POSITIVE)
    gamma_beta_ratio: float = setting(0.5, "Margin gamma / beta of the preference between images.")
    beta_cond: float | None = setting(
        None, "beta of the preference between prompts. null: as between images.", _POSITIVE
    )
    gamma_beta_ratio_cond: float | None = setting(
        None, "Margin gamma / beta of the preference between prompts. null: as between images."
    )
    simpo_weight: float = setting(1.0, "Weight of the preference between images.", _AT_LEAST_0)
    cond_weight: float = setting(0.0, "Weight of the preference between prompts; 0: no such term.", _AT_LEAST_0)
    sft_weight: float = setting(
        2.0, "Weight of the SFT term, which raises the probability of the chosen image.", _AT_LEAST_0
    )
    label_smoothing: float = setting(0.0, "Probability that the label of a pair is wrong.", _SMOOTHING)
    mask_alpha: float = setting(
        1.0, "alpha of the token weights 1 + alpha * m^gamma, of the blurred mask m; 0: masks are ignored.", _AT_LEAST_0
    )
    mask_gamma: float = setting(1.0, "gamma, the exponent of the blurred mask in the token weights.", _AT_LEAST_0)
    normalize: Literal["weights", "length", "sum"] = setting(
        "weights",
        "Divide a log-probability by the sum of the token weights (official code), the length (paper), or 1 (sum).",
        _NORMALIZE,
    )
    reference: bool = setting(
        False,
        "Subtract the log-probabilities of a reference model, that before training, in the preference between images "
        "(DPO).",
        expect("true or false", lambda value: isinstance(value, bool)),
    )
    mask_blur: int = setting(
        5, "Taps of the blur of the masks, in cells of the code grid: 5 in the official code, 1 in the paper.", _TAPS
    )

    group_size: int = setting(
        0,
        "Images of a prompt in a step of GRPO, which generates and scores them; 0: pairs train.",
        expect("0, or 2 to 10000", lambda value: type(value) is int and (value == 0 or 2 <= value <= 10**4)),
    )
    kl_weight: float = setting(0.0, "Weight of the KL divergence from the model before training, in GRPO.", _AT_LEAST_0)

    def __post_init__(self) -> None:
        for item in fields(self):
            if expected := _unmet(item, getattr(self, item.name)):
                raise UsageError(f"OSPOLossConfig: {item.name} is {getattr(self, item.name)!r}, expected {expected}")
        if self.reference and self.cond_weight > 0:
            raise UsageError(
                f"OSPOLossConfig: cond_weight is {self.cond_weight!r} with reference=True, expected 0: the preference "
                "between prompts has no reference"
            )

    @classmethod
    def preset(cls, name: str) -> "OSPOLossConfig":
        """Return the coefficients of version "v1", "v2" or "v3", or of "full": v3 with v2's conditional term.

        "official" has those of "v3". "dpo", "sft", "suder" and "grpo" are other methods, see docs/methods.md.
        """
        if not isinstance(name, str) or name not in _PRESETS:
            raise UsageError(f"OSPOLossConfig: preset {name!r} is unknown, expected one of {', '.join(_PRESETS)}")
        return cls(**_PRESETS[name])


_PRESETS: dict[str, dict[str, Any]] = {
    "v1": {"mask_alpha": 0.0},
    "v2": {
        "beta": 3.0,
        "beta_cond": 5.0,
        "gamma_beta_ratio_cond": 0.5,
        "simpo_weight": 0.8,
        "cond_weight": 0.5,
        "sft_weight": 1.5,
        "mask_alpha": 0.0,
    },
    "v3": {},
    "full": {"beta_cond": 5.0, "gamma_beta_ratio_cond": 0.5, "cond_weight": 0.5},
    "official": {},  # as v3; what else it sets is in config.py
    "dpo": {
        "beta": 0.1,
        "gamma_beta_ratio": 0.0,
        "sft_weight": 0.0,
        "mask_alpha": 0.0,
        "normalize": "sum",
        "reference": True,
    },
    "sft": {"simpo_weight": 0.0, "sft_weight": 1.0, "mask_alpha": 0.0},
    "suder": {"mask_alpha": 0.0},
    "grpo": {"simpo_weight": 0.0, "sft_weight": 0.0, "mask_alpha": 0.0, "group_size": 8, "kl_weight": 0.01},
}

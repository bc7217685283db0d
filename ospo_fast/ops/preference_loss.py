"""Preference terms of the loss: SimPO between two images, and between two prompts of one image."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from ospo_fast.errors import OpError
from ospo_fast.ops._dispatch import check_float, describe, result_dtype
from ospo_fast.ops._transfer import widen


@dataclass(frozen=True, eq=False)
class PreferenceLoss:
    """Result of `preference_loss`, (B,) each. The last four are detached."""

    simpo: Tensor
    conditional: Tensor | None
    chosen_rewards: Tensor  # β·chosen
    rejected_rewards: Tensor  # β·rejected
    accuracy: Tensor  # 1 where chosen > rejected, else 0
    margin: Tensor  # chosen_rewards − rejected_rewards


def preference_loss(
    chosen: Tensor,
    rejected: Tensor,
    swapped: Tensor | None = None,
    *,
    beta: float,
    gamma_beta_ratio: float,
    beta_cond: float | None = None,
    gamma_beta_ratio_cond: float | None = None,
    label_smoothing: float = 0.0,
) -> PreferenceLoss:
    """Compute simpo = f(β·(chosen − rejected − ρ)) and conditional = f(β_c·(chosen − swapped − ρ_c)).

    With f(x) = −(1−ε)·log σ(x) − ε·log σ(−x).

    Args:
        chosen: (B,) float, sequence log-probabilities of the chosen images.
        rejected: (B,) float, of the rejected images.
        swapped: (B,) float or None, of the chosen images under the rejected prompts.
        beta: β.
        gamma_beta_ratio: ρ.
        beta_cond: β_c; None = β.
        gamma_beta_ratio_cond: ρ_c; None = ρ.
        label_smoothing: ε, 0 to 0.5.

    Returns:
        Terms in fp32 (float64 for float64 inputs); `conditional` is None without `swapped`.

    Raises:
        OpError: shapes that differ, a beta that is not positive, label_smoothing out of range.

    """
    for name, other in (("chosen", chosen), ("rejected", rejected), ("swapped", swapped)):
        if other is not None and (other.dim() != 1 or other.shape != chosen.shape or not other.is_floating_point()):
            expected = f"float (B,) as chosen, {tuple(chosen.shape)}"
            raise OpError(f"preference_loss: {name} is {describe(other)}, expected {expected}")
    op = "preference_loss"
    beta, gamma_beta_ratio = check_float(op, "beta", beta), check_float(op, "gamma_beta_ratio", gamma_beta_ratio)
    beta_cond = beta if beta_cond is None else check_float(op, "beta_cond", beta_cond)
    ratio_cond = gamma_beta_ratio
    if gamma_beta_ratio_cond is not None:
        ratio_cond = check_float(op, "gamma_beta_ratio_cond", gamma_beta_ratio_cond)
    label_smoothing = check_float(op, "label_smoothing", label_smoothing)
    for name, value in (("beta", beta), ("beta_cond", beta_cond)):
        if not value > 0:
            raise OpError(f"preference_loss: {name} is {value}, expected a positive number")
    if not 0 <= label_smoothing <= 0.5:
        raise OpError(f"preference_loss: label_smoothing is {label_smoothing}, expected 0 to 0.5")

    # float64 costs nothing for B numbers, and the loss of a confident pair, exp(−x), amplifies each rounding of x.
    device, dtype = chosen.device, result_dtype(chosen)
    chosen, rejected = widen(chosen), widen(rejected)
    simpo = _smoothed(beta * (chosen - rejected - gamma_beta_ratio), label_smoothing)
    conditional = None
    if swapped is not None:
        conditional = _smoothed(beta_cond * (chosen - widen(swapped) - ratio_cond), label_smoothing).to(device, dtype)
    chosen_rewards, rejected_rewards = beta * chosen.detach(), beta * rejected.detach()
    return PreferenceLoss(
        simpo=simpo.to(device, dtype),
        conditional=conditional,
        chosen_rewards=chosen_rewards.to(device, dtype),
        rejected_rewards=rejected_rewards.to(device, dtype),
        accuracy=(chosen_rewards > rejected_rewards).to(device, dtype),
        margin=(chosen_rewards - rejected_rewards).to(device, dtype),
    )


def _smoothed(x: Tensor, epsilon: float) -> Tensor:
    loss = -(1 - epsilon) * F.logsigmoid(x)
    return loss - epsilon * F.logsigmoid(-x) if epsilon else loss  # 0 · log σ(−∞) would be NaN

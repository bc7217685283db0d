"""The preference terms of the loss: SimPO between two images, and between two prompts of one image."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ospo_fast.errors import OpError


@dataclass(frozen=True, eq=False)
class PreferenceLoss:
    """Per pair, (B,) each; the last four are detached and never carry a gradient."""

    simpo: Tensor
    conditional: Tensor | None
    chosen_rewards: Tensor  # β·s(chosen)
    rejected_rewards: Tensor  # β·s(rejected)
    accuracy: Tensor  # 1 where chosen > rejected, else 0
    margin: Tensor  # chosen_rewards − rejected_rewards


def preference_loss(
    chosen: Tensor,  # (B,)
    rejected: Tensor,  # (B,)
    swapped: Tensor | None = None,  # (B,)
    *,
    beta: float,
    gamma_beta_ratio: float,
    beta_cond: float | None = None,
    gamma_beta_ratio_cond: float | None = None,
    label_smoothing: float = 0.0,
) -> PreferenceLoss:
    """The terms simpo = −log σ(β·(chosen − rejected − ρ)) and conditional = −log σ(β_c·(chosen − swapped − ρ_c)).

    chosen, rejected, swapped (B,) float: sequence log-probabilities of the chosen image, the rejected image, and the
    chosen image under the rejected prompt. ρ is gamma_beta_ratio; β_c, ρ_c = beta_cond, gamma_beta_ratio_cond, by
    default β, ρ. label_smoothing ε in [0, 0.5] mixes in −log σ of the negated argument: (1−ε)·f(x) + ε·f(−x).
    Results fp32 (float64 for float64 inputs); conditional is None without `swapped`.
    Raises OpError: shapes that differ, beta not positive, label_smoothing out of range.
    """
    for name, other in (("chosen", chosen), ("rejected", rejected), ("swapped", swapped)):
        if other is not None and (other.dim() != 1 or other.shape != chosen.shape or not other.is_floating_point()):
            raise OpError(
                f"preference_loss: {name} is {other.dtype} {tuple(other.shape)}, "
                f"expected float (B,), as chosen {tuple(chosen.shape)}"
            )
    beta_cond = beta if beta_cond is None else beta_cond
    ratio_cond = gamma_beta_ratio if gamma_beta_ratio_cond is None else gamma_beta_ratio_cond
    for name, value in (("beta", beta), ("beta_cond", beta_cond)):
        if not value > 0:
            raise OpError(f"preference_loss: {name} is {value}, expected a positive number")
    if not 0 <= label_smoothing <= 0.5:
        raise OpError(f"preference_loss: label_smoothing is {label_smoothing}, expected 0 to 0.5")

    # B numbers cost nothing in float64, and a confident pair's loss, exp(−x), shows every rounding of x.
    result = torch.float64 if chosen.dtype == torch.float64 else torch.float32
    chosen, rejected = chosen.double(), rejected.double()
    simpo = _smoothed(beta * (chosen - rejected - gamma_beta_ratio), label_smoothing)
    conditional = None
    if swapped is not None:
        conditional = _smoothed(beta_cond * (chosen - swapped.double() - ratio_cond), label_smoothing).to(result)
    rewards = beta * chosen.detach(), beta * rejected.detach()
    return PreferenceLoss(
        simpo=simpo.to(result),
        conditional=conditional,
        chosen_rewards=rewards[0].to(result),
        rejected_rewards=rewards[1].to(result),
        accuracy=(rewards[0] > rewards[1]).to(result),
        margin=(rewards[0] - rewards[1]).to(result),
    )


def _smoothed(x: Tensor, epsilon: float) -> Tensor:
    return -(1 - epsilon) * F.logsigmoid(x) - epsilon * F.logsigmoid(-x)

import math
from typing import Any

import numpy as np
import pytest
import torch

from ospo_fast import preference_loss
from ospo_fast.errors import OpError


def test_golden(golden: Any) -> None:
    cases = golden("preference_loss.json")
    assert len(cases) == 64
    for case in cases:
        groups = [torch.tensor(case[name], requires_grad=True) for name in ("chosen", "rejected", "swap")]
        names = ("beta", "gamma_beta_ratio", "beta_cond", "gamma_beta_ratio_cond", "label_smoothing")
        terms = preference_loss(*groups, **{name: case[name] for name in names})
        (0.8 * terms.simpo + 0.5 * terms.conditional).mean().backward()
        np.testing.assert_allclose(terms.simpo.detach(), case["simpo"], rtol=2e-6)
        np.testing.assert_allclose(terms.conditional.detach(), case["copo"], rtol=2e-6)
        for group, name in zip(groups, ("chosen", "rejected", "swap"), strict=True):
            np.testing.assert_allclose(group.grad, case[f"grad_{name}"], rtol=2e-6)


def test_metrics() -> None:
    chosen, rejected = torch.tensor([-1.0, -3.0], requires_grad=True), torch.tensor([-2.0, -2.0])
    terms = preference_loss(chosen, rejected, beta=5, gamma_beta_ratio=0.5)
    assert terms.conditional is None
    assert terms.chosen_rewards.tolist() == [-5, -15]
    assert terms.rejected_rewards.tolist() == [-10, -10]
    assert terms.margin.tolist() == [5, -5]
    assert terms.accuracy.tolist() == [1, 0]
    assert not any(
        t.requires_grad for t in (terms.chosen_rewards, terms.rejected_rewards, terms.accuracy, terms.margin)
    )
    assert terms.simpo[0].item() == pytest.approx(math.log1p(math.exp(-2.5)))


def test_conditional_coefficients_default_to_the_others() -> None:
    x, y = torch.randn(3), torch.randn(3)
    terms = preference_loss(x, y, y, beta=2, gamma_beta_ratio=0.3, label_smoothing=0.1)
    assert torch.equal(terms.simpo, terms.conditional)
    smoothed = [
        -0.9 * math.log(1 / (1 + math.exp(-z))) - 0.1 * math.log(1 / (1 + math.exp(z)))
        for z in (2 * (x - y - 0.3)).tolist()
    ]
    assert terms.simpo.tolist() == pytest.approx(smoothed, rel=1e-5)


def test_extremes_stay_finite_and_gradcheck() -> None:
    chosen = torch.tensor([0.0, -1e4], requires_grad=True)
    terms = preference_loss(chosen, -1e4 - chosen.detach(), beta=5, gamma_beta_ratio=0.5)
    terms.simpo.sum().backward()
    assert terms.simpo.isfinite().all()
    assert chosen.grad.isfinite().all()
    groups = [torch.randn(3, dtype=torch.float64, requires_grad=True) for _ in range(3)]

    def loss(*groups: torch.Tensor) -> tuple[torch.Tensor, ...]:
        terms = preference_loss(*groups, beta=2, gamma_beta_ratio=0.5, beta_cond=3, label_smoothing=0.2)
        return terms.simpo, terms.conditional

    assert torch.autograd.gradcheck(loss, groups)
    assert loss(*groups)[0].dtype == torch.float64
    assert preference_loss(torch.zeros(0), torch.zeros(0), beta=1, gamma_beta_ratio=0).simpo.shape == (0,)
    assert preference_loss(*torch.zeros(2, 3).half(), beta=1, gamma_beta_ratio=0).simpo.dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rejected": torch.zeros(3)}, r"rejected is torch.float32 \(3,\), expected float \(B,\) as chosen, \(2,\)"),
        ({"swapped": torch.zeros(1)}, r"swapped is torch.float32 \(1,\)"),
        ({"chosen": torch.zeros(2, 1)}, r"chosen is torch.float32 \(2, 1\)"),
        ({"rejected": torch.zeros(2).int()}, "rejected is torch.int32"),
        ({"beta": 0}, "beta is 0.0, expected a positive number"),
        ({"beta": math.nan}, "beta is nan"),
        ({"beta_cond": -1.0}, "beta_cond is -1.0"),
        ({"label_smoothing": 0.6}, "label_smoothing is 0.6, expected 0 to 0.5"),
    ],
)
def test_wrong_arguments(change: dict[str, Any], message: str) -> None:
    arguments = {"chosen": torch.zeros(2), "rejected": torch.zeros(2), "beta": 1.0, "gamma_beta_ratio": 0.5} | change
    with pytest.raises(OpError, match=message):
        preference_loss(**arguments)

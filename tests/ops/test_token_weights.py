from typing import Any

import numpy as np
import pytest
import torch

from ospo_fast import token_weights
from ospo_fast.errors import OpError
from ospo_fast.ops.token_weights import spread_weights


def test_golden(golden: Any) -> None:
    figures = golden("token_weights.npz")
    for mask, alpha, gamma, weights in zip(*(figures[k] for k in ("masks", "alpha", "gamma", "weights")), strict=True):
        result = token_weights(torch.tensor(mask)[None], alpha=float(alpha), gamma=float(gamma))
        assert result.dtype == torch.float32
        np.testing.assert_allclose(result[0], weights, rtol=2e-6)


def test_formula_cell_by_cell() -> None:
    mask = torch.rand(2, 5, 7, dtype=torch.float64)
    kernel = np.exp(-0.5 * (np.arange(3) - 1.0) ** 2 / 0.7**2)
    kernel /= kernel.sum()
    expected = np.empty((2, 5, 7))
    for b in range(2):
        padded = np.pad(mask[b].numpy(), 1)
        blurred = np.array([[kernel @ padded[y : y + 3, x : x + 3] @ kernel for x in range(7)] for y in range(5)])
        expected[b] = 1 + 0.5 * ((blurred - blurred.min()) / (blurred.max() - blurred.min() + 1e-8)) ** 2
    result = token_weights(mask, alpha=0.5, gamma=2, blur_size=3, blur_sigma=0.7)
    assert result.dtype == torch.float64
    np.testing.assert_allclose(result, expected.reshape(2, 35), rtol=1e-12)


def test_empty_full_and_unblurred_masks() -> None:
    empty, full = torch.zeros(1, 6, 6), torch.ones(1, 6, 6)
    assert torch.equal(token_weights(empty), torch.ones(1, 36))
    assert token_weights(full)[0, 0] == 1  # the corner is dimmed most
    assert token_weights(full).max() == 2
    assert token_weights(full, gamma=0.5)[0, [0, 5, 30, 35]].tolist() == [1] * 4  # equal cells stay equal
    mask = torch.rand(3, 6, 6) < 0.3
    assert torch.equal(token_weights(mask, blur_size=1), 1 + mask.flatten(1).float())
    assert torch.equal(token_weights(mask, alpha=0), torch.ones(3, 36))
    for dtype in (torch.uint8, torch.float32, torch.bfloat16):
        assert torch.equal(token_weights(mask.to(dtype)), token_weights(mask))
    assert torch.equal(token_weights(mask.transpose(1, 2)), token_weights(mask.transpose(1, 2).contiguous()))
    assert token_weights(torch.zeros(0, 6, 6)).shape == (0, 36)


def test_spread_weights() -> None:
    weights = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    mask = torch.tensor([[0, 1, 0, 1], [1, 1, 0, 0], [0, 0, 0, 0]]).bool()
    assert spread_weights(weights, mask).tolist() == [[0, 1, 0, 2], [3, 4, 0, 0], [0, 0, 0, 0]]
    mask[1, 2] = True
    with pytest.raises(
        OpError, match=r"row 1 has 3 image tokens, the object masks 2 cells.*make the masks on the model"
    ):
        spread_weights(weights, mask)
    torch.library.opcheck(torch.ops.ospo_fast.spread_weights, (weights, torch.ones(3, 2).bool()))


@pytest.mark.parametrize(
    ("mask", "options", "message"),
    [
        (torch.zeros(6, 6), {}, r"mask has shape \(6, 6\), expected \(B, H, W\)"),
        (torch.zeros(1, 0, 6), {}, r"mask has shape \(1, 0, 6\)"),
        (torch.zeros(1, 6, 6), {"blur_size": 4}, "blur_size is 4"),
        (torch.zeros(1, 6, 6), {"blur_sigma": 0}, "expected an odd size and a positive sigma"),
        (torch.zeros(1, 6, 6), {"alpha": -1}, "alpha is -1"),
        (torch.zeros(1, 6, 6), {"gamma": float("nan")}, "gamma nan; expected numbers >= 0"),
    ],
)
def test_wrong_arguments(mask: torch.Tensor, options: dict[str, Any], message: str) -> None:
    with pytest.raises(OpError, match=message):
        token_weights(mask, **options)

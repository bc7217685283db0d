"""csrc/token_weights.cu on the host."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from ospo_fast import token_weights


@pytest.mark.parametrize(
    ("shape", "alpha", "gamma", "blur_size"),
    [((2, 24, 24), 1.0, 0.5, 5), ((1, 13, 7), 0.5, 1.0, 31), ((1, 5, 6), 2.0, 2.0, 1), ((1, 1, 1), 1.0, 1.0, 3)],
)
def test_weights_equal_those_of_the_cpu_kernel(
    on_host: Callable[..., Any], shape: tuple[int, int, int], alpha: float, gamma: float, blur_size: int
) -> None:
    kernel = on_host("token_weights_cuda", "token_weights.cu", "token_weights.cpp")
    masks = (torch.rand(shape) < 0.4).float()
    expected = token_weights(masks, alpha=alpha, gamma=gamma, blur_size=blur_size, blur_sigma=1.1)
    for reverse in (False, True):
        weights = torch.full_like(expected, torch.nan)
        kernel(masks, weights, *shape, alpha, gamma, blur_size, 1.1, reverse=reverse)
        torch.testing.assert_close(weights, expected, rtol=1e-7, atol=0)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 3e38])
def test_one_extreme_cell(on_host: Callable[..., Any], value: float) -> None:
    kernel = on_host("token_weights_cuda", "token_weights.cu", "token_weights.cpp")
    masks = torch.rand(1, 5, 6)
    masks[0, 2, 3] = value
    for blur_size in (1, 5):
        weights = torch.zeros(1, 30)
        kernel(masks, weights, 1, 5, 6, 1.0, 0.5, blur_size, 1.0)
        expected = token_weights(masks, gamma=0.5, blur_size=blur_size)
        torch.testing.assert_close(weights, expected, rtol=1e-6, atol=0, equal_nan=True)

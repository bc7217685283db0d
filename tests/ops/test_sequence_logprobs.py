from typing import Any

import pytest
import torch

from ospo_fast import sequence_logprobs
from ospo_fast.errors import OpError


@pytest.mark.parametrize("normalize", ["weights", "length", "sum"])
@pytest.mark.parametrize("weighted", [False, True])
def test_formula(weighted: bool, normalize: Any) -> None:
    batch, tokens = 5, 9
    density = torch.tensor([[0.0], [0.2], [0.5], [0.5], [1.0]])
    logps, mask = -torch.rand(batch, tokens) * 9, torch.rand(batch, tokens) < density
    weights = torch.rand(batch, tokens) * 2 if weighted else None
    result = sequence_logprobs(logps, mask, weights, normalize=normalize)
    assert result.dtype == torch.float32
    for row in range(batch):
        w = [1.0 if weights is None else float(weights[row, t]) for t in range(tokens) if mask[row, t]]
        total = sum(a * float(logps[row, t]) for a, t in zip(w, mask[row].nonzero().flatten(), strict=True))
        norm = {"weights": max(sum(w), 1), "length": max(len(w), 1), "sum": 1}[normalize]
        assert float(result[row]) == pytest.approx(total / norm, rel=1e-5, abs=1e-6)


def test_values_outside_the_mask_reach_no_result() -> None:
    logps = torch.tensor([[-1.0, torch.nan, -3.0], [torch.nan] * 3], requires_grad=True)
    weights = torch.tensor([[1.0, torch.nan, 3.0], [torch.nan] * 3])
    mask = torch.tensor([[True, False, True], [False] * 3])
    result = sequence_logprobs(logps, mask, weights)
    assert result.tolist() == [-2.5, 0]
    result.sum().backward()
    assert logps.grad.tolist() == [[0.25, 0, 0.75], [0, 0, 0]]


def test_dtypes_and_gradcheck() -> None:
    mask = torch.rand(2, 5) < 0.7
    assert sequence_logprobs(torch.randn(2, 5).bfloat16(), mask).dtype == torch.float32
    logps = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(2, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a, w: sequence_logprobs(a, mask, w), (logps, weights + 1))
    assert sequence_logprobs(logps, mask).dtype == torch.float64


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logps": torch.zeros(3)}, r"logps is torch.float32 \(3,\), expected float \(B, T\)"),
        ({"token_mask": torch.ones(2, 3).bool()}, r"token_mask is torch.bool \(2, 3\), expected bool \(2, 4\)"),
        ({"token_mask": torch.ones(2, 4)}, "token_mask is torch.float32"),
        ({"weights": torch.ones(4)}, r"weights are torch.float32 \(4,\), expected shape \(2, 4\)"),
        ({"normalize": "mean"}, "normalize is 'mean', expected 'weights', 'length' or 'sum'"),
    ],
)
def test_wrong_arguments(change: dict[str, Any], message: str) -> None:
    with pytest.raises(OpError, match=message):
        sequence_logprobs(**{"logps": torch.zeros(2, 4), "token_mask": torch.ones(2, 4).bool()} | change)

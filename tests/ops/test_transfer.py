"""Devices without float64: the ops that compute in it do so on the CPU, with the same results and gradients."""

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ospo_fast import ops
from ospo_fast.ops import _transfer
from ospo_fast.ops.object_masks import soft_masks, spatial_entropy
from ospo_fast.ops.sample_codes import sample_codes_reference
from ospo_fast.ops.token_weights import token_weights_reference

MASK, LOGITS, LOGPS, PAIR = (
    torch.rand(*shape, generator=torch.Generator().manual_seed(0)) for shape in ((2, 4, 4), (3, 50), (2, 5), (2, 3))
)
WIDENED: dict[str, Callable[[], Tensor]] = {
    "sequence_logprobs": lambda: ops.sequence_logprobs(LOGPS, LOGPS > 0.2, weights=LOGPS.exp()),
    "preference_loss": lambda: ops.preference_loss(*PAIR, beta=2.0, gamma_beta_ratio=0.5).simpo,
    "soft_masks": lambda: soft_masks(ops.object_masks(MASK[None])),
    "spatial_entropy": lambda: spatial_entropy(MASK),
}
REFERENCES: dict[str, Callable[[], Tensor]] = {
    "sample_codes": lambda: sample_codes_reference(
        LOGITS, LOGITS**2, guidance_scale=2.0, top_p=0.9, seeds=torch.arange(3), steps=torch.arange(3)
    )[0],
    "token_weights": lambda: token_weights_reference(MASK),
}


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """What is copied to the CPU."""
    found: list[Tensor] = []
    cpu = Tensor.cpu
    monkeypatch.setattr(Tensor, "cpu", lambda self: found.append(self) or cpu(self))
    return found


def test_mps_is_such_a_device() -> None:
    assert _transfer.WITHOUT_FLOAT64 == ("mps",)


@pytest.mark.parametrize("name", WIDENED)
def test_numbers_are_widened_on_the_cpu(name: str, copies: list[Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    expected = WIDENED[name]()
    assert not copies
    monkeypatch.setattr(_transfer, "WITHOUT_FLOAT64", ("cpu",))
    assert torch.equal(WIDENED[name](), expected)
    assert copies


@pytest.mark.parametrize("name", REFERENCES)
def test_references_run_on_the_cpu(name: str, copies: list[Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    expected = REFERENCES[name]()
    assert not copies
    answers = iter([True, False])  # of the call, and of the one with the copies

    class Types:
        def __contains__(self, kind: str) -> bool:
            return next(answers)

    module: Any = importlib.import_module(f"ospo_fast.ops.{name}")
    monkeypatch.setattr(module, "WITHOUT_FLOAT64", Types())
    assert torch.equal(REFERENCES[name](), expected)
    assert len(copies) == {"sample_codes": 4, "token_weights": 1}[name]


def test_gradients_pass_through_the_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_transfer, "WITHOUT_FLOAT64", ("cpu",))
    x = PAIR.clone().requires_grad_()
    ops.preference_loss(*x, beta=2.0, gamma_beta_ratio=0.5).simpo.sum().backward()
    assert x.grad is not None
    assert bool((x.grad != 0).all())

"""A small Janus model with random weights, strong enough that greedy codes vary."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
import torch

if TYPE_CHECKING:  # fixtures import it: without transformers only the modules that need it are skipped
    from ospo_fast.models.janus import JanusUnifiedModel


@pytest.fixture(scope="session")
def parts() -> tuple[Any, Any]:
    from ospo_fast.shapes.build import build_model, build_processor

    module = build_model(hidden=64, layers=2, intermediate=96, heads=4)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() > 1:
                parameter.mul_(6)
    return module, build_processor()


@pytest.fixture
def tiny(parts: tuple[Any, Any]) -> JanusUnifiedModel:
    from ospo_fast.models.janus import JanusUnifiedModel

    module, processor = parts
    return JanusUnifiedModel(copy.deepcopy(module), processor, name="tiny")


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """For where there is no GPU: graphs that run the step when they are replayed. What was done, in its order."""
    from ospo_fast.generation import graph

    calls: list[str] = []

    class Graph:
        def __init__(self, step: Callable[[], None], device: torch.device) -> None:
            calls.append(f"capture on {device}")
            self._step = step

        def replay(self) -> None:
            calls.append("replay")
            self._step()

    monkeypatch.setattr(graph, "captured", Graph)
    return calls

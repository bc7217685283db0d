"""A small Janus model with random weights, behind its adapter."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:  # the fixtures import it, so that without transformers only the tests that need it are skipped
    from ospo_fast.models.janus import JanusUnifiedModel


@pytest.fixture(scope="session")
def parts() -> tuple[Any, Any]:
    from ospo_fast.shapes.model import build_model, build_processor

    return build_model(hidden=64, layers=3, intermediate=96, heads=4), build_processor()


@pytest.fixture
def tiny(parts: tuple[Any, Any]) -> JanusUnifiedModel:
    from ospo_fast.models.janus import JanusUnifiedModel

    module, processor = parts
    return JanusUnifiedModel(copy.deepcopy(module), processor, name="tiny")

"""A small Janus model with random weights, behind its adapter."""

import copy
from typing import Any

import pytest

from ospo_fast.models.janus import JanusUnifiedModel
from ospo_fast.shapes.build import build_model, build_processor


@pytest.fixture(scope="session")
def parts() -> tuple[Any, Any]:
    return build_model(hidden=64, layers=3, intermediate=96, heads=4), build_processor()


@pytest.fixture
def tiny(parts: tuple[Any, Any]) -> JanusUnifiedModel:
    module, processor = parts
    return JanusUnifiedModel(copy.deepcopy(module), processor, name="tiny")

"""A small Janus model with random weights, behind its adapter."""

import pytest

from ospo_fast.models.janus import JanusUnifiedModel
from ospo_fast.shapes.build import build_model, build_processor

SIZES = {"hidden": 64, "layers": 3, "intermediate": 96, "heads": 4}


@pytest.fixture
def tiny() -> JanusUnifiedModel:
    return JanusUnifiedModel(build_model(**SIZES), build_processor(), name="tiny")

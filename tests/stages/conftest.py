"""A run folder that holds everything up to the masks, made once by the scripted model."""

import shutil

import pytest

from ospo_fast.config import load_config
from ospo_fast.pipeline import Pipeline
from ospo_fast.stages import STAGE_NAMES

COUNTS = "prompts.counts={color1: 3, shape1: 1, color2: 4, 2D_spatial: 4, numeracy1: 1, numeracy2: 3}"


@pytest.fixture(scope="session")
def made(omegaconf, scripted, tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        scripted.install(patch.setattr)
        settings = [COUNTS, "images.draws=1", "select.pairs=1", "masks.layers=[0]"]
        config = load_config([*settings, f"model={tiny}", f"out={folder}"], family="shapes")
        pipeline = Pipeline(config, progress=False)
        for name in STAGE_NAMES[:-1]:
            pipeline.stage(name)
    return folder


@pytest.fixture
def run_folder(made, tmp_path):
    """A copy of that folder, to train in."""
    return shutil.copytree(made, tmp_path / "run")

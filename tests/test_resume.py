"""A stage of the embedded model that is stopped, and continued with other batches, makes the same bytes."""

import json
import shutil

import pytest

from ospo_fast.config import load_config
from ospo_fast.pipeline import Pipeline, store_path
from ospo_fast.records import Store
from ospo_fast.stages import STAGE_NAMES, image_files

pytestmark = pytest.mark.usefixtures("omegaconf")

PROMPTS = [
    "a red circle",
    "two blue squares",
    "a green triangle on a white background",
    "a small red circle left of a large blue square",
    "a yellow triangle and a blue circle",
    "three red triangles",
]
WRITERS = STAGE_NAMES[:-1]


def stage(name, out, *overrides):
    settings = ["model=shapes", f"out={out}", f"prompts.file={out.parent / 'prompts.txt'}", "images.draws=1"]
    # Every item has a pair, and the rule v2 compares the images of each.
    settings += ["select.threshold=-1", "select.margin=-1", "masks.layers=[0,1,2,3,4]", "masks.soft=true", *overrides]
    return Pipeline(load_config(settings, family="shapes"), progress=False).stage(name)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resume")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    for name in WRITERS:
        stage(name, folder / "whole")
    return folder / "whole"


def contents(out, name):
    folders = [folder for folder in (out / name,) if folder.is_dir()]
    files = [store_path(out, name), *(path for folder in folders for path in folder.rglob("*") if path.is_file())]
    return {str(path.relative_to(out)): path.read_bytes() for path in files}


def before(whole, name, folder):
    """A copy of the run folder without what a stage and those after it have made."""
    shutil.copytree(whole, folder / "run")
    shutil.copy(whole.parent / "prompts.txt", folder)
    for later in WRITERS[WRITERS.index(name) :]:
        store_path(folder / "run", later).unlink()
        shutil.rmtree(folder / "run" / later, ignore_errors=True)
    saved = folder / "run" / "settings.json"
    settings = json.loads(saved.read_text())
    saved.write_text(json.dumps({key: settings[key] for key in WRITERS[: WRITERS.index(name)]}))
    return folder / "run"


def stop_after(count, patch, owner, name):
    """Interrupt before call `count` + 1 of a function."""
    left, function = [None] * count, getattr(owner, name)

    def stopping(*arguments):
        if not left:
            raise KeyboardInterrupt
        left.pop()
        return function(*arguments)

    patch.setattr(owner, name, stopping)


@pytest.mark.parametrize("count", [1, 4, 15])
def test_images_of_a_stopped_stage(whole, tmp_path, monkeypatch, count):
    out = before(whole, "images", tmp_path)
    with monkeypatch.context() as patch:
        stop_after(count, patch, image_files, "save_image")
        with pytest.raises(KeyboardInterrupt):
            stage("images", out, "images.batch_size=5")
    assert len(list((out / "images").rglob("*.png"))) == count
    stage("images", out)
    assert contents(out, "images") == contents(whole, "images")


V2 = ["select.rule=v2", "select.rejected=negative"]


@pytest.mark.parametrize(
    ("name", "settings", "count"), [("score", [], 2), ("select", [], 1), ("select", V2, 3), ("masks", [], 1)]
)
def test_records_of_a_stopped_stage(whole, tmp_path, monkeypatch, name, settings, count):
    out, expected = (before(whole, name, tmp_path / folder) for folder in ("stopped", "whole"))
    stage(name, expected, *settings)
    with monkeypatch.context() as patch:
        stop_after(count, patch, Store, "append")
        with pytest.raises(KeyboardInterrupt):
            stage(name, out, *settings, f"{name}.batch_size=2")
    stage(name, out, *settings, f"{name}.batch_size=3")
    assert contents(out, name) == contents(expected, name)
    assert len(store_path(out, name).read_bytes().splitlines()) == len(PROMPTS)

"""Files that the user deletes in a run folder: made again to the same bytes, or an error with the remedy."""

import json
import shutil

import pytest

from ospo_fast.cli import main
from ospo_fast.config import load_config
from ospo_fast.errors import OspoError, UsageError
from ospo_fast.pipeline import Pipeline
from ospo_fast.stages import STAGE_NAMES

pytestmark = pytest.mark.usefixtures("omegaconf", "script")

SMALL = [
    "prompts.counts={color1: 2, shape1: 1, color2: 3, 2D_spatial: 3, numeracy1: 1, numeracy2: 1}",
    "images.draws=1",
    "select.pairs=1",
    "masks.layers=[0]",
]
SMALL += ["select.threshold=-1", "select.margin=-1"]
SMALL += ["train.steps=3", "train.batch_size=2", "train.save_every=1", "train.eval_every=0"]


def pipeline(tiny, out, *overrides):
    return Pipeline(load_config([*SMALL, f"model={tiny}", f"out={out}", *overrides], family="shapes"), progress=False)


@pytest.fixture(scope="module")
def whole(omegaconf, scripted, tiny, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        scripted.install(patch.setattr)
        pipeline(tiny, out).run()
    return out


@pytest.fixture
def out(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "run")


def contents(out):
    """The files of a run without those that hold times and the state of the folder."""
    files = (path for path in out.rglob("*") if path.is_file() and path.suffix in (".jsonl", ".png", ".npz", ".json"))
    files = [*files, *out.rglob("*.safetensors")]
    own = ("stages.json", "settings.json", "log.jsonl")
    return {str(path.relative_to(out)): path.read_bytes() for path in files if path.name not in own}


def delete(out, pattern):
    """Delete a folder, or the first file of a pattern; return its path."""
    path = min(out.glob(pattern))
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    return path


@pytest.mark.parametrize("pattern", ["images", "images/*/base_0.png", "images/*/negative_0.npz", "masks/*.safetensors"])
def test_deleted_files_of_records_are_made_again(whole, tiny, out, caplog, pattern):
    lost = delete(out, pattern)
    pipeline(tiny, out).run()
    assert contents(out) == contents(whole)
    assert str(lost) in caplog.text
    assert "missing; making the missing files again" in caplog.text


@pytest.mark.parametrize("suffix", [".png", ".npz"])
def test_an_image_that_differs_from_what_is_left_of_it_is_refused(whole, tiny, out, suffix):
    """As after a change of the device: here, the surviving half is that of another image."""
    first, second = sorted(out.glob("images/*/base_0.npz"))[:2]
    (first if suffix == ".npz" else first.with_suffix(".png")).unlink()
    left = first.with_suffix(".png" if suffix == ".npz" else ".npz")
    left.write_bytes(second.with_suffix(left.suffix).read_bytes())
    before = contents(out)
    with pytest.raises(OspoError, match=f"base_0.png was generated again, but it differs from what {left.name} has"):
        pipeline(tiny, out).stage("images")
    assert contents(out) == before


@pytest.mark.parametrize(
    "pattern", ["train/adapter", "train/model", "train/model/config.json", "train/model/*token*", "train/adapter/*.md"]
)
def test_deleted_weights_are_saved_again(whole, tiny, out, caplog, pattern):
    lost = delete(out, pattern)
    assert pipeline(tiny, out).stage("train").total == 3
    assert contents(out) == contents(whole)
    assert str(lost) in caplog.text
    assert "saving the weights of the last checkpoint again" in caplog.text
    assert pipeline(tiny, out).stage("train").items == 0


def test_deleted_weights_without_a_checkpoint_are_an_error(tiny, out):
    delete(out, "train/model/model.safetensors")
    delete(out, "train/checkpoints")
    with pytest.raises(OspoError, match=r"model\.safetensors is missing.*run `ospo-fast train --out .* --no-resume`"):
        pipeline(tiny, out).stage("train")


def test_training_without_its_checkpoints_starts_over(whole, tiny, out, caplog):
    delete(out, "train/checkpoints")
    delete(out, "train/done.json")
    assert pipeline(tiny, out).stage("train").items == 3
    assert "training starts from step 0 again" in caplog.text
    assert contents(out) == contents(whole)


@pytest.mark.parametrize("stage", ["images", "train"])
def test_results_without_their_settings_are_refused(tiny, out, stage):
    """They may have been made with others; here, the command names another one."""
    (out / "settings.json").unlink()
    before = contents(out)
    with pytest.raises(UsageError, match=rf"settings\.json does not have the settings that the results of {stage}"):
        pipeline(tiny, out, "images.guidance_scale=4", "train.learning_rate=0.5").stage(stage)
    assert contents(out) == before
    assert not (out / "settings.json").exists()


def without(out, stage):
    """Remove the results of a stage and those after it, and their settings."""
    saved, gone = out / "settings.json", STAGE_NAMES[STAGE_NAMES.index(stage) :]
    saved.write_text(
        json.dumps({key: value for key, value in json.loads(saved.read_text()).items() if key not in gone})
    )
    for later in gone:
        (out / f"{later}.jsonl").unlink(missing_ok=True)
        shutil.rmtree(out / later, ignore_errors=True)


@pytest.mark.parametrize(
    ("stage", "pattern", "maker"),
    [
        ("score", "images/*/base_0.png", "images"),
        ("masks", "images/*/*.png", "images"),
        ("masks", "images", "images"),
        ("train", "images/*/*.npz", "images"),
        ("train", "masks/*.safetensors", "masks"),
    ],
)
def test_a_stage_refuses_deleted_inputs(whole, tiny, out, stage, pattern, maker):
    without(out, stage)
    for path in [out / "images"] if pattern == "images" else out.glob(pattern):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(UsageError, match=rf"is missing; run `ospo-fast {maker} --out .*` to make the missing files"):
        pipeline(tiny, out).stage(stage)
    pipeline(tiny, out).stage(maker)
    pipeline(tiny, out).stage(stage)
    name = f"{stage}.jsonl" if stage != "train" else "train/model/model.safetensors"
    assert (out / name).read_bytes() == (whole / name).read_bytes()


def test_deleted_codes_are_not_replaced_by_those_of_the_encoder(whole, tiny, out):
    """The rule v2 compares codes, and an encoded image has other ones than those that it was generated from."""
    without(out, "select")
    for path in out.glob("images/*/*.npz"):
        path.unlink()
    with pytest.raises(UsageError, match=r"npz of item .* is missing; run `ospo-fast images"):
        pipeline(tiny, out, "select.rule=v2", "select.rejected=negative").stage("select")


def test_a_selection_of_layers_that_was_deleted_is_not_made_of_fewer_pairs(tiny, out):
    without(out, "masks")
    automatic = ["masks.layers=auto"]
    pipeline(tiny, out, *automatic).stage("masks")
    delete(out, "masks/layers.json")
    pipeline(tiny, out, *automatic).stage("masks")  # has nothing left to do
    delete(out, "masks/*.safetensors")
    with pytest.raises(OspoError, match=r"layers\.json is missing.*run `ospo-fast masks --out .* --no-resume`"):
        pipeline(tiny, out, *automatic).stage("masks")


@pytest.mark.parametrize("command", ["generate", "evaluate"])
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", ""])
def test_a_model_without_its_files_is_an_error(out, tmp_path, capsys, command, name):
    model = out / "train" / "model"
    (model / name).unlink() if name else shutil.rmtree(model)
    arguments = ["a red circle"] if command == "generate" else ["evaluate.per_kind=1", "evaluate.seeds=[0]"]
    assert main([command, *arguments, "--model", str(model), "--out", str(tmp_path / "new")]) in (1, 2)
    error = capsys.readouterr().err
    assert str(model) in error
    assert "Traceback" not in error


def test_the_report_names_deleted_images(out):
    delete(out, "images")
    assert main(["report", "--out", str(out)]) == 0
    assert "base_0.png is missing" in (out / "report" / "index.html").read_text()

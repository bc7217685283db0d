"""Training of all weights by one process: what it changes and leaves, and its checkpoints, which are folders."""

import hashlib
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from ospo_fast.config import load_config
from ospo_fast.errors import OspoError
from ospo_fast.models import load_model
from ospo_fast.pipeline import read_stage
from ospo_fast.report.load import load_run
from ospo_fast.stages import StageContext
from ospo_fast.stages.checkpoints import read_checkpoint, write_checkpoint
from ospo_fast.stages.run_files import missing_trained
from ospo_fast.stages.train import train

pytestmark = pytest.mark.usefixtures("omegaconf")

SMALL = ["train.full=true", "train.steps=4", "train.batch_size=2", "train.accumulation=1", "train.save_every=2"]
SMALL += ["train.learning_rate=1e-3", "train.schedule=constant", "train.warmup_ratio=0", "masks.layers=[0]"]


def start(tiny, out, *overrides, stop=None, dtype=None, **context):
    """Train, and return the model."""
    done = []

    def progress(steps):
        done.append(steps)
        if len(done) == stop:
            raise KeyboardInterrupt

    model = load_model(tiny, dtype=dtype)
    settings = load_config([*SMALL, *overrides])
    train(read_stage(out, "masks"), model, settings, out=out, context=StageContext(progress=progress, **context))
    return model


def trained(out):
    return load_file(out / "train" / "model" / "model.safetensors")


@pytest.fixture
def stopped(tiny, run_folder):
    """A run with a checkpoint of step 2."""
    with pytest.raises(KeyboardInterrupt):
        start(tiny, run_folder, stop=3)
    return run_folder


@pytest.fixture(scope="module")
def whole(tiny, made, tmp_path_factory):
    folder = shutil.copytree(made, tmp_path_factory.mktemp("whole") / "run")
    start(tiny, folder)
    return folder


def test_the_model_in_memory_is_the_saved_one(tiny, run_folder):
    model = start(tiny, run_folder)
    saved = load_model(run_folder / "train" / "model").module.state_dict()
    state = model.module.state_dict()
    assert state.keys() == saved.keys()
    assert all(torch.equal(state[name], saved[name]) for name in saved)
    assert not any(p.requires_grad for p in model.module.parameters())
    assert not model.module.training


def test_weights_of_half_precision_train_in_float32(tiny, run_folder):
    """An update far below the resolution of bfloat16 adds up over the steps, and the model keeps its dtype."""
    rate = ["train.learning_rate=2e-5", "train.steps=40", "train.save_every=100"]
    before = load_model(tiny, dtype="bfloat16").module.state_dict()
    model = start(tiny, run_folder, *rate, dtype="bfloat16")
    assert model.dtype == torch.bfloat16
    state = model.module.state_dict()
    name = "model.language_model.layers.0.mlp.down_proj.weight"
    large = before[name].abs() > 0.02  # half a step of bfloat16 is then three updates: each would round to none
    assert state[name].dtype == torch.bfloat16
    assert (state[name] != before[name])[large].float().mean() > 0.01


def test_evaluations_see_the_weights_of_their_step(tiny, run_folder):
    values, seen = (0.5, 0.6, 0.9, 0.7, 0.8), {}

    def evaluation(model, step):
        seen[step] = {name: p.detach().clone() for name, p in model.module.state_dict().items()}
        assert not model.decoder.training
        return {"alignment": values[step]}

    watched = ["train.eval_every=1", "train.early_stopping=alignment", "train.patience=9"]
    model = start(tiny, run_folder, *watched, evaluation=evaluation)
    state = model.module.state_dict()
    assert all(torch.equal(seen[2][name], state[name]) for name in state)
    assert any(not torch.equal(seen[4][name], state[name]) for name in state)
    best = load_file(run_folder / "train" / "best.safetensors")
    assert all(torch.equal(best[name], model.decoder.state_dict()[name]) for name in best)


def test_resume_is_exact(tiny, stopped, whole):
    start(tiny, stopped)
    one, other = trained(stopped), trained(whole)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_report_and_the_check_of_files_do_without_an_adapter(whole):
    folder = whole / "train"
    done = json.loads((folder / "done.json").read_text())
    assert not any(name.startswith("adapter") for name in done["files"])
    assert missing_trained(folder, done["files"]) == []
    assert load_run(whole).adapter == {}


def checkpoint_of(out):
    (path,) = (out / "train" / "checkpoints").iterdir()
    return path


def test_every_damage_is_refused(tiny, stopped):
    path = checkpoint_of(stopped)
    assert path.name == "step-000002"
    for file in sorted(path.iterdir()):
        data = file.read_bytes()
        for at in (0, 9, len(data) // 2, len(data) - 1):
            file.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
            with pytest.raises(OspoError, match=r"Cannot read the checkpoint .*step-000002: .*checksum.*--no-resume"):
                start(tiny, stopped)
        file.unlink()
        with pytest.raises(OspoError, match=r"step-000002: .*--no-resume"):
            start(tiny, stopped)
        file.write_bytes(data)
    (path / "x.pkl").touch()
    with pytest.raises(OspoError, match="no other files"):
        start(tiny, stopped)


def test_an_older_checkpoint_takes_the_place_of_a_damaged_one(tiny, stopped, whole, caplog):
    path = checkpoint_of(stopped)
    shutil.copytree(path, path.with_name("step-000003"))
    (path.with_name("step-000003") / "state.pt").write_bytes(b"half")
    shutil.copytree(path, path.with_name("step-000004.partial"))
    start(tiny, stopped)
    assert "Training continues from the older step-000002." in caplog.text
    assert {file.name for file in path.parent.iterdir()} == {"step-000004"}
    assert all(torch.equal(trained(stopped)[name], tensor) for name, tensor in trained(whole).items())


@pytest.mark.parametrize("change", ["missing", "shape", "nan", "updates"])
def test_what_a_checkpoint_holds_is_checked(tiny, stopped, change):
    """Also if its checksums are right, as in one that was made up."""
    path = checkpoint_of(stopped)
    state = read_checkpoint(path / "state.pt", 2**20)
    [file] = path.glob("*.safetensors")
    tensors = load_file(file)
    name = "exp_avg.layers.0.mlp.down_proj.weight"
    if change == "missing":
        del tensors[name]
    elif change == "shape":
        tensors[name] = tensors[name][1:].contiguous()
    elif change == "nan":
        tensors[name][0] = float("nan")
    else:
        state["updates"] = -1
    save_file(tensors, file)
    state["files"] = {file.name: hashlib.sha256(file.read_bytes()).hexdigest()}
    write_checkpoint(path / "state.pt", state)
    with pytest.raises(OspoError, match=r"Cannot read the checkpoint .*step-000002: .*--no-resume"):
        start(tiny, stopped)
    assert not (stopped / "train" / "done.json").exists()


def test_a_checkpoint_that_cannot_be_written_is_an_error(tiny, run_folder):
    folder = run_folder / "train" / "checkpoints"
    folder.parent.mkdir()
    folder.write_text("in the way")
    with pytest.raises(OspoError, match="Cannot write the checkpoint"):
        start(tiny, run_folder)


def test_settings_of_lora_and_of_all_weights_are_not_those_of_one_run(tiny, stopped):
    with pytest.raises(OspoError, match="other settings or other pairs"):
        start(tiny, stopped, "train.full=false")


def test_online_masks_and_guidance_train_all_weights(tiny, run_folder):
    start(tiny, run_folder, "train.masks=online", "train.guidance_scale=2", "train.steps=2")
    rows = [read for read in (run_folder / "train" / "log.jsonl").read_text().splitlines() if "mask_coverage" in read]
    assert len(rows) == 2

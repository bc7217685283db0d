"""Live tracking is a copy: it has what the records have, and weights and log are the same with it and without it."""

import json
import os
import shutil
import subprocess
import sys
import types
from typing import ClassVar

import numpy as np
import PIL.Image
import pytest

from ospo_fast.config import load_config
from ospo_fast.errors import OspoError
from ospo_fast.packages import MissingPackageError
from ospo_fast.pipeline import Pipeline
from ospo_fast.stages import Shard, samples, tracking
from tests.missing_packages import run_without

SMALL = (
    "images.draws=1", "select.pairs=1", "masks.layers=[0]", "train.steps=6", "train.batch_size=2", "train.save_every=2",
    "train.lora_rank=4", "train.accumulation=2", "train.learning_rate=1e-3", "train.eval_every=3",
    "train.early_stopping=null", "train.patience=9",
)  # fmt: skip
COUNTS = "prompts.counts={color1: 3, shape1: 1, color2: 4, 2D_spatial: 4, numeracy1: 1, numeracy2: 3}"


def pipeline(tiny, folder, *settings, evaluation=lambda model, step: {"alignment": step / 10}, **options):
    config = load_config([COUNTS, *SMALL, *settings, f"model={tiny}", f"out={folder}"], family="shapes")
    return Pipeline(config, progress=False, evaluation=evaluation, **options)


def stop_at(step):
    """An evaluation that interrupts training at a step."""

    def evaluation(model, now):
        if now == step:
            raise KeyboardInterrupt
        return {"alignment": now / 10}

    return evaluation


def log(folder):
    """The rows of the log, without the clock."""
    rows = [json.loads(line) for line in (folder / "train" / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in ("seconds", "tokens_s")} for row in rows]


def weights(folder):
    return (folder / "train" / "adapter" / "adapter_model.safetensors").read_bytes()


def read(folder, part="train"):
    """The values (tag → [(step, value)]) and images (tag → steps) that TensorBoard shows of a tracker run."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tracking" / part), size_guidance={"scalars": 0, "images": 0})
    events.Reload()
    tags = events.Tags()
    scalars = {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in tags["scalars"]}
    return scalars, {tag: [event.step for event in events.Images(tag)] for tag in tags["images"]}


def expected(rows, key):
    return [(row["step"], pytest.approx(row[key], rel=1e-6)) for row in rows if key in row]


@pytest.fixture(scope="module")
def plain(made, tiny, tmp_path_factory):
    """A training without tracking and without samples."""
    folder = shutil.copytree(made, tmp_path_factory.mktemp("plain") / "run")
    pipeline(tiny, folder).stage("train")
    return folder


@pytest.fixture
def tensorboard():
    pytest.importorskip("tensorboard")


@pytest.mark.usefixtures("tensorboard")
def test_the_tracker_has_every_number_of_the_log_and_changes_nothing(plain, tiny, run_folder):
    pipeline(tiny, run_folder, "track=tensorboard", "train.sample_every=2").stage("train")
    assert weights(run_folder) == weights(plain)
    rows = log(run_folder)
    assert rows == log(plain)
    scalars, images = read(run_folder)
    names = {key for row in rows for key in row} - {"step"}
    assert names >= {"loss", "accuracy", "margin", "chosen_rewards", "rejected_rewards", "lr", "grad_norm", "alignment"}
    for name in names:
        assert scalars[name] == expected(rows, name), name
    assert len([name for name in names if name.startswith("accuracy/")]) > 1
    assert scalars["memory_mb"][0][1] > 10
    assert images == {"samples": [2, 4, 6]}
    stages, _ = read(run_folder, "stages")
    assert stages["train/items"] == [(0, 6.0)]
    assert stages["train/items_s"][0][1] > 0


@pytest.mark.usefixtures("tensorboard")
def test_a_resumed_training_continues_its_tracker_run_without_doubled_steps(plain, tiny, run_folder):
    shutil.copytree(run_folder, other := run_folder.with_name("other"))
    for stop, folder in ((3, run_folder), (6, other)):  # the checkpoints before them are of steps 2 and 4
        with pytest.raises(KeyboardInterrupt):
            pipeline(tiny, folder, "track=tensorboard", evaluation=stop_at(stop)).stage("train")
        pipeline(tiny, folder, "track=tensorboard").stage("train")
        assert weights(folder) == weights(plain)
        scalars, _ = read(folder)
        for name in ("loss", "alignment", "accuracy"):
            assert scalars[name] == expected(log(plain), name), (stop, name)


@pytest.mark.usefixtures("tensorboard")
def test_a_training_that_starts_over_hides_the_steps_of_the_old_one(tiny, run_folder):
    pipeline(tiny, run_folder, "track=tensorboard").stage("train")
    pipeline(tiny, run_folder, "track=tensorboard", "train.learning_rate=1e-2", resume=False).stage("train")
    scalars, _ = read(run_folder)
    for name in ("loss", "alignment", "lr"):
        assert scalars[name] == expected(log(run_folder), name), name
    assert max(rate for _, rate in scalars["lr"]) > 5e-3


@pytest.mark.usefixtures("tensorboard", "script")
def test_every_stage_of_a_run_is_reported_also_where_the_run_starts_over(tiny, tmp_path):
    for resume in (True, False):
        reports = pipeline(tiny, tmp_path / "run", "track=tensorboard", resume=resume).run()
        stages, _ = read(tmp_path / "run", "stages")
        for report in reports:
            assert stages[f"{report.stage}/items"][-1] == (0, report.items)
            assert stages[f"{report.stage}/seconds"][-1] == (0, pytest.approx(report.seconds, rel=1e-5))
    assert [path.name for path in (tmp_path / "run").glob(".restart*")] == []


def test_what_is_tracked_or_sampled_is_no_setting_of_the_results(plain, tiny, tmp_path):
    folder = shutil.copytree(plain, tmp_path / "run")
    assert pipeline(tiny, folder, "track=tensorboard", "train.sample_every=1").stage("train").items == 0
    with pytest.raises(KeyboardInterrupt):
        pipeline(tiny, folder, evaluation=stop_at(6), resume=False).stage("train")
    report = pipeline(tiny, folder, "train.sample_every=6").stage("train")  # continues what starts over
    assert (report.items, weights(folder)) == (2, weights(plain))


def test_samples_are_of_fixed_prompts_and_seeds(plain, tiny, run_folder):
    pipeline(tiny, run_folder, "train.sample_every=4").stage("train")
    assert (weights(run_folder), log(run_folder)) == (weights(plain), log(plain))
    folder = run_folder / "train" / "samples" / "step-000004"
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    names = [*(f"{n}.png" for n in range(samples.COUNT)), "sheet.png"]
    assert sorted(path.name for path in folder.iterdir()) == names
    images = [PIL.Image.open(folder / name).size for name in names]
    assert len(set(images[:-1])) == 1
    assert images[-1] > images[0]
    # The weights of step 4, resumed from there, give the same bytes.
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(KeyboardInterrupt):
        pipeline(tiny, run_folder, "train.sample_every=4", evaluation=stop_at(6), resume=False).stage("train")
    work = next(run_folder.glob(".restart*"))
    again = work / "train" / "samples" / "step-000004"
    assert {path.name: path.read_bytes() for path in again.iterdir()} == before


def test_samples_that_fail_do_not_end_training(plain, tiny, run_folder, monkeypatch, caplog):
    def fail(*_, **__):
        raise OspoError("no memory is left")

    monkeypatch.setattr(samples.ImageGenerator, "generate", fail)
    pipeline(tiny, run_folder, "train.sample_every=3").stage("train")
    assert weights(run_folder) == weights(plain)
    assert caplog.text.count("no memory is left") == 2
    assert not (run_folder / "train" / "samples").exists()


class Fake:
    """A tracker that keeps its calls, and raises an error in one of its methods."""

    requires_logging_directory = False
    fails = ""
    made: ClassVar[list["Fake"]] = []

    def __init__(self, project, **options):
        self.project, self.options, self.calls = project, options, []
        Fake.made.append(self)
        self._maybe("init")

    def _maybe(self, name, *arguments):
        if self.fails == name:
            raise RuntimeError(f"{name} does not work")
        self.calls.append((name, *arguments))

    def start(self):
        self._maybe("start")

    def log(self, values, step=None):
        self._maybe("log", values, step)

    def finish(self):
        self._maybe("finish")

    def sent(self, method="log"):
        return [tuple(rest) for name, *rest in self.calls if name == method]


class WithImages(Fake):
    def log_images(self, values, step=None):
        self._maybe("log_images", values, step)


@pytest.fixture
def fake(monkeypatch):
    """Put a fake in the place of a tracker of accelerate."""
    accelerate = pytest.importorskip("accelerate.tracking")

    def install(name, kind, fails=""):
        monkeypatch.setattr(Fake, "fails", fails)
        monkeypatch.setattr(Fake, "made", [])
        monkeypatch.setitem(accelerate.LOGGER_TYPE_TO_CLASS, name, kind)
        monkeypatch.setattr("ospo_fast.pipeline.check_tracker", lambda name: None)

    return install


@pytest.mark.parametrize("method", ["init", "start", "log", "log_images", "finish"])
def test_a_tracker_that_fails_is_turned_off_with_one_warning(method, plain, tiny, run_folder, fake, caplog):
    fake("wandb", WithImages, method)
    pipeline(tiny, run_folder, "track=wandb", "train.sample_every=3").stage("train")
    assert (weights(run_folder), log(run_folder)) == (weights(plain), log(plain))
    assert caplog.text.count("track=wandb failed") == 1
    assert f"RuntimeError: {method} does not work" in caplog.text


def test_wandb_keeps_its_run_when_training_is_resumed_and_gets_a_new_one_when_it_starts_over(tiny, run_folder, fake):
    fake("wandb", WithImages)
    settings = ("track=wandb", "train.sample_every=3")
    with pytest.raises(KeyboardInterrupt):
        pipeline(tiny, run_folder, *settings, evaluation=stop_at(6)).stage("train")
    pipeline(tiny, run_folder, *settings).stage("train")
    pipeline(tiny, run_folder, *settings, resume=False).stage("train")
    train = [run for run in Fake.made if " train " in run.options["name"]]
    first, resumed, over = (run.options["id"] for run in train)
    assert first == resumed != over
    stages = [run for run in Fake.made if " stages " in run.options["name"]]
    assert len({run.options["id"] for run in stages}) == 1
    assert all(run.calls[-1] == ("finish",) for run in Fake.made)
    assert [step for _, step in train[0].sent("log_images")] == [3]
    options = train[0].options
    assert options["config"]["train"]["steps"] == 6
    assert (options["resume"], options["dir"]) == ("allow", str(run_folder / "tracking"))
    rows = train[2].sent()
    assert [step for _, step in rows] == [row["step"] for row in log(run_folder)]
    assert all(isinstance(value, float | int) for values, _ in rows for value in values.values())


def test_trackio_gets_images_as_its_own_type(tiny, run_folder, fake, monkeypatch):
    fake("trackio", Fake)
    monkeypatch.setitem(sys.modules, "trackio", types.SimpleNamespace(Image=lambda image: ("image", image.size)))
    pipeline(tiny, run_folder, "track=trackio", "train.sample_every=6").stage("train")
    sent = [values["samples"] for run in Fake.made for values, _ in run.sent() if "samples" in values]
    assert [kind for kind, _ in sent] == ["image"]
    assert "id" not in Fake.made[0].options


def test_standard_output_keeps_the_results_of_the_command_alone(run_folder, fake, capsys):
    class Talking(Fake):
        def start(self):
            print("View the dashboard")

    fake("wandb", Talking)
    tracker = tracking.Tracker(load_config(["track=wandb", f"out={run_folder}"]))
    tracker.start(1, None)
    out, err = capsys.readouterr()
    assert (out, err) == ("", "View the dashboard\n")


def test_only_the_first_process_tracks_and_a_shard_has_a_tracker_run_of_its_own(run_folder, fake, monkeypatch):
    fake("trackio", Fake)
    config = load_config(["track=trackio", f"out={run_folder}"])
    monkeypatch.setenv("RANK", "1")
    tracking.Tracker(config).start(1, None)
    assert Fake.made == []
    tracking.Tracker(config, Shard(1, 4)).start(2, None)
    assert " train-iter2-1-of-4 " in Fake.made[0].options["name"]
    monkeypatch.setenv("RANK", "0")
    tracking.Tracker(config).start(1, None)
    assert len(Fake.made) == 2


def test_the_rank_of_the_process_group_counts_before_that_of_the_launcher(monkeypatch):
    from torch import distributed

    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "get_rank", lambda: 1)
    assert not tracking.is_first_process()


@pytest.mark.usefixtures("tensorboard")
def test_no_process_group_is_joined_for_a_tracker(tmp_path):
    """The variables of a launcher would make accelerate's own state wait for the other processes."""
    code = (
        "from ospo_fast.config import load_config; from ospo_fast.stages.tracking import Tracker; import torch\n"
        f"tracker = Tracker(load_config(['track=tensorboard', {f'out={tmp_path}'!r}]))\n"
        "tracker.start(1, None); tracker.log({'step': 1, 'loss': 2.0}); tracker.close()\n"
        "assert not torch.distributed.is_initialized()"
    )
    launched = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}
    subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", code], env=os.environ | launched, check=True, timeout=100
    )
    assert read(tmp_path)[0]["loss"] == [(1, 2.0)]


def test_links_in_a_run_folder_are_not_followed(tmp_path, fake, caplog):
    fake("wandb", Fake)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "tracking").symlink_to(tmp_path / "elsewhere")
    tracking.Tracker(load_config(["track=wandb", f"out={tmp_path / 'run'}"])).start(1, None)
    assert "symbolic link" in caplog.text
    assert (Fake.made, list((tmp_path / "elsewhere").iterdir())) == ([], [])


def test_a_damaged_id_is_replaced(tmp_path, fake):
    fake("wandb", Fake)
    (tmp_path / "tracking").mkdir()
    (tmp_path / "tracking" / "train.id").write_text("../../x")
    tracking.Tracker(load_config(["track=wandb", f"out={tmp_path}"])).start(1, 4)
    assert len(bytes.fromhex(Fake.made[0].options["id"])) == 8


@pytest.mark.parametrize("missing", ["tensorboard", "accelerate"])
def test_a_tracker_that_is_not_installed_is_refused_before_torch_and_before_anything_is_written(missing, tmp_path):
    code = (
        "import sys; from ospo_fast import cli\n"
        "cli._check_packages = lambda names: None\n"
        f"print(cli.main(['images', '--out', {str(tmp_path / 'run')!r}, 'track=tensorboard']), 'torch' in sys.modules)"
    )
    if missing == "accelerate":
        pytest.importorskip("tensorboard")
    assert run_without([missing], code) == "1 False\n"
    assert list(tmp_path.iterdir()) == []


def test_the_refusal_names_the_package_and_the_command(monkeypatch):
    monkeypatch.setattr(tracking.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingPackageError, match=r"track: got 'trackio', .* run: pip install trackio\.$"):
        tracking.check_tracker("trackio")
    tracking.check_tracker(None)


def test_images_for_tensorboard_have_channels_first(run_folder, fake):
    fake("tensorboard", WithImages)
    tracker = tracking.Tracker(load_config(["track=tensorboard", f"out={run_folder}"]))
    tracker._tracker = WithImages("")
    tracker.sheet(PIL.Image.new("RGB", (5, 4), "red"), 3)
    name, values, step = tracker._tracker.calls[-1]
    assert (name, step, values["samples"].shape) == ("log_images", 3, (1, 3, 4, 5))
    assert np.array_equal(values["samples"][0, :, 0, 0], [255, 0, 0])

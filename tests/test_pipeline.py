"""A run folder: resumption after a stop at any point, shards, iterations, and refused requests."""

import contextlib
import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import ospo_fast.stages.templates
from ospo_fast import restarts
from ospo_fast.config import load_config
from ospo_fast.errors import OspoError, UsageError
from ospo_fast.models import chat, load_model
from ospo_fast.models.chat import ChatModel
from ospo_fast.pipeline import Pipeline, Shard, _begin_steps, changed_setting, read_stage, stage_metrics, store_path
from ospo_fast.records import Store, only_writer, read_records
from ospo_fast.shapes.scenes import descriptions
from ospo_fast.stages import STAGE_NAMES, find_stage
from ospo_fast.stages.train import Trainer
from tests.models import tiny_chat

pytestmark = pytest.mark.usefixtures("omegaconf")

COUNTS = "prompts.counts={color1: 2, shape1: 1, color2: 3, 2D_spatial: 3, numeracy1: 1, numeracy2: 2}"
SMALL = [COUNTS, "train.steps=3", "train.batch_size=2", "train.save_every=1", "train.eval_every=0"]
SMALL += ["masks.batch_size=3", "masks.layers=[0]"]
WRITERS = STAGE_NAMES[:-1]
SHIPPED = Path(ospo_fast.stages.__file__).with_name("templates") / "shapes.yaml"


def config(tiny, out, *overrides):
    return load_config([*SMALL, f"model={tiny}", f"out={out}", *overrides], family="shapes")


def pipeline(tiny, out, *overrides, **settings):
    return Pipeline(config(tiny, out, *overrides), progress=False, **settings)


def contents(out):
    """Every file that holds no times and no paths of this run."""
    found = {}
    for path in sorted(Path(out).rglob("*")):
        name = str(path.relative_to(out))
        if path.is_file() and path.suffix in (".jsonl", ".png", ".npz", ".safetensors") and "checkpoints" not in name:
            found[name] = path.read_bytes()
    log = found.pop("train/log.jsonl", b"")
    rows = [json.loads(line) for line in log.splitlines()]
    found["train/log.jsonl"] = [{k: v for k, v in row.items() if k not in ("seconds", "tokens_s")} for row in rows]
    return found


@pytest.fixture(scope="module")
def whole(scripted, tiny, tmp_path_factory):
    """An uninterrupted run."""
    out = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        scripted.install(patch.setattr)
        pipeline(tiny, out).run()
    return out


def test_every_item_goes_through_every_stage(whole):
    ids = [r["item_id"] for r in read_records(whole / "prompts.jsonl")]
    assert len(ids) == 12
    for stage in WRITERS:
        assert [r["item_id"] for r in read_records(whole / f"{stage}.jsonl")] == ids
    assert sum(r["kept"] for r in read_records(whole / "select.jsonl")) >= 3
    metrics = stage_metrics(whole)
    assert list(metrics) == list(STAGE_NAMES)
    assert {name: row["items"] for name, row in metrics.items()} == {**dict.fromkeys(WRITERS, 12), "train": 3}
    drawing = {row["stage"]: row.get("drawing") for row in json.loads((whole / "stages.json").read_text())}
    assert drawing["images"]["images"] == sum(1 for _ in (whole / "images").rglob("*.png"))
    assert drawing["images"]["images_s"] > 0
    assert drawing["score"] is None
    assert all(row["seconds"] > 0 and row["peak_mb"] > 50 and row["failed"] >= 0 for row in metrics.values())
    assert load_config(saved=whole / "config.yaml", family="shapes") == config(
        load_config(saved=whole / "config.yaml").model, whole
    )


def test_second_run_does_nothing(whole, tiny, monkeypatch):
    before = contents(whole)
    monkeypatch.setattr(Pipeline, "model", lambda *_: pytest.fail("the model was loaded"))
    assert [report.items for report in pipeline(tiny, whole).run()] == [0] * len(STAGE_NAMES)
    assert contents(whole) == before


def test_resume_after_a_stop(whole, tiny, script, tmp_path, monkeypatch):
    """Stop four times, within stores of 12 records and between two. The resumed run equals the uninterrupted one."""
    append, stops, made = Store.append, [5, 12, 29, 80], 0

    def stopping(store, record):
        nonlocal made
        if made in stops:
            stops.remove(made)
            raise KeyboardInterrupt
        made += 1
        append(store, record)

    monkeypatch.setattr(Store, "append", stopping)
    for left in (3, 2, 1, 0):
        with pytest.raises(KeyboardInterrupt):
            pipeline(tiny, tmp_path).run()
        assert len(stops) == left
        assert sum(len(read_stage(tmp_path, name)) for name in WRITERS if store_path(tmp_path, name).exists()) == made
    pipeline(tiny, tmp_path).run()
    assert contents(tmp_path) == contents(whole)


KILLED = """
import os, signal, sys
sys.path.insert(0, {tests!r})
import scripted
scripted.install()
import ospo_fast.records as records
from ospo_fast.config import load_config
from ospo_fast.models import load_model
from ospo_fast.pipeline import Pipeline
left = {stop}
write = records.Store._write
def dying(store, data):
    global left
    left -= 1
    if left == 0:
        os.write(store._file.fileno(), data[: len(data) // 2])
        os.kill(os.getpid(), signal.SIGKILL)
    write(store, data)
records.Store._write = dying
Pipeline(load_config({overrides!r}, family="shapes"), progress=False).run()
"""


def copy_until(whole, out, stage):
    """A copy of a run folder that was stopped before a stage."""
    shutil.copytree(whole, out, dirs_exist_ok=True)
    done = STAGE_NAMES[: STAGE_NAMES.index(stage)]
    for later in STAGE_NAMES[len(done) :]:
        store_path(out, later).unlink(missing_ok=True)
        shutil.rmtree(out / later, ignore_errors=True)
    saved = out / "settings.json"
    settings = json.loads(saved.read_text())
    saved.write_text(json.dumps({name: settings[name] for name in done}))


def test_resume_after_a_kill_inside_a_line(whole, tiny, script, tmp_path):
    copy_until(whole, tmp_path, "score")
    overrides = [*SMALL, f"model={tiny}", f"out={tmp_path}"]
    code = KILLED.format(tests=str(Path(__file__).parent), stop=3, overrides=overrides)
    assert subprocess.run([sys.executable, "-c", code], check=False, capture_output=True).returncode == -9
    torn = [path for path in tmp_path.glob("*.jsonl") if not path.read_bytes().endswith(b"\n")]
    assert torn == [tmp_path / "score.jsonl"]
    pipeline(tiny, tmp_path).run()
    assert contents(tmp_path) == contents(whole)


def test_shards_give_the_same_records(whole, tiny, script, tmp_path):
    for stage in WRITERS:
        for index in (1, 0):
            pipeline(tiny, tmp_path, shard=Shard(index, 2)).stage(stage)
        assert not (tmp_path / f"{stage}.jsonl").exists()
        if stage != "prompts":
            parts = [list(read_records(tmp_path / f"{stage}.{i}-of-2.jsonl")) for i in (0, 1)]
            assert all(parts)
    for stage in WRITERS:
        one, other = (sorted(read_stage(out, stage), key=lambda r: r["item_id"]) for out in (tmp_path, whole))
        assert one == other
    with pytest.raises(UsageError, match="not sharded"):
        pipeline(tiny, tmp_path, shard=Shard(0, 2)).stage("train")
    # A run without shards merges them, processes no item again, and trains to the same weights.
    reports = pipeline(tiny, tmp_path).run()
    assert [report.items for report in reports] == [0] * len(WRITERS) + [3]
    assert not list(tmp_path.glob("*-of-*"))
    for name in ("train/log.jsonl", "train/adapter/adapter_model.safetensors"):
        assert contents(tmp_path)[name] == contents(whole)[name]


def test_two_iterations(tiny, script, tmp_path):
    counts = "prompts.counts={color1: 0, shape1: 0, color2: 3, 2D_spatial: 3, numeracy1: 0, numeracy2: 0}"
    reports = pipeline(tiny, tmp_path, "iterations=2", counts, "train.steps=1").run()
    assert [(r.stage, r.iteration) for r in reports] == [(s, i) for i in (1, 2) for s in STAGE_NAMES]
    assert (tmp_path / "iter2" / "train" / "model" / "config.json").exists()
    saved = json.loads((tmp_path / "iter2" / "settings.json").read_text())
    assert saved["images"]["settings"]["model"] == "./train/model"
    first, second = ([r["prompt"] for r in read_stage(f, "prompts")] for f in (tmp_path, tmp_path / "iter2"))
    assert first != second
    with pytest.raises(UsageError, match="Iteration 3 starts from"):
        pipeline(tiny, tmp_path / "iter2").stage("prompts", 3)


@pytest.mark.parametrize("resume", [True, False])
def test_the_adapter_of_a_second_iteration_names_the_model_of_the_first(tiny, script, tmp_path, resume):
    """Also when one process runs both, and the model that it trained stays in memory."""
    counts = "prompts.counts={color1: 0, shape1: 0, color2: 3, 2D_spatial: 3, numeracy1: 0, numeracy2: 0}"
    out = tmp_path / "run"
    pipeline(tiny, out, "iterations=2", counts, "train.steps=1", resume=resume).run()
    train = out / "iter2" / "train"
    assert json.loads((train / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"] == "run-model"
    done = json.loads((train / "done.json").read_text())
    assert done["base_model"] == {"name": "run-model", "folder": "../../train/model"}
    assert "# OSPO adapter for run-model" in (train / "adapter" / "README.md").read_text()
    adapter, merged = (load_model(train / name).module.state_dict() for name in ("adapter", "model"))
    assert all(torch.allclose(value, merged[name], atol=1e-6) for name, value in adapter.items())


def test_setting_that_the_folder_does_not_name_had_its_default(whole, tiny, tmp_path):
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    saved = json.loads((tmp_path / "settings.json").read_text())
    del saved["images"]["settings"]["images.temperature"]
    # Older versions wrote null for each number of the loss that the preset decides.
    saved["train"]["settings"]["train.loss"] |= {"sft_weight": None}
    (tmp_path / "settings.json").write_text(json.dumps(saved))
    pipeline(tiny, tmp_path).stage("images")
    pipeline(tiny, tmp_path).stage("train")
    with pytest.raises(UsageError, match=r"images was made with images\.temperature=1\.0, now .*=0\.5"):
        pipeline(tiny, tmp_path, "images.temperature=0.5").stage("images")


def test_runs_of_older_versions_had_whole_weights(tmp_path):
    for saved, now, expected in (
        ({}, None, None),
        ({}, "int4", ("quantize", None, "int4")),
        ({"quantize": "int4"}, None, ("quantize", "int4", None)),
        ({"quantize": "int4"}, "int4", None),
    ):
        assert changed_setting({"settings": saved}, {"quantize": now}, tmp_path, find_stage("images")) == expected


def test_other_settings_are_refused_and_a_restart_deletes_later_stages(whole, tiny, script, tmp_path):
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    with pytest.raises(
        UsageError, match=r"images was made with images\.temperature=1\.0, now images\.temperature=0\.5"
    ):
        pipeline(tiny, tmp_path, "images.temperature=0.5").stage("images")
    pipeline(tiny, tmp_path, "images.batch_size=2").stage("images")  # affects speed only
    report = pipeline(tiny, tmp_path, "images.temperature=0.5", resume=False).stage("images")
    assert report.items == report.total == 12
    assert (tmp_path / "perturb.jsonl").exists()
    left = {path.name for path in tmp_path.iterdir()}
    assert not left & {"questions.jsonl", "score.jsonl", "select.jsonl", "masks.jsonl", "masks", "train"}
    assert set(stage_metrics(tmp_path)) == {"prompts", "perturb", "images"}


class StoppedError(Exception):
    """Stands for the end of the process."""


def stop_at(patch, where, name, count):
    """Let call number `count` of `where.name` end the process; return the list of calls."""
    calls, function = [], getattr(where, name)

    def stopping(*arguments, **more):
        calls.append(name)
        if len(calls) == count:
            raise StoppedError
        return function(*arguments, **more)

    patch.setattr(where, name, stopping)
    return calls


def finish(out):
    with restarts.RunLock.hold(out, shared=False) as lock:
        restarts.finish_run(lock)


def visible(out):
    """Every file of a run folder but hidden ones, byte by byte."""
    paths = (path.relative_to(out) for path in sorted(Path(out).rglob("*")) if path.is_file())
    return {str(path): (out / path).read_bytes() for path in paths if not any(p.startswith(".") for p in path.parts)}


OTHER = {"images": "images.temperature=0.5", "masks": "masks.scaler=0.5", "train": "train.learning_rate=1e-3"}
OTHER |= {"select": "select.threshold=0.9", "prompts": "prompts.temperature=0.9"}


@pytest.mark.parametrize("stage", OTHER)
def test_what_starts_over_replaces_when_it_is_whole(whole, tiny, script, tmp_path, stage):
    """Stopped in the middle, the old files are as they were; continued without --no-resume, it is as never stopped."""
    for folder in ("a", "b"):
        shutil.copytree(whole, tmp_path / folder)
    assert pipeline(tiny, tmp_path / "a", OTHER[stage], resume=False).stage(stage).items
    before = visible(whole)
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, *((Trainer, "train_step") if stage == "train" else (Store, "append")), 3)
        with pytest.raises(StoppedError):
            pipeline(tiny, tmp_path / "b", OTHER[stage], resume=False).stage(stage)
    assert visible(tmp_path / "b") == before
    assert pipeline(tiny, tmp_path / "b").stage(stage).items == 0  # the old one is complete
    assert visible(tmp_path / "b") == before
    done = pipeline(tiny, tmp_path / "b", OTHER[stage]).stage(stage)
    assert 0 < done.items < done.total
    assert contents(tmp_path / "b") == contents(tmp_path / "a") != contents(whole)
    assert not list((tmp_path / "b").glob(".restart*"))
    assert {row["stage"] for row in json.loads((tmp_path / "b" / "stages.json").read_text())} == set(
        STAGE_NAMES[: STAGE_NAMES.index(stage) + 1]
    )


def test_a_run_that_starts_over_replaces_when_it_is_whole(whole, tiny, script, tmp_path):
    settings = ["images.temperature=0.5"]
    for folder in ("a", "b"):
        shutil.copytree(whole, tmp_path / folder)
    (tmp_path / "b" / "iter2").mkdir()
    (tmp_path / "b" / "iter2" / "score.jsonl").touch()
    before = visible(tmp_path / "b")
    pipeline(tiny, tmp_path / "a", *settings, resume=False).run()
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, Store, "append", 40)
        with pytest.raises(StoppedError):
            pipeline(tiny, tmp_path / "b", *settings, resume=False).run()
    assert visible(tmp_path / "b") == before
    reports = pipeline(tiny, tmp_path / "b", *settings).run()
    assert sum(report.items for report in reports) < sum(report.total for report in reports)
    assert contents(tmp_path / "b") == contents(tmp_path / "a") != contents(whole)
    assert not (tmp_path / "b" / "iter2").exists()
    assert not list((tmp_path / "b").glob(".restart*"))
    reports = pipeline(tiny, tmp_path / "b", *settings).run()
    assert not any(report.items for report in reports)


def link_images(source, target):
    """Link an image or its codes, which no stage changes in place, and copy any other file."""
    (os.link if Path(source).suffix in (".png", ".npz") else shutil.copy2)(source, target)


@pytest.mark.parametrize("stage", ["run", "images", "train"])
def test_a_replacement_that_was_stopped_is_finished(whole, tiny, script, tmp_path, stage):
    """At every step between the whole new files and their places, the next command does the rest."""

    def over(out, **settings):
        run = pipeline(tiny, out, "images.temperature=0.5", "train.learning_rate=1e-3", **settings)
        return run.run() if stage == "run" else run.stage(stage)

    shutil.copytree(whole, tmp_path / "work")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(restarts, "_move", lambda *arguments: None)
        over(tmp_path / "work", resume=False)
    calls = 0
    for name in ("delete", "update_json", "_rename"):
        for count in itertools.count(1):
            out = tmp_path / f"{name}-{count}"
            shutil.copytree(tmp_path / "work", out, copy_function=link_images)
            with pytest.MonkeyPatch.context() as patch:
                made = stop_at(patch, restarts, name, count)
                with contextlib.suppress(StoppedError):
                    finish(out)
            over(out)
            found = contents(out)
            calls += len(made)
            if name == "delete" and count == 1:
                expected = found
            assert found == expected != contents(whole)
            assert not list(out.glob(".restart*"))
            if len(made) < count:
                break
            shutil.rmtree(out)
    assert calls > 6


def prepared(folder, names="[]"):
    """A folder that starts over and is whole."""
    (folder / "images").mkdir(parents=True)
    for name, text in {"score.jsonl": "", "settings.json": "{}", "config.yaml": "", ".whole.json": names}.items():
        (folder / name).write_text(text)
    return folder


def test_links_of_a_stranger_are_not_followed(tmp_path):
    mine, out = prepared(tmp_path / "mine"), tmp_path / "out"
    out.mkdir()
    before = contents(mine)
    (out / ".restart").symlink_to(mine)
    with pytest.raises(OspoError, match=r"\.restart is a symbolic link"):
        finish(out)
    (out / ".restart").unlink()
    inner = prepared(out / ".restart", '["images", "score.jsonl"]')
    shutil.rmtree(inner / "images")
    (inner / "images").symlink_to(mine)
    with pytest.raises(OspoError, match="images is a symbolic link"):
        finish(out)
    assert contents(mine) == before
    assert mine.is_dir()


@pytest.mark.parametrize(
    "broken", [".whole.json", "settings.json", "stages.json", "../settings.json", "../stages.json"]
)
def test_a_replacement_is_checked_before_anything_is_deleted(tmp_path, broken):
    work = prepared(tmp_path / ".restart", '["images", "score.jsonl"]')
    (tmp_path / "score.jsonl").write_text("{}")
    (work / broken).write_text("3")
    before = visible(tmp_path)
    with pytest.raises(OspoError, match=Path(broken).name):
        finish(tmp_path)
    assert visible(tmp_path) == before


def test_folders_of_other_names_are_not_replacements(tmp_path):
    for name in (".restartfoo", ".restart..x", ".restart.score.zzz", ".restart.nothing"):
        prepared(tmp_path / name)
    (tmp_path / "score.jsonl").write_text("{}")
    finish(tmp_path)
    assert (tmp_path / "score.jsonl").exists()
    assert len(list(tmp_path.glob(".restart*"))) == 4


REFUSED = [
    ("train", "train.early_stopping=off"),
    ("train", "train.lora_targets=[q_proj,nothing]"),
    ("train", "train.lora_targets=[q_proj,mlp]"),  # no linear layer
    ("train", "train.lora_targets=[input_layernorm]"),
    ("train", "train.lora_targets=[proj]"),  # neither a name nor the end of one after a dot
    ("train", "train.lora_targets=[..]"),
    ("train", "train.early_stopping=off train.eval_every=0"),
    ("masks", "masks.official=/nowhere"),
    ("masks", "masks.layers=[7]"),
    ("masks", "masks.layers=null masks.skip_layers=1"),
    ("masks", "masks.layers=null masks.skip_layers=[0,1]"),
    ("perturb", "prompts.exclude=/nowhere.txt"),
    ("prompts", "prompts.file=/nowhere.txt"),
    ("prompts", "prompts.counts.nothing=3"),
    ("questions", "templates=nothing"),
    ("prompts", "prompts.file_kind=nothing"),
    ("run", "train.early_stopping=off"),
    ("run", "train.lora_targets=[nothing]"),
    ("run", "prompts.file_kind=nothing"),
    ("run", "masks.official=/nowhere"),
    ("run", "prompts.exclude=/nowhere.txt"),
]


@pytest.mark.parametrize(("stage", "setting"), REFUSED)
def test_refused_settings_change_nothing(whole, tiny, script, tmp_path, stage, setting):
    out = tmp_path / "run"
    shutil.copytree(whole, out)

    def evaluation(model, step):
        raise AssertionError("it has begun")

    evaluation.metrics = ("alignment",)
    before = {path: path.read_bytes() if path.is_file() else None for path in out.rglob("*")}
    run = pipeline(tiny, out, "train.eval_every=1", *setting.split(" "), resume=False, evaluation=evaluation)
    with pytest.raises(UsageError):
        run.run() if stage == "run" else run.stage(stage)
    assert {path: path.read_bytes() if path.is_file() else None for path in out.rglob("*")} == before


def tree(folder):
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.mark.parametrize("setting", ["train.lora_targets=[nothing]", "train.lora_targets=[mlp]"])
def test_a_run_checks_later_stages_before_the_first_begins(whole, tiny, script, tmp_path, setting):
    with pytest.raises(UsageError, match="got"):
        pipeline(tiny, tmp_path / "new", setting).run()
    assert not (tmp_path / "new").exists()
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    for name in ("select.jsonl", "masks.jsonl"):  # select itself needs no model
        (out / name).unlink()
    shutil.rmtree(out / "train")
    saved = json.loads((out / "settings.json").read_text())
    del saved["train"]
    (out / "settings.json").write_text(json.dumps(saved))
    before = tree(out)
    run = pipeline(tiny, out, setting)
    with pytest.raises(UsageError, match="got"):
        run.run()
    assert tree(out) == before
    assert run.stage("select").items == 12  # which does not depend on it


@pytest.mark.parametrize("stage", ["train", "run"])
def test_a_refused_setting_keeps_what_had_started_over(whole, tiny, script, tmp_path, stage):
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    (out / ".restart.train" / "train").mkdir(parents=True)
    (out / ".restart" / "train").mkdir(parents=True)
    before = tree(out)
    run = pipeline(tiny, out, "train.lora_targets=[nothing]", resume=False)
    with pytest.raises(UsageError, match=r"train\.lora_targets: got 'nothing', expected names of linear layers"):
        run.run() if stage == "run" else run.stage(stage)
    assert tree(out) == before


def test_many_iterations_are_checked_once(tiny, script, tmp_path, monkeypatch):
    calls = stop_at(monkeypatch, ospo_fast.stages.templates, "load_templates", 100)
    stop_at(monkeypatch, Pipeline, "stage", 1)
    with pytest.raises(StoppedError):
        pipeline(tiny, tmp_path / "out", "iterations=1000", "templates=shapes").run()
    assert len(calls) <= 2 * len(STAGE_NAMES)  # not once per iteration


@pytest.mark.parametrize("resume", [True, False])
def test_a_second_training_in_a_folder_is_refused(whole, tiny, tmp_path, resume):
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    (tmp_path / "train" / "done.json").unlink()
    before = contents(tmp_path)
    refused = pytest.raises(OspoError, match="train is being written by another process; wait for it, or give this one")
    with only_writer(tmp_path / "train"), refused:
        pipeline(tiny, tmp_path, resume=resume).stage("train")
    assert contents(tmp_path) == before
    assert pipeline(tiny, tmp_path, resume=resume).stage("train").total == 3


def test_wrong_request_leaves_nothing_behind(tiny, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(UsageError, match=r"There is no prompts\.jsonl in .*run `ospo-fast prompts"):
        pipeline(tiny, out).stage("perturb")
    with pytest.raises(UsageError, match="no stage 'paint'"):
        pipeline(tiny, out).stage("paint")
    with pytest.raises(OspoError, match="no folder"):
        pipeline(tmp_path / "nothing", out).run()
    with pytest.raises(UsageError, match=r"There is no masks\.jsonl"):
        pipeline(tiny, out).stage("train")
    assert not out.exists()


# What replaces the second line of a store, and what the warning says of it.
BROKEN_LINES = {
    "not JSON": (lambda line: "{oops", "the line is not valid JSON"),
    "nested": (lambda line: line[:-1] + ', "x": ' + "[" * 10**5 + "]" * 10**5 + "}", "nested too deeply"),
    "a surrogate": (lambda line: line[:-1] + r', "x": "\ud83d"}', "lone surrogate"),
    "no object": (lambda line: "[1, 2]", "a record is a JSON object"),
    "a wrong type": (lambda line: line[:-1] + ', "question": 3}', "`question` should be a list of strings"),
    "a twin": (lambda line: json.dumps({**json.loads(line), "item_id": "0000000"}), "item '0000000' occurs already"),
    "no prompt": (lambda line: json.dumps({**json.loads(line), "prompt": None}), "has no `prompt`"),
}
STAGES_AND_LINES = [("select", kind) for kind in BROKEN_LINES]
STAGES_AND_LINES += [(stage, "not JSON") for stage in STAGE_NAMES if stage not in ("prompts", "select")]


@pytest.mark.parametrize(("stage", "kind"), STAGES_AND_LINES)
def test_only_the_item_of_a_broken_line_fails(whole, tiny, script, tmp_path, caplog, stage, kind):
    source = STAGE_NAMES[STAGE_NAMES.index(stage) - 1]
    for name in ("images", "masks"):
        shutil.copytree(whole / name, tmp_path / name)
    edit, reason = BROKEN_LINES[kind]
    lines = (whole / f"{source}.jsonl").read_text().splitlines()
    lost = json.loads(lines[1])["item_id"]
    lines[1] = edit(lines[1])
    (tmp_path / f"{source}.jsonl").write_text("\n".join(lines) + "\n")
    report = pipeline(tiny, tmp_path).stage(stage)
    assert f"{stage}: 1 of 12 items failed" in caplog.text
    assert f"{source}.jsonl" in caplog.text
    assert reason in caplog.text
    if stage != "train":
        assert (report.items, report.failed) == (11, 1)
        assert read_stage(tmp_path, stage) == [r for r in read_stage(whole, stage) if r["item_id"] != lost]


def test_a_broken_line_of_a_store_is_kept_and_its_item_made_again(whole, tiny, script, tmp_path, caplog):
    shutil.copytree(whole, tmp_path / "run")
    path = tmp_path / "run" / "questions.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text(lines[0] + "{oops\n" + "".join(lines[2:]))
    report = pipeline(tiny, tmp_path / "run").stage("questions")
    assert (report.items, report.failed) == (1, 1)
    assert f"questions: 1 of 2 items failed: {path}:2: the line is not valid JSON" in caplog.text
    assert path.read_text() == lines[0] + "{oops\n" + "".join(lines[2:]) + lines[1]


def test_an_item_of_an_unknown_sub_category_fails_alone(whole, tiny, script, tmp_path, caplog):
    lines = [json.loads(line) for line in (whole / "prompts.jsonl").read_text().splitlines()]
    lines[1]["sub_category"] = "layout9"
    lines[2]["relation"] = lines[3]["concepts_and_relations"] = None
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for stage in ("perturb", "images", "questions", "score", "select"):
        report = pipeline(tiny, tmp_path).stage(stage)
        assert report.items == len(lines)
    made = read_stage(tmp_path, "select")
    assert made[1]["reason"].startswith("no image: No perturbation is known for the sub-category 'layout9'")
    assert made[0] == read_stage(whole, "select")[0]
    assert "perturb: 1 of 12 items failed" in caplog.text


def test_items_without_their_prompts_have_no_images(whole, tiny, script, tmp_path):
    lines = [json.loads(line) for line in (whole / "perturb.jsonl").read_text().splitlines()]
    del lines[1]["negative_prompt"], lines[2]["long_prompt"]
    (tmp_path / "perturb.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    report = pipeline(tiny, tmp_path, "images.prompts=plain").stage("images")
    assert (report.items, report.failed) == (len(lines), 2)
    reasons = [record["variant_reasons"][0] for record in read_stage(tmp_path, "images")]
    assert "has no negative_prompt for each long_prompt" in reasons[1]
    assert "has 0 long_prompt and 3 negative_long_prompt" in reasons[2]
    assert reasons[3:] == [record["variant_reasons"][0] for record in read_stage(whole, "images")][3:]


def test_model_that_writes_no_prompt(tiny, tmp_path):
    """Without the script the answers of the random model do not parse."""
    with pytest.raises(OspoError, match="wrote no prompt that could be used: the answer does not parse"):
        pipeline(tiny, tmp_path, "prompts.patience=2").run()


def test_prompts_of_a_file(tiny, script, tmp_path):
    file = tmp_path / "mine.txt"
    file.write_text("\n".join(description.text for description in descriptions("numeracy2")[:2]))
    run = pipeline(tiny, tmp_path / "out", f"prompts.file={file}", "prompts.file_kind=numeracy2")
    for stage in ("prompts", "perturb", "images"):
        assert run.stage(stage).items == 2
    with pytest.raises(UsageError, match="without --shard"):
        pipeline(tiny, tmp_path / "b", f"prompts.file={file}", shard=Shard(0, 2)).stage("prompts")


def test_shards_of_other_settings_are_refused(tiny, script, tmp_path):
    pipeline(tiny, tmp_path).stage("prompts")
    pipeline(tiny, tmp_path, shard=Shard(0, 2)).stage("perturb")
    other = ["perturb.temperature=0.5"]
    for shard in (Shard(1, 2), None):
        with pytest.raises(UsageError, match=r"perturb\.0-of-2 was made with perturb\.temperature=None, now .*=0\.5"):
            pipeline(tiny, tmp_path, *other, shard=shard).stage("perturb")
    with pytest.raises(UsageError, match=r"perturb\.0-of-2 was made with"):
        pipeline(tiny, tmp_path, *other, shard=Shard(1, 2), resume=False).stage("perturb")
    # The only shard may start over.
    assert pipeline(tiny, tmp_path, *other, shard=Shard(0, 2), resume=False).stage("perturb").items
    pipeline(tiny, tmp_path, *other, shard=Shard(1, 2)).stage("perturb")
    pipeline(tiny, tmp_path, *other).stage("perturb")
    with pytest.raises(UsageError, match=r"perturb\S* was made with perturb\.temperature=0\.5, now .*=None"):
        pipeline(tiny, tmp_path, shard=Shard(0, 3)).stage("perturb")
    # Merged shards are not made again one by one.
    before = (tmp_path / "perturb.jsonl").read_bytes()
    with pytest.raises(UsageError, match=r"merged into .*perturb\.jsonl.*without --shard"):
        pipeline(tiny, tmp_path, *other, shard=Shard(0, 2), resume=False).stage("perturb")
    assert (tmp_path / "perturb.jsonl").read_bytes() == before


def test_edited_files_are_refused(tiny, script, tmp_path):
    file, held, templates = tmp_path / "mine.txt", tmp_path / "held.txt", tmp_path / "own.yaml"
    shutil.copy(SHIPPED, templates)
    texts = [description.text for description in descriptions("numeracy2")[:3]]
    file.write_text("\n".join(texts[:2]))
    held.write_text(texts[2])
    files = [f"prompts.file={file}", f"templates={templates}", f"prompts.exclude={held}", "prompts.file_kind=numeracy2"]
    assert pipeline(tiny, tmp_path / "out", *files).stage("prompts").items == 2
    assert pipeline(tiny, tmp_path / "out", *files).stage("prompts").items == 0
    for path, words in ((file, r"prompts\.file="), (templates, "templates="), (held, r"prompts\.exclude=")):
        content = path.read_text()
        path.write_text(content + ("\n# a comment" if path == templates else "\na red circle"))
        with pytest.raises(UsageError, match="prompts was made with " + words):
            pipeline(tiny, tmp_path / "out", *files).stage("prompts")
        path.write_text(content)


def edit(path, change):
    """Apply `change` to the first record of a store that it changes, and return the item's id."""
    lines = path.read_text().splitlines()
    for index, line in enumerate(lines):
        record = json.loads(line)
        change(record)
        if (edited := json.dumps(record, ensure_ascii=False)) != line:
            lines[index] = edited
            path.write_text("\n".join(lines) + "\n")
            return record["item_id"]
    raise AssertionError("no record was changed")


def edit_prompt(record):
    record["prompt"] += "!"


def edit_image(record):
    for image in record["base_metadata"].values():
        image["prompt"] += "!"


@pytest.mark.parametrize(
    ("edited", "run", "change", "words"),
    [
        ("prompts", "perturb", edit_prompt, "`prompt`"),
        ("prompts", "masks", edit_prompt, "`prompt`"),
        ("prompts", "train", edit_prompt, "`prompt`"),
        ("select", "train", edit_prompt, "`prompt`"),
        ("score", "score", edit_prompt, "`prompt`"),
        ("perturb", "select", lambda record: record["negative_prompt"].reverse(), "`negative_prompt`"),
        ("questions", "score", lambda record: record["question"].clear(), "`question`"),
        ("images", "score", edit_image, r"`base_metadata\.base_\d\.prompt`"),
    ],
)
def test_texts_edited_behind_the_stages_are_refused(whole, tiny, tmp_path, edited, run, change, words):
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    item_id = edit(out / f"{edited}.jsonl", change)
    before = contents(out)
    with pytest.raises(UsageError, match=rf"Item '{item_id}': {words} is .*one of them was edited.*--no-resume"):
        pipeline(tiny, out).stage(run)
    assert contents(out) == before


def test_texts_are_compared_along_the_inputs_of_the_run(tiny, script, tmp_path):
    """Hard negatives that GRPO's questions were not made of are no edit; dense prompts that it needs are asked for."""
    out = tmp_path / "out"
    grpo = ("method=grpo", "train.steps=1", "train.batch_size=1", "train.loss.group_size=2", "train.lora_dropout=0")
    pipeline(tiny, out, *grpo).run()
    pipeline(tiny, out, *grpo).stage("perturb")
    pipeline(tiny, out, *grpo, resume=False).stage("train")
    with pytest.raises(UsageError, match=r"questions\.jsonl has none: it was made of other .*questions --no-resume"):
        pipeline(tiny, out, *grpo, "images.prompts=both", resume=False).stage("train")


def test_training_that_is_complete_needs_no_store(whole, tiny, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    for path in out.glob("*.jsonl"):
        path.unlink()
    assert pipeline(tiny, out).stage("train").total == 3


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("7", "with the name of a `stage`"),
        ('{"seconds": 1, "items": 1, "peak_mb": 1}', "with the name of a `stage`"),
        ('{"stage": "score", "seconds": 1, "peak_mb": 1}', "`items` should be a number"),
        ('{"stage": "score", "seconds": -1, "items": 1, "peak_mb": 1}', "`seconds` should be a number"),
        ('{"stage": "score", "seconds": NaN, "items": 1, "peak_mb": 1}', "`seconds` should be a number"),
        ('{"stage": "score", "seconds": 1, "items": 1, "peak_mb": 1e400}', "`peak_mb` should be a number"),
    ],
)
def test_broken_times_of_stages_are_named(tmp_path, row, words):
    (tmp_path / "stages.json").write_text(f"[{row}]")
    with pytest.raises(OspoError, match=rf"stages\.json, entry 1.*{words}"):
        stage_metrics(tmp_path)


def test_an_empty_store_is_refused(whole, tiny, script, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    (out / "score.jsonl").write_bytes(b"")
    with pytest.raises(UsageError, match=r"score\.jsonl holds no records; run `ospo-fast score"):
        pipeline(tiny, out).stage("select")
    assert pipeline(tiny, out).stage("score").items == 12
    assert pipeline(tiny, out).stage("select").items == 0
    assert contents(out) == contents(whole)


def test_moved_run_resumes(tiny, script, tmp_path, monkeypatch):
    here, there = tmp_path / "here", tmp_path / "there" / "deep"
    there.mkdir(parents=True)
    (here / "run").mkdir(parents=True)
    shutil.copy(SHIPPED, here / "run" / "own.yaml")
    shutil.copytree(tiny, here / "model")
    (here / "held.txt").write_text("a red circle\n")
    monkeypatch.chdir(here)
    run = pipeline("model", "run", "prompts.exclude=held.txt", "templates=run/own.yaml")
    for stage in ("prompts", "perturb", "images"):
        run.stage(stage)
    saved = (here / "run" / "config.yaml").read_text()
    assert f"exclude: {here / 'held.txt'}\n" in saved
    assert f"model: {here / 'model'}\n" in saved
    assert "templates: ./own.yaml\n" in saved
    (here / "run").rename(there / "moved")
    monkeypatch.chdir(there.parent)
    again = load_config(["templates=deep/moved/own.yaml"], saved=Path("deep/moved/config.yaml"), family="shapes")
    assert (again.out, again.templates) == ("deep/moved", "deep/moved/own.yaml")
    reports = Pipeline(again, progress=False).run()
    assert [report.items for report in reports] == [0, 0, 0, 12, 12, 12, 12, 3]


@pytest.mark.parametrize(
    "text",
    ["2/2", "1", "a/b", "-1/2", "\u00b2/3", "\u0663/4", "0/\u0664", "1/" + "9" * 5000, "1/" + "9" * 19, "+0/2", ""],
)
def test_shard_that_does_not_parse(text):
    with pytest.raises(UsageError, match="i/n"):
        Shard.parse(text)


def test_shards_divide_the_items():
    shards = [Shard.parse(f"{i}/3") for i in range(3)]
    assert all(sum(shard.holds(str(n)) for shard in shards) == 1 for n in range(100))


def test_without_masks(tiny, script, tmp_path):
    pipeline(tiny, tmp_path, "preset=v1").run()
    assert not (tmp_path / "masks.jsonl").exists()
    assert (tmp_path / "train" / "done.json").exists()


def test_rule_v2(whole, tiny, script, tmp_path):
    """An item with a prompt that is too long, or with unreadable codes, has no pair. Other items are unaffected."""
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    settings = ["preset=v2", "select.margin=0.9", "select.rejected=negative"]
    pipeline(tiny, tmp_path, *settings, resume=False).stage("select")
    before = {record["item_id"]: record for record in read_stage(tmp_path, "select")}
    kept = [record for record in before.values() if record["kept"]]
    assert kept
    for record in kept:
        pair = record["pairs"][0]
        name = next(k for k, v in record["negative_metadata"].items() if v["path"] == pair["rejected"])
        assert pair["rejected_prompt"] == record["negative_prompt"][int(name[-1])]
    # Log-probabilities decide only where several hard negatives are left.
    several = [record for record in kept if sum(v["kept"] for v in record["negative_metadata"].values()) > 1]
    assert len(several) >= 3
    long, torn = several[0]["item_id"], several[1]["item_id"]
    (tmp_path / several[1]["pairs"][0]["chosen"]).with_suffix(".npz").write_bytes(b"PK\x03\x04 half")
    for stage in WRITERS[: WRITERS.index("select")]:
        path = tmp_path / f"{stage}.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        for line in lines:
            if line["item_id"] == long:
                line["prompt"] += " and a red circle" * 400
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert pipeline(tiny, tmp_path, *settings, resume=False).stage("select").items == 12
    after = {record["item_id"]: record for record in read_stage(tmp_path, "select")}
    assert not after[long]["kept"]
    assert "tokens" in after[long]["reason"]
    assert not after[torn]["kept"]
    assert "Cannot read the codes" in after[torn]["reason"]
    assert all(after[item] == before[item] for item in before if item not in (long, torn))


def test_failed_items_are_counted_and_named(whole, tiny, script, tmp_path, caplog):
    shutil.copytree(whole, tmp_path / "run")
    run = pipeline(tiny, tmp_path / "run", resume=False)
    first = next(iter(read_stage(tmp_path / "run", "questions")))
    path = tmp_path / "run" / first["base_metadata"]["base_0"]["path"]
    path.write_bytes(path.read_bytes()[:60])
    report = run.stage("score")
    assert (report.items, report.failed) == (12, 1)
    assert f"score: 1 of 12 items failed: {first['item_id']}: Cannot read the image {path}" in caplog.text
    assert stage_metrics(tmp_path / "run")["score"]["failed"] == 1
    run = pipeline(tiny, tmp_path / "run")
    assert [run.stage(stage).failed for stage in ("score", "select", "masks", "train")] == [0, 0, 0, 0]


def test_peak_memory_of_a_stage_is_its_own(whole, tiny, script, tmp_path, monkeypatch):
    """Memory that an earlier stage used and freed does not count for a later one."""
    shutil.copytree(whole, tmp_path / "run")
    from ospo_fast.stages import score as module

    original = module.run

    def wasteful(records, model, settings, **rest):
        held = bytearray(600 * 2**20)
        yield from original(records, model, settings, **rest)
        del held

    monkeypatch.setattr(module, "run", wasteful)
    run = pipeline(tiny, tmp_path / "run", resume=False)
    score, select = run.stage("score"), run.stage("select")
    assert score.peak_mb > 600
    assert select.peak_mb < score.peak_mb - 500
    metrics = stage_metrics(tmp_path / "run")
    assert metrics["score"]["peak_mb"] == score.peak_mb
    assert metrics["select"]["peak_mb"] == select.peak_mb


def test_the_clock_of_training_starts_at_its_first_step(tiny, tmp_path, monkeypatch):
    """The evaluation before it takes longer than many steps."""
    now = [0.0]
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    pipeline = Pipeline(config(tiny, tmp_path), progress=True)
    with pipeline._bar(find_stage("train"), 10) as bar:
        bar.set_postfix_str("evaluating before the first step", refresh=True)
        now[0] = 100.0
        _begin_steps(bar, 4)  # of a run that is resumed
        for _ in range(2):
            now[0] += 3.0
            bar.update(1)
        shown = bar.format_dict
    assert (shown["n"], shown["elapsed"]) == (6, 6.0)
    assert "6/10 [00:06<00:12,  3.00s/step" in str(bar)


def test_training_shows_no_bar_with_json(tiny, tmp_path, capsys):
    with Pipeline(config(tiny, tmp_path), progress=False)._bar(find_stage("train"), 10) as bar:
        bar.set_postfix_str("evaluating before the first step", refresh=True)
        _begin_steps(bar, 4)
    assert capsys.readouterr().err == ""


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    """Settings of models that write questions and answer them in place of the run's own."""
    folder = tmp_path_factory.mktemp("others")
    speaker = tiny_chat.save_speaker(folder / "speaker", "is there a red circle ?")
    judge = tiny_chat.save("llava", folder / "judge")
    return [f"questions.model={speaker}", f"score.model={judge}", "select.rule=random"]


FIRST_STAGES = STAGE_NAMES[: STAGE_NAMES.index("select") + 1]


@pytest.fixture(scope="module")
def by_others(scripted, tiny, others, tmp_path_factory):
    """An uninterrupted run from its start to its pairs."""
    out = tmp_path_factory.mktemp("by-others")
    with pytest.MonkeyPatch.context() as patch:
        scripted.install(patch.setattr)
        pipeline(tiny, out, *others).run(FIRST_STAGES)
    return out


def test_other_models_run_stages(whole, by_others, others):
    for name in ("prompts", "perturb", "images"):
        assert (by_others / f"{name}.jsonl").read_bytes() == (whole / f"{name}.jsonl").read_bytes()
    records = read_stage(by_others, "select")
    assert {tuple(record["question"]) for record in records} == {("is there a red circle ?",)}
    verdicts = [verdict for record in records for verdict in record["base_metadata"].values()]
    assert len({verdict["local_score"] for verdict in verdicts}) > 5
    assert all(record["pairs"] for record in records)
    judge = ChatModel(others[1].partition("=")[2])
    image = Image.open(by_others / verdicts[0]["path"])
    asked = [{"role": "user", "content": "is there a red circle ? Please answer 'yes' or 'no' without explanation."}]
    found = judge.answer(judge.encode(image, asked), (judge.yes_ids, judge.no_ids))
    (answer,) = verdicts[0]["answer_metadata"]
    assert [answer["p_yes"], answer["p_no"]] == pytest.approx(found, abs=1e-6)
    costs = {row["stage"]: row["cost"] for row in json.loads((by_others / "stages.json").read_text())}
    assert costs["questions"]["flops"] is None
    assert costs["questions"]["tokens"] > 100


def test_stages_of_other_models_resume(by_others, tiny, others, script, tmp_path, monkeypatch):
    append, made = Store.append, []

    def stopping(store, record):
        if len(made) in stops:
            stops.remove(len(made))
            raise KeyboardInterrupt
        made.append(record)
        append(store, record)

    stops = [40, 54]  # within questions and score
    monkeypatch.setattr(Store, "append", stopping)
    monkeypatch.setattr("ospo_fast.stages.questions.CHUNK", 2)
    monkeypatch.setattr("ospo_fast.stages.score.CHUNK", 2)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            pipeline(tiny, tmp_path, *others).run(FIRST_STAGES)
    pipeline(tiny, tmp_path, *others).run(FIRST_STAGES)
    assert not stops
    for name in FIRST_STAGES:
        assert (tmp_path / f"{name}.jsonl").read_bytes() == (by_others / f"{name}.jsonl").read_bytes()


def test_a_stage_of_another_model_loads_that_one_alone_and_frees_it(by_others, tiny, others, tmp_path, monkeypatch):
    shutil.copytree(by_others, tmp_path, dirs_exist_ok=True)
    for name in ("questions", "score", "select"):
        store_path(tmp_path, name).unlink()
    opened = []
    original = chat.open_text_model
    monkeypatch.setattr(
        chat, "open_text_model", lambda name, *rest, **given: opened.append(name) or original(name, *rest, **given)
    )
    monkeypatch.setattr(Pipeline, "model", lambda *_: pytest.fail("the run's own model was loaded"))
    run = pipeline(tiny, tmp_path, *others)
    for name in ("questions", "score", "score"):
        run.stage(name)
        assert run._other is None
    assert opened == [setting.partition("=")[2] for setting in others[:2]]
    assert (tmp_path / "score.jsonl").read_bytes() == (by_others / "score.jsonl").read_bytes()


def test_another_model_cannot_change_in_the_middle_of_a_stage(by_others, tiny, others, tmp_path):
    shutil.copytree(by_others, tmp_path, dirs_exist_ok=True)
    with pytest.raises(UsageError, match=r"score was made with score.model=.*judge, now score.model=None"):
        pipeline(tiny, tmp_path, others[0], others[2]).stage("score")


def test_a_finished_stage_does_not_need_its_model_any_more(by_others, tiny, others, tmp_path):
    shutil.copytree(by_others, tmp_path, dirs_exist_ok=True)
    gone = [f"{setting}-gone" for setting in others[:2]]
    saved = json.loads((tmp_path / "settings.json").read_text())
    for setting in gone:
        key, _, path = setting.partition("=")
        saved[key.partition(".")[0]]["settings"][key] = path
    (tmp_path / "settings.json").write_text(json.dumps(saved))
    reports = pipeline(tiny, tmp_path, *gone, others[2]).run(FIRST_STAGES)
    assert [report.items for report in reports] == [0] * len(FIRST_STAGES)
    with pytest.raises(OspoError, match=r"^questions.model: there is no folder"):
        pipeline(tiny, tmp_path, *gone, others[2], resume=False).run(FIRST_STAGES)


def test_another_model_inside_of_the_run_folder_moves_with_it(by_others, tiny, others, tmp_path):
    run, moved = tmp_path / "run", tmp_path / "moved"
    shutil.copytree(by_others, run)
    shutil.copytree(others[1].partition("=")[2], run / "judge")
    (run / "score.jsonl").unlink()
    pipeline(tiny, run, others[0], f"score.model={run / 'judge'}", others[2], resume=False).stage("score")
    run.rename(moved)
    assert "  model: ./judge\n" in (moved / "config.yaml").read_text()
    saved = load_config([f"out={moved}"], saved=moved / "config.yaml", family="shapes")
    assert saved.score.model == str(moved / "judge")
    assert Pipeline(saved, progress=False).stage("score").items == 0


@pytest.mark.parametrize("name", ["questions", "score", "perturb", "prompts"])
def test_another_model_is_checked_before_the_run_begins(tiny, others, tmp_path, name):
    def refused(value, words):
        with pytest.raises(OspoError, match=f"^{name}.model: {words}"):
            pipeline(tiny, tmp_path / "run", f"{name}.model={value}").run()
        assert not (tmp_path / "run").exists() or not list((tmp_path / "run").iterdir())

    refused(tmp_path / "none", "there is no folder")
    (tmp_path / "clip").mkdir()
    (tmp_path / "clip" / "config.json").write_text('{"model_type": "clip", "vision_config": {}}')
    (tmp_path / "clip" / "model.safetensors").write_bytes(b"")
    refused(tmp_path / "clip", ".* is a 'clip' model, which writes no answers; name a")
    if name == "score":
        refused(others[0].partition("=")[2], ".* is a 'llama' model without an image input")


def test_another_unified_model_runs_stages_as_its_own_run_does(whole, tiny, script, tmp_path, monkeypatch):
    """The own model only generates the images, and need not chat."""
    own = tmp_path / "own"
    shutil.copytree(tiny, own)

    def check_chat(model):
        if model.name == str(own):
            raise OspoError("model: it only generates images")

    monkeypatch.setattr("ospo_fast.models.adapter.Adapter.check_chat", check_chat)
    names = ("prompts", "perturb", "questions", "score")
    others = [f"{name}.model={tiny}" for name in names]
    with pytest.raises(OspoError, match="it only generates images"):
        pipeline(own, tmp_path / "run", *others[1:]).run(FIRST_STAGES)
    run = pipeline(own, tmp_path / "run", *others)
    run.run(FIRST_STAGES)
    for name in FIRST_STAGES:
        assert (tmp_path / "run" / f"{name}.jsonl").read_bytes() == (whole / f"{name}.jsonl").read_bytes()
    saved = json.loads((tmp_path / "run" / "settings.json").read_text())
    assert [saved[name]["settings"]["model"] for name in names] == [None] * 4
    assert saved["images"]["settings"]["model"] == str(own)


def test_prompts_of_another_template_set_are_counted_by_it(tiny, others, tmp_path):
    speaker = others[0].partition("=")[2]
    plan = find_stage("prompts").plan
    own, other, set_by_name = (
        plan(None, load_config([f"prompts.model={name}", *more]), None)
        for name, more in ((tiny, []), (speaker, []), (speaker, ["templates=shapes"]))
    )
    assert own == set_by_name < other
    (tmp_path / "prompts.txt").write_text("a red circle\n")
    given = pipeline(tiny, tmp_path, f"prompts.model={tmp_path / 'none'}", f"prompts.file={tmp_path / 'prompts.txt'}")
    given.check_settings(["prompts"])  # which no model writes

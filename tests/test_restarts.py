"""Starting over: what a stage or a run replaces, next to shards, other processes, and files that are not its own."""

import contextlib
import errno
import itertools
import json
import os
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ospo_fast import records, restarts
from ospo_fast.cli import main
from ospo_fast.config import load_config
from ospo_fast.errors import Failure, OspoError, UsageError
from ospo_fast.pipeline import Pipeline, Shard, read_stage
from ospo_fast.records import Store, only_user, read_records
from ospo_fast.stages import STAGE_NAMES, find_stage
from ospo_fast.stages.image_files import load_codes

pytestmark = pytest.mark.usefixtures("omegaconf")

COUNTS = "prompts.counts={color1: 1, shape1: 1, color2: 1, 2D_spatial: 1, numeracy1: 1, numeracy2: 1}"
SMALL = [COUNTS, "train.steps=1", "train.batch_size=2", "train.eval_every=0", "masks.layers=[0]"]


def pipeline(tiny, out, *overrides, **settings):
    config = load_config([*SMALL, f"model={tiny}", f"out={out}", *overrides], family="shapes")
    return Pipeline(config, progress=False, **settings)


@pytest.fixture(scope="module")
def scored(scripted, tiny, tmp_path_factory):
    """The folder of a run up to its score stage."""
    out = tmp_path_factory.mktemp("scored")
    with pytest.MonkeyPatch.context() as patch:
        scripted.install(patch.setattr)
        pipeline(tiny, out).run(STAGE_NAMES[: STAGE_NAMES.index("score") + 1])
    return out


@pytest.fixture
def out(scored, tmp_path):
    return Path(shutil.copytree(scored, tmp_path / "out"))


def back_to(out, stage):
    """Delete what the stages after `stage` made."""
    names = STAGE_NAMES[: STAGE_NAMES.index(stage) + 1]
    for path in restarts.made_by(out, [find_stage(name) for name in STAGE_NAMES if name not in names]):
        restarts.delete(path)
    settings = json.loads((out / "settings.json").read_text())
    (out / "settings.json").write_text(json.dumps({name: settings[name] for name in settings if name in names}))


def visible(out):
    paths = (path.relative_to(out) for path in sorted(out.rglob("*")) if path.is_file())
    return {str(path): (out / path).read_bytes() for path in paths if not any(p.startswith(".") for p in path.parts)}


hold = restarts.RunLock.hold


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    monkeypatch.setattr(restarts, "_PATIENCE", 1.0)


class StoppedError(Exception):
    pass


def stopped(function):
    def stop(*arguments):
        raise StoppedError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(restarts, "_move", stop)
        with pytest.raises(StoppedError):
            function()


@contextlib.contextmanager
def stopped_after(records):
    """Stop a block at the record after so many."""
    append, count = Store.append, itertools.count()

    def stop(self, record):
        if next(count) >= records:
            raise StoppedError
        append(self, record)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Store, "append", stop)
        with pytest.raises(StoppedError):
            yield


def test_a_shard_replaces_the_files_of_its_items(tiny, script, tmp_path, out):
    back_to(out, "perturb")
    for index in (0, 1):
        pipeline(tiny, out, shard=Shard(index, 2)).stage("images")
    before = visible(out)
    other = pipeline(tiny, out, "images.temperature=0.5", shard=Shard(0, 2), resume=False)
    with pytest.raises(UsageError, match=r"images\.1-of-2 was made with images\.temperature"):
        other.stage("images")
    (out / "images.1-of-2.jsonl").unlink()
    settings = json.loads((out / "settings.json").read_text())
    del settings["images.1-of-2"]
    (out / "settings.json").write_text(json.dumps(settings))
    other.stage("images")
    changed = 0
    for record in read_records(out / "images.0-of-2.jsonl"):
        for verdict in (record["base_metadata"] | record["negative_metadata"]).values():
            assert load_codes((out / verdict["path"]).with_suffix(".npz"))["temperature"] == 0.5
            changed += (out / verdict["path"]).read_bytes() != before[verdict["path"]]
    assert changed
    assert visible(out).keys() >= before.keys() - {"images.1-of-2.jsonl"}  # images of the other shard stay
    assert not list(out.glob(".restart*"))


def test_masks_of_a_shard_that_starts_over(tiny, script, out):
    pipeline(tiny, out).stage("select")
    for index in (0, 1):
        pipeline(tiny, out, shard=Shard(index, 2)).stage("masks")
    diagnostics = (out / "masks" / "diagnostics.json").read_bytes()
    shutil.rmtree(out / "masks")  # so that what is there below is new
    pipeline(tiny, out, shard=Shard(1, 2), resume=False).stage("masks")
    masked = [
        pair for r in read_records(out / "masks.1-of-2.jsonl") for pair in r.get("pairs", ()) if "mask_path" in pair
    ]
    assert masked
    assert all((out / pair["mask_path"]).exists() for pair in masked)
    assert (out / "masks" / "diagnostics.json").read_bytes() == diagnostics  # of both shards


def test_a_shard_does_not_replace_what_later_stages_used(tiny, script, out):
    back_to(out, "perturb")
    pipeline(tiny, out, shard=Shard(0, 1)).stage("images")
    pipeline(tiny, out, shard=Shard(0, 1)).stage("questions")
    before = visible(out)
    with pytest.raises(UsageError, match=r"questions\.0-of-1\.jsonl was made of results of images that a shard would"):
        pipeline(tiny, out, "images.temperature=0.5", shard=Shard(0, 1), resume=False).stage("images")
    assert visible(out) == before


def test_files_of_other_names_are_no_shards(tiny, script, out):
    copy = out / "score.copy-of-first.jsonl"
    shutil.copy(out / "score.jsonl", copy)
    folder = out / ".restart.score_backup"
    folder.mkdir()
    (folder / "file").write_text("mine")
    before = copy.read_bytes()
    pipeline(tiny, out).stage("score")
    pipeline(tiny, out, "score.batch_size=2", resume=False).stage("score")
    assert copy.read_bytes() == before
    assert (folder / "file").exists()


def test_nothing_starts_over_while_a_stage_has_read_its_inputs(tiny, script, out, monkeypatch):
    """A stage whose store is not there yet holds no lock of it."""
    begin, refused = Pipeline._begin, []

    def during(self, *arguments):
        if not refused:
            with pytest.raises(
                OspoError,
                match=r"out is in use by another process \(.*, process \d+ on .*\); wait for it, or give",
            ) as e:
                pipeline(tiny, out, "images.temperature=0.5", resume=False).stage("images")
            refused.append(str(e.value))
        begin(self, *arguments)

    monkeypatch.setattr(Pipeline, "_begin", during)
    pipeline(tiny, out).stage("select")
    assert refused


def test_no_stage_reads_what_is_being_replaced(tiny, script, out, monkeypatch):
    refused = []

    def during(self, *arguments):
        if not refused:
            refused.append(self)
            with pytest.raises(OspoError, match="out is in use by another process"):
                pipeline(tiny, out).stage("select")
        return append(self, *arguments)

    append = Store.append
    monkeypatch.setattr(Store, "append", during)
    pipeline(tiny, out, "score.batch_size=2", resume=False).stage("score")
    assert refused


def test_a_refused_process_changes_no_configuration(tiny, script, out):
    pipeline(tiny, out).stage("select")
    lines = (out / "select.jsonl").read_bytes().splitlines(keepends=True)
    (out / "select.jsonl").write_bytes(lines[0])
    before = visible(out)
    with only_user(out / "select.jsonl"), pytest.raises(OspoError, match="is being written by another process"):
        pipeline(tiny, out, "train.learning_rate=0.5").stage("select")
    assert visible(out) == before


@pytest.mark.parametrize("call", ["missing input", "unknown item"])
def test_an_unfinished_start_is_kept_until_the_new_one_is_checked(tiny, script, out, call):
    with stopped_after(2):
        pipeline(tiny, out, "score.batch_size=1", resume=False).stage("score")
    work = out / ".restart.score"
    before = (work / "score.jsonl").read_bytes()
    assert before
    source = out / f"{find_stage('score').inputs(pipeline(tiny, out).config)}.jsonl"
    if call == "missing input":
        source.unlink()
        with pytest.raises(UsageError, match=rf"There is no {source.name}"):
            pipeline(tiny, out, "score.batch_size=1", resume=False).stage("score")
    else:
        known = json.loads(before.splitlines()[0])["item_id"]
        lines = source.read_bytes().splitlines(keepends=True)
        source.write_bytes(b"".join(line for line in lines if json.loads(line)["item_id"] != known))
        with pytest.raises(UsageError, match=rf"has the item '{known}', which {source.name} does not have any more"):
            pipeline(tiny, out, "score.batch_size=1").stage("score")
    assert (work / "score.jsonl").read_bytes() == before


def test_a_run_that_was_whole_is_put_in_place_before_a_stage_of_an_iteration(tiny, script, tmp_path):
    out = tmp_path / "out"
    run = ["iterations=2", "prompts.counts={color2: 2}"]
    pipeline(tiny, out, *run).run()
    stopped(lambda: pipeline(tiny, out, *run, "images.temperature=0.5", resume=False).run())
    assert (out / ".restart" / ".whole.json").exists()
    settings = (*run, "images.temperature=0.5", "train.learning_rate=1e-4")
    pipeline(tiny, out, *settings, resume=False).stage("train", 2)
    done = (out / "iter2" / "train" / "done.json").read_bytes()
    assert not (out / ".restart").exists()
    pipeline(tiny, out, *settings).stage("score")
    assert (out / "iter2" / "train" / "done.json").read_bytes() == done


@pytest.mark.parametrize("shard", [None, Shard(0, 2)])
def test_links_in_an_unfinished_start_are_refused(tiny, script, out, tmp_path, shard):
    mine = tmp_path / "mine"
    mine.mkdir()
    work = restarts.folder(out, find_stage("images"), shard)
    work.mkdir()
    shutil.copy(out / "settings.json", work)
    (work / "images").symlink_to(mine)
    with pytest.raises(OspoError, match="images is a symbolic link"):
        pipeline(tiny, out, shard=shard).stage("images")
    assert not list(mine.iterdir())


def test_a_killed_write_of_diagnostics_leaves_nothing(tiny, script, out):
    """Also where the stage is complete, and begins no more."""
    pipeline(tiny, out).run(["select", "masks"])
    left = out / "masks" / ".diagnostics.json.0123456789abcdef.tmp"
    left.write_text("{")
    pipeline(tiny, out).stage("masks")
    assert not left.exists()


def test_an_inaccessible_folder_is_an_error_of_the_package(tiny, tmp_path):
    for out in (tmp_path / ("x" * 300), tmp_path / "file" / "out"):
        (tmp_path / "file").touch()
        for call in (lambda run: run.stage("prompts"), Pipeline.run):
            with pytest.raises(OspoError, match=r"Cannot (use|read|write) "):
                call(pipeline(tiny, out))
    with contextlib.suppress(OspoError):
        assert not read_stage(tmp_path, "prompts")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def half_deleted(patch, name="images"):
    """Let the deletion of a folder stop after it has deleted its part `name`."""

    def stop(folder):
        shutil.rmtree(folder / name, ignore_errors=True)
        raise StoppedError

    patch.setattr(records, "delete", stop)


@pytest.mark.parametrize("stage", ["images", "run"])
def test_an_unfinished_start_that_was_half_deleted_is_not_continued(tiny, script, tmp_path, stage):
    out = tmp_path / "out"
    settings = ("images.temperature=0.5", "train.learning_rate=1e-3")
    pipeline(tiny, out).run()
    before = visible(out)

    def call(*overrides, **more):
        run = pipeline(tiny, out, *overrides, **more)
        return run.run() if stage == "run" else run.stage(stage)

    with stopped_after(3 if stage == "images" else 20):
        call(*settings, resume=False)
    with pytest.MonkeyPatch.context() as patch:
        half_deleted(patch)
        with pytest.raises(StoppedError):
            call(*settings, resume=False)
    assert visible(out) == before
    call()  # the old ones are whole, and what was half deleted is swept
    assert visible(out) == before
    assert not list(out.glob(".restart*")) + list(out.glob("*.tmp")) + list(out.glob(".*.tmp"))
    call(*settings, resume=False)
    for record in read_records(out / "images.jsonl"):
        for verdict in (record["base_metadata"] | record["negative_metadata"]).values():
            assert load_codes((out / verdict["path"]).with_suffix(".npz"))["temperature"] == 0.5


@pytest.mark.parametrize("stage", ["images", "run"])
def test_starting_over_on_nfs(tiny, script, tmp_path, monkeypatch, stage):
    """NFS gives a file that is deleted while it is open another name, so that its folder cannot be deleted."""
    unlink, numbers = os.unlink, itertools.count()

    def silly(path, *, dir_fd=None):
        removed = os.stat(path, dir_fd=dir_fd, follow_symlinks=False)
        for handle in Path("/proc/self/fd").iterdir():
            with contextlib.suppress(OSError):
                if os.path.samestat(os.fstat(int(handle.name)), removed):
                    other = (
                        f".nfs{next(numbers)}" if dir_fd is not None else Path(path).with_name(f".nfs{next(numbers)}")
                    )
                    return os.rename(path, other, src_dir_fd=dir_fd, dst_dir_fd=dir_fd)
        return unlink(path, dir_fd=dir_fd)

    out, iterations = tmp_path / "out", ("iterations=2", "prompts.counts={color2: 2}")
    pipeline(tiny, out, *iterations).run()
    monkeypatch.setattr(os, "unlink", silly)
    for temperature in (0.5, 0.6):
        run = pipeline(tiny, out, *iterations, f"images.temperature={temperature}", resume=False)
        run.run() if stage == "run" else run.stage("images")
    assert not list(out.glob(".restart*"))
    if stage == "run":
        reports = pipeline(tiny, out, *iterations, "images.temperature=0.6").run()
        assert not any(report.items for report in reports)


def test_a_complete_run_in_a_folder_that_cannot_be_written(tiny, script, out, monkeypatch):
    opened = os.open

    def read_only(path, flags, *rest, **more):
        if flags & (os.O_RDWR | os.O_CREAT):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return opened(path, flags, *rest, **more)

    for lock in (True, False):
        if not lock:
            (out / ".stages.lock").unlink()
        with monkeypatch.context() as patch:
            patch.setattr(os, "open", read_only)
            assert pipeline(tiny, out).stage("images").items == 0


def test_a_run_that_starts_over_continues_with_another_batch_size(tiny, script, out):
    pipeline(tiny, out).run()
    with stopped_after(20):
        pipeline(tiny, out, "images.temperature=0.5", resume=False).run()
    pipeline(tiny, out, "images.temperature=0.5", "images.batch_size=1").run()
    assert "temperature: 0.5" in (out / "config.yaml").read_text()
    assert not (out / ".restart").exists()


def test_folders_without_a_lock_get_one(tiny, script, out, monkeypatch):
    """Those of earlier versions, and copies without hidden files."""
    (out / ".stages.lock").unlink()
    test_nothing_starts_over_while_a_stage_has_read_its_inputs(tiny, script, out, monkeypatch)


def test_links_and_other_folders_get_no_lock(tiny, script, out, tmp_path):
    victim, notes = tmp_path / "victim", out / "iter_notes"
    victim.mkdir()
    notes.mkdir()
    (out / "iter9").symlink_to(victim)
    pipeline(tiny, out, "images.temperature=0.5", resume=False).run()
    assert not list(victim.iterdir()) + list(notes.iterdir())


def test_a_shard_that_starts_over_is_not_continued_after_the_shards_are_merged(tiny, script, out):
    back_to(out, "perturb")
    for index in (0, 1):
        pipeline(tiny, out, shard=Shard(index, 2)).stage("images")
    with stopped_after(1):
        pipeline(tiny, out, shard=Shard(0, 2), resume=False).stage("images")
    pipeline(tiny, out).stage("images")  # merges them
    before = visible(out)
    assert pipeline(tiny, out, shard=Shard(0, 2)).stage("images").items == 0
    assert visible(out).keys() - {"images.0-of-2.jsonl"} == before.keys()


@pytest.mark.parametrize("kind", ["place", "folder in it", "source"])
def test_what_was_whole_is_not_put_in_place_through_links(tiny, script, tmp_path, out, kind):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "file").write_text("mine")
    work = out / ".restart.images.0-of-1"
    (work / ("images/x" if kind == "folder in it" else "" if kind == "source" else "images")).mkdir(parents=True)
    (work / ".whole.json").write_text('["images"]')
    if kind == "source":
        (work / "images").symlink_to(mine)
    elif kind == "place":
        (work / "images" / "file").write_text("of someone else")
        shutil.rmtree(out / "images")
        (out / "images").symlink_to(mine)
    else:
        (work / "images" / "x" / "file").write_text("of someone else")
        (out / "images" / "x").symlink_to(mine)
    with pytest.raises(OspoError, match="is a symbolic link"):
        pipeline(tiny, out).stage("score")
    assert {path.name: path.read_text() for path in mine.iterdir()} == {"file": "mine"}


@contextlib.contextmanager
def during(patch, owner, name, call):
    """Call `call` once, before the method `name` does its work: as another process would at that time."""
    method, calls = getattr(owner, name), []

    def wrapped(self, *arguments, **settings):
        if not calls:
            calls.append(None)
            call()
        return method(self, *arguments, **settings)

    with patch.context() as inner:
        inner.setattr(owner, name, wrapped)
        yield
    assert calls


def refused(call):
    with pytest.raises(OspoError, match=r"is in use by another process.*; wait for it, or give this one another --out"):
        call()


def test_one_process_uses_a_run_folder_with_its_iterations(tiny, script, tmp_path, monkeypatch):
    out = tmp_path / "out"
    pipeline(tiny, out).run()
    before = visible(out)

    def others():
        refused(pipeline(tiny, out, "images.temperature=0.5", resume=False).run)
        refused(lambda: pipeline(tiny, out, resume=False).stage("train"))
        refused(lambda: pipeline(tiny, out, shard=Shard(0, 2)).stage("images"))
        refused(pipeline(tiny, out, "iterations=2").run)

    with during(monkeypatch, Store, "append", others):
        assert pipeline(tiny, out, "iterations=2").stage("prompts", 2).items == 6
    with during(monkeypatch, Pipeline, "model", others):  # also before anything is written
        pipeline(tiny, out, "iterations=2").stage("perturb", 2)
    after = visible(out)
    assert {name: after[name] for name in before} == {**before, "config.yaml": after["config.yaml"]}


def test_what_a_later_iteration_made_of_a_replaced_training_goes(tiny, script, tmp_path):
    out = tmp_path / "out"
    pipeline(tiny, out).run()
    pipeline(tiny, out, "iterations=2").stage("prompts", 2)
    shutil.copytree(out / "iter2", out / "iter3")
    (out / "iter2" / "prompts.jsonl").unlink()
    pipeline(tiny, out, "iterations=3", resume=False).stage("prompts", 2)  # nothing was made of it
    assert (out / "iter2" / "prompts.jsonl").exists()
    assert (out / "iter3").exists()
    pipeline(tiny, out, "iterations=3", resume=False).stage("prompts", 2)
    assert not (out / "iter3").exists()
    pipeline(tiny, out, "iterations=2", "train.learning_rate=0.01", resume=False).stage("train")
    assert not (out / "iter2").exists()


@pytest.mark.parametrize("whole", [True, False])
def test_what_another_process_begins_in_an_empty_folder_stays(tiny, script, tmp_path, monkeypatch, whole):
    out = tmp_path / "out"

    def other():
        with contextlib.nullcontext() if whole else stopped_after(2):
            pipeline(tiny, out, "prompts.temperature=0.5").stage("prompts")
        other.made = visible(out)

    with (
        during(monkeypatch, Pipeline, "model", other),
        pytest.raises(OspoError, match=r"Another process has just written to .*out; run the command again"),
    ):
        pipeline(tiny, out).stage("prompts")
    assert visible(out) == other.made


def test_shards_that_begin_at_once_have_the_same_settings(tiny, script, out, monkeypatch):
    back_to(out, "perturb")

    def other():
        pipeline(tiny, out, "images.temperature=0.5", shard=Shard(0, 2)).stage("images")
        other.made = visible(out)

    with (
        during(monkeypatch, Pipeline, "model", other),
        pytest.raises(UsageError, match=r"images\.0-of-2 was made with"),
    ):
        pipeline(tiny, out, shard=Shard(1, 2)).stage("images")
    assert visible(out) == other.made


def test_the_same_shard_that_starts_over_twice(tiny, script, out, monkeypatch):
    back_to(out, "perturb")
    pipeline(tiny, out, shard=Shard(1, 2)).stage("images")
    shard = {"shard": Shard(0, 2)}

    def others():
        for resume in (True, False):
            with pytest.raises(OspoError, match=r"images\.0-of-2\.jsonl is being written by another process; wait"):
                pipeline(tiny, out, **shard, resume=resume).stage("images")

    for resume in (False, True):
        with during(monkeypatch, Store, "append", others), stopped_after(1) if not resume else contextlib.nullcontext():
            pipeline(tiny, out, **shard, resume=resume).stage("images")
    assert not list(out.glob(".restart*"))
    assert pipeline(tiny, out).stage("images").items == 0
    assert pipeline(tiny, out).stage("questions").items == 6


@pytest.mark.parametrize("resume", [True, False])
def test_a_shard_that_another_process_has_just_finished(tiny, script, out, monkeypatch, resume):
    back_to(out, "perturb")
    pipeline(tiny, out, shard=Shard(1, 2)).stage("images")
    with stopped_after(1):
        pipeline(tiny, out, shard=Shard(0, 2), resume=False).stage("images")

    def other():
        pipeline(tiny, out, shard=Shard(0, 2)).stage("images")

    with (
        during(monkeypatch, Pipeline, "model", other),
        pytest.raises(OspoError, match=r"Another process has just written .*images\.0-of-2\.jsonl"),
    ):
        pipeline(tiny, out, shard=Shard(0, 2), resume=resume).stage("images")
    assert pipeline(tiny, out).stage("questions").items == 6


def test_the_same_shard_twice(tiny, script, out, monkeypatch):
    back_to(out, "perturb")

    def other():
        pipeline(tiny, out, shard=Shard(0, 2)).stage("images")

    with during(monkeypatch, Pipeline, "model", other), pytest.raises(OspoError, match="Another process has just"):
        pipeline(tiny, out, shard=Shard(0, 2)).stage("images")


@pytest.mark.parametrize("first", ["starts over", "uses"])
def test_a_shard_does_not_replace_what_a_later_stage_uses_meanwhile(tiny, script, out, monkeypatch, first):
    back_to(out, "perturb")
    shard = {"shard": Shard(0, 1)}
    pipeline(tiny, out, **shard).stage("images")
    before = visible(out)

    def over():
        pipeline(tiny, out, "images.temperature=0.5", **shard, resume=False).stage("images")

    def use():
        pipeline(tiny, out, **shard).stage("questions")

    if first == "starts over":
        with (
            during(monkeypatch, Store, "append", use),
            pytest.raises(UsageError, match=r"questions\.0-of-1\.jsonl was"),
        ):
            over()
        after = visible(out)
        assert {name: after[name] for name in before if name not in NOTES} == {
            name: before[name] for name in before if name not in NOTES
        }
    else:
        with during(monkeypatch, Store, "__init__", over), pytest.raises(OspoError, match=r"just replaced .*images"):
            use()
        assert not (out / "questions.0-of-1.jsonl").exists()
    assert not list(out.glob(".restart*")) or first == "starts over"


NOTES = ("settings.json", "stages.json", "config.yaml")


@pytest.mark.parametrize("shard", [None, Shard(0, 2)])
def test_a_start_that_failed_leaves_no_settings_to_the_next(tiny, script, tmp_path, monkeypatch, shard):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(Pipeline, "_measured", lambda *_: (_ for _ in ()).throw(OspoError("No space left")))
        with pytest.raises(OspoError, match="No space left"):
            pipeline(tiny, out, "prompts.temperature=0.5", shard=shard).stage("prompts")
    assert json.loads((out / "settings.json").read_text())
    pipeline(tiny, out, shard=shard, resume=False).stage("prompts")
    assert pipeline(tiny, out, shard=shard).stage("prompts").items == 0  # the settings are those of the records
    with pytest.raises(UsageError, match=r"was made with prompts\.temperature"):
        pipeline(tiny, out, "prompts.temperature=0.5", shard=shard).stage("prompts")


@pytest.mark.parametrize("shard", [None, Shard(0, 2)])
def test_a_start_without_configuration_has_no_settings(tiny, script, tmp_path, monkeypatch, shard):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(Pipeline, "_config_text", lambda _: (_ for _ in ()).throw(OspoError("No space left")))
        with pytest.raises(OspoError, match="No space left"):
            pipeline(tiny, out, "prompts.temperature=0.5", shard=shard).stage("prompts")
    assert not visible(out)
    assert pipeline(tiny, out, shard=shard).stage("prompts").items


def test_an_interrupted_lock_is_released(tiny, script, out, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(restarts.RunLock, "_lock", interrupted)
        with pytest.raises(KeyboardInterrupt):
            pipeline(tiny, out).stage("score")
    assert pipeline(tiny, out).stage("score").items == 0


def test_a_run_folder_that_is_a_link_is_finished_before_its_configuration_is_read(tiny, script, tmp_path, out):
    stopped(lambda: pipeline(tiny, out, "score.batch_size=2", resume=False).stage("score"))
    (tmp_path / "link").symlink_to(out)
    with hold(tmp_path / "link", shared=False) as lock:
        restarts.finish_run(lock)
    assert not (out / ".restart.score").exists()


def test_stages_of_several_iterations_are_not_started_over_without_the_first(tiny, script, tmp_path):
    out = tmp_path / "out"
    pipeline(tiny, out).run()
    pipeline(tiny, out, "iterations=2").stage("prompts", 2)
    before = visible(out)
    with pytest.raises(UsageError, match=r"would delete .*iter2, which they read"):
        pipeline(tiny, out, "iterations=2", resume=False).run(["select", "masks", "train"])
    assert visible(out) == before


@pytest.mark.parametrize("shards", [2, 3])
def test_shards_that_begin_at_once_finish_what_was_killed(tiny, script, out, shards):
    stopped(lambda: pipeline(tiny, out, "score.batch_size=2", resume=False).stage("score"))
    barrier = threading.Barrier(shards)

    def shard(_):
        with hold(out, shared=True) as lock:
            barrier.wait(60)
            restarts.finish_run(lock)
            barrier.wait(60)  # and each uses the folder for hours
            refused(lambda: hold(out, shared=False).__enter__())
            barrier.wait(60)

    with ThreadPoolExecutor(shards) as threads:
        list(threads.map(shard, range(shards)))
    assert not list(out.glob(".restart*"))


@pytest.mark.parametrize("by_itself", [True, False])
def test_a_killed_iteration_is_finished_as_it_was_begun(tiny, script, scored, out, monkeypatch, by_itself):
    folder = Path(shutil.copytree(scored, out / "iter2"))
    (out / "iter3").mkdir()
    stopped(lambda: pipeline(tiny, folder, "score.batch_size=2", resume=False).stage("score"))
    work = folder / ".restart.score"
    if not by_itself:
        (work / restarts._LIST).unlink()
        stopped(lambda: restarts.put_in_place(work, folder, out))
    config = {path: (path / "config.yaml").read_bytes() for path in (work, folder, out)}
    monkeypatch.chdir(folder)
    with hold(Path(), shared=False) as lock:
        restarts.finish(lock, Path())
    assert not work.exists()
    assert (out / "iter3").exists() == by_itself
    place, other = (folder, out) if by_itself else (out, folder)
    assert (place / "config.yaml").read_bytes() == config[work] != config[place]
    assert (other / "config.yaml").read_bytes() == config[other]


def test_a_refused_shard_that_catches_the_error_still_holds_the_lock(out):
    (out / ".stages.lock").touch()
    with hold(out, shared=True) as first:
        with hold(out, shared=True):
            refused(lambda: first.alone().__enter__())
        refused(lambda: hold(out, shared=False).__enter__())
        with first.alone():
            refused(lambda: hold(out, shared=True).__enter__())
        with hold(out, shared=True):
            pass


def test_a_forked_process_does_not_keep_the_lock(out):
    with hold(out, shared=False):
        reader, writer = os.pipe()
        if (child := os.fork()) == 0:
            os.read(reader, 1)
            os._exit(0)
    with hold(out, shared=False):
        os.write(writer, b"x")
    os.waitpid(child, 0)


def test_readers_of_a_folder_that_cannot_be_written(tiny, script, out, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)
    with hold(out, shared=False):
        assert pipeline(tiny, out).stage("score").items == 0


def test_an_iteration_by_itself_is_excluded_by_its_run(tiny, script, tmp_path):
    out = tmp_path / "out"
    pipeline(tiny, out).run()
    pipeline(tiny, out, "iterations=2").stage("prompts", 2)
    with hold(out, shared=False):
        refused(lambda: pipeline(tiny, out / "iter2").stage("perturb"))


def test_a_refused_command_leaves_no_lock(tiny, script, out):
    (out / ".stages.lock").unlink()
    (out / "images.jsonl").unlink()
    before = sorted(out.rglob("*"))
    with pytest.raises(UsageError, match=r"There is no images\.jsonl"):
        pipeline(tiny, out, resume=False).stage("questions")
    assert sorted(out.rglob("*")) == before


def test_commands_hold_the_lock_before_they_read_the_configuration(tiny, script, out, capsys):
    before = visible(out)
    with hold(out, shared=False):
        for command in ("run", "score", "demo"):
            assert main([command, "--out", str(out), "--no-resume", "--model", str(tiny)]) == 1
            assert "out is in use by another process" in capsys.readouterr().err
    assert visible(out) == before


def test_an_error_of_the_caller_is_its_own(tiny, script, out):
    def broken(_):
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    for settings in ({}, {"resume": False}):
        with pytest.raises(BrokenPipeError):
            pipeline(tiny, out, **settings).run(["prompts"], on_report=broken)


def test_locks_that_are_one_file_are_named(tiny, script, out):
    (out / ".lock").unlink()
    os.link(out / ".stages.lock", out / ".lock")
    with pytest.raises(OspoError, match=r"\.lock is a hard link of another lock"):
        pipeline(tiny, out).stage("select")


def test_other_processes_do_not_sweep_what_is_being_deleted(tmp_path, monkeypatch):
    folder = tmp_path / "folder"
    (folder / "inner").mkdir(parents=True)
    rmtree, left = shutil.rmtree, []

    def sweep_first(path, *arguments, **settings):
        if not left:
            left.append(None)
            records.sweep_temporary_files(tmp_path)
            left[0] = (path / "inner").exists()
        rmtree(path, *arguments, **settings)

    monkeypatch.setattr(shutil, "rmtree", sweep_first)
    records.discard(folder)
    assert left == [True]
    assert not list(tmp_path.iterdir())


def test_a_run_that_starts_over_sweeps_its_folder(tiny, script, out):
    (out / ".restart.0123456789abcdef.tmp").mkdir()
    (out / ".settings.json.0123456789abcdef.tmp").write_text("{")
    pipeline(tiny, out, resume=False).run(["prompts", "perturb"])
    assert not list(out.glob(".*.tmp"))


def test_files_of_any_name_in_an_unfinished_start(tiny, script, out):
    with stopped_after(2):
        pipeline(tiny, out, resume=False).stage("score")
    Path(os.fsdecode(os.fsencode(out / ".restart.score") + b"/\xff")).touch()
    pipeline(tiny, out).stage("score")
    assert not (out / ".restart.score").exists()


@pytest.mark.parametrize("name", ["score.jsonl", "config.yaml"])
def test_a_folder_in_the_place_of_a_file_is_named_before_anything_is_replaced(tiny, script, out, name):
    stopped(lambda: pipeline(tiny, out, "score.batch_size=2", resume=False).stage("score"))
    (out / name).unlink()
    (out / name).mkdir()
    before = visible(out)
    for _ in range(2):
        with pytest.raises(OspoError, match=rf"out/{name} is a folder, expected a file; delete it"):
            pipeline(tiny, out).stage("score")
        assert visible(out) == before
    (out / name).rmdir()
    assert pipeline(tiny, out).stage("score").items == 0
    assert len(list(read_records(out / "score.jsonl"))) == 6


def test_the_configuration_of_what_was_whole_is_used(tiny, script, out):
    stopped(lambda: pipeline(tiny, out, "score.batch_size=2", "train.learning_rate=0.01", resume=False).stage("score"))
    assert main(["select", "--out", str(out)]) == 0
    saved = load_config(saved=out / "config.yaml", family="shapes")
    assert (saved.score.batch_size, saved.train.learning_rate) == (2, 0.01)


@pytest.mark.parametrize("what", ["score", "run"])
def test_what_was_made_after_a_start_was_interrupted_is_kept(tiny, script, out, what):
    """Plain commands would replace it by what the start makes."""
    with stopped_after(1):
        over = pipeline(tiny, out, resume=False)
        over.run() if what == "run" else over.stage(what)
    (work,) = out.glob(".restart*")
    pipeline(tiny, out).stage("select")
    before = visible(out)
    calls = [lambda: pipeline(tiny, out).run()] + [lambda: pipeline(tiny, out).stage("score")] * (what != "run")
    for call in calls:
        with pytest.raises(UsageError, match=rf"select\.jsonl was made after a start .*; delete .*{work.name} to keep"):
            call()
    assert visible(out) == before
    kept = Path(shutil.copytree(out, f"{out}-kept"))
    restarts.delete(kept / work.name)
    assert pipeline(tiny, kept).stage("score").items == 0
    assert visible(kept) == before
    if what != "run":
        pipeline(tiny, out, resume=False).stage("score")
        assert not (out / "select.jsonl").exists()


def test_a_shard_whose_results_were_used_after_it_was_interrupted(tiny, script, out):
    back_to(out, "perturb")
    pipeline(tiny, out, shard=Shard(0, 1)).stage("images")
    with stopped_after(1):
        pipeline(tiny, out, shard=Shard(0, 1), resume=False).stage("images")
    pipeline(tiny, out, shard=Shard(0, 1)).stage("questions")
    with pytest.raises(
        UsageError, match=r"delete .*\.restart\.images\.0-of-1 to keep what is there, or start over with"
    ):
        pipeline(tiny, out, shard=Shard(0, 1)).stage("images")
    restarts.delete(out / ".restart.images.0-of-1")
    assert pipeline(tiny, out, shard=Shard(0, 1)).stage("images").items == 0


def test_what_another_process_writes_to_an_iteration_is_noticed(out):
    (out / "iter2").mkdir()
    (out / "iter2" / "select.jsonl").write_text("")
    (out / ".stages.lock").unlink()
    with hold(out, shared=False) as lock:
        (out / "iter2" / "settings.json").write_text("{}")
        with pytest.raises(OspoError, match="Another process has just written to"):
            lock.begin()


def test_an_iteration_by_another_path_has_the_lock_of_its_run(out, tmp_path, monkeypatch):
    (out / "iter2").mkdir()
    (tmp_path / "link").symlink_to(out / "iter2")
    monkeypatch.chdir(out / "iter2")
    with hold(out, shared=False):
        for path in (Path(), tmp_path / "link", Path("../iter2")):
            refused(lambda path=path: hold(path, shared=False).__enter__())


@pytest.mark.parametrize("resume", [True, False])
def test_what_is_whole_is_put_in_place_under_the_lock(tiny, script, out, monkeypatch, resume):
    stopped(lambda: pipeline(tiny, out, resume=False).stage("score"))
    (out / ".restart.score" / ".whole.json").unlink()
    (out / ".stages.lock").unlink()
    with during(monkeypatch, restarts, "_move", lambda: refused(lambda: hold(out, shared=False).__enter__())):
        pipeline(tiny, out, resume=resume).stage("score")
    assert not list(out.glob(".restart*"))


def test_a_report_is_of_what_was_whole(tiny, script, out):
    stopped(lambda: pipeline(tiny, out, "score.batch_size=2", resume=False).stage("score"))
    for shared in (False, True):  # it is written of a folder that is in use, too
        with hold(out, shared=shared):
            assert main(["report", str(out)]) == 0
            assert (out / ".restart.score").exists()
    (out / "iter2").mkdir()
    main(["report", str(out / "iter2")])  # has no records, but a run that is finished first
    assert not (out / ".restart.score").exists()


def test_diagnostics_that_are_missing_from_a_folder_that_cannot_be_written(tiny, script, out, monkeypatch):
    for stage in ("select", "masks"):
        pipeline(tiny, out).stage(stage)
    (out / "masks" / "diagnostics.json").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda *_: False)
        assert pipeline(tiny, out).stage("masks").items == 0
    assert not (out / "masks" / "diagnostics.json").exists()
    pipeline(tiny, out).stage("masks")
    assert (out / "masks" / "diagnostics.json").exists()


def test_a_lock_of_someone_else_is_not_to_be_deleted(out, monkeypatch):
    def closed(*_):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(restarts, "open_to_lock", closed)
    with pytest.raises(OspoError, match=r"Cannot lock .*\.stages\.lock: Permission denied; ask its owner for access\."):
        hold(out, shared=False).__enter__()


@pytest.mark.parametrize("stage", ["score", "masks"])
def test_a_start_over_that_makes_nothing_replaces_nothing(tiny, script, out, monkeypatch, stage):
    pipeline(tiny, out).run()
    before = visible(out)
    module = find_stage(stage)._module()
    monkeypatch.setattr(module, "failure", lambda record: Failure("no"))
    with pytest.raises(OspoError, match=rf"{stage}: .* items failed: .*The old results in .* and of later"):
        pipeline(tiny, out, resume=False).stage(stage)
    assert visible(out) == before
    assert not (out / f".restart.{stage}").exists()

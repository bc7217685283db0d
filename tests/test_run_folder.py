"""A run folder is written below itself only, and what a failed write left in it goes."""

import pytest

from ospo_fast import restarts
from ospo_fast.config import load_config
from ospo_fast.errors import OspoError, UsageError
from ospo_fast.pipeline import Pipeline
from ospo_fast.records import Store, write_atomic
from ospo_fast.stages import STAGES

pytestmark = pytest.mark.usefixtures("omegaconf")


def pipeline(tiny, out, *overrides):
    counts = "prompts.counts={color1: 1, shape1: 1, color2: 1, 2D_spatial: 1, numeracy1: 1, numeracy2: 1}"
    return Pipeline(load_config([counts, f"model={tiny}", f"out={out}", *overrides], family="shapes"), progress=False)


@pytest.mark.parametrize(
    ("link", "stage", "iteration"),
    [
        ("images", "images", 1),
        ("images/0000001", "images", 1),
        ("masks", "masks", 1),
        ("train", "train", 1),
        ("train/checkpoints", "train", 1),
        ("iter2", "prompts", 2),
    ],
)
def test_a_run_folder_is_not_written_through_links(tiny, tmp_path, link, stage, iteration):
    out, mine = tmp_path / "out", tmp_path / "mine"
    mine.mkdir()
    (mine / "file").write_text("mine")
    (out / link).parent.mkdir(parents=True)
    (out / link).symlink_to(mine)
    run = pipeline(tiny, out, f"iterations={iteration}")
    for call in (lambda: run.stage(stage, iteration), run.run):  # the whole run, too, before its first stage
        with pytest.raises(OspoError, match=rf"{link} is a symbolic link, and a run folder is not written through"):
            call()
    assert [path.name for path in mine.iterdir()] == ["file"]
    assert not list(out.rglob("*.jsonl"))


def test_the_run_folder_itself_may_be_a_link(tiny, script, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    pipeline(tiny, tmp_path / "out").stage("prompts")
    assert (tmp_path / "disk" / "prompts.jsonl").exists()


def test_what_a_failed_write_left_goes_with_the_next_command(tiny, tmp_path, monkeypatch):
    """Also where no stage begins, as all are complete."""
    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.unlink", lambda *_, **__: None)  # a file system that became read-only
        patch.setattr("pathlib.Path.replace", lambda *_: (_ for _ in ()).throw(OSError(30, "Read-only file system")))
        with pytest.raises(OspoError, match="Read-only"):
            write_atomic(tmp_path / "stages.json", b"[]")
    assert len(list(tmp_path.iterdir())) == 1
    with pytest.raises(UsageError):
        pipeline(tiny, tmp_path).stage("perturb")  # has no input
    assert not list(tmp_path.glob("*.tmp"))


def test_starting_over_locks_stores_and_leaves_them_as_they_are(tmp_path):
    """Opening them for writing would remove what looks like a torn line."""
    held = {"prompts.jsonl": b'[{"item_id": "a"}]', "select.jsonl": b'{"item_id": "a"}\n{"item', "images.jsonl": b"x"}
    for name, data in held.items():
        (tmp_path / name).write_bytes(data)
    with restarts.exclusive(tmp_path, STAGES), pytest.raises(OspoError, match="being written by another process"):
        Store(tmp_path / "select.jsonl")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == held
    with Store(tmp_path / "select.jsonl"), pytest.raises(OspoError, match="being written by another process"):  # noqa: SIM117
        with restarts.exclusive(tmp_path, STAGES):
            pass


@pytest.mark.parametrize(
    ("name", "stage"), [("prompts.jsonl", "perturb"), ("config.yaml", "run"), ("train/log.jsonl", "train")]
)
def test_files_that_are_links_are_not_read(tiny, script, tmp_path, name, stage):
    """In a run folder of someone else they lead to any file, which a report or a record could show."""
    out, mine = tmp_path / "out", tmp_path / "mine"
    run = pipeline(tiny, out, "train.steps=1")
    run.run()
    (out / name).rename(mine)
    (out / name).symlink_to(mine)
    if stage == "train":
        (out / "train" / "done.json").unlink()
    before = mine.read_bytes()
    run = pipeline(tiny, out, "train.steps=1", "train.save_every=1")
    with pytest.raises(OspoError, match=rf"{name} is a symbolic link"):
        load_config(saved=out / "config.yaml", family="shapes") if stage == "run" else run.stage(stage)
    assert mine.read_bytes() == before

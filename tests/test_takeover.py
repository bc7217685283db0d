"""A run from the finished stages of another one: what is taken, what is refused, and that the other one stays."""

import fcntl
import json
import shutil

import pytest

from ospo_fast import restarts, takeover
from ospo_fast.cli import main
from ospo_fast.pipeline import stage_metrics
from ospo_fast.records import read_records
from ospo_fast.report.load import load_run
from ospo_fast.stages import STAGE_NAMES

pytestmark = pytest.mark.usefixtures("omegaconf")

COUNTS = "prompts.counts={color1: 1, shape1: 1, color2: 2, 2D_spatial: 1, numeracy1: 1, numeracy2: 1}"
SMALL = [COUNTS, "images.draws=1", "train.steps=2", "train.batch_size=2", "train.eval_every=0", "masks.layers=[0]"]
STAGES = list(STAGE_NAMES)


@pytest.fixture(scope="module")
def first(scripted, tiny, tmp_path_factory):
    """A whole run in the folder `first`."""
    out = tmp_path_factory.mktemp("runs") / "first"
    with pytest.MonkeyPatch.context() as patch:
        scripted.install(patch.setattr)
        assert main(["run", "--model", str(tiny), "--out", str(out), *SMALL]) == 0
    return out


@pytest.fixture
def runs(first, script, tmp_path, monkeypatch):
    """The current folder, with a copy of that run."""
    shutil.copytree(first, tmp_path / "first")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def content(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def call(*words, code=0, capsys=None):
    """Run a command; return what it printed."""
    assert main(list(words)) == code
    printed = capsys.readouterr()
    return printed.err if code else printed.out


def items(out):
    rows = json.loads((out / "stages.json").read_text())
    return {row["stage"]: row["items"] for row in rows if "from" not in row}


def test_a_changed_loss_takes_everything_but_training(runs, capsys):
    before = content(runs / "first")
    printed = call("run", "--out", "second", "--from", "first", "train.loss.beta=3", capsys=capsys)
    assert content(runs / "first") == before
    reason = "; train was made with train.loss={"
    assert printed.startswith(f"taken over from first: {', '.join(STAGES[:-1])}{reason}")
    second = runs / "second"
    assert items(second) == {"train": 2}
    assert stage_metrics(second).keys() == {"train"}
    for name in ("prompts", "select", "masks"):
        assert (second / f"{name}.jsonl").read_bytes() == before[f"{name}.jsonl"]
        assert (second / f"{name}.jsonl").stat().st_ino != (runs / "first" / f"{name}.jsonl").stat().st_ino
    for folder in ("images", "masks"):
        assert content(second / folder) == content(runs / "first" / folder)
    settings = json.loads((second / "settings.json").read_text())
    old = json.loads(before["settings.json"])
    assert settings["from"] == {"run": "first", "stages": STAGES[:-1]}
    assert all(settings[name] == old[name] for name in STAGES[:-1])
    assert settings["train"]["settings"]["train.loss"] == {**old["train"]["settings"]["train.loss"], "beta": 3.0}
    config, mine = (second / "config.yaml").read_text(), before["config.yaml"].decode()
    changed = set(config.splitlines()) - set(mine.splitlines())
    assert changed == {"    beta: 3.0"}
    assert "exclude: ./held_out.txt" in config
    assert not list(second.glob(".restart*"))
    note = f"{', '.join(STAGES[:-1])}: taken over from the run 'first', with its time and cost there"
    assert note in load_run(second).notes


def test_the_new_run_stands_alone_and_continues(runs, capsys):
    """Its results are those of a run of its own with these settings, and the other run may go."""
    call("run", "--out", "second", "--from", "first", "masks.scaler=0.5", capsys=capsys)
    assert items(runs / "second") == {"masks": items(runs / "first")["masks"], "train": 2}
    whole = content(runs / "second")
    call("run", "--out", "second", "--from", "first", "masks.scaler=0.5", capsys=capsys)
    shutil.rmtree(runs / "first")
    call("run", "--out", "second", capsys=capsys)
    assert {n: b for n, b in content(runs / "second").items() if n != "plan.json"} == {
        n: b for n, b in whole.items() if n != "plan.json"
    }
    model = next(line for line in whole["config.yaml"].decode().splitlines() if line.startswith("model:")).split()[1]
    call("run", "--model", model, "--out", "third", *SMALL, "masks.scaler=0.5", capsys=capsys)
    third = content(runs / "third")
    names = [name for name in whole if name.startswith(("images/", "masks/")) or name.endswith("s.jsonl")]
    assert len(names) > 10
    assert all(whole[name] == third[name] for name in names)
    weights = "train/model/model.safetensors"
    assert whole[weights] == third[weights]


def test_the_same_settings_take_the_training_too(runs, capsys):
    printed = call("run", "--out", "second", "--from", "first", capsys=capsys)
    assert f"taken over from first: {', '.join(STAGES)}\n" in printed
    assert items(runs / "second") == {}
    for name, data in content(runs / "first" / "train").items():
        assert (runs / "second" / "train" / name).read_bytes() == data
    assert (runs / "second" / "train" / "log.jsonl").stat().st_nlink == 1
    before = content(runs / "first")  # what later commands write is no longer shared
    call("train", "--out", "second", "train.steps=3", "train.extend=constant", capsys=capsys)
    call("images", "--out", "second", "--no-resume", "images.temperature=0.5", capsys=capsys)
    assert content(runs / "first") == before


@pytest.mark.parametrize("command", ["run", "train"])
def test_a_training_is_taken_over_and_extended(runs, capsys, command):
    more = ("train.steps=4", "train.extend=constant")
    call("train", "--out", "first", "--no-resume", "train.save_every=1", capsys=capsys)
    before = content(runs / "first")
    printed = call(command, "--out", "second", "--from", "first", *more, capsys=capsys)
    assert f"taken over from first: {', '.join(STAGES)}\n" in printed
    assert content(runs / "first") == before
    call(command, "--out", "second", "--from", "first", *more, capsys=capsys)
    call("train", "--out", "first", *more, capsys=capsys)
    first, second = content(runs / "first" / "train"), content(runs / "second" / "train")
    assert first["model/model.safetensors"] == second["model/model.safetensors"]
    assert first["extended.json"] == second["extended.json"]
    assert json.loads(second["done.json"])["step"] == 4
    # A training that ended otherwise is refused before anything is copied.
    for words, expected in {
        "train.steps=9 train.extend=cosine iterations=2": "iterations=2; iterations after the first are",
        "train.steps=3 train.extend=constant": "train.steps: got 3 with train.extend=constant, expected more than",
        "train.steps=9 train.extend=cosine masks.soft=true": (
            "train.extend: got cosine with --from first, expected null: masks was made with masks.soft=False, now "
            "masks.soft=True, so that its training is not taken over; leave it out"
        ),
        "train.steps=9 train.extend=cosine train.clip=2": "train was made with train.clip=1.0, now train.clip=2.0",
    }.items():
        assert expected in call("run", "--out", "third", "--from", "first", *words.split(), code=2, capsys=capsys)
        assert not (runs / "third").exists()


def test_a_command_of_a_stage(runs, capsys):
    printed = call("masks", "--out", "second", "--from", "first", "masks.soft=true", capsys=capsys)
    reason = "; masks was made with masks.soft=False, now masks.soft=True\n"
    assert f"taken over from first: {', '.join(STAGES[:-2])}{reason}" in printed
    assert not (runs / "second" / "train").exists()
    words = ("train", "--out", "third", "--from", "first", "masks.soft=true")
    error = call(*words, code=2, capsys=capsys)
    assert (
        "--from first: masks was made with masks.soft=False, now masks.soft=True, so that train has no inputs" in error
    )
    assert not (runs / "third").exists()


def test_without_hard_links_files_are_copied(runs, capsys, monkeypatch):
    def refuse(*arguments, **options):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr("os.link", refuse)
    call("run", "--out", "second", "--from", "first", "train.clip=2", capsys=capsys)
    assert content(runs / "second" / "images") == content(runs / "first" / "images")
    assert all(path.stat().st_nlink == 1 for path in (runs / "second" / "images").rglob("*.png"))


def test_it_plans_the_rest_and_writes_nothing(runs, capsys):
    plan = call("run", "--dry-run", "--out", "second", "--from", "first", "train.loss.beta=3", capsys=capsys)
    rows = {line.split()[0]: line for line in plan.splitlines() if line.split() and line.split()[0] in STAGES}
    assert all("nothing to do" in rows[name] for name in STAGES[:-1])
    assert "nothing to do" not in rows["train"]
    assert not (runs / "second").exists()


@pytest.mark.parametrize("stage", ["score", "masks", "train"])
def test_an_unfinished_stage_is_not_taken(runs, capsys, stage):
    first = runs / "first"
    if stage == "train":
        (first / "train" / "done.json").unlink()
    else:
        lines = (first / f"{stage}.jsonl").read_bytes().splitlines(keepends=True)
        (first / f"{stage}.jsonl").write_bytes(b"".join(lines[:-1]))
    printed = call("run", "--out", "second", "--from", "first", capsys=capsys)
    reason = f"; {stage} is not finished there"
    assert printed.splitlines()[0] == f"taken over from first: {', '.join(STAGES[: STAGES.index(stage)])}{reason}"


class StoppedError(KeyboardInterrupt):
    pass


def stop(*arguments, **options):
    raise StoppedError


@pytest.mark.parametrize("moment", ["copy_folder", "put_in_place", "_rename"])
def test_killed_while_it_takes_over(runs, capsys, moment):
    """All of it is there, or nothing; the same command continues."""
    words = ("run", "--out", "second", "--from", "first", "train.loss.beta=3")
    before = content(runs / "first")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(takeover if moment == "copy_folder" else restarts, moment, stop)
        assert main(list(words)) == 130
    assert not (runs / "second" / "prompts.jsonl").exists()
    call(*words, capsys=capsys)
    assert content(runs / "first") == before
    assert items(runs / "second") == {"train": 2}
    assert len(list(read_records(runs / "second" / "masks.jsonl"))) == len(
        list(read_records(runs / "first" / "masks.jsonl"))
    )
    assert not [
        path for path in (runs / "second").glob(".*") if path.name.startswith(".restart") or path.suffix == ".tmp"
    ]


def test_several_workers_take_over_once_and_extend(runs, capsys, forked):
    before = content(runs / "first")

    def start(*words):
        ended = forked.run_workers(lambda rank: main(list(words)), 2, runs)
        assert [worker.code for worker in ended] == [0, 0], [worker.output for worker in ended]
        return [worker.output for worker in ended]

    words = ("run", "--out", "second", "--from", "first", "train.loss.beta=3")
    assert [output.count("taken over from first") for output in start(*words)] == [1, 0]
    assert content(runs / "first") == before
    assert stage_metrics(runs / "second").keys() == {"train"}
    call("run", "--out", "alone", *words[3:], capsys=capsys)
    second, alone = content(runs / "second"), content(runs / "alone")
    names = [name for name in alone if not name.startswith("train/") and name.endswith((".jsonl", ".png", ".yaml"))]
    assert len(names) > 10
    assert all(second[name] == alone[name] for name in names)
    for command, steps in (("train", 3), ("run", 4)):
        start(command, "--out", "second", f"train.steps={steps}", "train.extend=constant")
        done = json.loads((runs / "second" / "train" / "done.json").read_text())
        assert (done["step"], len(done["extended"])) == (steps, steps - 2)
    log = [json.loads(line) for line in (runs / "second" / "train" / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in log] == [1, 2, 3, 4]


REFUSED = {
    "run --out second --from nowhere": "--from: got nowhere, expected a run folder, with a config.yaml",
    "run --out second --from images": "--from: got images, expected a run folder, with a config.yaml",
    "run --out first --from first": "expected two folders of which none is in the other",
    "run --out first/second --from first": "expected two folders of which none is in the other",
    "run --out . --from first": "expected two folders of which none is in the other",
    "run --out second --from first --no-resume": "--from: got it with --no-resume, expected one of both",
    "images --out second --from first --shard 0/2": "--from: got it with --shard, expected one of both",
    "images --out second --from first --iteration 2": "--from: got it with --iteration, expected one of both",
    "run --out second --from first --seed 7": (
        "--from first: prompts was made with seed=42, now seed=7, so that nothing can be taken over"
    ),
    "run --out other --from first": "--from: got first, but other has results of its own; give another --out",
    "run --out second --from first train.loss.beta=-1": "train.loss.beta is -1.0, expected a positive number",
    "run --out second --from": "argument --from: expected one argument",
}


@pytest.mark.parametrize("words", REFUSED)
def test_refusals_leave_no_trace(runs, capsys, words):
    (runs / "images").mkdir()
    (runs / "other").mkdir()
    shutil.copy(runs / "first" / "prompts.jsonl", runs / "other")
    before = content(runs)
    assert REFUSED[words] in call(*words.split(), code=2, capsys=capsys)
    assert content(runs) == before
    assert not (runs / "second").exists()


def test_a_run_that_is_being_written_is_named(runs, capsys):
    before = content(runs / "first")
    with restarts.RunLock.hold(runs / "first", shared=False):
        error = call("run", "--out", "second", "--from", "first", code=1, capsys=capsys)
    assert "first is in use by another process" in error
    assert content(runs / "first") == before
    with restarts.RunLock.hold(runs / "first", shared=True):  # of a shard
        assert "first is in use by" in call("run", "--out", "second", "--from", "first", code=1, capsys=capsys)
    with (runs / "first" / ".stages.lock").open() as file:  # another run that starts from it
        fcntl.flock(file, fcntl.LOCK_SH)
        call("run", "--out", "second", "--from", "first", capsys=capsys)


def test_another_source_or_setting_is_refused_later(runs, capsys):
    call("run", "--out", "second", "--from", "first", "train.loss.beta=3", capsys=capsys)
    shutil.copytree(runs / "first", runs / "other")
    error = call("run", "--out", "second", "--from", "other", code=2, capsys=capsys)
    assert "--from: got other, but second has started from first" in error
    error = call("run", "--out", "second", "--from", "first", "masks.scaler=0.5", code=2, capsys=capsys)
    assert "masks was made with masks.scaler=0.8, now masks.scaler=0.5" in error


def test_links_and_results_that_are_not_in_place_are_refused(runs, capsys):
    mine = runs / "mine"
    (runs / "first" / "masks").rename(mine)
    (runs / "first" / "masks").symlink_to(mine)
    error = call("run", "--out", "second", "--from", "first", code=1, capsys=capsys)
    assert "is a symbolic link" in error
    assert not (runs / "second" / "prompts.jsonl").exists()
    (runs / "first" / ".restart").mkdir()
    (runs / "first" / ".restart" / ".whole.json").write_text("[]")
    error = call("run", "--out", "second", "--from", "first", code=1, capsys=capsys)
    assert "run `ospo-fast report first`, which puts them there" in error


def test_what_a_run_folder_may_not_decide(runs, capsys):
    path = runs / "first" / "config.yaml"
    path.write_text(path.read_text().replace("templates: null", "templates: /tmp/theirs.yaml"))
    error = call("run", "--out", "second", "--from", "first", code=2, capsys=capsys)
    assert "names the template file" in error
    assert not (runs / "second").exists()

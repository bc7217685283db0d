"""Several workers make the records of one process, byte for byte, and survive the end of any of them."""

import contextlib
import faulthandler
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ospo_fast import cli, restarts
from ospo_fast import pipeline as pipeline_module
from ospo_fast import workers as workers_module
from ospo_fast.config import load_config
from ospo_fast.errors import Failure, OspoError, UsageError
from ospo_fast.pipeline import Pipeline, Shard, read_stage, store_path
from ospo_fast.records import LockedError, Store, merge_stores, read_records
from ospo_fast.restarts import RunLock
from ospo_fast.stages import STAGE_NAMES, find_stage
from ospo_fast.work_sharing import SharedWork, divide
from ospo_fast.workers import PeerError, StrangerError, Workers
from tests.models import tiny_chat

pytestmark = pytest.mark.usefixtures("omegaconf")

WRITERS = STAGE_NAMES[:-1]
SMALL = [
    "prompts.counts={color1: 2, shape1: 1, color2: 3, 2D_spatial: 3, numeracy1: 1, numeracy2: 2}",
    "masks.batch_size=3", "masks.layers=[0]", "images.batch_size=4", "select.pairs=2",
]  # fmt: skip


def config(tiny, out, *overrides):
    return load_config([*SMALL, f"model={tiny}", f"out={out}", *overrides], family="shapes")


def make(tiny, out, *overrides, stages=WRITERS, facts=None, **settings):
    """Return the function of a worker that makes all records."""

    def do(rank):
        workers = Workers.from_environment()
        try:
            with workers.together():
                workers.agree(facts(rank) if facts else {})
                Pipeline(config(tiny, out, *overrides), progress=False, workers=workers, **settings).run(stages)
        except OspoError as error:
            print(f"{type(error).__name__}: {error}")
            return 1
        return 0

    return do


def contents(out):
    found = {}
    for path in sorted(Path(out).rglob("*")):
        if path.is_file() and path.suffix in (".jsonl", ".png", ".npz", ".safetensors"):
            found[str(path.relative_to(out))] = path.read_bytes()
    return found


def once_all_have_come(out, delay):
    """Return the time of a kill: some seconds after the workers have agreed. Before that, no other takes its part."""
    begun = []

    def due():
        if not begun and (out / "settings.json").exists():
            begun.append(time.monotonic())
        return bool(begun) and time.monotonic() > begun[0] + delay

    return due


def check_ended(ended, code=0):
    assert [worker.code for worker in ended] == [code] * len(ended), "\n".join(worker.output for worker in ended)


@pytest.fixture(scope="module")
def whole(scripted, tiny, tmp_path_factory):
    """The records of one process."""
    out = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        scripted.install(patch.setattr)
        Pipeline(config(tiny, out), progress=False).run(WRITERS)
    return contents(out)


@pytest.mark.parametrize("size", [2, 4, 13])
def test_records_are_those_of_one_process(whole, tiny, script, tmp_path, size, forked):
    out = tmp_path / "run"
    check_ended(forked.run_workers(make(tiny, out), size, tmp_path))
    assert contents(out) == whole
    rows = json.loads((out / "stages.json").read_text())
    for name in WRITERS:
        found = [row for row in rows if row["stage"] == name]
        assert sum(row["items"] for row in found) == 12
        assert {row["workers"] for row in found} == {size}
        assert len({row["worker"] for row in found}) == len(found)
    assert len({row["worker"] for row in rows}) >= 2
    # A second start has nothing to do, for any number of workers.
    check_ended(forked.run_workers(make(tiny, out), 3, tmp_path))
    assert contents(out) == whole
    assert json.loads((out / "stages.json").read_text()) == rows


def test_layers_that_are_searched_are_those_of_one_process(tiny, script, tmp_path, forked):
    searched = "masks.layers=auto"
    Pipeline(config(tiny, tmp_path / "one", searched), progress=False).run(WRITERS)
    check_ended(forked.run_workers(make(tiny, tmp_path / "two", searched), 2, tmp_path))
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
    found = [(tmp_path / name / "masks" / "layers.json").read_text() for name in ("one", "two")]
    assert found[0] == found[1]


def test_stages_of_other_models_make_the_records_of_one_process(tiny, script, tmp_path, forked):
    speaker = tiny_chat.save_speaker(tmp_path / "speaker", "is there a red circle ?")
    others = [f"questions.model={speaker}", f"score.model={tiny_chat.save('llava', tmp_path / 'judge')}"]
    others += [f"{name}.model={tiny}" for name in ("prompts", "perturb")]
    Pipeline(config(tiny, tmp_path / "one", *others), progress=False).run(WRITERS[:5])
    check_ended(forked.run_workers(make(tiny, tmp_path / "two", *others, stages=WRITERS[:5]), 2, tmp_path))
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


def test_prompts_of_a_file_are_those_of_one_process(tiny, script, tmp_path, forked):
    file = tmp_path / "prompts.txt"
    file.write_text("two red circles and one blue square\none red circle\nthree blue squares\n")
    named = f"prompts.file={file}"
    Pipeline(config(tiny, tmp_path / "one", named), progress=False).run(WRITERS[:3])
    check_ended(forked.run_workers(make(tiny, tmp_path / "two", named, stages=WRITERS[:3]), 2, tmp_path))
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
    assert len(read_stage(tmp_path / "two", "prompts")) == 3


def test_another_number_of_workers_continues(whole, tiny, script, tmp_path, monkeypatch, forked):
    """Workers that are stopped leave stores of their parts; other numbers, and one process, take them over."""
    out = tmp_path / "run"
    for size, delay in ((3, 0.9), (2, 1.3), (4, 1.8)):
        forked.run_workers(make(tiny, out), size, tmp_path, kill=(0, delay))
    Pipeline(config(tiny, out), progress=False).run(WRITERS)
    assert contents(out) == whole


def test_the_others_take_over_from_a_worker_that_is_killed(whole, tiny, script, tmp_path, forked):
    """Any worker, worker 0 too, at any time after all have come. Nothing is started again."""
    rng, killed = random.Random(0), 0
    for number in range(6):
        out, rank, delay = tmp_path / f"run{number}", rng.randrange(3), rng.uniform(0, 1.5)
        ended = forked.run_workers(make(tiny, out), 3, tmp_path, kill=(rank, once_all_have_come(out, delay)))
        check_ended([worker for n, worker in enumerate(ended) if n != rank])
        killed += ended[rank].code == -signal.SIGKILL
        assert contents(out) == whole
    assert killed >= 2


def test_a_worker_that_is_started_again_joins(whole, tiny, script, tmp_path, forked):
    """A scheduler starts the process of one worker again, while the others wait for no one."""
    out, marks = tmp_path / "run", tmp_path / "tries"

    def do(rank):
        if rank == 1 and not marks.exists():
            marks.write_text("")
            process = os.fork()
            if process == 0:
                os._exit(make(tiny, out, stages=WRITERS[:2])(rank))
            os.waitpid(process, 0)
        return make(tiny, out)(rank)

    ended = forked.run_workers(do, 2, tmp_path)
    check_ended(ended)
    assert contents(out) == whole


def test_deleted_images_are_made_again(whole, tiny, script, tmp_path, forked):
    out = tmp_path / "run"
    Pipeline(config(tiny, out), progress=False).run(WRITERS[:3])
    images = sorted((out / "images").rglob("*.png"))
    for path in images[::5]:
        path.unlink()
    check_ended(forked.run_workers(make(tiny, out), 2, tmp_path))
    assert contents(out) == whole


def test_images_that_a_killed_worker_has_made_again_are_not_missed(whole, tiny, script, tmp_path, forked):
    """It ends after it has made them, and before it says so."""
    out = tmp_path / "run"
    Pipeline(config(tiny, out), progress=False).run(WRITERS[:3])
    for path in sorted((out / "images").rglob("*.png")):
        path.unlink()

    def do(rank):
        if rank == 1:
            SharedWork.mark_done = lambda *arguments: os.kill(os.getpid(), signal.SIGKILL)
        return make(tiny, out, stages=WRITERS[:3])(rank)

    ended = forked.run_workers(do, 2, tmp_path)
    assert [worker.code for worker in ended] == [0, -signal.SIGKILL], ended[0].output
    assert contents(out) == {name: data for name, data in whole.items() if name in contents(out)}
    assert sorted(contents(out)) == sorted(
        name for name in whole if name.startswith(("images", "prompts.", "perturb."))
    )


@pytest.mark.parametrize("stage", ["images", "masks", None])
def test_starting_over(whole, tiny, script, tmp_path, stage, forked):
    """The old results stay until the new ones are whole, and are replaced once."""
    out = tmp_path / "run"
    Pipeline(config(tiny, out, "images.temperature=0.5", "masks.scaler=0.5"), progress=False).run(WRITERS)
    old = contents(out)
    stages = WRITERS if stage is None else [stage]

    def do(rank):
        workers = Workers.from_environment()
        with workers.together():
            workers.agree({})
            changed = [] if stage != "masks" else ["images.temperature=0.5"]
            pipeline = Pipeline(config(tiny, out, *changed), progress=False, workers=workers, resume=False)
            if stage is None:
                pipeline.run(stages)
            else:
                pipeline.stage(stage)
        return 0

    check_ended(forked.run_workers(do, 2, tmp_path))
    new = contents(out)
    if stage is None:
        assert new == whole
    elif stage == "images":
        assert new["images.jsonl"] == whole["images.jsonl"]
        assert {n: d for n, d in new.items() if n.startswith("images/")} == {
            n: d for n, d in whole.items() if n.startswith("images/")
        }
        assert "score.jsonl" not in new
    else:
        assert new["select.jsonl"] == old["select.jsonl"]
        assert new["masks.jsonl"] != old["masks.jsonl"]
    assert not list(out.glob(".restart*"))


def test_the_reason_of_a_worker_that_fails_ends_the_others(tiny, script, tmp_path, monkeypatch, forked):
    """Also where they are inside of a call that takes long."""

    def do(rank):
        run = find_stage("perturb")._module().run

        def failing(*arguments, **settings):
            if rank == 1:
                raise OspoError("The disk of this worker is full; make room.")
            time.sleep(60)
            yield from run(*arguments, **settings)

        find_stage("perturb")._module().run = failing
        try:
            return make(tiny, tmp_path / "run")(rank)
        finally:
            find_stage("perturb")._module().run = run

    ended = forked.run_workers(do, 3, tmp_path)
    check_ended(ended, 1)
    assert max(worker.seconds for worker in ended) < 30  # and not the minute
    for rank, worker in enumerate(ended):
        assert "The disk of this worker is full; make room" in worker.output
        assert ("PeerError: worker 1 on" in worker.output) == (rank != 1)


def test_workers_of_other_settings_are_refused(tiny, script, tmp_path, forked):
    facts = lambda rank: {"images.batch_size": 8 if rank == 2 else 4}  # noqa: E731
    ended = forked.run_workers(make(tiny, tmp_path / "run", facts=facts), 3, tmp_path)
    check_ended(ended, 1)
    for worker in ended:
        assert (
            "images.batch_size: got 8 in worker 2 and 4 in worker 0; start all workers with the same" in worker.output
        )
    assert not (tmp_path / "run").exists()


def test_a_world_size_that_differs_is_refused(tiny, script, tmp_path, monkeypatch, forked):
    """From the number that is started, and from that of another worker."""
    monkeypatch.setattr(workers_module, "NOTICE", 0.5)
    do = make(tiny, tmp_path / "run")

    def impatient(rank):
        from_environment = Workers.from_environment

        def patient(*arguments):
            found = from_environment(*arguments)
            found.patience = 2.0
            return found

        Workers.from_environment = patient
        return do(rank)

    ended = forked.run_workers(impatient, 2, tmp_path, environ={rank: {"WORLD_SIZE": "3"} for rank in range(2)})
    check_ended(ended, 1)
    assert all("worker 2 did not come" in w.output or "failed: WORLD_SIZE: got 3" in w.output for w in ended)
    ended = forked.run_workers(impatient, 2, tmp_path, environ={1: {"WORLD_SIZE": "3"}})
    check_ended(ended, 1)
    assert all("WORLD_SIZE: got 3 in worker 1 and 2 in worker 0" in w.output for w in ended)
    assert not (tmp_path / "run").exists()


def test_clocks_that_differ_change_nothing(whole, tiny, script, tmp_path, forked):
    """No decision depends on the time of day, nor on the value of a monotonic clock, which each machine has its own."""

    def do(rank):
        clocks = {name: getattr(time, name) for name in ("time", "time_ns", "monotonic")}
        for name, clock in clocks.items():
            offset = 10**6 * (-1 if rank else 1) * (10**9 if name == "time_ns" else 1)
            setattr(time, name, lambda clock=clock, offset=offset: clock() + offset)
        return make(tiny, tmp_path / "run")(rank)

    out = tmp_path / "run"
    check_ended(forked.run_workers(do, 2, tmp_path, kill=(1, once_all_have_come(out, 0.5)))[:1])
    assert contents(out) == whole


def start_over(tiny, out, stage="images", before=None):
    """Return the function of a worker that starts a stage over."""

    def do(rank):
        workers = Workers.from_environment()
        with workers.together():
            workers.agree({})
            if before is not None:
                before(rank)
            Pipeline(config(tiny, out), progress=False, workers=workers, resume=False).stage(stage)
        return 0

    return do


def test_workers_whose_start_over_makes_nothing_keep_the_old_results(tiny, script, tmp_path, forked):
    out = tmp_path / "run"
    Pipeline(config(tiny, out), progress=False).run(WRITERS)
    before = contents(out)

    def fail(rank):
        find_stage("score")._module().failure = lambda record: Failure("no")

    ended = forked.run_workers(start_over(tiny, out, "score", fail), 2, tmp_path)
    assert all("items failed: " in each.output and "of later stages are kept" in each.output for each in ended)
    assert all(worker.code not in (0, -signal.SIGKILL) for worker in ended)
    assert contents(out) == before
    assert not (out / ".restart.score").exists()
    check_ended(forked.run_workers(start_over(tiny, out, "score"), 2, tmp_path))


def test_workers_that_are_started_again_start_over_once(whole, tiny, script, tmp_path, forked):
    """What began before by the same launcher is continued, and nothing else."""
    out = tmp_path / "run"
    Pipeline(config(tiny, out), progress=False).run(WRITERS)
    again = {rank: {"TORCHELASTIC_RESTART_COUNT": "1"} for rank in range(2)}
    before = (out / "images.jsonl").stat().st_ino
    check_ended(
        forked.run_workers(start_over(tiny, out), 2, tmp_path, environ=again)
    )  # the first attempt did not begin
    made = (out / "images.jsonl").stat().st_ino
    assert made != before
    assert not (out / "score.jsonl").exists()
    check_ended(forked.run_workers(start_over(tiny, out), 2, tmp_path, environ=again))  # it did
    assert (out / "images.jsonl").stat().st_ino == made
    assert {name: data for name, data in whole.items() if name in contents(out)} == contents(out)


def started_over(tiny, out, stage):
    """Return the function of a worker that starts a stage, or a run, over."""

    def do(rank):
        workers = Workers.from_environment()
        with workers.together():
            workers.agree({})
            pipeline = Pipeline(config(tiny, out), progress=False, workers=workers, resume=False)
            pipeline.run(WRITERS) if stage is None else pipeline.stage(stage)
        return 0

    return do


def wait_for(condition, seconds):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)


def check_whole(out, whole, stage):
    found = contents(out)
    assert found == {name: data for name, data in whole.items() if stage is None or name in found}
    assert stage is None or f"{stage}.jsonl" in found
    assert not list(out.glob(".restart*"))


@pytest.mark.parametrize("stage", ["images", None])
def test_a_worker_that_is_killed_while_results_are_put_in_place(whole, tiny, script, tmp_path, stage, forked):
    """What it has moved is not deleted by the one that moves the rest."""
    out, killed = tmp_path / "run", tmp_path / "killed"
    Pipeline(config(tiny, out), progress=False).run(WRITERS[: 3 if stage else None])
    rename = restarts._rename

    def rename_and_end(*paths):
        rename(*paths)
        if not killed.exists():
            killed.write_text("")
            os.kill(os.getpid(), signal.SIGKILL)

    def do(rank):
        restarts._rename = rename_and_end
        return started_over(tiny, out, stage)(rank)

    ended = forked.run_workers(do, 2, tmp_path)
    assert sorted(worker.code for worker in ended) == [-signal.SIGKILL, 0], [worker.output for worker in ended]
    check_whole(out, whole, stage)


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("stage", ["images", None])
def test_a_worker_that_joins_while_results_are_put_in_place(whole, tiny, script, tmp_path, stage, late, forked):
    """It had done its part before it was started again. It never replaces the results by nothing.

    late: the others have put them in place before it joins; else it joins just before, and is slow.
    """
    out = tmp_path / "run"
    Pipeline(config(tiny, out), progress=False).run(WRITERS[: 3 if stage else None])
    place, items = Pipeline._put_in_place, Pipeline._items
    joined, placed, gone = (tmp_path / name for name in ("joined", "placed", "gone"))

    def end(pipeline, *arguments):
        pipeline._shared._arrive(pipeline._shared._step + 1)  # so that the other one does not wait for this one
        os._exit(0)

    def place_later(pipeline, *arguments):
        if not late:
            wait_for(joined.exists, 20)
        place(pipeline, *arguments)
        placed.write_text("")
        if late:
            wait_for(gone.exists, 20)

    def items_later(pipeline, *arguments):
        if not joined.exists():
            joined.write_text("")
            wait_for(placed.exists, 0 if late else 2)
        return items(pipeline, *arguments)

    def do(rank):
        if rank == 0:
            Pipeline._put_in_place = place_later
            return started_over(tiny, out, stage)(rank)
        process = os.fork()
        if process == 0:
            Pipeline._put_in_place = end
            os._exit(started_over(tiny, out, stage)(rank))
        os.waitpid(process, 0)
        if late:
            wait_for(placed.exists, 20)
        Pipeline._items = items_later
        try:
            return started_over(tiny, out, stage)(rank)
        finally:
            gone.write_text("")

    check_ended(forked.run_workers(do, 2, tmp_path))
    assert joined.exists()
    check_whole(out, whole, stage)


@pytest.mark.parametrize("stage", ["images", None])
def test_a_worker_that_joins_within_a_step_of_another_waits(whole, tiny, script, tmp_path, stage, forked):
    """It was killed before it came to any step, so that the others have not noted it."""
    out = tmp_path / "run"
    Pipeline(config(tiny, out), progress=False).run(WRITERS[: 3 if stage else None])
    placing, joined, placed = (tmp_path / name for name in ("placing", "joined", "placed"))
    mark, place, gather = SharedWork.mark_done, Pipeline._put_in_place, Pipeline._gather

    def mark_slowly(shared, name, part):
        if name == "in place":
            placing.write_text("")
            wait_for(joined.exists, 2)
        mark(shared, name, part)

    def place_and_tell(pipeline, *arguments):
        place(pipeline, *arguments)
        placed.write_text("")

    def gather_slowly(pipeline, *arguments):
        first = pipeline._shared is None
        gather(pipeline, *arguments)
        if first:
            joined.write_text("")
            wait_for(placed.exists, 20)

    def do(rank):
        if rank == 0:
            SharedWork.mark_done, Pipeline._put_in_place = mark_slowly, place_and_tell
            return started_over(tiny, out, stage)(rank)
        process = os.fork()
        if process == 0:
            Pipeline._share = lambda *arguments, **settings: os._exit(0)
            os._exit(started_over(tiny, out, stage)(rank))
        os.waitpid(process, 0)
        wait_for(placing.exists, 30)
        Pipeline._gather = gather_slowly
        return started_over(tiny, out, stage)(rank)

    check_ended(forked.run_workers(do, 2, tmp_path))
    assert placing.exists()
    check_whole(out, whole, stage)


def test_a_worker_that_joins_after_a_kill_between_mark_and_list(whole, tiny, script, tmp_path, forked):
    """What is marked and not yet in place is what the run continues, and not the results that it replaces."""
    out = tmp_path / "run"
    Pipeline(config(tiny, out, "images.temperature=0.5"), progress=False).run(WRITERS)
    joined = tmp_path / "joined"
    mark, once, stages = SharedWork.mark_done, SharedWork.once, Pipeline._stages

    def mark_and_end(shared, name, part):
        mark(shared, name, part)
        if name == "in place":
            os._exit(0)

    def once_later(shared, do):
        if do.__qualname__.startswith("Pipeline._put_in_place"):
            shared._arrive(shared._step + 1)
            wait_for(joined.exists, 20)
        once(shared, do)

    def stages_and_tell(pipeline, *arguments):
        joined.write_text("")
        return stages(pipeline, *arguments)

    def do(rank):
        if rank == 0:
            SharedWork.once = once_later
            return started_over(tiny, out, None)(rank)
        process = os.fork()
        if process == 0:
            SharedWork.mark_done = mark_and_end
            os._exit(started_over(tiny, out, None)(rank))
        os.waitpid(process, 0)
        Pipeline._stages = stages_and_tell
        return started_over(tiny, out, None)(rank)

    check_ended(forked.run_workers(do, 2, tmp_path))
    check_whole(out, whole, None)


def test_a_late_worker_does_as_the_others(whole, tiny, script, tmp_path, forked):
    """With --no-resume in a new folder, it finds what the others have made there."""

    def do(rank):
        workers = Workers.from_environment()
        with workers.together():
            workers.agree({})
            time.sleep(2.0 * rank)
            Pipeline(config(tiny, tmp_path / "run"), progress=False, workers=workers, resume=False).run(WRITERS)
        return 0

    check_ended(forked.run_workers(do, 2, tmp_path))
    assert contents(tmp_path / "run") == whole
    assert not list((tmp_path / "run").glob(".restart*"))


def test_a_worker_that_ends_before_the_others_share_the_folder(tiny, script, tmp_path, forked):
    def before(rank):
        if rank == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    ended = forked.run_workers(start_over(tiny, tmp_path / "run", "prompts", before), 2, tmp_path)
    assert ended[1].code == 70
    assert "PeerError: worker 0 has ended; run the command again" in ended[1].output


def test_a_process_of_another_launch_ends_alone(whole, tiny, script, tmp_path, forked):
    """It has the same MASTER_PORT, as two jobs on one machine can have."""

    def do(rank):
        workers = Workers.from_environment()
        with workers.together():
            workers.agree({"--out": "a"})
            if rank == 0:
                process = os.fork()
                if process == 0:
                    os.environ["RANK"] = "1"
                    try:
                        with contextlib.suppress(UsageError), Workers.from_environment().together():
                            raise UsageError("A wrong setting; correct it.")
                        with Workers.from_environment().together():
                            Workers.current.agree({"--out": "b"})
                    except StrangerError as error:
                        print(error)
                        sys.stdout.flush()
                        os._exit(7)
                    os._exit(0)
                assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 7
            Pipeline(config(tiny, tmp_path / "run"), progress=False, workers=workers).run(WRITERS)
        return 0

    ended = forked.run_workers(do, 2, tmp_path)
    check_ended(ended)
    assert "--out: got 'b' in worker 1 and 'a' in worker 0" in ended[0].output
    assert "give another MASTER_PORT" in ended[0].output
    assert contents(tmp_path / "run") == whole


def test_an_imported_array_is_refused_before_the_work(tiny, script, tmp_path, forked):
    out = tmp_path / "run"
    Pipeline(config(tiny, out), progress=False).run(WRITERS)
    rows = [json.loads(line) for line in (out / "masks.jsonl").read_text().splitlines()]
    shutil.rmtree(out / "masks")
    (out / "settings.json").unlink()
    (out / "stages.json").unlink()
    (out / "masks.jsonl").write_text(json.dumps(rows[:-2]))
    before = contents(out)
    ended = forked.run_workers(make(tiny, out, stages=["masks"]), 2, tmp_path)
    check_ended(ended, 1)
    assert all("is a JSON array, to which no record is appended" in worker.output for worker in ended)
    assert contents(out) == before
    assert not (out / "settings.json").exists()


def test_missing_inputs_leave_no_trace(tiny, script, tmp_path, forked):
    ended = forked.run_workers(make(tiny, tmp_path / "run", stages=["images"]), 2, tmp_path)
    check_ended(ended, 1)
    assert all("There is no perturb.jsonl" in worker.output for worker in ended)
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------- the command, with training


TRAINING = ["train.steps=8", "train.batch_size=4", "train.accumulation=1", "train.save_every=1", "train.eval_every=0"]
TRAINING += ["train.lora_rank=4", "train.lora_dropout=0"]


def command(tiny, out, *overrides, name="run"):
    """Return the function of a worker that runs a command."""
    return lambda rank: cli.main([name, "--model", str(tiny), "--out", str(out), *SMALL, *TRAINING, *overrides])


def trained(out):
    """Return the losses, and all weights in one vector."""
    log = [json.loads(line) for line in (out / "train" / "log.jsonl").read_text().splitlines()]
    weights = load_file(out / "train" / "adapter" / "adapter_model.safetensors")
    assert [row["step"] for row in log] == list(range(1, len(log) + 1))
    return [row["loss"] for row in log], torch.cat([weights[name].flatten() for name in sorted(weights)])


def check_trained(out, whole):
    """Sums of other orders round differently, and each step begins from what the one before it has rounded."""
    losses, weights = trained(out)
    assert losses[0] == pytest.approx(whole[0][0], rel=1e-6)
    assert losses == pytest.approx(whole[0], rel=1e-5)
    assert float((weights - whole[1]).norm() / whole[1].norm()) < 1e-4


@pytest.fixture(scope="module")
def run(scripted, tiny, tmp_path_factory, forked):
    """A run by one process: its records, and what it has trained."""
    out = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        scripted.install(patch.setattr)
        check_ended(forked.run_workers(command(tiny, out), 1, tmp_path_factory.mktemp("output")))
    return {name: data for name, data in contents(out).items() if not name.startswith("train/")}, trained(out)


def check_run(out, run):
    assert {name: data for name, data in contents(out).items() if not name.startswith("train/")} == run[0]
    check_trained(out, run[1])


@pytest.mark.parametrize("size", [2, 4])
def test_a_run_is_that_of_one_process(run, tiny, script, tmp_path, forked, size):
    out = tmp_path / "run"
    ended = forked.run_workers(command(tiny, out), size, tmp_path)
    check_ended(ended)
    check_run(out, run)
    assert "done: " in ended[0].output
    assert "images: 12 items in" in ended[0].output
    assert "train: 8 steps in" in ended[0].output
    assert not any("items in" in worker.output or "done" in worker.output for worker in ended[1:])
    rows = json.loads((out / "stages.json").read_text())
    assert sorted(row["items"] for row in rows if row["stage"] == "train") == [0] * (size - 1) + [8]
    # One process continues what several have made.
    assert command(tiny, out)(0) == 0
    check_run(out, run)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_kill_in_training_ends_the_others_and_loses_nothing(run, tiny, script, tmp_path, forked, rank):
    out = tmp_path / "run"

    def training():
        log = out / "train" / "log.jsonl"
        return log.exists() and log.read_bytes().count(b"\n") >= 2

    slow = command(tiny, out, "train.max_skipped=9")  # which changes no result
    ended = forked.run_workers(slow, 3, tmp_path, kill=(rank, training))
    assert ended[rank].code == -signal.SIGKILL
    for worker in (worker for n, worker in enumerate(ended) if n != rank):
        assert worker.code == 1, worker.output
        assert re.search(rf"ospo-fast: workers? .*\b{rank}\b.* ha(s|ve) ended", worker.output)
        assert worker.seconds - ended[rank].seconds < 10
    for size in (2, 1):
        check_ended(forked.run_workers(slow, size, tmp_path))
        check_run(out, run)


def test_a_worker_that_joins_after_a_stage_has_started_over(tiny, script, tmp_path, forked):
    """It sees a stage that is whole where the others have put it in place, and comes to training at the same step."""
    out = tmp_path / "run"
    for name in WRITERS[:3]:
        assert command(tiny, out, name=name)(0) == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(restarts, "put_in_place", lambda *arguments: os.kill(os.getpid(), signal.SIGINT))
        assert command(tiny, out, "--no-resume", name="images")(0) == 130
    assert (out / ".restart.images").exists()
    place = Pipeline._put_in_place

    def place_and_end(pipeline, *arguments):
        place(pipeline, *arguments)
        os._exit(0)

    def do(rank):
        faulthandler.dump_traceback_later(60, exit=True)
        if rank == 1:
            process = os.fork()
            if process == 0:
                Pipeline._put_in_place = place_and_end
                os._exit(command(tiny, out)(rank))
            os.waitpid(process, 0)
        return command(tiny, out)(rank)

    check_ended(forked.run_workers(do, 2, tmp_path))
    assert (out / "train" / "done.json").exists()


def test_a_worker_that_joins_counts_no_store_that_another_merges(tiny, script, tmp_path, forked, monkeypatch):
    """In a new run of the Shapes model, whose list of evaluation prompts it finds."""
    out = tmp_path / "run"
    merging, listed, merged = (tmp_path / name for name in ("merging", "listed", "merged"))
    merge, share, paths = Pipeline._merge, Pipeline._share, pipeline_module.store_paths

    def merge_slowly(pipeline, stage, *arguments):
        if stage.name == "perturb":
            merging.write_text("")
            wait_for(listed.exists, 5)
        merge(pipeline, stage, *arguments)
        if stage.name == "perturb":
            merged.write_text("")

    def end_at_perturb(pipeline, stage, *arguments, **settings):
        if stage.name == "perturb":
            os._exit(0)
        return share(pipeline, stage, *arguments, **settings)

    def list_slowly(folder, name):
        found = paths(folder, name)
        if name == "perturb" and not listed.exists():
            listed.write_text("")
            wait_for(merged.exists, 5)
        return found

    def do(rank):
        if rank == 0:
            Pipeline._merge = merge_slowly
            return command(tiny, out)(rank)
        process = os.fork()
        if process == 0:
            Pipeline._share = end_at_perturb
            os._exit(command(tiny, out)(rank))
        os.waitpid(process, 0)
        wait_for(merging.exists, 30)
        pipeline_module.store_paths = list_slowly
        return command(tiny, out)(rank)

    check_ended(forked.run_workers(do, 2, tmp_path))
    assert (out / "train" / "done.json").exists()


def test_a_worker_that_ends_just_before_training(run, tiny, script, tmp_path, forked, monkeypatch):
    monkeypatch.setattr(workers_module, "NOTICE", 1.0)

    def do(rank):
        if rank == 1:
            Workers.process_group = lambda *arguments: os.kill(os.getpid(), signal.SIGKILL)
        return command(tiny, tmp_path / "run")(rank)

    ended = forked.run_workers(do, 2, tmp_path)
    assert [worker.code for worker in ended] == [1, -signal.SIGKILL]
    assert "worker 1 has ended, and training needs all; what was made is kept" in ended[0].output
    assert ended[0].seconds - ended[1].seconds < 20
    check_ended(forked.run_workers(command(tiny, tmp_path / "run"), 2, tmp_path))
    check_run(tmp_path / "run", run)


def test_torchrun_starts_all_again_after_a_kill(run, tiny, tmp_path):
    """The whole path of a user: torchrun, its store, its restarts; the model's texts follow no script here."""
    out = tmp_path / "run"
    counts = "prompts.counts={color1: 2, shape1: 1, color2: 2, 2D_spatial: 2, numeracy1: 1, numeracy2: 2}"
    given = [*TRAINING, counts, "images.draws=1"]
    code = KILLED.format(marker=str(tmp_path / "killed"))
    program = tmp_path / "program.py"
    program.write_text(code)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "1"]
    environ = {**os.environ, "OMP_NUM_THREADS": f"{torch.get_num_threads()}", "PYTHONPATH": os.pathsep.join(sys.path)}
    arguments = [str(program), "run", "--out", str(out), *given]
    done = subprocess.run(
        [*torchrun, "--standalone", *arguments],
        env=environ,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "killed").exists()
    assert "done: " in done.stdout
    one = tmp_path / "one"
    assert cli.main(["run", "--out", str(one), *given]) == 0
    assert contents_of_records(out) == contents_of_records(one)
    check_trained(out, trained(one))


KILLED = """
import os, signal, sys
from pathlib import Path
from ospo_fast import cli
from ospo_fast.stages import find_stage

marker = Path({marker!r})
run = find_stage("score")._module().run

def killed(*arguments, **settings):
    for record in run(*arguments, **settings):
        if os.environ["RANK"] == "1" and not marker.exists():
            marker.write_text("")
            os.kill(os.getpid(), signal.SIGKILL)
        yield record

find_stage("score")._module().run = killed
sys.exit(cli.main(sys.argv[1:]))
"""


def contents_of_records(out):
    return {name: data for name, data in contents(out).items() if not name.startswith("train/")}


@pytest.mark.parametrize("name", ["demo", "generate", "evaluate", "report"])
def test_commands_of_one_process_are_refused(name, tmp_path, monkeypatch, capsys):
    for variable, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(variable, value)
    arguments = ["a red circle"] if name == "generate" else []
    out = [] if name == "report" else ["--out", str(tmp_path / "out")]
    assert cli.main([name, *arguments, *out]) == 2
    assert f"{name} is done by one process, and WORLD_SIZE is 2" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_other_settings_of_a_worker_are_named(tiny, script, tmp_path, forked):
    """Whether they come from the command, or from the environment of a machine."""
    out = tmp_path / "run"
    do = lambda rank: command(tiny, out, f"images.temperature={1 + rank / 2}")(rank)  # noqa: E731
    ended = forked.run_workers(do, 2, tmp_path)
    assert {worker.code for worker in ended} <= {1, 2}
    for worker in ended:
        assert "images.temperature: got 1.5 in worker 1 and 1.0 in worker 0" in worker.output
    assert not out.exists()


# ---------------------------------------------------------------- the run folder


def test_the_run_folder_is_that_of_the_workers_alone(tiny, script, tmp_path, forked):
    """A shard by hand and another command are refused, and told who has it."""
    out = tmp_path / "run"
    ready, go = tmp_path / "ready", tmp_path / "go"

    def do(rank):
        workers = Workers.from_environment()
        with workers.together():
            workers.agree({})
            with RunLock.hold(out, shared=False, workers=workers) as lock:
                lock.share(workers)
                (tmp_path / f"ready{rank}").write_text("")
                while not go.exists() and not (rank == 0 and ready.exists()):
                    time.sleep(0.01)
        return 0

    process = os.fork()
    if process == 0:
        ended = forked.run_workers(do, 2, tmp_path)
        os._exit(max(worker.code for worker in ended))
    while not all((tmp_path / f"ready{rank}").exists() for rank in (0, 1)):
        time.sleep(0.01)
    try:
        for shard in (None, Shard(0, 2), Shard(1, 2)):
            if shard == Shard(1, 2):  # worker 0 leaves before the others
                ready.write_text("")
                time.sleep(1.0)
            with pytest.raises(OspoError, match=r"is in use by another process \(.*, process \d+ on .*, since .*\)"):
                Pipeline(config(tiny, out), progress=False, shard=shard).stage("prompts")
    finally:
        go.write_text("")
    assert os.waitpid(process, 0)[1] == 0
    Pipeline(config(tiny, out), progress=False, shard=Shard(0, 2)).stage("prompts")


def test_a_folder_that_workers_do_not_have_in_common_is_refused(tiny, script, tmp_path, forked):
    def do(rank):
        return make(tiny, tmp_path / f"disk{rank}" / "run")(rank)

    ended = forked.run_workers(do, 2, tmp_path)
    check_ended(ended, 1)
    assert all("does not see the files of worker 0 there" in worker.output for worker in ended)


def test_a_file_system_without_common_locks_is_refused(tiny, script, tmp_path, monkeypatch, forked):
    monkeypatch.setattr("ospo_fast.restarts._is_held", lambda path: False)
    ended = forked.run_workers(make(tiny, tmp_path / "run"), 2, tmp_path)
    check_ended(ended, 1)
    assert all("does not show the file locks (flock) of other machines" in worker.output for worker in ended)


def test_a_worker_that_is_started_twice_is_refused(tmp_path):
    workers = Workers(0, 2, 0, "localhost", 1)
    workers.first, workers.everyone = contextlib.nullcontext, lambda: None
    with SharedWork(tmp_path, workers).held(), pytest.MonkeyPatch.context() as patch:
        patch.setattr("ospo_fast.work_sharing._PATIENCE", 0.1)
        with pytest.raises(UsageError, match=r"RANK: got 0, which another process in .* has; start each worker once"):
            SharedWork(tmp_path, workers).held().__enter__()


# ---------------------------------------------------------------- the environment


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"WORLD_SIZE": "4"}, "RANK: it is not set, while WORLD_SIZE is"),
        ({"RANK": "0"}, "WORLD_SIZE: it is not set, while RANK is"),
        ({"RANK": "4", "WORLD_SIZE": "4", "MASTER_ADDR": "a"}, "RANK: got '4', expected an integer from 0 to 3"),
        ({"RANK": "-1", "WORLD_SIZE": "4"}, "RANK: got '-1'"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "WORLD_SIZE: got '0', expected an integer from 1"),
        ({"RANK": "0", "WORLD_SIZE": "two"}, "WORLD_SIZE: got 'two'"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR: it is not set"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "http"}, "MASTER_PORT: got 'http'"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "a"}, "MASTER_PORT: it is not set"),
    ],
)
def test_wrong_environments(environ, message):
    with pytest.raises(UsageError) as error:
        Workers.from_environment(environ)
    assert message in str(error.value)


@pytest.mark.parametrize("environ", [{}, {"WORLD_SIZE": "1"}, {"RANK": "0", "WORLD_SIZE": "1"}])
def test_one_process_has_no_workers(environ):
    assert Workers.from_environment(environ) is None


def test_an_address_without_a_store(tmp_path, forked):
    environ = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(forked.free_port())}
    workers = Workers.from_environment(environ)
    workers.patience = 1.0
    message = r"Worker 1 of 2 cannot connect to 127.0.0.1:\d+ .*MASTER_ADDR, MASTER_PORT"
    with pytest.raises(UsageError, match=message), workers.together():
        pass


def test_a_shard_of_workers_is_refused(tiny, tmp_path):
    with pytest.raises(UsageError, match=r"--shard: got 0/2 in one of 4 workers"):
        Pipeline(config(tiny, tmp_path), shard=Shard(0, 2), workers=Workers(0, 4, 0, "a", 1))


# ---------------------------------------------------------------- parts and their merge


def test_parts_are_equal_and_do_not_depend_on_the_order():
    items = [f"{n:07d}" for n in range(101)]
    parts = divide(items, str, 4)
    assert sorted(map(len, parts)) == [25, 25, 25, 26]
    assert sorted(itertools.chain.from_iterable(parts)) == items
    assert all(part == sorted(part) for part in parts)
    assert [sorted(part) for part in divide(items[::-1], str, 4)] == parts
    assert divide([], str, 2) == [[], []]


def records(*ids):
    return [{"item_id": item_id, "prompt": f"prompt {item_id}"} for item_id in ids]


def test_stores_are_merged_in_order_byte_by_byte(tmp_path):
    place, parts = tmp_path / "a.jsonl", [tmp_path / f"a.{n}-of-2.jsonl" for n in (0, 1)]
    place.write_text('{"prompt": "by hand",  "item_id": "5"}\n{"item_id": "extra"}\n')
    for path, ids in zip(parts, (("3", "1"), ("2", "3")), strict=True):
        with Store(path) as store:
            store.extend(records(*ids))
    with parts[1].open("ab") as file:
        file.write(b'{"item_id": "torn')
    merge_stores(place, parts, ["1", "2", "3", "4", "5"])
    assert [record["item_id"] for record in read_records(place)] == ["1", "2", "3", "5", "extra"]
    assert b'{"prompt": "by hand",  "item_id": "5"}\n' in place.read_bytes()
    assert not any(path.exists() for path in parts)
    before = place.stat()
    merge_stores(place, [], ["1", "2", "3", "4", "5"])
    assert place.stat().st_mtime_ns == before.st_mtime_ns


def test_a_broken_line_is_kept_where_it_is(tmp_path):
    place, part = tmp_path / "a.jsonl", tmp_path / "a.0-of-1.jsonl"
    place.write_text('{"item_id": "2"}\nnot JSON\n')
    with Store(part) as store:
        store.extend(records("1"))
    merge_stores(place, [part], ["1", "2"])
    assert place.read_text().splitlines()[:2] == ['{"item_id": "2"}', "not JSON"]
    assert [record["item_id"] for record in read_records(place, lambda error: None)] == ["2", "1"]


def test_a_store_that_is_written_is_not_merged(tmp_path):
    place, part = tmp_path / "a.jsonl", tmp_path / "a.0-of-1.jsonl"
    with Store(part) as store:
        store.extend(records("1"))
        with pytest.raises(LockedError):
            merge_stores(place, [part], ["1"])
    assert list(read_records(part)) == records("1")


def test_gaps_of_an_interrupted_run_are_filled_in_order(tiny, script, tmp_path, whole):
    out = tmp_path / "run"
    Pipeline(config(tiny, out), progress=False).run(WRITERS[:2])
    place = store_path(out, "perturb")
    lines = place.read_bytes().splitlines(keepends=True)
    store_path(out, "perturb", Shard(0, 2)).write_bytes(b"".join(lines[1::2]))
    place.write_bytes(lines[4])
    shutil.rmtree(out / "images", ignore_errors=True)
    Pipeline(config(tiny, out), progress=False).run(WRITERS)
    assert contents(out) == whole


def test_peer_errors_are_errors_of_the_package():
    assert issubclass(PeerError, OspoError)


def test_several_workers_do_not_share_an_apple_gpu(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: True)
    workers = Workers(1, 2, 1, "localhost", 1)
    assert (workers.device(None), workers.device("cpu")) == ("cpu", "cpu")
    with pytest.raises(UsageError, match="device: got 'mps' with 2 workers, expected 'cpu'"):
        workers.device("mps")
    alone = Workers(0, 1, 0, "localhost", 1)
    assert (alone.device(None), alone.device("mps")) == (None, "mps")

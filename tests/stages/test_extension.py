"""More steps for a finished training: the bits are those without an end in between, and nothing is lost meanwhile."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ospo_fast import restarts
from ospo_fast.config import load_config
from ospo_fast.errors import OspoError, UsageError
from ospo_fast.models import load_model
from ospo_fast.pipeline import Pipeline, stage_metrics
from ospo_fast.stages import extension, find_stage
from ospo_fast.stages.extension import Extension, extended_factor, read_extensions

pytestmark = pytest.mark.usefixtures("omegaconf")

SMALL = ("train.batch_size=2", "train.accumulation=1", "train.save_every=2", "train.lora_rank=4", "train.eval_every=0")
SMALL += ("train.lora_dropout=0.2", "train.learning_rate=1e-3", "train.warmup_ratio=0", "masks.layers=[0]")
SMALL += (
    "train.early_stopping=null",
    "prompts.counts={color1: 3, shape1: 1, color2: 4, 2D_spatial: 4, numeracy1: 1, numeracy2: 3}",
)
SMALL += ("images.draws=1", "select.pairs=1", "train.schedule=cosine")
MORE = ("train.steps=7", "train.extend=constant")


def pipeline(tiny, out, *overrides, **options):
    saved = out / "config.yaml"
    config = load_config(
        [*SMALL, f"model={tiny}", *overrides], saved=saved if saved.exists() else None, family="shapes"
    )
    config.out = str(out)
    return Pipeline(config, progress=False, **options)


def train(tiny, out, *overrides, **options):
    return pipeline(tiny, out, *overrides, **options).stage("train")


def lines(out):
    rows = [json.loads(line) for line in (out / "train" / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in ("seconds", "tokens_s")} for row in rows]


def files(folder):
    """The content of all files but the log, whose clock differs, and checkpoints: equal ones can have other bytes."""
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.suffix not in (".pt", ".jsonl"))
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def weights(out):
    return load_file(out / "train" / "model" / "model.safetensors")


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def finished(tiny, made, tmp_path_factory):
    """A finished training of 4 steps by a cosine, with samples of step 3."""
    out = shutil.copytree(made, tmp_path_factory.mktemp("finished") / "run")
    train(tiny, out, "train.steps=4", "train.sample_every=3")
    return out


@pytest.fixture(scope="module")
def extended(tiny, finished, tmp_path_factory):
    out = shutil.copytree(finished, tmp_path_factory.mktemp("extended") / "run")
    report = train(tiny, out, *MORE)
    assert (report.items, report.total) == (3, 7)
    return out


@pytest.fixture
def copy(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def test_learning_rates_of_each_schedule():
    """Constant from the last rate; a cosine from the highest rate to the lowest, in the middle after half of it."""
    settings = load_config(["train.learning_rate=1e-3", "train.min_learning_rate=1e-4", "train.steps=23"]).train
    extensions = [Extension(10, "constant"), Extension(15, "cosine"), Extension(19, "constant")]
    found = [extended_factor(lambda step: 1 - step / 20, settings, extensions, step) for step in range(23)]
    assert found[:10] == [1 - step / 20 for step in range(10)]
    assert found[10:15] == [0.55] * 5
    assert found[15] == pytest.approx(1)
    assert found[17] == pytest.approx(0.55)
    assert found[18] == pytest.approx(0.1 + 0.9 * (1 - 0.5**0.5) / 2)
    assert found[19:] == [found[18]] * 4


@pytest.mark.parametrize("overrides", [(), ("train.full=true",), ("train.validation_pairs=3",)])
def test_constant_steps_are_those_of_a_longer_training(tiny, made, tmp_path, overrides):
    """To the last bit: weights, moments, dropout and the order of the pairs continue."""
    short, long = (shutil.copytree(made, tmp_path / name) for name in ("short", "long"))
    constant = ("train.schedule=constant", *overrides)
    train(tiny, short, "train.steps=3", *constant)
    train(tiny, short, "train.steps=7", "train.extend=constant", *constant)
    train(tiny, long, "train.steps=7", *constant)
    assert same(weights(short), weights(long))
    assert [row for row in lines(short) if "loss" in row] == [row for row in lines(long) if "loss" in row]


def test_what_an_extension_leaves(finished, extended):
    rows, before = lines(extended), lines(finished)
    assert [row["step"] for row in rows] == list(range(1, 8))
    assert rows[:4] == before
    assert [row["lr"] for row in rows[4:]] == [before[3]["lr"]] * 3  # which is above the lowest rate
    assert before[3]["lr"] > 1e-7
    done = json.loads((extended / "train" / "done.json").read_text())
    assert (done["step"], done["extended"]) == (7, [{"after": 4, "schedule": "constant"}])
    assert not same(weights(extended), weights(finished))
    samples = files(finished / "train" / "samples")
    assert files(extended / "train" / "samples").items() > samples.items() > {}.items()
    assert not list(extended.glob(".restart*"))
    assert stage_metrics(extended)["train"]["items"] == 7
    assert "cosine, constant after step 4" in (extended / "train" / "adapter" / "README.md").read_text()


def test_an_extended_training_is_a_finished_one(tiny, extended, tmp_path):
    """The same command, and one without settings, do nothing; what is deleted is saved again."""
    out = shutil.copytree(extended, tmp_path / "run")
    before = files(out / "train")
    for overrides in (MORE, ("train.steps=7",), ()):
        assert train(tiny, out, *overrides).items == 0
        assert files(out / "train") == before
    assert "extend: null" in (out / "config.yaml").read_text()
    assert "steps: 7" in (out / "config.yaml").read_text()
    shutil.rmtree(out / "train" / "adapter")
    train(tiny, out)
    assert files(out / "train") == before


def test_a_cosine_follows_and_can_be_extended_again(tiny, extended, tmp_path):
    out = shutil.copytree(extended, tmp_path / "run")
    train(tiny, out, "train.steps=11", "train.extend=cosine", "train.min_learning_rate=1e-7")
    rates = [row["lr"] for row in lines(out)][7:]
    assert rates == pytest.approx([1e-3, 1e-7 + (1e-3 - 1e-7) * (2 + 2**0.5) / 4, (1e-3 + 1e-7) / 2, rates[3]])
    train(tiny, out, "train.steps=12", "train.extend=constant")
    assert [row["lr"] for row in lines(out)][11] == rates[3]
    listed = [Extension(4, "constant"), Extension(7, "cosine"), Extension(11, "constant")]
    assert read_extensions(out / "train") == listed
    train(tiny, out, "train.steps=4", resume=False)
    assert read_extensions(out / "train") == []


class StoppedError(KeyboardInterrupt):
    pass


def stop(*arguments, **options):
    raise StoppedError


MOMENTS = {
    "before the folder is whole": (extension, "copy_folder"),
    "after it": (Pipeline, "_begin"),
    "at the end": (restarts, "put_in_place"),
    "while it takes its place": (restarts, "_rename"),
}


@pytest.mark.parametrize("moment", [*MOMENTS, "a step"])
def test_killed_and_continued(tiny, copy, finished, extended, moment, monkeypatch):
    """The old training stays as it was until the new one is whole, and the same command continues."""
    with pytest.MonkeyPatch.context() as patch:
        if moment == "a step":
            from ospo_fast.stages.train import Trainer

            step = Trainer.train_step

            def train_step(self):
                if self.step == 6:
                    raise StoppedError
                return step(self)

            patch.setattr(Trainer, "train_step", train_step)
        else:
            patch.setattr(*MOMENTS[moment], stop)
        with pytest.raises(StoppedError):
            train(tiny, copy, *MORE)
    if "place" not in moment:
        assert files(copy / "train") == files(finished / "train")
        assert train(tiny, copy).items == 0
        load_model(copy / "train" / "adapter")
    train(tiny, copy, *MORE)
    assert files(copy / "train") == files(extended / "train")
    assert lines(copy) == lines(extended)
    assert not [path for path in copy.glob(".*") if path.name.startswith(".restart") or path.suffix == ".tmp"]
    assert stage_metrics(copy)["train"]["items"] == 7


def test_it_changes_no_file_that_a_copy_by_hard_links_has(tiny, copy, finished, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(copy, other, copy_function=lambda a, b: Path(b).hardlink_to(a))
    train(tiny, copy, *MORE)
    assert files(other / "train") == files(finished / "train")
    assert lines(other) == lines(finished)


REFUSED = {
    ("train.steps=7",): (
        r"train was made with train\.steps=4, now train\.steps=7; train\.steps=7 with train\.extend=constant or cosine "
        "gives a finished train more steps; use the same setting, use another --out, or start train over"
    ),
    ("train.steps=3",): r"train\.steps=4, now train\.steps=3; use the same setting",
    ("train.steps=3", "train.extend=cosine"): (
        r"train\.steps: got 3 with train\.extend=cosine, expected more than the 4 steps of the finished training in"
    ),
    ("train.extend=cosine",): r"train\.steps=4, which the training in .* has already, without an extension; raise",
    (*MORE, "train.clip=2"): r"train was made with train\.clip=1\.0, now train\.clip=2\.0",
    (*MORE, "train.extend=linear"): r"train\.extend should be one of constant, cosine, got 'linear'",
}


@pytest.mark.parametrize("overrides", REFUSED)
def test_refusals(tiny, copy, overrides):
    before = files(copy)
    with pytest.raises(UsageError, match=REFUSED[overrides]):
        train(tiny, copy, *overrides)
    assert files(copy) == before


def test_another_schedule_for_the_same_steps_is_refused(tiny, extended):
    with pytest.raises(
        UsageError, match=r"has already, the last of them as train\.extend=constant; raise train\.steps"
    ):
        train(tiny, extended, "train.steps=7", "train.extend=cosine")


def test_there_must_be_a_finished_training(tiny, made, copy, tmp_path):
    (copy / "train" / "done.json").unlink()
    for out in (shutil.copytree(made, tmp_path / "fresh"), copy):
        with pytest.raises(UsageError, match="got constant, expected null: there is no finished training in"):
            train(tiny, out, *MORE)
    with pytest.raises(UsageError, match="got constant with a training that starts over, expected null"):
        train(tiny, copy, *MORE, resume=False)
    with pytest.raises(UsageError, match="got constant with a training that starts over, expected null"):
        pipeline(tiny, copy, *MORE, resume=False).run()


def test_a_training_without_checkpoint_is_not_extended(tiny, copy):
    shutil.rmtree(copy / "train" / "checkpoints")
    with pytest.raises(UsageError, match=r"no checkpoint in .*checkpoints that training could continue from"):
        train(tiny, copy, *MORE)


def test_early_stopping_ends_a_training(tiny, run_folder):
    """One that it did not end continues, with the best weights until then."""
    watched = ("train.eval_every=1", "train.early_stopping=alignment", "train.steps=5")
    values = {"rising": lambda step: step / 10, "falling": lambda step: -step / 10}
    options = {"evaluation": lambda model, step: {"alignment": values["falling"](step)}}
    train(tiny, run_folder, *watched, "train.patience=2", **options)
    with pytest.raises(UsageError, match=r"early stopping ended the training in .* at step 2 of 5, after which it has"):
        train(tiny, run_folder, *watched, "train.patience=2", *MORE, **options)
    options = {"evaluation": lambda model, step: {"alignment": {2: 0.9}.get(step, step / 10)}}
    train(tiny, run_folder, *watched, "train.patience=9", resume=False, **options)
    train(tiny, run_folder, *watched, "train.patience=9", *MORE, **options)
    done = json.loads((run_folder / "train" / "done.json").read_text())
    assert (done["step"], done["best_step"], done["kept"]["value"]) == (7, 2, 0.9)


def test_later_iterations_and_other_starts_are_kept(tiny, copy):
    work = restarts.folder(copy, find_stage("train"))
    work.mkdir()
    (work / "settings.json").write_text(json.dumps({"train": {"settings": {"train.steps": 9}}}))
    with pytest.raises(UsageError, match=r"\.restart\.train holds an unfinished start of train with other settings"):
        train(tiny, copy, *MORE)
    shutil.rmtree(work)
    (copy / "iter2").mkdir()
    with pytest.raises(UsageError, match=r"iter2 starts from the training that would get more steps"):
        train(tiny, copy, *MORE)


@pytest.mark.parametrize("rows", [[3], [{"after": 0, "schedule": "cosine"}], [{"after": 2, "schedule": "x"}], {}])
def test_a_broken_list_is_named(tmp_path, rows):
    (tmp_path / "extended.json").write_text(json.dumps(rows))
    with pytest.raises(OspoError, match=r"extended\.json"):
        read_extensions(tmp_path)


def test_a_run_extends_its_training(tiny, copy, extended):
    """`ospo-fast run`, whose other stages have nothing to do; also its plan counts the added steps alone."""
    from ospo_fast.plan import count_done

    assert count_done({"train": copy}, extends=True) == {"train": 4}
    assert count_done({"train": copy}) == {"train": 10**9}
    reports = pipeline(tiny, copy, *MORE).run()
    assert [report.items for report in reports] == [0] * 7 + [3]
    assert files(copy / "train") == files(extended / "train")


def test_a_run_of_several_iterations_extends_the_last(tiny, script, tmp_path):
    """The settings of the run have the new number of steps, which the trainings before the last one do not have."""
    out, one, more = tmp_path / "run", ("iterations=2",), ("train.steps=3", "train.extend=constant")
    pipeline(tiny, out, *one, "train.steps=2").run()
    first = files(out / "train")
    for _ in range(2):  # the second call has nothing to do
        reports = pipeline(tiny, out, *more).run()
    assert {report.items for report in reports} == {0}
    done = json.loads((out / "iter2" / "train" / "done.json").read_text())
    assert (done["step"], [each["after"] for each in done["extended"]]) == (3, [2])
    assert files(out / "train") == first
    assert {report.items for report in pipeline(tiny, out).run()} == {0}
    # The first one is trained to its own end, also where its weights have to be saved again.
    (out / "train" / "model" / "config.json").unlink()
    with pytest.raises(UsageError, match="iter2"):
        pipeline(tiny, out, *more).stage("train")
    pipeline(tiny, out).run()
    assert files(out / "train") == first
    with pytest.raises(UsageError, match=r"train was made with train\.steps=3, now train\.steps=9"):
        pipeline(tiny, out, "train.steps=9").run()
    pipeline(tiny, out, "train.steps=4", "train.extend=cosine").stage("train", 2)
    assert {report.items for report in pipeline(tiny, out).run()} == {0}
    # A wrong number is refused before the deleted weights are saved again.
    shutil.rmtree(out / "train" / "model")
    before = (out / "config.yaml").read_bytes()
    with pytest.raises(UsageError, match=r"got 1 with train.extend=constant, expected more than the 4 steps"):
        pipeline(tiny, out, "train.steps=1", "train.extend=constant").run()
    assert ((out / "train" / "model").exists(), (out / "config.yaml").read_bytes()) == (False, before)
    checkpoints = shutil.copytree(out / "train" / "checkpoints", tmp_path / "checkpoints")
    shutil.rmtree(out / "train" / "checkpoints")
    with pytest.raises(OspoError, match=r"--no-resume train.steps=2` to train again, which deletes what follows from"):
        pipeline(tiny, out).run()
    shutil.copytree(checkpoints, out / "train" / "checkpoints")
    pipeline(tiny, out).run()
    # A third iteration has the newest number of steps, also where it is not trained yet.
    pipeline(tiny, out, "iterations=3").run(["prompts", "perturb"])
    assert (out / "iter3").exists()
    for more in ((), ("train.steps=5", "train.extend=constant")):
        for _ in range(2):
            pipeline(tiny, out, *more).run()
    found = [json.loads((at / "train" / "done.json").read_text()) for at in (out, out / "iter2", out / "iter3")]
    assert [(done["step"], len(done.get("extended") or [])) for done in found] == [(2, 0), (4, 2), (5, 1)]
    assert files(out / "train") == first

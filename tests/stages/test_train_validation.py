"""Held-out pairs: their loss is that of the model, for every adapter, and training does not notice them."""

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file

from ospo_fast.config import load_config
from ospo_fast.errors import UsageError
from ospo_fast.loss import OSPOLoss
from ospo_fast.models import load_model
from ospo_fast.pipeline import Pipeline, read_stage
from ospo_fast.shapes.commands import build_evaluation
from ospo_fast.stages import StageContext
from ospo_fast.stages import train as train_module
from ospo_fast.stages.teacher_forcing import hidden_states
from ospo_fast.stages.train import load_examples, loss_config, make_batch
from ospo_fast.stages.training_pairs import held_out_ids, select_training_pairs

pytestmark = pytest.mark.usefixtures("omegaconf")

SMALL = ("train.steps=6", "train.batch_size=2", "train.accumulation=2", "train.save_every=2", "train.lora_rank=4")
SMALL += ("train.lora_dropout=0.2", "train.learning_rate=1e-2", "masks.layers=[0]", "train.validation_pairs=4")
NAMES = ("loss", "accuracy", "margin", "chosen_logps", "rejected_logps")


def config(*overrides):
    return load_config([*SMALL, *overrides])


def train(tiny, out, *overrides, records=None, **context):
    records = read_stage(out, "masks") if records is None else records
    train_module.train(records, load_model(tiny), config(*overrides), out=out, context=StageContext(**context))


def lines(out):
    rows = [json.loads(line) for line in (out / "train" / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in ("seconds", "tokens_s")} for row in rows]


def evaluations(out):
    return {row["step"]: row for row in lines(out) if "loss" not in row}


def weights(out):
    return load_file(out / "train" / "model" / "model.safetensors")


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def validated(tiny, made, tmp_path_factory):
    out = shutil.copytree(made, tmp_path_factory.mktemp("validated") / "run")
    train(tiny, out, "train.eval_every=2")
    return out


@pytest.fixture(scope="module")
def held_out(made):
    return held_out_ids(select_training_pairs(read_stage(made, "masks"), config()), config())


def pair_losses(model, out, settings, pair_ids):
    """The loss of each pair by itself, and its values."""
    records = read_stage(out, "masks")
    pairs = [item for item in select_training_pairs(records, settings) if item.pair_id in pair_ids]
    loss = OSPOLoss(loss_config(settings))
    for example in load_examples(pairs, model, settings, out)[0]:
        batch, masks = make_batch(model, [example], swapped=loss.config.cond_weight > 0)
        with torch.no_grad():
            output = loss(hidden_states(model, batch.embeds), batch.labels, model.head, object_masks=masks)
        yield example.category, {name: float(output.metrics[name]) for name in NAMES}


def test_the_loss_is_that_of_the_model_before_and_after(tiny, validated, held_out):
    """Masks included, and without dropout. The adapter changes nothing at first; at the end it is merged."""
    rows = evaluations(validated)
    for step, place in ((0, tiny), (6, validated / "train" / "model")):
        found = list(pair_losses(load_model(place), validated, config(), held_out))
        assert len(found) == 4
        for name in NAMES:
            mean = math.fsum(values[name] for _, values in found) / 4
            assert rows[step][f"validation/{name}"] == pytest.approx(mean, rel=1e-4, abs=1e-5)
        for category in {category for category, _ in found}:
            own = [values for name, values in found if name == category]
            for name in ("accuracy", "chosen_logps", "rejected_logps"):
                mean = math.fsum(values[name] for values in own) / len(own)
                assert rows[step][f"validation/{name}/{category}"] == pytest.approx(mean, rel=1e-4, abs=1e-5)
    unweighted = list(pair_losses(load_model(tiny), validated, config("masks.enabled=false"), held_out))
    mean = math.fsum(values["loss"] for _, values in unweighted) / 4
    assert rows[0]["validation/loss"] != pytest.approx(mean, rel=1e-4)


def test_training_does_not_notice_the_held_out_pairs(tiny, made, validated, held_out, tmp_path):
    """Weights, log, order and random numbers are those of a run that never had these pairs, to the last bit."""
    out = shutil.copytree(made, tmp_path / "run")
    records = [record for record in read_stage(made, "masks") if record["item_id"] not in held_out]
    train(tiny, out, "train.validation_pairs=0", records=records)
    assert same(weights(out), weights(validated))
    assert lines(out) == [row for row in lines(validated) if "loss" in row]
    done = json.loads((validated / "train" / "done.json").read_text())
    assert sorted(done["validation_pairs"]) == sorted(held_out)


def test_when_it_is_measured(tiny, validated, run_folder):
    assert list(evaluations(validated)) == [0, 2, 4, 6]
    train(tiny, run_folder, "train.eval_every=0")
    assert list(evaluations(run_folder)) == [0, 6]
    assert evaluations(run_folder) == {step: evaluations(validated)[step] for step in (0, 6)}
    assert same(weights(run_folder), weights(validated))
    card = (run_folder / "train" / "adapter" / "README.md").read_text()
    assert f"| this adapter (step 6) | {evaluations(validated)[6]['validation/loss']:.3f} |" in card
    assert "Validation/loss of pairs that did not train:" in card


def test_a_resumed_training_has_the_same_values(tiny, validated, run_folder):
    steps = iter(range(1, 9))

    def progress(_):
        if next(steps) == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(tiny, run_folder, "train.eval_every=2", progress=progress)
    train(tiny, run_folder, "train.eval_every=2")
    assert lines(run_folder) == lines(validated)


@pytest.mark.parametrize("metric", ["loss", "accuracy", "margin"])
def test_early_stopping_by_held_out_pairs(tiny, run_folder, metric):
    values = iter([3.0, math.nan, 2.0, 4.0, 1.0, 5.0, 2.5])
    real = train_module.Trainer.validate

    def validate(self):
        return real(self) | {f"validation/{metric}": next(values)}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_module.Trainer, "validate", validate)
        train(tiny, run_folder, f"train.early_stopping=validation/{metric}", "train.eval_every=1", "train.patience=9")
    kept = json.loads((run_folder / "train" / "done.json").read_text())["kept"]
    best = {"loss": (4, 1.0), "accuracy": (5, 5.0), "margin": (5, 5.0)}[metric]
    assert kept == {"step": best[0], "metric": f"validation/{metric}", "before": 3.0, "value": best[1]}


def test_a_value_that_is_not_finite_is_named_and_training_continues(tiny, validated, held_out, run_folder, caplog):
    bad, make = min(held_out), train_module.make_batch

    def poisoned(model, examples, **options):
        batch, masks = make(model, examples, **options)
        if any(example.pair_id == bad for example in examples):
            batch.embeds[[example.pair_id for example in examples].index(bad)] = math.nan
        return batch, masks

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_module, "make_batch", poisoned)
        train(tiny, run_folder, "train.eval_every=2")
    assert same(weights(run_folder), weights(validated))
    for row in evaluations(run_folder).values():
        assert row["validation/not_finite"] == [bad]
        assert row["validation/loss"] is None
    assert f"values of held-out pairs are not finite at step 0: {bad}" in caplog.text


@pytest.mark.parametrize("overrides", [("train.full=true",), ("train.masks=online",), ("train.guidance_scale=2",)])
def test_other_trainings_validate_too(tiny, made, held_out, tmp_path, overrides):
    out, plain = (shutil.copytree(made, tmp_path / name) for name in ("run", "plain"))
    settings = ("train.learning_rate=1e-3", "train.steps=2", *overrides)
    train(tiny, out, *settings)
    records = [record for record in read_stage(made, "masks") if record["item_id"] not in held_out]
    train(tiny, plain, "train.validation_pairs=0", *settings, records=records)
    assert same(weights(out), weights(plain))
    first, last = evaluations(out).values()
    assert first["validation/loss"] != last["validation/loss"]
    assert all(math.isfinite(row[f"validation/{name}"]) for row in (first, last) for name in NAMES)


@pytest.fixture
def janus(tiny, tmp_path):
    """The model, as one that is not of the Shapes world."""
    folder = shutil.copytree(tiny, tmp_path / "janus")
    values = json.loads((folder / "config.json").read_text())
    del values["template_set"]
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def pipeline(model, out, *overrides, **options):
    settings = load_config([*SMALL, f"model={model}", f"out={out}", "train.learning_rate=1e-3", *overrides])
    return Pipeline(settings, progress=False, evaluation=build_evaluation(settings), **options)


def test_a_model_of_another_world_is_validated_and_draws_its_prompts(janus, made, run_folder):
    """Pictures of the same prompts from the same seeds at each step, and no alignment."""
    pipeline(janus, run_folder, "train.eval_every=3", "train.sample_every=3").stage("train")
    rows = evaluations(run_folder)
    assert list(rows) == [0, 3, 6]
    assert all("alignment" not in row and math.isfinite(row["validation/loss"]) for row in rows.values())
    samples = run_folder / "train" / "samples"
    first, second = samples / "step-000003", samples / "step-000006"
    assert {path.name for path in first.iterdir()} == {path.name for path in second.iterdir()}
    assert len(list(first.iterdir())) > 4
    with pytest.raises(UsageError, match="Images can be checked in the Shapes world only"):
        pipeline(janus, run_folder, "train.eval_every=3", "train.validation_pairs=0")


def test_samples_of_each_step_are_of_the_same_prompts(janus, run_folder, monkeypatch):
    from ospo_fast.stages import samples

    seen = []
    generate = samples.ImageGenerator.generate

    def recorded(self, prompts, **options):
        seen.append((list(prompts), list(options["seeds"])))
        return generate(self, prompts, **options)

    monkeypatch.setattr(samples.ImageGenerator, "generate", recorded)
    pipeline(janus, run_folder, "train.sample_every=2").stage("train")
    assert len(seen) == 3
    assert seen[0] == seen[1] == seen[2]
    assert len(set(seen[0][0])) == len(seen[0][0]) > 4


REFUSED = {
    ("train.validation_pairs=1000",): "train.validation_pairs: got 1000, expected a number that leaves pairs",
    ("train.validation_pairs=0", "train.early_stopping=validation/loss"): (
        "got 'validation/loss', expected null; or hold pairs out by train.validation_pairs"
    ),
    ("train.early_stopping=validation/loss",): "train.eval_every: got 0 with train.early_stopping=validation/loss",
    ("train.early_stopping=alignment", "train.eval_every=1"): (
        "got 'alignment', expected null or a metric of the evaluation: validation/accuracy, validation/margin, validat"
    ),
    ("train.validation_pairs=-1",): "train.validation_pairs should be 0 or more, got -1",
}


@pytest.mark.parametrize("overrides", REFUSED)
def test_refusals_leave_no_trace(janus, run_folder, overrides):
    before = (run_folder / "settings.json").read_bytes()
    with pytest.raises(UsageError) as caught:
        pipeline(janus, run_folder, *overrides).stage("train")
    assert REFUSED[overrides] in str(caught.value)
    assert (run_folder / "settings.json").read_bytes() == before
    assert not (run_folder / "train").exists()

"""Training: which weights change, exact resumption, batches, limits, failed pairs and the official file format."""

import dataclasses
import json
import math
import shutil
import zipfile
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from ospo_fast.config import load_config
from ospo_fast.errors import Failure, OspoError, attempt
from ospo_fast.loss import OSPOLoss
from ospo_fast.models import load_model
from ospo_fast.ops import Head
from ospo_fast.pipeline import read_stage
from ospo_fast.records import iter_pairs, read_records, to_official
from ospo_fast.stages import StageContext
from ospo_fast.stages import train as train_module
from ospo_fast.stages.checkpoints import write_checkpoint
from ospo_fast.stages.masks import MaskExtractor
from ospo_fast.stages.teacher_forcing import hidden_states
from ospo_fast.stages.train import (
    load_examples,
    loss_config,
    make_batch,
    run,
    select_training_pairs,
    shuffled_indices,
    unconditional_hidden_states,
)
from ospo_fast.stages.trained_weights import add_lora, check_lora

pytestmark = pytest.mark.usefixtures("omegaconf")  # nearly every test reads a configuration


def config(*overrides):
    small = ["train.steps=6", "train.batch_size=2", "train.save_every=2", "train.lora_rank=4", "train.lora_alpha=8"]
    small += ["train.accumulation=2", "train.learning_rate=1e-3", "train.eval_every=0", "masks.layers=[0]"]
    return load_config([*small, *overrides])


def train(records, model, settings, out, **context):
    """Train, and return the report."""
    context = StageContext(**context)
    train_module.train(records, model, settings, out=out, context=context)
    return context.report


def done(folder):
    return json.loads((folder / "train" / "done.json").read_text())


def lines(folder):
    """The log without the clock."""
    rows = [json.loads(line) for line in (folder / "train" / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in ("seconds", "tokens_s")} for row in rows]


@pytest.fixture
def model(tiny):
    return load_model(tiny)


@pytest.fixture(scope="session")
def records(made):
    return read_stage(made, "masks")


def test_order_is_a_stream_of_shuffled_epochs():
    stream = shuffled_indices(5, 1, 0, 20)
    assert all(sorted(stream[i : i + 5]) == list(range(5)) for i in range(0, 20, 5))
    assert stream[:5] != stream[5:10]
    assert [shuffled_indices(5, 1, start, 3) for start in range(17)] == [
        stream[start : start + 3] for start in range(17)
    ]
    assert shuffled_indices(5, 2, 0, 20) != stream


def test_overrides_change_the_loss_of_the_preset():
    loss = loss_config(load_config(["preset=v2", "train.loss.simpo_weight=0.1"]))
    assert (loss.simpo_weight, loss.cond_weight, loss.beta, loss.mask_alpha) == (0.1, 0.5, 3.0, 0.0)


def test_the_metrics_of_a_category_are_those_of_its_pairs(tiny, records, run_folder):
    """Weighted by the pairs that each category has in a step, their mean is that of the step."""
    train(records, load_model(tiny), config(), out=run_folder)
    categories = [item.record["t2i_category"] for item in select_training_pairs(records, config())]
    mixed = 0
    for row in lines(run_folder):
        indices = shuffled_indices(len(categories), config().seed, 4 * (row["step"] - 1), 4)
        counts = Counter(categories[index] for index in indices)
        for metric in ("accuracy", "chosen_logps", "rejected_logps"):
            assert {key for key in row if key.startswith(f"{metric}/")} == {f"{metric}/{name}" for name in counts}
            mean = sum(count * row[f"{metric}/{name}"] for name, count in counts.items()) / 4
            assert row[metric] == pytest.approx(mean)
        mixed += len(counts) > 1
    assert mixed > 2


def test_trainings_of_older_versions_are_known_by_the_same_digest():
    """That of a version before held-out pairs and other methods."""
    settings = load_config(["preset=full", "train.steps=7"])
    examples = [SimpleNamespace(identity=name) for name in ("0000001", "0000001-1")]
    trainer = SimpleNamespace(settings=settings.train, config=settings, examples=examples, held_out=[])
    assert train_module.Trainer._digest_of(trainer, 7, []) == "5649e64039a15b2c"


def ids(pairs):
    return [item.pair_id for item in pairs]


def test_training_pairs_do_not_depend_on_the_order_and_obey_limits(records, caplog):
    kept = [r["item_id"] for r in records if r["kept"]]
    assert len(kept) > 5
    assert ids(select_training_pairs(records[::-1], config())) == sorted(kept)
    few = select_training_pairs(records, config("train.max_pairs=3"))
    assert ids(few) == ids(select_training_pairs(records[::-1], config("train.max_pairs=3")))
    assert len(few) == 3
    capped = select_training_pairs(records, config("train.max_pairs_per_kind=1"))
    kinds = {item.record["kind"] for item in capped}
    assert len(kinds) == len(capped) == len({r["kind"] for r in records if r["kept"]})
    unmasked = [change_pair(r, mask_path=None) for r in records]
    assert select_training_pairs(unmasked, config()) == []
    assert "no object mask" in caplog.text
    assert len(select_training_pairs(unmasked, config("masks.enabled=false"))) == len(kept)


def change_pair(record, **fields):
    """The record with other fields of its pairs."""
    return {**record, "pairs": [{**pair, **fields} for pair in record.get("pairs", [])]}


def test_batches_hold_chosen_rejected_and_swapped_rows(model, records, made):
    settings = config("preset=full")
    pairs = select_training_pairs(records, settings)
    examples, failures = load_examples(pairs, model, settings, made)
    assert not failures
    examples = examples[:3]
    batch, masks = make_batch(model, examples, swapped=True)
    assert len(batch.labels) == 9
    assert masks.shape == (6, *model.grid)
    codes = [row[row != -100] for row in batch.labels]
    for n, (example, item) in enumerate(zip(examples, pairs, strict=False)):
        assert torch.equal(codes[n], example.codes[0])
        assert torch.equal(codes[n + 3], example.codes[1])
        assert torch.equal(codes[n + 6], example.codes[0])
        assert torch.equal(masks[n + 3], example.masks[1])
        prompts = (item.record["prompt"], item.pair["rejected_prompt"])
        own, other = (model.embed_tokens(model.image_prompt(prompt)) for prompt in prompts)
        torch.testing.assert_close(batch.embeds[n + 3, : len(own)], own)
        torch.testing.assert_close(batch.embeds[n + 6, : len(other)], other)


def test_only_the_language_models_projections_change(model, tiny, records, run_folder):
    result = train(records, model, config(), out=run_folder)
    assert (result.items, result.total, result.failed) == (6, 6, 0)
    before, after = load_model(tiny).module.state_dict(), model.module.state_dict()
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    layers = len(model.decoder.layers)
    assert len(changed) == 7 * layers
    assert all("language_model.layers" in name and "_proj" in name for name in changed)
    # The merged model that was saved, and the adapter on its base, are the model in memory.
    for saved in ("model", "adapter"):
        loaded = load_model(run_folder / "train" / saved).module.state_dict()
        for name in changed:
            torch.testing.assert_close(loaded[name], after[name], rtol=1e-4, atol=1e-6)


def test_training_lowers_the_loss(model, records, run_folder):
    # At ten times this rate the loss swings, and which way it ends depends on the processor's rounding.
    settings = ["train.steps=30", "train.schedule=constant", "train.learning_rate=1e-3"]
    settings = config(*settings, "train.batch_size=4", "train.accumulation=1")
    train(records, model, settings, out=run_folder)
    log = lines(run_folder)
    assert sum(row["loss"] for row in log[-5:]) < 0.5 * sum(row["loss"] for row in log[:5])  # batches differ
    assert [row["step"] for row in log] == list(range(1, 31))


def test_training_of_the_guided_distribution(model, records, run_folder):
    settings = config("train.steps=12", "train.schedule=constant", "train.learning_rate=2e-2", "preset=full")
    settings.train.guidance_scale = 3.0
    examples = load_examples(select_training_pairs(records, settings), model, settings, run_folder)[0][:3]
    # A swapped row with an unconditional sequence of its own length.
    longer = torch.cat([examples[2].rejected_ids[:-1], examples[2].rejected_ids])
    examples[2] = dataclasses.replace(examples[2], rejected_ids=longer)

    def guided_loss():
        batch, masks = make_batch(model, examples, swapped=True)
        codes = torch.stack([example.codes[side] for side in (0, 1) for example in examples])
        unconditional = unconditional_hidden_states(model, codes, [*range(len(codes)), *range(len(examples))], batch)
        hidden, head = Head.of(model.head).guided(hidden_states(model, batch.embeds), unconditional, 3.0)
        return hidden, head, OSPOLoss(loss_config(settings))(hidden, batch.labels, head, object_masks=masks)

    with torch.no_grad():
        hidden, head, before = guided_loss()
        # Row by row, against the logits of transformers' own classes.
        prompts = [e.ids for e in examples] * 2 + [e.rejected_ids for e in examples]
        codes = [e.codes[side] for side in (0, 1, 0) for e in examples]
        assert len(prompts) == len(hidden) == 9
        for row, prompt, image in zip(hidden, prompts, codes, strict=True):
            logits = []
            for start in (prompt, model.unconditional(prompt)):
                embeds = torch.cat([model.embed_tokens(start), model.embed_codes(image)])[None]
                states = model.module.model.language_model(inputs_embeds=embeds).last_hidden_state[0]
                logits.append(model.module.model.generation_head(states))
            expected = logits[1] + 3.0 * (logits[0] - logits[1])
            torch.testing.assert_close(head(row[: len(expected)]), expected, rtol=1e-3, atol=1e-3)
    train(records, model, settings, out=run_folder)
    with torch.no_grad():
        assert guided_loss()[2].loss < 0.98 * before.loss


def test_learning_rate_warms_up_and_decays(model, records, run_folder):
    settings = config("train.warmup_ratio=0.34", "train.min_learning_rate=1e-4")
    train(records, model, settings, out=run_folder)
    rates = [row["lr"] for row in lines(run_folder)]
    assert rates[:3] == pytest.approx([0, 5e-4, 1e-3])
    assert rates[2] > rates[3] > rates[4] > rates[5] > 1e-4


def test_the_official_learning_rate(model, records, run_folder):
    """Of CosineDecayWarmUpRestarts with warmup_iter = 2.04 and max_iter = 6, after the step of its constructor."""
    settings = config("train.schedule=official", "train.warmup_ratio=0.34", "train.min_learning_rate=1e-4")
    train(records, model, settings, out=run_folder)
    rates = [row["lr"] for row in lines(run_folder)]
    cosine = [0.5 * (1 + math.cos(math.pi * n / 6)) for n in (3, 4, 5, 6)]  # of steps 3 to 6, counted from 1
    expected = [1e-3 * 1 / 2.04, 1e-3 * 2 / 2.04, *(1e-4 + (1e-3 - 1e-4) * share for share in cosine)]
    assert rates == pytest.approx(expected)
    # As the official settings: 50 steps of warm-up of 1000.
    official = load_config(["preset=official"]).train
    shares = [train_module.official_factor(official, 1000, step) for step in (0, 48, 49, 999, 2000)]
    cosine = 0.5 * (1 + math.cos(math.pi * 0.05))
    assert shares == pytest.approx([1 / 50, 49 / 50, 0.01 + 0.99 * cosine, 0.01, 0.01])


@pytest.mark.parametrize(("name", "tolerance"), [("float16", 0.02), ("bfloat16", 0.2)])
def test_training_in_the_type_of_autocast(tiny, records, run_folder, name, tolerance):
    found, model = set(), load_model(tiny)
    model.decoder.layers[0].mlp.down_proj.register_forward_hook(lambda module, given, output: found.add(output.dtype))
    train(records, model, config(f"train.autocast={name}", "train.steps=2"), out=run_folder)
    assert found == {getattr(torch, name)}
    rows = lines(run_folder)
    assert all(math.isfinite(row["loss"]) and "skipped" not in row for row in rows)
    shutil.rmtree(run_folder / "train")
    train(records, load_model(tiny), config("train.steps=2"), out=run_folder)
    assert rows[0]["loss"] == pytest.approx(lines(run_folder)[0]["loss"], rel=tolerance)


def interrupt_after(steps):
    count = 0

    def progress(done):
        nonlocal count
        count += done
        if count == steps:
            raise KeyboardInterrupt

    return progress


def test_resume_is_exact(tiny, made, records, tmp_path):
    """Dropout, schedule, optimizer and data order continue as in an uninterrupted run."""
    settings = config("train.lora_dropout=0.2")
    whole = shutil.copytree(made, tmp_path / "whole")
    train(records, load_model(tiny), settings, out=whole)
    for stop in (1, 3):  # before the first checkpoint, and one step after it
        broken = shutil.copytree(made, tmp_path / str(stop))
        with pytest.raises(KeyboardInterrupt):
            train(records, load_model(tiny), settings, out=broken, progress=interrupt_after(stop))
        torch.manual_seed(99)
        train(records[::-1], load_model(tiny), settings, out=broken)
        assert lines(broken) == lines(whole)
        one, other = (load_file(f / "train" / "adapter" / "adapter_model.safetensors") for f in (whole, broken))
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_broken_and_foreign_checkpoints_are_refused(tiny, records, run_folder):
    def start(*overrides, **arguments):
        train(records, load_model(tiny), config("train.steps=3", *overrides), out=run_folder, **arguments)

    with pytest.raises(KeyboardInterrupt):
        start(progress=interrupt_after(3))
    with pytest.raises(OspoError, match="other settings or other pairs"):
        start("train.learning_rate=2e-3")
    with pytest.raises(OspoError, match="other settings or other pairs"):
        start("masks.scaler=1.0", "train.masks=online")
    (checkpoint,) = (run_folder / "train" / "checkpoints").iterdir()
    checkpoint.write_bytes(b"PK\x03\x04 half")
    with pytest.raises(OspoError, match=r"step-000003\.pt.*--no-resume"):
        start()
    start("train.learning_rate=2e-3", resume=False)


def test_lora_targets_are_names_or_ends_of_names(tiny):
    model = load_model(tiny)
    rank = "train.lora_rank=64"  # the published one, which is above the width of these layers
    settings = config("train.lora_targets=[layers.0.self_attn.q_proj, up_proj]", rank).train
    check_lora(model, settings)
    adapted = {name for name, _ in add_lora(model, settings).named_parameters() if "lora_A" in name}
    ends = ["0.self_attn.q_proj", "0.mlp.up_proj", "1.mlp.up_proj"]
    assert sorted(adapted) == sorted(
        f"base_model.model.model.language_model.layers.{end}.lora_A.default.weight" for end in ends
    )


def test_early_stopping_keeps_the_best(tiny, records, run_folder):
    values = iter([0.1, 0.5, 0.3, 0.2, 0.9])
    seen = []

    def evaluation(model, step):
        torch.rand(3)  # must not change the random numbers of training
        seen.append(step)
        return {"alignment": next(values)}

    settings = config("train.eval_every=2", "train.early_stopping=alignment", "train.patience=2", "train.steps=20")
    model = load_model(tiny)
    result = train(records, model, settings, out=run_folder, evaluation=evaluation)
    assert seen == [0, 2, 4, 6]
    assert (result.total, done(run_folder)["best_step"]) == (6, 2)
    assert [row["alignment"] for row in lines(run_folder) if "alignment" in row] == [0.1, 0.5, 0.3, 0.2]
    best = load_file(run_folder / "train" / "best.safetensors")
    kept = load_file(run_folder / "train" / "adapter" / "adapter_model.safetensors")
    assert {name.replace(".default", "") for name in best} == set(kept)
    assert all(torch.equal(tensor, kept[name.replace(".default", "")]) for name, tensor in best.items())
    bad = config("train.eval_every=1", "train.early_stopping=accuracy")
    with pytest.raises(OspoError, match="expected a metric of the evaluation: alignment"):
        train(records, load_model(tiny), bad, out=run_folder, evaluation=lambda m, s: {"alignment": 1}, resume=False)


def test_resume_after_metrics_of_numpy(tiny, records, run_folder):
    settings = config("train.steps=3", "train.save_every=1", "train.eval_every=1", "train.early_stopping=alignment")

    def evaluation(model, step):
        return {"alignment": np.float64(step)}

    with pytest.raises(KeyboardInterrupt):
        train(records, load_model(tiny), settings, out=run_folder, evaluation=evaluation, progress=interrupt_after(2))
    train(records, load_model(tiny), settings, out=run_folder, evaluation=evaluation)
    assert done(run_folder)["best_step"] == 3


def test_gradient_checkpointing_changes_nothing(tiny, made, records, tmp_path):
    folders = []
    for flag in ("true", "false"):
        folders.append(shutil.copytree(made, tmp_path / flag))
        settings = config(f"train.gradient_checkpointing={flag}", "train.lora_dropout=0")
        train(records, load_model(tiny), settings, out=folders[-1])
    for one, other in zip(*map(lines, folders), strict=True):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize(("free", "expected"), [(2**40, False), (2**20, True)])
def test_gradient_checkpointing_follows_the_free_memory(tiny, records, run_folder, monkeypatch, free, expected):
    monkeypatch.setattr("ospo_fast.stages.train_memory.free_bytes", lambda device: free)
    model = load_model(tiny)
    seen = []
    train(records, model, config(), run_folder, progress=lambda _: seen.append(model.module.is_gradient_checkpointing))
    assert seen == [expected] * 6
    assert not model.module.is_gradient_checkpointing


def test_resume_is_exact_with_and_without_gradient_checkpointing(tiny, made, records, tmp_path):
    whole, stopped = (shutil.copytree(made, tmp_path / name) for name in ("whole", "stopped"))
    settings = ["train.lora_dropout=0.2", "train.gradient_checkpointing=false"]
    train(records, load_model(tiny), config(*settings), out=whole)
    with pytest.raises(KeyboardInterrupt):
        train(records, load_model(tiny), config(*settings), out=stopped, progress=interrupt_after(3))
    settings[1] = "train.gradient_checkpointing=true"
    train(records, load_model(tiny), config(*settings), out=stopped)
    for row, expected in zip(lines(stopped), lines(whole), strict=True):
        assert row == pytest.approx(expected, rel=1e-5, abs=1e-6)
    one, other = weights(stopped), weights(whole)
    assert all(torch.allclose(one[name], other[name], rtol=1e-5, atol=1e-7) for name in one)


def test_official_training_set_can_be_trained_on(tiny, made, records, tmp_path):
    """A JSON array with the published fields and absolute image paths, without codes and masks.

    The user names the folder of the images: a record alone cannot have files of the machine read.
    """
    fields = ("item_id", "t2i_category", "sub_category", "prompt", "chosen", "rejected", "rejected_prompt")
    official = []
    for record in [r for r in records if r["kept"]][:3]:
        flat = to_official(record)
        entry = {name: flat[name] for name in fields}
        for side in ("chosen", "rejected"):
            path = tmp_path / f"{record['item_id']}_{side}.png"
            shutil.copy(made / flat[side], path)
            entry[side] = str(path)
        official.append(entry)
    (tmp_path / "train.json").write_text(json.dumps(official))
    out = tmp_path / "out"
    settings = config("preset=full", "masks.enabled=false", "train.steps=1")
    with pytest.raises(OspoError, match="no pair to train on; see the warning"):
        train(read_records(tmp_path / "train.json"), load_model(tiny), settings, out=out)
    settings.read_from = [str(tmp_path)]
    result = train(read_records(tmp_path / "train.json"), load_model(tiny), settings, out=out)
    assert (result.total, result.failed) == (1, 0)
    assert lines(out)[0]["conditional"] > 0


def test_missing_inputs_are_errors(tiny, records, tmp_path, made):
    model = load_model(tiny)
    with pytest.raises(OspoError, match="no pair to train on"):
        train([], model, config(), out=tmp_path)
    with pytest.raises(OspoError, match="no rejected_prompt"):
        train([change_pair(r, rejected_prompt="") for r in records], model, config("preset=full"), out=made)
    with pytest.raises(OspoError, match="run folder"):
        list(run(records, model, config()))
    assert not (made / "train").exists()


@pytest.mark.parametrize("preset", ["v3", "full"])
def test_pairs_that_fail_are_reported(tiny, records, run_folder, preset, caplog):
    settings = config(f"preset={preset}", "train.steps=1")
    kept = [record for record in records if record["kept"]]
    pairs = [record["pairs"][0] for record in kept]
    long = " and a red circle" * 400
    kept[0] = {**kept[0], "prompt": kept[0]["prompt"] + long}
    kept[1] = change_pair(kept[1], rejected_prompt=pairs[1]["rejected_prompt"] + long)
    (run_folder / pairs[2]["chosen"]).with_suffix(".npz").write_bytes(b"PK\x03\x04 half")
    (run_folder / pairs[3]["mask_path"]).write_bytes(b"12")
    union = torch.ones(7, 7, dtype=torch.uint8)
    save_file({"chosen_union": union, "rejected_union": union.clone()}, run_folder / pairs[4]["mask_path"])
    context, steps = StageContext(), []
    context.progress = steps.append
    assert list(run(kept, load_model(tiny), settings, out=run_folder, context=context)) == []
    failed = done(run_folder)["left_out"]
    item_ids = [record["item_id"] for record in kept]
    # Only the conditional term reads the rejected prompt.
    expected = {
        item_ids[0]: "tokens, at most",
        item_ids[2]: "Cannot read the codes",
        item_ids[3]: "Cannot read the masks",
        item_ids[4]: "expected twice (6, 6)",
    }
    expected |= {item_ids[1]: "tokens, at most"} if preset == "full" else {}
    assert failed.keys() == expected.keys()
    assert all(words in failed[item] for item, words in expected.items())
    report = context.report
    assert (report.items, report.total, report.failed, steps) == (1, 1, len(expected), [1])
    assert f"train: {len(expected)} of {len(kept)} pairs failed: " in caplog.text


ONLINE = "train.masks=online"


def test_online_masks_are_those_of_the_masks_stage_before_the_first_step(model, records, made, run_folder, monkeypatch):
    """An untrained adapter changes nothing, so the policy's masks are the stored ones."""
    settings = config(ONLINE, "preset=full", "train.steps=1", "train.batch_size=3", "train.accumulation=1")
    seen = []
    forward = train_module.OSPOLoss.forward
    monkeypatch.setattr(
        train_module.OSPOLoss, "forward", lambda self, *a, **k: seen.append(k["object_masks"]) or forward(self, *a, **k)
    )
    pairs = select_training_pairs(records, settings)
    stored = {e.pair_id: e.masks for e in load_examples(pairs, model, config("preset=full"), made)[0]}
    examples, _ = load_examples(pairs, model, settings, made)
    assert all(example.masks is None and example.columns for example in examples)
    chosen = [examples[i] for i in shuffled_indices(len(examples), settings.seed, 0, 3)]
    train(records, model, settings, out=run_folder)
    expected = torch.stack([stored[example.pair_id][side] for side in (0, 1) for example in chosen])
    # The attention of the random model is nearly uniform: a cell at the threshold may fall on either side.
    assert (seen[0] != expected).float().mean() < 0.02
    assert all(row["loss"] == row["loss"] for row in lines(run_folder))


def test_online_masks_follow_the_policy(model, records, run_folder, monkeypatch):
    """Without stored masks, with gradient checkpointing; trained weights move the maps."""
    shutil.rmtree(run_folder / "masks")
    bare = [change_pair(r, mask_path=None) for r in records]
    maps = []
    compute = MaskExtractor.compute
    monkeypatch.setattr(
        MaskExtractor, "compute", lambda self, c, *a: maps.append(c.maps.clone()) or compute(self, c, *a)
    )
    settings = config(ONLINE, "train.max_pairs=2", "train.accumulation=1", "train.learning_rate=1e-2")
    settings.train.gradient_checkpointing = True
    result = train(bare, model, settings, out=run_folder)
    assert result.total == len(maps) == 6
    assert all(0 < row["mask_coverage"] < 1 for row in lines(run_folder))
    assert not torch.allclose(maps[0].sort(0).values, maps[-1].sort(0).values)
    assert all(m.isfinite().all() for m in maps)
    assert model.decoder.config._attn_implementation == "sdpa"


def test_metrics_are_read_after_the_backward_pass(model, records, run_folder, monkeypatch):
    """Reading a metric synchronizes with the device, so the backward pass is launched first."""
    events = []
    for name in ("__float__", "backward"):
        real = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor, name, lambda *a, real=real, name=name, **k: events.append(name) or real(*a, **k)
        )
    train(records, model, config(ONLINE, "train.steps=1", "train.accumulation=1"), out=run_folder)
    assert events[0] == "backward"
    assert events.count("backward") == 1
    assert 0 < lines(run_folder)[0]["mask_coverage"] < 1


@pytest.mark.parametrize("variant", ["masks.heads=[1]", "masks.soft=true", "train.loss.mask_blur=1"])
def test_online_masks_train_with_variants_of_the_masks(model, records, run_folder, variant):
    train(records, model, config(ONLINE, variant, "train.steps=1"), out=run_folder)
    assert len(lines(run_folder)) == 1


def test_pairs_without_objects_fail_for_online_masks(model, records, made):
    kept = [record for record in records if record["kept"]]
    odd = [{**kept[0], "nouns": ["zeppelin"]}, *kept[1:]]
    examples, failures = load_examples(list(iter_pairs(odd)), model, config(ONLINE), made)
    assert len(examples) == len(kept) - 1
    assert "'zeppelin'" in failures[kept[0]["item_id"]].reason


@pytest.mark.gpu
@pytest.mark.parametrize("checkpointing", [False, True])
def test_online_masks_train_on_a_gpu_under_autocast(model, records, run_folder, checkpointing):
    """Under bf16 autocast, with and without gradient checkpointing."""
    moved = load_model(model.name, device="cuda", dtype="float32")
    settings = config(ONLINE, f"train.gradient_checkpointing={checkpointing}".lower(), "train.steps=3")
    train(records, moved, settings, out=run_folder)
    assert all(0 < row["mask_coverage"] < 1 for row in lines(run_folder))


def first_pairs(records, settings, step):
    """The pairs of a step's first batch."""
    pairs = ids(select_training_pairs(records, settings))
    size = settings.train.batch_size
    start = (step - 1) * size * settings.train.accumulation
    return sorted(pairs[i] for i in shuffled_indices(len(pairs), settings.seed, start, size))


def poison(patch, *batches):
    """Make the embeddings of batches of these pairs NaN."""

    def poisoned(model, examples, **options):
        batch, masks = make_batch(model, examples, **options)
        if sorted(example.pair_id for example in examples) in batches:
            batch = dataclasses.replace(batch, embeds=batch.embeds * float("nan"))
        return batch, masks

    patch.setattr(train_module, "make_batch", poisoned)


def overflow(patch, *numbers):
    """Make the gradient of the batches of these numbers, but not their loss, infinite or NaN."""
    forward, count = OSPOLoss.forward, iter(range(1, 1000))

    def overflowing(self, hidden, *rest, **options):
        output = forward(self, hidden, *rest, **options)
        if next(count) in numbers:
            output = dataclasses.replace(output, loss=output.loss + (0 * hidden.sum()).abs().sqrt())
        return output

    patch.setattr(OSPOLoss, "forward", overflowing)


def results(folder):
    """The log, and every file that training leaves, without the checkpoints: equal ones can have other bytes."""
    files = [path for path in (folder / "train").rglob("*") if path.is_file() and path.parent.name != "checkpoints"]
    return lines(folder), {path.name: path.read_bytes() for path in files if path.name != "log.jsonl"}


def weights(folder):
    return load_file(folder / "train" / "adapter" / "adapter_model.safetensors")


@pytest.mark.parametrize("number", [1, 3])
@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_a_step_that_is_not_finite_makes_no_update(tiny, made, records, tmp_path, caplog, number, kind):
    settings = config("train.lora_dropout=0.2", "train.steps=4")
    skipped, expected = (shutil.copytree(made, tmp_path / name) for name in ("skipped", "expected"))
    with pytest.MonkeyPatch.context() as patch:
        if kind == "loss":
            poison(patch, first_pairs(records, settings, number))
        else:
            overflow(patch, 2 * number)
        train(records, load_model(tiny), settings, out=skipped)
    with pytest.MonkeyPatch.context() as patch:  # the same run, without that update
        update, steps = torch.optim.AdamW.step, iter(range(1, 5))
        patch.setattr(torch.optim.AdamW, "step", lambda self, *a: update(self, *a) if next(steps) != number else None)
        train(records, load_model(tiny), settings, out=expected)
    one, other = weights(skipped), weights(expected)
    assert all(torch.equal(one[name], other[name]) for name in one)
    log, plain = lines(skipped), lines(expected)
    bad = log.pop(number - 1)
    assert bad["lr"] == plain.pop(number - 1)["lr"]
    assert log == plain
    pairs = bad["not_finite"]
    if kind == "loss":
        assert pairs == first_pairs(records, settings, number)
    assert (bad["step"], bad["skipped"], bad["grad_norm"]) == (number, True, None)
    assert (bad["loss"] is None) == (kind == "loss")
    assert f"skipping step {number}, whose loss or gradient is not finite; its pairs: {', '.join(pairs)}" in caplog.text
    assert done(skipped)["skipped_steps"] == 1
    assert done(skipped)["skipped_pairs"] == dict.fromkeys(pairs, 1)
    assert (done(expected)["skipped_steps"], done(expected)["skipped_pairs"]) == (0, {})


@pytest.mark.parametrize("stop", [3, 5])
def test_resume_around_skipped_steps_is_exact(tiny, made, records, tmp_path, stop):
    settings = config("train.lora_dropout=0.2")
    bad = [first_pairs(records, settings, step) for step in (3, 4)]
    whole, stopped = (shutil.copytree(made, tmp_path / name) for name in ("whole", "stopped"))
    with pytest.MonkeyPatch.context() as patch:
        poison(patch, *bad)
        train(records, load_model(tiny), settings, out=whole)
        with pytest.raises(KeyboardInterrupt):
            train(records, load_model(tiny), settings, out=stopped, progress=interrupt_after(stop))
        train(records, load_model(tiny), settings, out=stopped)
    assert done(whole)["skipped_steps"] == 2
    assert results(stopped) == results(whole)


@pytest.mark.parametrize("first", [1, 3])
def test_too_many_skipped_steps_in_a_row_stop_training(tiny, made, records, tmp_path, first):
    """The checkpoint is from before them: once their cause is gone, the run is as if it had never been."""

    def start(out, *overrides):
        values = (0.5, 0, 0.4, 0, 0.6, 0, 0.7)
        watched = ("train.eval_every=2", "train.early_stopping=alignment", "train.patience=9", *overrides)
        settings = config("train.lora_dropout=0.2", "train.max_skipped=1", *watched)
        return train(records, load_model(tiny), settings, out, evaluation=lambda _, step: {"alignment": values[step]})

    whole, stopped = (shutil.copytree(made, tmp_path / name) for name in ("whole", "stopped"))
    start(whole)
    bad = [first_pairs(records, config(), step) for step in (first, first + 1)]
    with pytest.MonkeyPatch.context() as patch:
        poison(patch, *bad)
        for _ in range(2):  # resuming does not pass them
            with pytest.raises(OspoError, match=f"2 steps in a row, from step {first}, is not finite") as caught:
                start(stopped)
            assert all(pair in str(caught.value) for pair in bad[0] + bad[1])
            (checkpoint,) = (stopped / "train" / "checkpoints").iterdir()
            assert checkpoint.name == f"step-{first - 1:06d}.pt"
            assert not (stopped / "train" / "done.json").exists()
        passed = shutil.copytree(stopped, tmp_path / "passed")
        start(passed, "train.max_skipped=2")
        assert done(passed)["skipped_steps"] == 2
    start(stopped)
    assert results(stopped) == results(whole)


WATCHED = ("train.eval_every=1", "train.early_stopping=alignment", "train.lora_dropout=0.2")


def start(tiny, records, out, *overrides, **context):
    """Train with an evaluation whose best step is the second."""
    values = (0.1, 0.2, 0.6, 0.3, 0.4, 0.5, 0.5)
    settings = config(*WATCHED, "train.patience=9", *overrides)
    return train(
        records, load_model(tiny), settings, out, evaluation=lambda _, step: {"alignment": values[step]}, **context
    )


@pytest.fixture(scope="module")
def stopped(tiny, records, made, tmp_path_factory):
    """A run that was stopped after 5 of 6 steps: the checkpoint is of step 4."""
    folder = shutil.copytree(made, tmp_path_factory.mktemp("stopped") / "run")
    with pytest.raises(KeyboardInterrupt):
        start(tiny, records, folder, progress=interrupt_after(5))
    return folder


@pytest.fixture
def stopped_copy(stopped, tmp_path):
    return shutil.copytree(stopped, tmp_path / "stopped")


@pytest.fixture(scope="module")
def whole(tiny, records, made, tmp_path_factory):
    """An uninterrupted run."""
    folder = shutil.copytree(made, tmp_path_factory.mktemp("whole") / "run")
    start(tiny, records, folder)
    return folder


def checkpoint_of(folder):
    (path,) = (folder / "train" / "checkpoints").iterdir()
    return path


@pytest.fixture
def trainer(tiny, records, stopped_copy):
    """A trainer of that run, which has not resumed yet."""
    settings, model = config(*WATCHED, "train.patience=9"), load_model(tiny)
    examples, _ = load_examples(select_training_pairs(records, settings), model, settings, stopped_copy)
    return train_module.Trainer(model, examples, settings, stopped_copy / "train")


def test_every_damage_of_a_checkpoint_is_refused(trainer, stopped_copy):
    path = checkpoint_of(stopped_copy)
    data = path.read_bytes()
    damaged = [data[:size] for size in (0, 1, 31, 32, 33, 1000, len(data) // 2, len(data) - 32, len(data) - 1)]
    damaged += [data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :] for at in range(0, len(data), len(data) // 50)]
    damaged += [data + b"x", data + data]
    for content in damaged:
        path.write_bytes(content)
        with pytest.raises(OspoError, match=r"Cannot read the checkpoint .*step-000004\.pt: it.*; use --no-resume to"):
            trainer.resume()
    path.unlink()
    path.mkdir()
    with pytest.raises(OspoError, match="no regular file; use --no-resume"):
        trainer.resume()


def mutations(value, change):
    """Yield copies of a nested value, in each of which `change` was made to one entry: (path, copy)."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, inner in items:
        copy = dict(value) if isinstance(value, dict) else list(value)
        if change is None:
            del copy[name]
        else:
            copy[name] = change(inner)
        yield (name,), copy
        for path, changed in mutations(inner, change):
            yield (name, *path), {**value, name: changed} if isinstance(value, dict) else [changed]


CHANGES = {
    "missing": None,
    "None": lambda value: None,
    "text": lambda value: {"x": 1} if isinstance(value, str) else "x",
    "tensor": lambda value: torch.zeros(3, 5, dtype=torch.complex64),
    "broadcast": lambda value: torch.zeros(1, 1) if isinstance(value, torch.Tensor) else [[]],
    "negative": lambda value: -1,
    "not finite": lambda value: value * float("nan") if isinstance(value, torch.Tensor) else float("nan"),
}


# What could be so in a checkpoint of this run. Only the checksum shows that it was not.
POSSIBLE = {
    "missing": {"optimizer.*", "progress.skipped_pairs.*"},
    "not finite": {"optimizer.*.exp_avg", "optimizer.*.exp_avg_sq", "optimizer.*.step", "progress.best.value"},
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_a_checkpoint_holds_is_checked(trainer, stopped_copy, change):
    """Also if its checksum is right, as in one that was made up."""
    path = checkpoint_of(stopped_copy)
    state = torch.load(path, weights_only=True)  # other programs can read it
    state["progress"]["skipped_pairs"] = {"x": 1}
    tried, accepted = set(), set()
    for where, mutated in mutations(state, CHANGES[change]):
        kind = ".".join(name if isinstance(name, str) and "lora" not in name and name != "x" else "*" for name in where)
        if kind not in tried:
            tried.add(kind)
            write_checkpoint(path, mutated)
            if not isinstance(attempt(trainer.resume), Failure):
                accepted.add(kind)
    assert len(tried) > 15
    assert accepted == POSSIBLE.get(change, set())


class Code:
    def __reduce__(self):
        return Path.touch, (Path("owned"),)


def test_a_checkpoint_runs_no_code_and_takes_no_memory(trainer, stopped_copy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = checkpoint_of(stopped_copy)
    write_checkpoint(path, {"digest": trainer.digest(), "adapter": Code()})
    with pytest.raises(OspoError, match="--no-resume"):
        trainer.resume()
    assert not Path("owned").exists()
    monkeypatch.setattr(torch, "save", lambda state, file: bomb(file))
    write_checkpoint(path, {})
    with pytest.raises(OspoError, match=r"unpacks to .* --no-resume"):
        trainer.resume()


def bomb(file):
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for number in range(3):
            archive.writestr(f"archive/data/{number}", bytes(10**8))


def test_an_older_checkpoint_takes_the_place_of_a_broken_one(tiny, records, stopped_copy, whole, caplog):
    """It gives the same weights and log. Names of other kinds are no checkpoints."""
    folder = stopped_copy / "train" / "checkpoints"
    checkpoint_of(stopped_copy).rename(folder / "kept")
    with pytest.raises(KeyboardInterrupt):
        start(tiny, records, stopped_copy, progress=interrupt_after(3))
    (folder / "step-1000000.pt").write_bytes((folder / "kept").read_bytes()[:-100])
    (folder / "kept").rename(folder / "step-x.pt")
    start(tiny, records, stopped_copy)
    assert "step-1000000.pt: its checksum is wrong" in caplog.text
    assert "Training continues from the older step-000002.pt." in caplog.text
    assert results(stopped_copy) == results(whole)
    assert {path.name for path in folder.iterdir()} == {"step-000006.pt", "step-x.pt"}


def test_best_weights_are_checked(tiny, records, stopped_copy):
    path = stopped_copy / "train" / "best.safetensors"
    data = path.read_bytes()
    tensors = load_file(path)
    name = min(tensors)
    others = [data[:100], b"", data[:-4]]
    for content in others:
        path.write_bytes(content)
        with pytest.raises(OspoError, match=r"best\.safetensors.*--no-resume"):
            start(tiny, records, stopped_copy)
    save_file({**tensors, name: torch.zeros(1, 1)}, path)
    with pytest.raises(OspoError, match=r"best\.safetensors: its adapter should have .*lora_A.* of shape"):
        start(tiny, records, stopped_copy)
    path.write_bytes(data[:-4] + bytes(4))
    with pytest.raises(OspoError, match=r"best\.safetensors: its checksum is wrong"):
        start(tiny, records, stopped_copy)
    assert not (stopped_copy / "train" / "done.json").exists()
    path.write_bytes(data)
    start(tiny, records, stopped_copy)


@pytest.mark.parametrize(
    "line", [b"", b"{", b'{"step": 1e999}\n', b'{"step": "2"}\n', b"\xff\n", b'{"step": 9' + b"9" * 400 + b"}\n"]
)
def test_a_changed_log_is_noticed(trainer, stopped_copy, caplog, line):
    log = stopped_copy / "train" / "log.jsonl"
    whole = log.read_bytes()
    log.write_bytes(line + b"".join(whole.splitlines(keepends=True)[1:]))
    assert trainer.resume()
    assert "log.jsonl were lost or changed" in caplog.text
    caplog.clear()
    log.write_bytes(whole + line)  # torn, or of later steps
    assert trainer.resume()
    assert not caplog.text


@pytest.mark.parametrize("failing", [1, 9])
def test_old_checkpoints_that_could_not_be_deleted_go_later(tiny, records, run_folder, monkeypatch, caplog, failing):
    unlink, left = Path.unlink, [None] * failing

    def broken(path, **options):
        if path.suffix == ".pt" and left:
            left.pop()
            raise OSError(5, "Input/output error")
        unlink(path, **options)

    monkeypatch.setattr(Path, "unlink", broken)
    start(tiny, records, run_folder)
    folder = run_folder / "train" / "checkpoints"
    assert f"cannot delete the old checkpoint {folder / 'step-000002.pt'}: Input/output error" in caplog.text
    assert (run_folder / "train" / "done.json").exists()
    expected = {"step-000006.pt"} if failing == 1 else {f"step-00000{step}.pt" for step in (2, 4, 6)}
    assert {path.name for path in folder.iterdir()} == expected


def test_training_is_done_when_older_checkpoints_are_gone(tiny, records, run_folder, monkeypatch):
    settings = config("train.steps=2", "train.save_every=1")
    with monkeypatch.context() as patch:
        patch.setattr("ospo_fast.stages.train.delete_others", lambda kept: (_ for _ in ()).throw(KeyboardInterrupt))
        for _ in range(2):  # with one checkpoint, then with two
            with pytest.raises(KeyboardInterrupt):
                train(records, load_model(tiny), settings, out=run_folder)
        with pytest.raises(KeyboardInterrupt):  # in `finish`
            train(records, load_model(tiny), settings, out=run_folder)
    assert not (run_folder / "train" / "done.json").exists()
    train(records, load_model(tiny), settings, out=run_folder)
    assert [path.name for path in (run_folder / "train" / "checkpoints").iterdir()] == ["step-000002.pt"]
    assert done(run_folder)["step"] == 2


def test_a_save_that_a_kill_ended_is_made_again(tiny, records, run_folder):
    """peft continues the model card that it finds."""
    settings = config("train.steps=1")
    train(records, load_model(tiny), settings, out=run_folder)
    saved = run_folder / "train" / "adapter"
    expected = {path.name: path.read_bytes() for path in saved.iterdir()}
    (saved / "README.md").write_bytes(expected["README.md"][:2600])
    (saved / "rest").touch()
    (run_folder / "train" / "done.json").unlink()
    train(records, load_model(tiny), settings, out=run_folder)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == expected


def test_kept_weights_are_recorded_and_status_shows_loss_and_evaluation(tiny, records, run_folder):
    values, events = iter([0.5, 0.3, 0.4]), []
    settings = config("train.eval_every=1", "train.early_stopping=alignment", "train.patience=2", "train.steps=9")

    def evaluation(model, step):
        events.append("evaluate")
        return {"alignment": next(values)}

    def show(name):
        return lambda value: events.append((name, value))

    callbacks = {name: show(name) for name in ("begin", "progress", "status")}
    report = train(records, load_model(tiny), settings, run_folder, evaluation=evaluation, **callbacks)
    assert report.kept == {"step": 0, "metric": "alignment", "before": 0.5, "value": 0.5}
    assert done(run_folder)["kept"] == report.kept
    assert events[:4] == [
        ("status", "evaluating before the first step"), "evaluate", ("status", "alignment 0.500"), ("begin", 0)
    ]  # fmt: skip
    texts = [event[1] for event in events if event[0] == "status"]
    loss = next(row["loss"] for row in lines(run_folder) if "loss" in row)
    assert texts[2:5] == [
        f"alignment 0.500, loss {loss:.3f}",
        f"alignment 0.500, loss {loss:.3f}, evaluating",
        f"alignment 0.300, loss {loss:.3f}",
    ]
    assert [event for event in events if event[0] == "progress"] == [("progress", 1)] * 2


def test_a_resumed_training_begins_at_its_step_and_knows_the_value_before(tiny, records, run_folder):
    settings = config("train.steps=4", "train.save_every=1", "train.eval_every=2", "train.early_stopping=alignment")
    begun = []

    def evaluation(model, step):
        return {"alignment": step / 4}

    with pytest.raises(KeyboardInterrupt):
        train(records, load_model(tiny), settings, out=run_folder, evaluation=evaluation, progress=interrupt_after(3))
    report = train(records, load_model(tiny), settings, out=run_folder, evaluation=evaluation, begin=begun.append)
    assert begun == [3]
    assert report.kept == {"step": 4, "metric": "alignment", "before": 0.0, "value": 1.0}

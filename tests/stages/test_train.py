"""Training: what is trained and what is not, exact resumption, batches, caps, and the official file format."""

import dataclasses
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from ospo_fast.config import load_config
from ospo_fast.errors import OspoError
from ospo_fast.loss import OSPOLoss
from ospo_fast.models import load_model
from ospo_fast.ops import Head
from ospo_fast.pipeline import read_stage
from ospo_fast.records import read_records
from ospo_fast.stages import masks as masks_module
from ospo_fast.stages import train as train_module
from ospo_fast.stages.teacher_forcing import hidden_states
from ospo_fast.stages.train import (
    load_examples,
    loss_config,
    make_batch,
    run,
    select_training_pairs,
    shuffled_indices,
    train,
    unconditional_hidden_states,
    unconditional_loss,
)

pytestmark = pytest.mark.usefixtures("omegaconf")  # nearly every test reads a configuration


def config(*overrides):
    small = ["train.steps=6", "train.batch_size=2", "train.save_every=2", "train.lora_rank=4", "train.lora_alpha=8"]
    small += ["train.accumulation=2", "train.learning_rate=1e-3", "train.eval_every=0", "masks.layers=[0]"]
    return load_config([*small, *overrides])


def lines(folder):
    """The log without the clock."""
    rows = [json.loads(line) for line in (folder / "train" / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


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


def test_loss_config():
    settings = load_config(["preset=v2", "train.loss.simpo_weight=0.1"])
    loss = loss_config(settings.preset, settings.train.loss)
    assert (loss.simpo_weight, loss.cond_weight, loss.beta, loss.mask_alpha) == (0.1, 0.5, 3.0, 0.0)


def test_pick(records, caplog):
    kept = [r["item_id"] for r in records if r["kept"]]
    assert len(kept) > 5
    assert [r["item_id"] for r in select_training_pairs(records[::-1], config())] == sorted(kept)
    few = select_training_pairs(records, config("train.max_pairs=3"))
    assert [r["item_id"] for r in few] == [
        r["item_id"] for r in select_training_pairs(records[::-1], config("train.max_pairs=3"))
    ]
    assert len(few) == 3
    capped = select_training_pairs(records, config("train.max_pairs_per_kind=1"))
    assert len({r["kind"] for r in capped}) == len(capped) == len({r["kind"] for r in records if r["kept"]})
    unmasked = [{k: v for k, v in r.items() if k != "mask_path"} for r in records]
    assert select_training_pairs(unmasked, config()) == []
    assert "no object mask" in caplog.text
    assert len(select_training_pairs(unmasked, config("masks.enabled=false"))) == len(kept)


def test_batch_groups(model, records, made):
    examples, left_out = load_examples(
        select_training_pairs(records, config("preset=full")), model, config("preset=full"), made
    )
    assert not left_out
    examples = examples[:3]
    batch, masks = make_batch(model, examples, swapped=True)
    assert len(batch.labels) == 9
    assert masks.shape == (6, *model.grid)
    codes = [row[row != -100] for row in batch.labels]
    for n, example in enumerate(examples):
        assert torch.equal(codes[n], example.codes[0])
        assert torch.equal(codes[n + 3], example.codes[1])
        assert torch.equal(codes[n + 6], example.codes[0])
        assert torch.equal(masks[n + 3], example.masks[1])
        own, other = (model.embed_tokens(model.image_prompt(p)) for p in (example.prompt, example.rejected_prompt))
        torch.testing.assert_close(batch.embeds[n + 3, : len(own)], own)
        torch.testing.assert_close(batch.embeds[n + 6, : len(other)], other)


def test_only_the_language_models_projections_change(model, tiny, records, run_folder):
    result = train(records, model, config(), out=run_folder)
    assert result.steps == 6
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


def test_learns_the_pairs(model, records, run_folder):
    train(
        records, model, config("train.steps=40", "train.schedule=constant", "train.learning_rate=1e-2"), out=run_folder
    )
    log = lines(run_folder)
    for name in ("loss", "sft"):  # of single batches, so that some are compared
        assert sum(row[name] for row in log[-5:]) < 0.98 * sum(row[name] for row in log[:5])
    assert [row["step"] for row in log] == list(range(1, 41))


def test_the_guidance_partner_is_trained_where_wanted(tiny, model, records, run_folder):
    settings = config("train.steps=30", "train.schedule=constant", "train.learning_rate=1e-2")
    settings.train.loss.simpo_weight = settings.train.loss.sft_weight = 0.0
    settings.train.unconditional_weight = 1.0
    examples, _ = load_examples(select_training_pairs(records, settings), model, settings, run_folder)
    with torch.no_grad():
        before = unconditional_loss(model, examples)
        # Of one example, against transformers' own classes: the codes after BOS, padding and begin-of-image.
        prompt = model.unconditional(model.image_prompt(examples[0].prompt))
        embeds = torch.cat([model.embed_tokens(prompt), model.embed_codes(examples[0].codes[0])])[None]
        hidden = model.module.model.language_model(inputs_embeds=embeds).last_hidden_state
        logits = model.module.model.generation_head(hidden[0, len(prompt) - 1 : -1])
        expected = torch.nn.functional.cross_entropy(logits, examples[0].codes[0])
        torch.testing.assert_close(unconditional_loss(model, examples[:1]), expected)
    train(records, model, settings, out=run_folder)
    with torch.no_grad():
        assert unconditional_loss(model, examples) < 0.98 * before
    assert all("unconditional" in row for row in lines(run_folder))


def test_the_distribution_under_guidance_is_trained_where_wanted(tiny, model, records, run_folder):
    settings = config("train.steps=30", "train.schedule=constant", "train.learning_rate=1e-2", "preset=full")
    settings.train.guidance_scale = 3.0
    examples = load_examples(select_training_pairs(records, settings), model, settings, run_folder)[0][:3]
    longer = examples[2].rejected_prompt + " on a white background"  # a swapped row with a partner of its own
    examples[2] = dataclasses.replace(examples[2], rejected_prompt=longer)

    def guided_loss():
        batch, masks = make_batch(model, examples, swapped=True)
        partners = unconditional_hidden_states(model, examples, batch)
        hidden, head = Head.of(model.head).guided(hidden_states(model, batch.embeds), partners, 3.0)
        return (
            hidden,
            head,
            OSPOLoss(loss_config("full", settings.train.loss))(hidden, batch.labels, head, object_masks=masks),
        )

    with torch.no_grad():
        hidden, head, before = guided_loss()
        # Row by row, against the logits of transformers' own classes.
        prompts = [e.prompt for e in examples] * 2 + [e.rejected_prompt for e in examples]
        codes = [e.codes[side] for side in (0, 1, 0) for e in examples]
        assert len(prompts) == len(hidden) == 9
        for row, prompt, drawn in zip(hidden, prompts, codes, strict=True):
            ids = model.image_prompt(prompt)
            both = []
            for start in (ids, model.unconditional(ids)):
                embeds = torch.cat([model.embed_tokens(start), model.embed_codes(drawn)])[None]
                states = model.module.model.language_model(inputs_embeds=embeds).last_hidden_state[0]
                both.append(model.module.model.generation_head(states))
            expected = both[1] + 3.0 * (both[0] - both[1])
            torch.testing.assert_close(head(row[: len(expected)]), expected, rtol=1e-3, atol=1e-3)
    train(records, model, settings, out=run_folder)
    with torch.no_grad():
        assert guided_loss()[2].loss < 0.98 * before.loss


def test_schedule(model, records, run_folder):
    settings = config("train.warmup_ratio=0.34", "train.min_learning_rate=1e-4")
    train(records, model, settings, out=run_folder)
    rates = [row["lr"] for row in lines(run_folder)]
    assert rates[:3] == pytest.approx([0, 5e-4, 1e-3])
    assert rates[2] > rates[3] > rates[4] > rates[5] > 1e-4


@pytest.mark.parametrize("stop", [1, 2, 3, 5])
def test_resume_is_exact(tiny, made, records, tmp_path, stop):
    """Dropout, schedule, optimizer and data order go on as if there had been no stop."""
    settings = config("train.lora_dropout=0.2")
    whole, broken = (shutil.copytree(made, tmp_path / name) for name in ("whole", "broken"))
    train(records, load_model(tiny), settings, out=whole)
    steps = 0

    def interrupt(count):
        nonlocal steps
        steps += count
        if steps == stop:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(records, load_model(tiny), settings, out=broken, progress=interrupt)
    torch.manual_seed(99)
    train(records[::-1], load_model(tiny), settings, out=broken)
    assert lines(broken) == lines(whole)
    one, other = (load_file(f / "train" / "adapter" / "adapter_model.safetensors") for f in (whole, broken))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_checkpoint_of_other_settings_is_refused(tiny, records, run_folder):
    train(records, load_model(tiny), config(), out=run_folder)
    with pytest.raises(OspoError, match="other settings or other pairs"):
        train(records, load_model(tiny), config("train.learning_rate=2e-3"), out=run_folder)
    train(records, load_model(tiny), config("train.learning_rate=2e-3"), out=run_folder, resume=False)


def test_early_stopping_keeps_the_best(tiny, records, run_folder):
    figures = iter([0.1, 0.5, 0.3, 0.2, 0.9])
    seen = []

    def evaluation(model, step):
        torch.rand(3)  # must not disturb the training's own random numbers
        seen.append(step)
        return {"alignment": next(figures)}

    settings = config("train.eval_every=2", "train.early_stopping=alignment", "train.patience=2", "train.steps=20")
    model = load_model(tiny)
    result = train(records, model, settings, out=run_folder, evaluation=evaluation)
    assert seen == [0, 2, 4, 6]
    assert (result.steps, result.best_step) == (6, 2)
    assert [row["alignment"] for row in lines(run_folder) if "alignment" in row] == [0.1, 0.5, 0.3, 0.2]
    best = load_file(run_folder / "train" / "best.safetensors")
    kept = load_file(run_folder / "train" / "adapter" / "adapter_model.safetensors")
    assert {name.replace(".default", "") for name in best} == set(kept)
    assert all(torch.equal(tensor, kept[name.replace(".default", "")]) for name, tensor in best.items())
    bad = config("train.eval_every=1", "train.early_stopping=accuracy")
    with pytest.raises(OspoError, match="no figure of the evaluation"):
        train(records, load_model(tiny), bad, out=run_folder, evaluation=lambda m, s: {"alignment": 1}, resume=False)


def test_gradient_checkpointing_changes_nothing(tiny, made, records, tmp_path):
    folders = []
    for flag in ("true", "false"):
        folders.append(shutil.copytree(made, tmp_path / flag))
        settings = config(f"train.gradient_checkpointing={flag}", "train.lora_dropout=0")
        train(records, load_model(tiny), settings, out=folders[-1])
    for one, other in zip(*map(lines, folders), strict=True):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-6)


def test_official_training_set(tiny, made, records, tmp_path):
    """A JSON array with the published fields and absolute image paths, no codes and no masks beside the images."""
    fields = ("item_id", "t2i_category", "sub_category", "prompt", "chosen", "rejected", "rejected_prompt")
    official = []
    for record in [r for r in records if r["kept"]][:3]:
        entry = {name: record[name] for name in fields}
        for side in ("chosen", "rejected"):
            path = tmp_path / f"{record['item_id']}_{side}.png"
            shutil.copy(made / record[side], path)
            entry[side] = str(path)
        official.append(entry)
    (tmp_path / "train.json").write_text(json.dumps(official))
    out = tmp_path / "out"
    settings = config("preset=full", "masks.enabled=false", "train.steps=1")
    result = train(read_records(tmp_path / "train.json"), load_model(tiny), settings, out=out)
    assert result.pairs == 3
    assert lines(out)[0]["conditional"] > 0


def test_what_is_missing_is_said(tiny, records, tmp_path, made):
    model = load_model(tiny)
    with pytest.raises(OspoError, match="no pair was left"):
        train([], model, config(), out=tmp_path)
    bare = [{k: v for k, v in r.items() if k != "rejected_prompt"} for r in records]
    with pytest.raises(OspoError, match="no rejected_prompt"):
        train(bare, model, config("preset=full"), out=made)
    with pytest.raises(OspoError, match="run folder"):
        list(run(records, model, config()))
    assert not (made / "train").exists()


@pytest.mark.parametrize("preset", ["v3", "full"])
def test_pairs_that_cannot_be_used_are_left_out(tiny, records, run_folder, preset, caplog):
    settings = config(f"preset={preset}", "train.steps=2")
    pairs = select_training_pairs(records, settings)
    long = " and a red circle" * 400
    pairs[0] = {**pairs[0], "prompt": pairs[0]["prompt"] + long}
    pairs[1] = {**pairs[1], "rejected_prompt": pairs[1]["rejected_prompt"] + long}
    (run_folder / pairs[2]["chosen"]).with_suffix(".npz").write_bytes(b"PK\x03\x04 half")
    (run_folder / pairs[3]["mask_path"]).write_bytes(b"12")
    result = train(pairs, load_model(tiny), settings, out=run_folder)
    ids = [record["item_id"] for record in pairs]
    # The rejected prompt is read by the conditional term alone.
    expected = {ids[0]: "tokens, at most", ids[2]: "Cannot read the codes", ids[3]: "Cannot read the masks"}
    expected |= {ids[1]: "tokens, at most"} if preset == "full" else {}
    assert result.left_out.keys() == expected.keys()
    assert all(words in result.left_out[item] for item, words in expected.items())
    assert result.pairs == len(pairs) - len(expected)
    assert json.loads((run_folder / "train" / "done.json").read_text())["left_out"] == result.left_out
    assert f"train: {len(expected)} of {len(pairs)} pairs failed: {ids[0]}: " in caplog.text


def test_broken_checkpoint(tiny, records, run_folder):
    with pytest.raises(KeyboardInterrupt):
        train(records, load_model(tiny), config(), out=run_folder, progress=interrupt_after(3))
    (folder,) = (run_folder / "train" / "checkpoints").glob("step-*")
    (folder / "state.pt").write_bytes(b"PK\x03\x04 half")
    with pytest.raises(OspoError, match=r"step-000002.*remove the folder"):
        train(records, load_model(tiny), config(), out=run_folder)


def interrupt_after(steps):
    count = 0

    def progress(done):
        nonlocal count
        count += done
        if count == steps:
            raise KeyboardInterrupt

    return progress


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
    stored = {e.item_id: e.masks for e in load_examples(pairs, model, config("preset=full"), made)[0]}
    examples, _ = load_examples(pairs, model, settings, made)
    assert all(example.masks is None and example.columns for example in examples)
    chosen = [examples[i] for i in shuffled_indices(len(examples), settings.seed, 0, 3)]
    train(records, model, settings, out=run_folder)
    expected = torch.stack([stored[example.item_id][side] for side in (0, 1) for example in chosen])
    # The random model's attention is all but uniform: a cell at the threshold may fall on either side.
    assert (seen[0] != expected).float().mean() < 0.02
    assert all(row["loss"] == row["loss"] for row in lines(run_folder))


def test_online_masks_follow_the_policy(model, records, run_folder, monkeypatch):
    """Without stored masks, with gradient checkpointing; trained weights move the maps."""
    shutil.rmtree(run_folder / "masks")
    bare = [{k: v for k, v in r.items() if not k.startswith("mask")} for r in records]
    maps = []
    made_of = masks_module.compute_masks
    monkeypatch.setattr(
        masks_module, "compute_masks", lambda capture, *a: maps.append(capture.maps.clone()) or made_of(capture, *a)
    )
    settings = config(ONLINE, "train.max_pairs=2", "train.accumulation=1", "train.learning_rate=1e-2")
    result = train(bare, model, settings, out=run_folder)
    assert result.steps == len(maps) == 6
    assert all(0 < row["mask_coverage"] < 1 for row in lines(run_folder))
    assert not torch.allclose(maps[0].sort(0).values, maps[-1].sort(0).values)
    assert all(m.isfinite().all() for m in maps)
    assert model.decoder.config._attn_implementation == "sdpa"


def test_figures_are_read_after_the_backward_pass(model, records, run_folder, monkeypatch):
    """A figure that is read waits for the device: not while the backward pass is still to be launched."""
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


@pytest.mark.parametrize(
    "variant",
    [
        ["masks.choose=separability"],
        ["masks.choose=contrast"],
        ["masks.heads=[1]"],
        ["masks.layers=auto", "masks.heads=auto"],
        ["masks.soft=true"],
        ["train.loss.mask_blur=1"],
    ],
)
def test_variants_of_the_masks(model, records, run_folder, variant):
    settings = config(ONLINE, *variant, "train.steps=1")
    train(records, model, settings, out=run_folder)
    assert len(lines(run_folder)) == 1
    stored = config(*variant, "train.steps=1")
    assert load_examples(select_training_pairs(records, stored)[:2], model, stored, run_folder)[0][0].masks is not None


def test_online_leaves_out_pairs_without_objects(model, records, made):
    strange = [
        {**r, "nouns": ["zeppelin"]} if n == 0 else r
        for n, r in enumerate(select_training_pairs(records, config(ONLINE)))
    ]
    examples, left_out = load_examples(strange, model, config(ONLINE), made)
    assert len(examples) == len(strange) - 1
    assert "'zeppelin'" in left_out[strange[0]["item_id"]]


def test_online_masks_made_otherwise_are_another_run(model, tiny, records, run_folder):
    train(records, model, config(ONLINE, "train.steps=2"), out=run_folder)
    (run_folder / "train" / "done.json").unlink()
    with pytest.raises(OspoError, match="other settings"):
        train(records, load_model(tiny), config(ONLINE, "train.steps=2", "masks.scaler=1.0"), out=run_folder)


@pytest.mark.gpu
@pytest.mark.parametrize("checkpointing", [False, True])
def test_cuda_online_masks(model, records, run_folder, checkpointing):
    """Under bf16 autocast, with and without gradient checkpointing."""
    moved = load_model(model.name, device="cuda", dtype="float32")
    settings = config(ONLINE, f"train.gradient_checkpointing={checkpointing}".lower(), "train.steps=3")
    train(records, moved, settings, out=run_folder)
    assert all(0 < row["mask_coverage"] < 1 for row in lines(run_folder))

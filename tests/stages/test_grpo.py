"""GRPO: advantages and loss by hand, images of the policy of now, exact resumption, and settings that it refuses."""

import json
import shutil

import pytest
import torch

from ospo_fast.cli import main
from ospo_fast.config import load_config
from ospo_fast.errors import OpError, OspoError, UsageError
from ospo_fast.generation import answer_questions
from ospo_fast.loss import OSPOLoss, OSPOLossConfig
from ospo_fast.models import load_model
from ospo_fast.models.layout import image_layout
from ospo_fast.pipeline import Pipeline, read_stage
from ospo_fast.stages import StageContext, find_stage
from ospo_fast.stages import train as train_module
from ospo_fast.stages.grpo import EPSILON, GroupTrainer, group_advantages, grpo_loss, load_groups
from ospo_fast.stages.train import hidden_states, loss_config
from ospo_fast.stages.training_pairs import select_training_prompts

pytestmark = pytest.mark.usefixtures("omegaconf")


def config(*overrides):
    small = ["train.steps=4", "train.batch_size=2", "train.save_every=2", "train.lora_rank=4", "train.lora_alpha=8"]
    small += ["train.accumulation=2", "train.learning_rate=1e-3", "train.loss.group_size=3", "method=grpo"]
    return load_config([*small, *overrides])


@pytest.fixture(scope="session")
def records(made):
    return read_stage(made, "questions")


def lines(folder):
    rows = [json.loads(line) for line in (folder / "train" / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in ("seconds", "tokens_s")} for row in rows]


def trainer(tiny, records, folder, *overrides):
    settings, model = config(*overrides), load_model(tiny)
    groups, failures = load_groups(select_training_prompts(records, settings), model, settings)
    assert not failures
    return GroupTrainer(model, groups, settings, folder)


def test_advantages():
    rewards = torch.tensor([[1.0, 0.0, 0.5, torch.nan], [0.2, 0.2, 0.2, 0.2], [0.3, torch.nan, torch.nan, torch.nan]])
    found = group_advantages(rewards)
    deviation = torch.tensor([1.0, 0.0, 0.5]).std() + EPSILON
    assert found[0].tolist() == pytest.approx([0.5 / float(deviation), -0.5 / float(deviation), 0, 0])
    assert found[1:].tolist() == [[0] * 4] * 2


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("kl_weight", [0.0, 0.3])
def test_loss_and_gradient_by_hand(kl_weight, weighted):
    groups, size, tokens = 2, 3, 5
    logps = (-torch.rand(groups * size, tokens, dtype=torch.float64)).requires_grad_()
    reference = -torch.rand(groups * size, tokens, dtype=torch.float64)
    present = torch.rand(groups * size, tokens) < 0.8
    present[:, 0] = True
    weights = 1 + torch.rand(groups * size, tokens, dtype=torch.float64) if weighted else None
    rewards = torch.tensor([[0.9, -0.2, 0.1], [0.5, torch.nan, 0.7]])
    output = grpo_loss(logps, present, rewards, weights=weights, reference=reference, kl_weight=kl_weight)
    advantages = group_advantages(rewards).double().flatten()
    means = []
    for row in (0, 1, 2, 3, 5):  # the fourth image of all has no reward
        w = (weights if weights is not None else torch.ones_like(logps))[row][present[row]]
        gap = (reference - logps)[row][present[row]]
        value = -advantages[row] * logps[row][present[row]] + kl_weight * (gap.exp() - gap - 1)
        means.append((w * value).sum() / w.sum())
    (expected,) = torch.autograd.grad(torch.stack(means).sum() / 6, logps)
    (found,) = torch.autograd.grad(output.loss, logps)
    torch.testing.assert_close(found, expected)
    assert output.metrics["reward"] == pytest.approx((0.8 / 3 + 0.6) / 2)
    assert output.metrics["no_signal"] == 0
    assert not any(value.requires_grad for value in output.metrics.values())


def test_a_step_without_any_reward_is_skipped(tiny, records, tmp_path, monkeypatch, caplog):
    output = grpo_loss(torch.randn(3, 4), torch.ones(3, 4).bool(), torch.full((1, 3), torch.nan))
    assert output.loss.isnan()
    made = trainer(tiny, records, tmp_path, "train.max_skipped=1")
    before = [p.clone() for p in made.parameters]
    monkeypatch.setattr(made.scorer, "score", lambda images, *_: [float("nan")] * len(images))
    row = made.train_step()
    assert row["skipped"]
    assert all(torch.equal(p, old) for p, old in zip(made.parameters, before, strict=True))
    made.check_skipped()
    made.train_step()
    with pytest.raises(OspoError, match="2 steps in a row"):
        made.check_skipped()


@pytest.mark.parametrize("value", [0.1, 0.3, 0.7, 0.9999, -3.7, -300.3, 1 / 3])
def test_equal_rewards_are_no_signal(value):
    """Their mean is rounded in float32, and the distance to it must not become an advantage."""
    rewards = torch.full((2, 8), value)
    rewards[1, 3:] = torch.nan
    assert group_advantages(rewards).tolist() == [[0] * 8] * 2
    metrics = grpo_loss(torch.zeros(16, 2), torch.ones(16, 2).bool(), rewards).metrics
    assert (float(metrics["no_signal"]), float(metrics["reward_std"])) == (1, 0)
    assert float(metrics["reward"]) == pytest.approx(value)


def test_a_group_without_a_reward_is_not_one_of_reward_0():
    rewards = torch.tensor([[-4.0, -4.2], [torch.nan, torch.nan]])
    output = grpo_loss(torch.zeros(4, 2), torch.ones(4, 2).bool(), rewards)
    assert float(output.metrics["reward"]) == pytest.approx(-4.1)
    assert float(output.metrics["reward_std"]) == pytest.approx(0.1)
    assert float(output.metrics["no_signal"]) == 0
    assert output.rewards.isnan().tolist() == [False, True]
    nothing = grpo_loss(torch.zeros(4, 2), torch.ones(4, 2).bool(), torch.full((2, 2), torch.nan)).metrics
    assert all(nothing[name].isnan() for name in ("reward", "reward_std", "no_signal"))


def test_what_does_not_count_adds_nothing():
    """Not a number that the generation returns for a failed image, nor infinity on padding."""
    present = torch.tensor([[True, True], [True, False], [True, True], [True, True]])
    rewards = torch.tensor([[1.0, 0.0], [torch.nan, 0.5]])
    logps = torch.tensor([[-1.0, -2.0], [-3.0, -torch.inf], [torch.nan, torch.nan], [-1.0, -1.0]], requires_grad=True)
    options = {"old": logps.detach() - 0.1, "reference": logps.detach() + 0.2, "kl_weight": 0.3}
    output = grpo_loss(logps, present, rewards, **options)
    (found,) = torch.autograd.grad(output.loss, logps)
    clean = logps.detach().nan_to_num(0, 0, 0).requires_grad_()
    others = {name: value.nan_to_num(0, 0, 0) if name != "kl_weight" else value for name, value in options.items()}
    expected = grpo_loss(clean, present, rewards, **others)
    assert output.loss.isfinite()
    assert torch.equal(output.loss, expected.loss)
    assert torch.equal(found, torch.autograd.grad(expected.loss, clean)[0])
    assert (found[1, 1], *found[2]) == (0, 0, 0)


def test_a_divergence_of_weight_0_adds_nothing():
    logps, rewards = torch.zeros(2, 3, requires_grad=True), torch.tensor([[1.0, 0.0]])
    far = grpo_loss(logps, torch.ones(2, 3).bool(), rewards, reference=torch.full((2, 3), 200.0))
    assert torch.equal(far.loss, grpo_loss(logps, torch.ones(2, 3).bool(), rewards).loss)


def test_the_scale_of_token_weights_has_no_effect():
    logps, present, rewards = torch.zeros(2, 5, requires_grad=True), torch.ones(2, 5).bool(), torch.tensor([[1.0, 0.0]])
    weights = torch.rand(2, 5) + 0.5
    weights[:, 0] = 0

    def gradient(scale):
        return torch.autograd.grad(grpo_loss(logps, present, rewards, weights=scale * weights).loss, logps)[0]

    torch.testing.assert_close(gradient(0.01), gradient(1.0))
    torch.testing.assert_close(gradient(1e-20), gradient(1.0))
    torch.testing.assert_close(gradient(100.0), gradient(1.0))
    assert not gradient(0.0).any()
    weights[1, 2] = -0.5
    assert grpo_loss(logps, present, rewards, weights=weights).loss.isnan()
    present[1, 2] = False
    assert grpo_loss(logps, present, rewards, weights=weights).loss.isfinite()


def test_importance_ratios_have_a_limit_and_weigh_the_gradient():
    logps = torch.tensor([[-1.0, -2.0], [-1.0, -2.0]], requires_grad=True)
    old = torch.tensor([[-1.5, -1.0], [-4.0, torch.nan]])
    present = torch.tensor([[True, True], [True, False]])
    output = grpo_loss(logps, present, torch.tensor([[1.0, 0.0]]), old=old)
    (found,) = torch.autograd.grad(output.loss, logps)
    high = float(group_advantages(torch.tensor([[1.0, 0.0]]))[0, 0])
    ratios = torch.tensor([[0.5, -1.0]]).exp() / 2  # two tokens
    torch.testing.assert_close(found[0], (-high * ratios / 2)[0])
    torch.testing.assert_close(found[1], torch.tensor([high * 2.0 / 2, 0.0]))  # exp(3) is above the limit
    assert float(output.metrics["off_policy"]) == pytest.approx((0.5 + 1 + 3) / 3)


def test_the_importance_ratio_of_training_is_exactly_1(tiny, records, tmp_path, caplog):
    """Of all weights that a run has: training has the bits of the generation."""
    options = ["train.guidance_scale=1.5", "images.temperature=0.8", "train.learning_rate=3e-2"]
    made = trainer(tiny, records, tmp_path, *options, "train.loss.kl_weight=0.1")
    assert made.not_exact is None
    steps = [made.train_step() for _ in range(3)]
    assert [step["off_policy"] for step in steps] == [0.0] * 3
    assert steps[0]["kl"] == 0.0  # and the reference before the first update
    assert steps[2]["kl"] > 0
    assert "log-probabilities" not in caplog.text
    own = trainer(tiny, records, tmp_path, *options)
    own.not_exact = "a test"
    assert 0 < own.train_step()["off_policy"] < 1e-4
    made.checkpointing = True  # the exact pass would keep all activations
    assert made.train_step()["off_policy"] > 0


def test_training_that_is_not_exact_says_why(tiny, records, tmp_path, caplog):
    caplog.set_level("INFO")
    half = trainer(tiny, records, tmp_path, "train.autocast=bfloat16")
    assert "not exactly those of the generation: train.autocast is bfloat16" in caplog.text
    assert half.train_step()["off_policy"] > 1e-4
    settings, model = config("dtype=bfloat16"), load_model(tiny, dtype="bfloat16")
    groups, _ = load_groups(select_training_prompts(records, settings), model, settings)
    assert "torch.bfloat16 on cpu" in GroupTrainer(model, groups, settings, tmp_path).not_exact


@pytest.mark.parametrize(
    ("rewards", "options", "message"),
    [
        (torch.zeros(4), {}, r"rewards is .*, expected \(P, G\) with P·G = 4"),
        (torch.zeros(1, 3), {}, r"rewards is .*, expected \(P, G\) with P·G = 4"),
        (torch.zeros(2, 2), {"old": torch.zeros(4)}, r"old is .*, expected the shape \(4, 2\)"),
        (torch.zeros(2, 2), {"weights": torch.zeros(4, 3)}, r"weights is .*, expected the shape \(4, 2\)"),
        (torch.zeros(2, 2), {"reference": torch.zeros(2, 2)}, r"reference is .*, expected the shape \(4, 2\)"),
        ([[0.0, 1.0], [0.0, 1.0]], {}, "rewards is list, expected a tensor"),
        (torch.zeros(2, 2), {"old": [[0.0, 0.0]] * 4}, "old is list, expected a tensor"),
        (torch.zeros(2, 2), {"kl_weight": -0.1}, "kl_weight is -0.1, expected a number >= 0"),
        (torch.zeros(2, 2), {"kl_weight": float("nan")}, "kl_weight is nan, expected a number >= 0"),
        (torch.zeros(2, 2), {"kl_weight": "1"}, "kl_weight is '1', expected a number >= 0"),
    ],
)
def test_wrong_arguments_are_named(rewards, options, message):
    with pytest.raises(OpError, match=message):
        grpo_loss(torch.zeros(4, 2), torch.ones(4, 2).bool(), rewards, **options)


def test_a_prompt_twice_in_a_step_has_other_images(tiny, records, tmp_path):
    made = trainer(tiny, records, tmp_path)
    one, other = made.prepare(made.examples[:1] * 2, range(2))
    assert not torch.equal(one.codes, other.codes)
    again, _ = made.prepare(made.examples[:1] * 2, range(1, 3))
    assert torch.equal(again.codes, other.codes)


def test_half_of_the_groups_have_a_dense_prompt(tiny, records, tmp_path):
    made = trainer(tiny, records, tmp_path, "images.prompts=both")
    dense = {text for record in records for text in record["long_prompt"]}
    assert all(group.dense and set(group.dense) <= dense for group in made.examples)
    group = made.examples[0]
    forms = [made._in_form(group, position).ids for position in range(400)]
    plain = sum(ids is group.ids for ids in forms)
    assert 160 < plain < 240
    assert {id(ids) for ids in forms} == {id(ids) for ids in (group.ids, *group.dense_ids)}
    position = next(n for n, ids in enumerate(forms) if ids is not group.ids)
    (prepared,) = made.prepare([group], range(position, position + 1))
    assert torch.equal(prepared.ids, forms[position])
    assert (prepared.prompt, prepared.questions) == (group.prompt, group.questions)  # the judge reads the plain one
    assert group.identity != trainer(tiny, records, tmp_path).examples[0].identity
    first, *others = records
    some = trainer(
        tiny, [first, *({**record, "long_prompt": [""]} for record in others)], tmp_path, "images.prompts=both"
    )
    assert all(some._in_form(group, n) is group for group in some.examples[1:] for n in range(9))


def test_dense_prompts_that_cannot_train_are_told(tiny, records, tmp_path, caplog):
    settings, model = config("images.prompts=both"), load_model(tiny)
    first, *others = select_training_prompts(records, settings)
    without = [item._replace(record={**item.record, "long_prompt": [""]}) for item in [first, *others]]
    with pytest.raises(OspoError, match=r"images\.prompts is both, and no record has a dense prompt \(long_prompt\)"):
        load_groups(without, model, settings)
    too_long = "a red circle " * 500
    long = first._replace(record={**first.record, "long_prompt": [too_long, *first.record["long_prompt"]]})
    groups, failures = load_groups([long, *others], model, settings)
    assert not failures
    assert groups[0].dense == tuple(first.record["long_prompt"])  # only the one that fails is left out
    GroupTrainer(model, groups, settings, tmp_path)
    total = 1 + sum(len(group.dense) for group in groups)
    assert f"train: 1 of {total} dense prompts failed: {first.pair_id}: " in caplog.text
    alone = [item._replace(record={**item.record, "long_prompt": [too_long]}) for item in [first, *others]]
    with pytest.raises(
        OspoError, match=rf"both, and {len(alone)} of {len(alone)} dense prompts failed: {first.pair_id}"
    ):
        load_groups(alone, model, settings)


def test_the_images_are_those_of_the_policy_and_its_judge_stays(tiny, records, tmp_path):
    """After a step both come from other weights than before it, and the answers from the same ones."""
    made = trainer(tiny, records, tmp_path, "train.learning_rate=3e-2", "train.guidance_scale=1.5")
    examples = made.examples[:2]
    before, again = made.prepare(examples, range(2)), made.prepare(examples, range(2))
    for one, other in zip(before, again, strict=True):
        assert torch.equal(one.codes, other.codes)
        assert torch.equal(one.rewards, other.rewards)
    judge = load_model(tiny)
    for group in before:
        asked = [group.questions] * 3
        chat = made.scorer._chats.__getitem__
        answers = answer_questions(judge, judge.decode_codes(group.codes), asked, template=chat)
        expected = [sum(a["p_yes"] - a["p_no"] for a in row) / len(row) for row in answers]
        assert group.rewards.tolist() == pytest.approx(expected, rel=1e-3, abs=1e-6)
    for _ in range(3):
        made.train_step()
    made.step = 0  # whose seeds are those of before
    after = made.prepare(examples, range(2))
    assert not all(torch.equal(one.codes, other.codes) for one, other in zip(before, after, strict=True))
    for group in after:
        answers = answer_questions(
            judge, judge.decode_codes(group.codes), [group.questions] * 3, template=made.scorer._chats.__getitem__
        )
        expected = [sum(a["p_yes"] - a["p_no"] for a in row) / len(row) for row in answers]
        assert group.rewards.tolist() == pytest.approx(expected, rel=1e-3, abs=1e-6)


def test_the_reference_is_the_model_before_training(tiny, records, tmp_path):
    made = trainer(tiny, records, tmp_path, "train.loss.kl_weight=0.5", "train.learning_rate=3e-2")
    first = made.train_step()
    assert first["kl"] == pytest.approx(0, abs=1e-9)
    assert made.train_step()["kl"] > 1e-7
    base = load_model(tiny)
    embeds = base.embed_tokens(base.image_prompt("a red circle"))[None]
    with made.weights.before_training(), torch.no_grad():
        torch.testing.assert_close(hidden_states(made.model, embeds), hidden_states(base, embeds))
    assert all(p.requires_grad for p in made.parameters)
    assert set(first) >= {"loss", "policy", "kl", "reward", "reward_std", "no_signal"}
    assert {key for key in first if key.startswith("reward/")} <= {"reward/attribute", "reward/layout"}


def test_training_resumes_exactly(tiny, records, tmp_path):
    whole, part = tmp_path / "whole", tmp_path / "part"
    train_module.train(records, load_model(tiny), config(), out=whole)

    def stop(steps):
        if len(lines(part)) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_module.train(records, load_model(tiny), config(), out=part, context=StageContext(progress=stop))
    train_module.train(records, load_model(tiny), config(), out=part)
    assert lines(part) == lines(whole)
    assert (part / "train/model/model.safetensors").read_bytes() == (
        whole / "train/model/model.safetensors"
    ).read_bytes()


def test_token_weights_come_from_the_forward_pass(tiny, records, tmp_path):
    masked = ["masks.enabled=true", "train.masks=online", "train.loss.mask_alpha=3", "masks.layers=[0]"]
    settings = config(*masked, "train.steps=2")
    train_module.train(records, load_model(tiny), settings, out=tmp_path / "masked")
    train_module.train(records, load_model(tiny), config("train.steps=2"), out=tmp_path / "plain")
    assert lines(tmp_path / "masked")[0]["reward"] == lines(tmp_path / "plain")[0]["reward"]
    assert lines(tmp_path / "masked")[0]["grad_norm"] != lines(tmp_path / "plain")[0]["grad_norm"]
    with pytest.raises(UsageError, match=r"train\.masks: got stored with group_size=3, expected online"):
        find_stage("train").check(config("masks.enabled=true", "train.loss.mask_alpha=1"))


def test_prompts_that_cannot_train_are_reported(tiny, records, tmp_path):
    long = {**records[1], "question": ["is there a red circle? " * 90]}
    broken = [{**records[0], "question": [], "question_reason": "no question could be read"}, long, *records[2:]]
    report = StageContext()
    train_module.train(broken, load_model(tiny), config("train.steps=1"), out=tmp_path, context=report)
    assert report.report.failed == 2
    done = json.loads((tmp_path / "train" / "done.json").read_text())
    assert done["left_out"][records[0]["item_id"]] == "no question could be read"
    assert "leave no position" in done["left_out"][records[1]["item_id"]]
    silent = [{**record, "question": []} for record in records]
    with pytest.raises(OspoError, match="no pair to train on"):
        train_module.train(silent, load_model(tiny), config(), out=tmp_path / "none")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("train.full=true", "train.full: got true with group_size=3, expected false"),
        ("train.validation_pairs=3", "train.validation_pairs: got 3 with group_size=3, expected 0"),
        ("score.model=llava", "score.model: got llava with group_size=3, expected null"),
        ("train.lora_dropout=0.1", "train.lora_dropout: got 0.1 with group_size=3, expected 0.0"),
        ("train.loss.sft_weight=2", "train.loss.sft_weight: got 2.0 with group_size=3, expected 0.0"),
        ("train.loss.reference=true", "train.loss.reference: got true with group_size=3, expected false"),
        ("images.top_k=5", "images.top_k: got 5 with group_size=3, expected 0"),
        ("images.top_p=0.9", "images.top_p: got 0.9 with group_size=3, expected 1.0"),
    ],
)
def test_settings_that_grpo_cannot_follow(setting, message):
    with pytest.raises(UsageError, match=message):
        find_stage("train").check(config(setting))
    of_pairs = load_config([setting] if "dropout" in setting else [setting, "train.lora_dropout=0"])
    find_stage("train").check(of_pairs)


def test_memory_is_estimated_for_the_longest_form(tiny, records, tmp_path, monkeypatch):
    made = trainer(tiny, records, tmp_path, "images.prompts=both")
    found = []
    monkeypatch.setattr(train_module, "needs_checkpointing", lambda *_, longest, **__: found.append(longest))
    made.needs_checkpointing()
    longest = max(len(ids) for group in made.examples for ids in group.dense_ids)
    assert longest > max(len(group.ids) for group in made.examples)
    assert found == [longest + image_layout(made.model).tokens]


@pytest.mark.parametrize(("scale", "branches"), [(1.0, 1), (1.5, 2)])
def test_memory_is_estimated_for_both_branches_of_guidance(tiny, records, tmp_path, monkeypatch, scale, branches):
    made = trainer(tiny, records, tmp_path, f"train.guidance_scale={scale}")
    found = []
    monkeypatch.setattr(train_module, "needs_checkpointing", lambda *_, sequences, **__: found.append(sequences))
    made.needs_checkpointing()
    assert found == [2 * 3 * branches]


def test_the_form_of_prompts_is_a_setting_of_training(tiny, made, tmp_path):
    """In both directions, and of folders that an older version made with plain prompts."""

    def train(folder, *settings):
        Pipeline(config(f"model={tiny}", f"out={folder}", "train.steps=1", *settings), progress=False).stage("train")

    of_perturb, of_prompts = tmp_path / "both", tmp_path / "plain"
    for folder in (of_perturb, of_prompts):
        shutil.copytree(made, folder, ignore=shutil.ignore_patterns("train"))
    train(of_perturb, "images.prompts=both")
    with pytest.raises(UsageError, match=r"train was made with images\.prompts=both, now images\.prompts=plain"):
        train(of_perturb)
    train(of_prompts)
    for old in (False, True):
        if old:
            saved = json.loads((of_prompts / "settings.json").read_text())
            del saved["train"]["settings"]["images.prompts"]
            (of_prompts / "settings.json").write_text(json.dumps(saved))
        train(of_prompts)
        with pytest.raises(UsageError, match=r"train was made with images\.prompts=plain, now images\.prompts=both"):
            train(of_prompts, "images.prompts=both")


def test_both_forms_of_prompts_are_for_grpo_without_masks():
    for stage, settings in (("images", []), ("images", ["method=grpo"]), ("train", []), ("train", ["method=sft"])):
        with pytest.raises(UsageError, match=r"images\.prompts: got both, expected dense or plain: .* of one form"):
            find_stage(stage).check(load_config([*settings, "images.prompts=both"]))
    masked = ["masks.enabled=true", "train.masks=online", "train.loss.mask_alpha=1", "images.prompts=both"]
    with pytest.raises(UsageError, match=r"images\.prompts: got both with group_size=3, expected plain"):
        find_stage("train").check(config(*masked))


def test_layers_are_not_chosen_by_pairs():
    masked = ["masks.enabled=true", "train.masks=online", "train.loss.mask_alpha=1", "masks.layers=auto"]
    with pytest.raises(UsageError, match=r"masks\.layers: got auto with group_size=3"):
        find_stage("train").check(config(*masked))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            ["method=grpo", "train.loss.group_size=0", "train.loss.kl_weight=0"],
            r"train\.loss: got simpo_weight, cond_weight and sft_weight of 0",
        ),
        (["method=dpo", "train.loss.group_size=3"], r"train\.loss\.simpo_weight: got 1\.0 with group_size=3"),
        (
            ["method=dpo", "masks.enabled=true", "train.masks=online", "train.loss.mask_alpha=1"],
            r"train\.masks: got online with train\.loss\.reference=true, expected stored",
        ),
        (["method=dpo", "train.loss.cond_weight=0.5"], r"^train\.loss\.cond_weight is 0\.5 with reference=True"),
        (["method=dpo", "train.lora_dropout=0.1"], r"train\.lora_dropout: got 0\.1 with train\.loss\.reference=true"),
    ],
)
def test_objectives_that_do_not_fit_their_loss(settings, message):
    with pytest.raises(UsageError, match=message):
        find_stage("train").check(load_config(settings))


def test_what_the_reward_depends_on_must_not_change(tiny, records, run_folder):
    train_module.train(records, load_model(tiny), config("train.steps=2"), out=run_folder)
    (run_folder / "train" / "done.json").unlink()
    changed = [{**record, "question": record["question"][:1]} for record in records]
    for given, overrides in (
        (records, ["images.temperature=0.5"]),
        (records, ["select.rule=likeliest"]),
        (changed, []),
    ):
        with pytest.raises(OspoError, match="other settings or other pairs"):
            train_module.train(given, load_model(tiny), config("train.steps=2", *overrides), out=run_folder)
    settings = find_stage("train").result_settings(config())
    assert {"images.temperature", "score.reward"} <= settings.keys()
    assert not {"images.temperature", "score.reward"} & find_stage("train").result_settings(load_config()).keys()


def test_a_model_that_cannot_judge_is_refused_before_anything(tiny):
    model = load_model(tiny)
    model.check_chat = lambda: (_ for _ in ()).throw(OspoError("cannot chat"))
    find_stage("train").check_model(model, load_config(["train.lora_rank=4"]))
    with pytest.raises(OspoError, match="cannot chat"):
        find_stage("train").check_model(model, config())


def test_wrong_groups():
    with pytest.raises(UsageError, match=r"train\.loss\.group_size is 1, expected 0, or 2 to 10000"):
        config("train.loss.group_size=1")
    with pytest.raises(UsageError, match=r"kl_weight: got 0\.1 with group_size=0, expected 0"):
        find_stage("train").check(load_config(["train.loss.kl_weight=0.1"]))
    assert loss_config(config("train.loss.kl_weight=0.1")).kl_weight == 0.1
    with pytest.raises(UsageError, match="OSPOLoss: the config has group_size 8, expected 0"):
        OSPOLoss(OSPOLossConfig.preset("grpo"))
    with pytest.raises(UsageError, match=r"OSPOLoss: the config has kl_weight 0\.1, expected 0"):
        OSPOLoss(OSPOLossConfig(kl_weight=0.1))
    with pytest.raises(UsageError, match=r"preset \['grpo'\] is unknown"):
        OSPOLossConfig.preset(["grpo"])


@pytest.mark.parametrize("form", ["plain", "both"])
def test_a_run_needs_prompts_and_questions_alone(form, tiny, made, tmp_path, scripted, monkeypatch, capsys):
    scripted.install(monkeypatch.setattr)
    counts = "prompts.counts={color1: 2, shape1: 0, color2: 2, 2D_spatial: 0, numeracy1: 0, numeracy2: 0}"
    small = [
        "train.steps=2",
        "train.batch_size=2",
        "train.loss.group_size=2",
        "train.accumulation=1",
        "train.lora_rank=4",
        f"images.prompts={form}",
    ]
    arguments = ["--model", str(tiny), "--out", str(tmp_path / "run"), "method=grpo", counts, *small]
    assert main(["run", *arguments, "train.eval_every=0", "train.early_stopping=null"]) == 0
    stores = {path.stem for path in (tmp_path / "run").glob("*.jsonl")}
    assert stores == {"prompts", "questions"} | ({"perturb"} if form == "both" else set())
    assert not (tmp_path / "run" / "images").exists()
    assert (tmp_path / "run" / "train" / "model" / "model.safetensors").exists()
    assert main(["report", str(tmp_path / "run")]) == 0
    capsys.readouterr()

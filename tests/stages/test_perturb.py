"""Stage 2: methods by sub-category, answers parsed, and a reason for each variant that fails."""

from types import SimpleNamespace

import pytest

from ospo_fast.config import load_config
from ospo_fast.errors import OspoError
from ospo_fast.records import stable_hash
from ospo_fast.stages import perturb
from ospo_fast.stages.perturb import METHODS, failure, methods_for, parse_contrast, parse_dense, run

pytestmark = pytest.mark.usefixtures("omegaconf")

MODEL = SimpleNamespace(templates="janus")


def record(item="0000001", sub="attribute2", prompt="a red cup and a blue hat"):
    return {"item_id": item, "t2i_category": "attribute", "sub_category": sub, "prompt": prompt}


@pytest.fixture
def asked(monkeypatch):
    """Answers that depend on the method only; keeps the calls."""
    calls = []

    def sample(model, templates, stage, settings, variables, seeds):
        calls.append((stage, list(variables), list(seeds)))
        return [answer(stage, values) for values in variables]

    def answer(stage, values):
        if stage == "perturb":
            return {
                "replace": "Step 1. x\nStep 4. Contrastive Prompt: a green cup and a blue hat",
                "swap": "Contrastive Prompt: A red cup and a blue hat.",
                "drop": "I cannot do that",
            }[values["method"]]
        return (
            f"Step 2. Prompt 1 Dense: long {values['prompt']}\nStep 4. Prompt 2 Dense: long {values['negative_prompt']}"
        )

    monkeypatch.setattr(perturb, "sample_text", sample)
    return calls


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Contrastive Prompt: a cup", "a cup"),
        ('Step 4. Contrastive Prompt:  "a cup" \nthanks', "a cup"),
        ("Contrastive Prompt: one; Contrastive Prompt: two", "one; Contrastive Prompt: two"),
        ("Contrastive Prompt: one\nContrastive Prompt: two;", "two"),
        ("contrastive prompt: a cup", "a cup"),
        ("Contrastive Prompt:", ""),
        ("a cup", ""),
        ("", ""),
    ],
)
def test_the_contrastive_prompt_is_read_from_an_answer(text, expected):
    assert parse_contrast(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Step 2. Prompt 1 Dense: a\nStep 3. x\nStep 4. Prompt 2 Dense: b", ("a", "b")),
        ("Step 2. Prompt 1 Dense: a; Step 4. Prompt 2 Dense: b", ("a", "b")),
        ("Step 2. Prompt 1 Dense: a; b, c. Step 3. Prompt 2 Objects: d Step 4. Prompt 2 Dense: e;", ("a; b, c.", "e")),
        ("Step 2. Prompt 1 Dense: a", ("a", "")),
        ("Prompt 1 Dense:\n\n a \r\n ; \n step3 : Prompt 2 dense: b ;", ("a", "b")),
        ("Prompt 1 Dense: a; ;Step 3: Prompt 2 Dense:;Step 4.", ("a", "")),
        ("Prompt 1 Dense: a Step by step\nStep 3.", ("a Step by step", "")),
        ("Step 2. Prompt 1 Dense: Step 1. Prompt 1 Dense: a\nStep 4. Prompt 2 Dense: b", ("", "b")),
        ("", ("", "")),
    ],
)
def test_both_dense_prompts_are_read_from_an_answer(text, expected):
    assert parse_dense(text) == expected


@pytest.mark.parametrize("unit", [" ", "\t;", "a", "Step", "Step ", "Step 1", "Step 1 ", "1", "\n", "Prompt 1 Dense: "])
@pytest.mark.parametrize("start", ["", "Contrastive Prompt:", "Prompt 1 Dense: a", "Prompt 2 Dense: a Step 1"])
def test_answers_of_any_form_take_linear_time(start, unit, seconds):
    text = start + unit * (100_000 // len(unit))
    assert seconds(parse_dense, text) < 10
    assert seconds(parse_contrast, text) < 10


def test_methods_depend_on_the_sub_category():
    assert methods_for("attribute1_texture") == ("replace",) * 3
    assert methods_for("layout2") == ("replace",) * 3
    assert methods_for("complex") == ("replace", "swap", "drop")
    assert methods_for("non-spatial") == ("replace", "drop", "replace")
    assert len(METHODS) == 9
    with pytest.raises(OspoError, match="'attribute3'"):
        methods_for("attribute3")


def test_a_variant_that_fails_has_a_reason(asked):
    (done,) = run([record()], MODEL, load_config())
    assert done["perturbed_method"] == ["replace", "swap", "drop"]
    assert done["negative_prompt"] == ["a green cup and a blue hat", "A red cup and a blue hat.", ""]
    assert done["long_prompt"] == ["long a red cup and a blue hat", "", ""]
    assert done["negative_long_prompt"] == ["long a green cup and a blue hat", "", ""]
    assert done["variant_reasons"][0] is None
    assert "prompt itself" in done["variant_reasons"][1]
    assert "no contrastive prompt" in done["variant_reasons"][2]
    assert failure(done) is None
    assert [(stage, len(values)) for stage, values, _ in asked] == [("perturb", 3), ("densify", 1)]


def test_an_answer_without_dense_prompts_fails_the_variants(monkeypatch):
    replies = {"perturb": "Contrastive Prompt: other", "densify": "Step 2. Prompt 1 Dense: a"}
    monkeypatch.setattr(
        perturb, "sample_text", lambda m, t, stage, s, variables, seeds: [replies[stage]] * len(variables)
    )
    (done,) = run([record()], MODEL, load_config())
    assert done["long_prompt"] == done["negative_long_prompt"] == [""] * 3
    assert failure(done).reason == "no dense prompts in the answer"
    assert done["variant_reasons"] == ["no dense prompts in the answer"] * 3


@pytest.mark.parametrize(
    ("excluded", "reason"),
    [
        ("a green cup and a blue hat", "the variant is on the list of excluded prompts"),
        ("long a red cup and a blue hat", "a dense prompt is on the list of excluded prompts"),
        ("Long a green cup and a blue hat.", "a dense prompt is on the list of excluded prompts"),
    ],
)
def test_variants_on_the_list_of_excluded_prompts_fail(asked, tmp_path, excluded, reason):
    file = tmp_path / "held.txt"
    file.write_text(excluded + "\n")
    (done,) = run([record()], MODEL, load_config([f"prompts.exclude={file}"]))
    assert done["variant_reasons"][0] == reason
    assert not any(done["long_prompt"] + done["negative_long_prompt"])


def test_seeds_do_not_depend_on_the_order(asked, monkeypatch):
    items = [record(str(n)) for n in range(5)]
    with monkeypatch.context() as patch:
        patch.setattr(perturb, "CHUNK", 2)
        forward = list(run(items, MODEL, load_config()))
    first = {(v["prompt"], s) for stage, values, seeds in asked for v, s in zip(values, seeds, strict=True)}
    asked.clear()
    backward = list(run(items[::-1], MODEL, load_config()))
    assert backward[::-1] == forward
    assert {(v["prompt"], s) for stage, values, seeds in asked for v, s in zip(values, seeds, strict=True)} == first
    assert len(first) == 5 * 3 + 5


def test_given_hard_negatives_get_dense_forms_alone(asked):
    given = [
        "a red cup and a green hat",
        "A red cup and a blue hat",
        "Step 1. Objects: cup\nStep 2. cup - red",
        "a cup",
    ]
    (done,) = run([record(sub="unknown") | {"negative_prompt": given}], MODEL, load_config())
    assert done["negative_prompt"] == given
    assert done["perturbed_method"] == [""] * 4
    assert done["negative_long_prompt"] == [f"long {given[0]}", "", "", f"long {given[3]}"]
    assert "prompt itself" in done["variant_reasons"][1]
    assert "several lines" in done["variant_reasons"][2]
    assert [done["variant_reasons"][n] for n in (0, 3)] == [None, None]
    seeds = [stable_hash(42, "densify", "0000001", variant) for variant in (0, 3)]
    assert [(stage, len(v), s) for stage, v, s in asked] == [("perturb", 0, []), ("densify", 2, seeds)]
    # Next to an item without any, and with the methods of its own.
    methods = ["drop", "swap", "replace", "replace"]
    asked.clear()
    others = [record("a"), record("b") | {"negative_prompt": given, "perturbed_method": methods}, record("c")]
    first, second, third = run(others, MODEL, load_config())
    assert (second["perturbed_method"], second["negative_long_prompt"]) == (methods, done["negative_long_prompt"])
    assert (
        first["negative_prompt"]
        == third["negative_prompt"]
        == ["a green cup and a blue hat", first["prompt"].replace("a red", "A red") + ".", ""]
    )


def test_given_dense_prompts_are_kept(asked, tmp_path):
    negatives = ["a green cup", "a blue hat", ""]
    dense = {"long_prompt": ["long base 0", "", ""], "negative_long_prompt": ["long green", "", ""]}
    item = record() | {"negative_prompt": negatives} | dense
    (done,) = run([item], MODEL, load_config())
    assert done["long_prompt"] == ["long base 0", "long a red cup and a blue hat", ""]
    assert done["negative_long_prompt"] == ["long green", "long a blue hat", ""]
    assert [len(values) for _, values, _ in asked] == [0, 1]
    file = tmp_path / "held.txt"
    file.write_text("Long green.\n")
    (done,) = run([item], MODEL, load_config([f"prompts.exclude={file}"]))
    assert (done["variant_reasons"][0], done["long_prompt"][0]) == (
        "a dense prompt is on the list of excluded prompts",
        "",
    )

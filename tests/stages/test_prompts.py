"""Stage 1: answers are parsed and filtered, every kind is filled, and an interrupted run resumes exactly."""

import re
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ospo_fast.config import load_config
from ospo_fast.errors import Failure, OspoError, UsageError
from ospo_fast.stages import Shard, StageContext, prompts
from ospo_fast.stages.prompts import check_wording, parse_answer, plan_counts, run

pytestmark = pytest.mark.usefixtures("omegaconf")  # nearly every test reads a configuration

MODEL = SimpleNamespace(templates="janus", image_prompt=str.split, max_positions=10, grid=(2, 2))


def answer(prompt, concepts="red cup", relation="(cup, red)"):
    return f"Prompt: {prompt}; Concepts and relations: {concepts}; Relation: {relation}"


class Writer:
    """Replaces the model and keeps what it was asked."""

    def __init__(self, monkeypatch, reply):
        self.reply, self.asked = reply, []
        monkeypatch.setattr(prompts, "sample_text", self)

    def __call__(self, model, templates, stage, settings, variables, seeds):
        assert stage == "prompts"
        self.asked += [(values, seed) for values, seed in zip(variables, seeds, strict=True)]
        return [self.reply(values["kind"], seed) for values, seed in zip(variables, seeds, strict=True)]


def config(*overrides, **counts):
    kinds = ["color1", "color2", "shape1", "shape2", "texture1", "texture2", "2D_spatial", "3D_spatial"]
    kinds += ["numeracy1", "numeracy2", "non-spatial", "complex"]
    all_counts = {kind: counts.get(kind.replace("-", "_"), 0) for kind in kinds}
    return load_config([f"prompts.counts={all_counts}".replace("'", ""), *overrides])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "Prompt: a red cup; Concepts and relations: red cup; Relation: (cup, red)",
            ("a red cup", "red cup", "(cup, red)"),
        ),
        ("Prompt: a red cup.;Concepts and relations: red cup;Relation: x", ("a red cup.", "red cup", "x")),
        ("  Prompt:  a cup\nConcepts and relations:  cup \nRelation:  (cup)\nmore", ("a cup", "cup", "(cup)")),
        ("Sure! prompt: a cup; concepts and relations: cup; relation: none;", ("a cup", "cup", "none")),
        # Still the form: text around it, several concepts, an empty relation, a further answer after the first.
        ("Here is a prompt:\nPrompt: a cup; Concepts and relations: cup; Relation: x", ("a cup", "cup", "x")),
        ("Prompt: a cup\nConcepts and relations: cup;\n saucer\nRelation:", ("a cup", "cup;\n saucer", "")),
        (
            "Prompt: a cup; Concepts and relations: cup; Relation: (cup)\nPrompt: a hat; Concepts and relations: hat",
            ("a cup", "cup", "(cup)"),
        ),
        ("Prompt: a cup; Concepts and relations: cup; Relation: (cup) Prompt: a hat", ("a cup", "cup", "(cup)")),
    ],
)
def test_the_parts_of_an_answer_are_read(text, expected):
    assert parse_answer(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "Prompt: a cup; Concepts and relations: cup",
        "Prompt: ; Concepts and relations: cup; Relation: x",
        "a cup",
        # A second prompt inside the first, a part in two, a label inside a part, a part without a word.
        "Prompt: a blue circle; Prompt: blue circle; Concepts and relations: blue circle; Relation: none",
        "Prompt: a blue circle; blue circle; Concepts and relations: blue circle; Relation: none",
        "Prompt: a blue circle\nblue circle; Concepts and relations: blue circle; Relation: none",
        "Prompt: a cup Prompt: a cup; Concepts and relations: cup; Relation: none",
        "Prompt: a cup; Concepts and relations: cup; Prompt: a hat; Relation: none",
        "Prompt: a cup; Concepts and relations: Relation: none; Relation: none",
        "Prompt: a cup; Concepts and relations: cup; Concepts and relations: cup; Relation: none",
        "Prompt: . ; Concepts and relations: cup; Relation: none",
        "Prompt: a cup; Concepts and relations: -; Relation: none",
    ],
)
def test_malformed_answers_are_failures(text):
    assert parse_answer(text) == Failure("the answer does not parse")


# The form of an answer as one regular expression, which takes cubic time.
LABEL = r"\b(?:Prompt|Concepts and relations|Relations?)\s*:"
REFERENCE = re.compile(
    rf"\bPrompt:\s*(?P<prompt>(?:(?!{LABEL})[^;\n])+?)\s*[;\n]\s*"
    rf"Concepts and relations:\s*(?P<concepts>(?:(?!{LABEL}).)+?)\s*[;\n]\s*"
    rf"Relations?:\s*(?P<relation>(?:(?!{LABEL})[^\n])*)",
    re.DOTALL | re.IGNORECASE,
)


def reference(answer):
    match = REFERENCE.search(answer)
    if match is not None and not re.search(r"\bPrompt:[ \t]*[^\s;]", answer[: match.start()], re.IGNORECASE):
        parts = tuple(match[name].strip(" ;\t\n") for name in ("prompt", "concepts", "relation"))
        if re.search(r"\w", parts[0]) and re.search(r"\w", parts[1]):
            return parts
    return Failure("the answer does not parse")


NOISE = st.text("a .;\n\t\r", max_size=3) | st.sampled_from(
    [
        "Prompt:",
        "prompt :",
        "Concepts and relations:",
        "Concepts and\nrelations:",
        "Relation:",
        "Relations :",
        "xPrompt:",
    ]
)
PARTS = ("Prompt:", "a", ";", "Concepts and relations:", "b", "\n", "relations:", "c")


@settings(deadline=None, max_examples=500)
@given(data=st.data())
def test_the_parser_equals_a_regular_expression(data):
    text = data.draw(NOISE)
    for part in PARTS * data.draw(st.integers(1, 2)):
        text += data.draw(st.sampled_from([part, part, part, ""])) + data.draw(st.just("") | NOISE)
    assert parse_answer(text) == reference(text)


@pytest.mark.parametrize("start", ["", "Prompt: a", "Prompt: a; Concepts and relations: b", answer("a", "b", "c")])
@pytest.mark.parametrize(
    "unit", ["\n", " ", "a", "; ", "\n;", "Prompt:", "Prompt ", "Relation:", answer("a"), "Prompt: a;\n"]
)
def test_answers_of_any_form_take_linear_time(start, unit, seconds):
    text = start + unit * (100_000 // len(unit))
    assert seconds(parse_answer, text) < 10
    assert seconds(check_wording, text, "layout2") < 10


@pytest.mark.parametrize(
    ("prompt", "sub_category", "accepted"),
    [
        ("a red cup", "attribute1_color", True),
        ("a cup of red color", "attribute1_color", False),
        ("a well-worn cup", "attribute2", False),
        ("a well-worn cup (red)", "complex", True),
        ("a shape / a texture", "non-spatial", True),
        ("three cups", "layout2", True),
        ("five cups", "layout2", False),
        ("two cups and 7 spoons", "layout3", False),
        ("some cups", "layout2", False),
        ("cups on the left", "layout1", True),
    ],
)
def test_wording_is_checked_by_sub_category(prompt, sub_category, accepted):
    assert (check_wording(prompt, sub_category) is None) == accepted


def test_fills_the_kinds_with_distinct_prompts(monkeypatch):
    writer = Writer(
        monkeypatch, lambda kind, seed: answer(f"{kind[0]}{kind[-1]} cup {seed % 40}") if seed % 5 else "no"
    )
    done = list(run([], MODEL, config(color1=5, color2=9, non_spatial=3)))
    kinds = [r["kind"] for r in done]
    assert {kind: kinds.count(kind) for kind in kinds} == {"color1": 5, "color2": 9, "non-spatial": 3}
    assert len({r["prompt"] for r in done}) == len(done) == len({r["item_id"] for r in done})
    # Category digit, and a range for each kind: color2 comes after the 5 of color1.
    assert next(r["item_id"] for r in done if r["kind"] == "color2") == "0000005"
    assert next(r["item_id"] for r in done if r["kind"] == "non-spatial") == "2000000"
    assert done[0]["t2i_category"] == "attribute"
    assert done[0]["sub_category"] == "attribute1_color"
    assert len({seed for _, seed in writer.asked}) == len(writer.asked)


def test_repeats_differ_in_more_than_case_and_full_stop(monkeypatch):
    texts = iter(["a red cup", "A red  cup.", "a blue cup"] * 100)
    Writer(monkeypatch, lambda kind, seed: answer(next(texts)))
    assert [r["prompt"] for r in run([], MODEL, config(color1=2))] == ["a red cup", "a blue cup"]


def test_excluded_prompts_are_never_produced(monkeypatch, tmp_path):
    file = tmp_path / "held_out.txt"
    file.write_text("A cup 1.\ncup 2\n")
    Writer(monkeypatch, lambda kind, seed: answer(f"a cup {seed % 6}" if seed % 2 else f"cup {seed % 6}"))
    done = list(run([], MODEL, config(f"prompts.exclude={file}", "prompts.patience=20", color1=6)))
    texts = {r["prompt"] for r in done}
    assert texts
    assert not texts & {"a cup 1", "cup 2"}


def test_few_shot_examples_become_the_models_own(monkeypatch):
    monkeypatch.setattr(prompts, "CALLS_PER_BATCH", 1)
    writer = Writer(monkeypatch, lambda kind, seed: answer(f"a cup {seed}") if seed % 3 == 0 else "no")
    done = list(run([], MODEL, config("prompts.refresh_every=2", color1=20, complex=20)))
    shown = {tuple(values["examples"]) for values, _ in writer.asked if values["kind"] == "color1"}
    assert len(shown) > 2
    own = {answer(r["prompt"]) for r in done}
    assert all(set(examples) <= own for examples in list(shown) if "turquoise" not in examples[0])
    assert {len(v["examples"]) for v, _ in writer.asked if v["kind"] == "complex"} == {5}


@pytest.mark.parametrize("batch", [1, 3])
def test_resume_equals_an_uninterrupted_run(monkeypatch, batch):
    settings = config("prompts.refresh_every=3", color1=10, shape2=13)
    Writer(monkeypatch, lambda kind, seed: answer(f"{kind[:3]} cup {seed % 50}") if seed % 4 == 0 else "no")
    whole = list(run([], MODEL, settings))
    assert len(whole) == 23
    monkeypatch.setattr(prompts, "CALLS_PER_BATCH", batch)
    for stop in (0, 1, 7, 8, 9, 15, 22):
        assert whole[:stop] + list(run(whole[:stop], MODEL, settings)) == whole


@pytest.mark.parametrize(
    "change",
    [
        {"source": None},
        {"source": 5},
        {"source": {"call": "x", "sample": 0}},
        {"source": {"call": True, "sample": 0}},
        {"source": {"call": -1, "sample": 0}},
        {"source": {"call": 0}},
        {"prompt": None},
        {"relation": None},
    ],
)
def test_a_record_without_what_the_next_prompts_need_keeps_its_place(monkeypatch, caplog, change):
    """It is one of the items of its kind; no id of another kind is given in place of its own."""
    settings = config("prompts.refresh_every=1", "prompts.samples_per_call=2", color1=8, shape1=2)
    Writer(monkeypatch, lambda kind, seed: answer(f"cup {seed}"))
    whole = list(run([], MODEL, settings))
    every = {record["item_id"] for record in whole}
    broken = [*whole[:5], {**whole[5], **change}]
    for absent in (False, True):
        broken[5] = {name: value for name, value in broken[5].items() if value is not None or not absent}
        more = list(run(broken, MODEL, settings))
        assert f"item {whole[5]['item_id']} is not used for further prompts" in caplog.text
        ids = [record["item_id"] for record in (*broken, *more)]
        assert len(ids) == len(every)
        assert set(ids) == every


def test_ids_that_other_kinds_have_taken_are_not_given(monkeypatch, caplog):
    settings = config(color1=3)
    Writer(monkeypatch, lambda kind, seed: answer(f"cup {seed}"))
    whole = list(run([], MODEL, settings))
    more = list(run([{**whole[1], "kind": "other"}], MODEL, settings))
    assert [record["item_id"] for record in more] == [whole[0]["item_id"], whole[2]["item_id"]]


def test_ids_of_lines_that_are_gone_are_given_again(monkeypatch):
    settings = config(color1=4)
    Writer(monkeypatch, lambda kind, seed: answer(f"cup {seed}"))
    whole = list(run([], MODEL, settings))
    more = list(run([whole[0], whole[2]], MODEL, settings))
    assert [record["item_id"] for record in more] == [whole[1]["item_id"], whole[3]["item_id"]]


def test_each_shard_writes_its_kinds(monkeypatch):
    Writer(monkeypatch, lambda kind, seed: answer(f"cup {seed}"))
    settings = config(color1=3, color2=3)
    shards = [Shard(0, 2), Shard(1, 2)]
    parts = [r for shard in shards for r in run([], MODEL, settings, context=StageContext(shard=shard))]
    assert sorted(parts, key=lambda r: r["item_id"]) == list(run([], MODEL, settings))
    assert [sum(plan_counts(MODEL, settings, shard).values()) for shard in [None, *shards]] == [6, 3, 3]


def test_too_few_prompts_give_a_warning_or_an_error(monkeypatch, caplog):
    Writer(monkeypatch, lambda kind, seed: answer("the only cup") if kind == "color1" else "no")
    settings = config("prompts.patience=3", color1=2, color2=2)
    assert len(list(run([], MODEL, settings))) == 1
    assert "color1: 1 of 2 prompts" in caplog.text
    Writer(monkeypatch, lambda kind, seed: answer("a cup in a color"))
    with pytest.raises(OspoError, match=r"no prompt that could be used: stop word 'color' \(\d+\)"):
        list(run([], MODEL, settings))


def test_unknown_kind_names_the_nearest():
    with pytest.raises(UsageError, match="no kind 'colour1'; nearest: color1"):
        list(run([], MODEL, load_config(["prompts.counts.colour1=3"])))


def test_prompts_of_a_file_become_distinct_items(tmp_path):
    file = tmp_path / "mine.txt"
    file.write_text("a red cup\n\n  a blue cup \nA red cup.\n")
    done = list(run([], MODEL, load_config([f"prompts.file={file}"])))
    assert [(r["item_id"], r["prompt"], r["sub_category"]) for r in done] == [
        ("p000000", "a red cup", "complex"),
        ("p000001", "a blue cup", "complex"),
    ]
    assert list(run(done[:1], MODEL, load_config([f"prompts.file={file}"]))) == done[1:]
    assert plan_counts(MODEL, load_config([f"prompts.file={file}"])) == {}
    with pytest.raises(UsageError, match="without --shard"):
        plan_counts(MODEL, load_config([f"prompts.file={file}"]), Shard(0, 2))
    with pytest.raises(UsageError, match="no kind 'circle'"):
        list(run([], MODEL, load_config([f"prompts.file={file}", "prompts.file_kind=circle"])))


def test_prompts_of_a_file_that_cannot_be_used_are_named(tmp_path):
    file, held = tmp_path / "mine.txt", tmp_path / "held.txt"
    held.write_text("a blue cup\n")
    file.write_text("a red cup\n\nA blue  cup.\n")
    with pytest.raises(UsageError, match=r"mine\.txt:3: 'A blue  cup\.' is on the list of excluded prompts"):
        list(run([], MODEL, load_config([f"prompts.file={file}", f"prompts.exclude={held}"])))
    file.write_text("a red cup\none two three four five six seven\n")
    with pytest.raises(UsageError, match=r"mine\.txt:2: .*7 tokens, at most 6 fit"):
        list(run([], MODEL, load_config([f"prompts.file={file}"])))


@pytest.mark.parametrize("content", [None, "\n  \n"])
def test_a_missing_or_empty_file_is_refused(tmp_path, content):
    file = tmp_path / "mine.txt"
    if content is not None:
        file.write_text(content)
    with pytest.raises(UsageError, match=r"mine\.txt"):
        list(run([], MODEL, load_config([f"prompts.file={file}"])))

"""Grammar, meanings, splits, hard negatives and questions of the Shapes world."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ospo_fast.shapes import grammar
from ospo_fast.shapes.scenes import (
    BACKGROUNDS,
    KINDS,
    PLACES,
    SIZES,
    Description,
    Group,
    descriptions,
    held_out_prompts,
    parse,
    prompts,
    random_scene,
    sample_scene,
)


@cache
def all_prompts() -> list[tuple[str, Description]]:
    return [(kind, description) for kind in KINDS for description in descriptions(kind)]


ANY_PROMPT = st.deferred(lambda: st.sampled_from(all_prompts()))  # not at collection, where it would take half a second


def test_every_prompt_is_parsed() -> None:
    for _, description in all_prompts():
        assert parse(description.text) == description


def without_scenery(description: Description) -> Description:
    return replace(description, size=None, place=None, background=None)


@settings(deadline=None)
@given(
    ANY_PROMPT,
    st.sampled_from([None, *SIZES]),
    st.sampled_from([None, *BACKGROUNDS]),
    st.sampled_from([None, *PLACES]),
)
def test_scenery_is_parsed_and_keeps_the_meaning(
    item: tuple[str, Description], size: str | None, background: str | None, place: str | None
) -> None:
    description = item[1]
    place = place if description.total == 1 else None
    dense = Description(
        description.groups, description.relation, description.noun_first, size=size, place=place, background=background
    )
    assert parse(dense.text) == dense
    assert dense.key == description.key
    assert without_scenery(dense) == description


def test_text_outside_the_grammar() -> None:
    for text in (
        "",
        "a dog",
        "a red circles",
        "two red circle",
        "a red circle and a red circle",
        "two red circles left of a blue square",
        "four red circles and one blue square",
        "a small red circle and a large blue square",
        "a red circle left of",
    ):
        assert parse(text) is None, text


def test_meanings() -> None:
    def key(text: str) -> str:
        description = parse(text)
        assert description is not None
        return description.key

    assert key("a red circle left of a blue square") == key("a blue square right of a red circle")
    assert key("a red circle above a blue square") == key("a blue square below a red circle")
    assert key("a red circle left of a blue square") != key("a blue square left of a red circle")
    assert key("a red circle and a blue square") == key("a blue square and a red circle")
    assert key("a circle in red") == key("a red circle") == key("a small red circle on a white background")
    assert key("one red circle and two blue squares") != key("two red circles and one blue square")


def test_splits_are_disjoint_in_meaning() -> None:
    splits = ("train", "validation", "test")
    meanings = {split: {d.key for kind in KINDS for d in prompts(kind, split)} for split in splits}
    assert not meanings["train"] & meanings["test"]
    assert not meanings["train"] & meanings["validation"]
    assert not meanings["test"] & meanings["validation"]
    assert sum(len(prompts(kind, split)) for kind in KINDS for split in splits) == len(all_prompts())
    texts = set(held_out_prompts())
    assert all((d.text in texts) == (d.split != "train") for _, d in all_prompts())
    rng = np.random.default_rng(0)
    for _, description in all_prompts()[::50]:
        dense = grammar.densify(description, description, rng)[0]
        assert (dense.text in texts) == (description.split != "train")


@settings(deadline=None)
@given(ANY_PROMPT, st.integers(0, 2**32 - 1))
def test_a_sampled_scene_satisfies_its_description(item: tuple[str, Description], seed: int) -> None:
    description = item[1]
    scene = sample_scene(description, np.random.default_rng(seed))
    looks = [(obj.color, obj.shape) for obj in scene.objects]
    assert Counter(looks) == {(g.color, g.shape): g.count for g in description.groups}
    assert len({obj.cell for obj in scene.objects}) == len(looks)
    if description.relation:
        first, second = ((group.color, group.shape) for group in description.groups)
        assert grammar.looks_related(scene, first, description.relation, second)


@settings(deadline=None)
@given(ANY_PROMPT, st.integers(0, 2**32 - 1))
def test_hard_negatives_change_the_meaning_and_share_the_scenery(item: tuple[str, Description], seed: int) -> None:
    kind, description = item
    rng = np.random.default_rng(seed)
    for method in grammar.METHODS[KINDS[kind][1]]:
        other = grammar.perturb(description, method, KINDS[kind][1], rng)
        assert other.key != description.key
        assert parse(other.text) == other
        first, second = grammar.densify(description, other, rng)
        assert (first.size, first.background) == (second.size, second.background)
        assert without_scenery(first) == description
        assert without_scenery(second) == other


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from(["existence", "total"]))
def test_answers_of_questions_are_true(seed: int, kind: str) -> None:
    rng = np.random.default_rng(seed)
    scene = random_scene(rng)
    question = grammar.sample_question(scene, kind, rng)
    looks = [(obj.color, obj.shape) for obj in scene.objects]
    if question.kind == "existence":
        expected = tuple(question.text.removeprefix("is there a ").rstrip("?").split()) in looks
    else:
        expected = grammar.TOTALS[question.text.rstrip("?")] == len(looks)
    assert question.answer == expected


def test_yes_and_no_are_about_equally_frequent() -> None:
    rng = np.random.default_rng(0)
    for kind in ("existence", "count", "total", "relation"):
        answers = [grammar.sample_question(random_scene(rng), kind, rng).answer for _ in range(1000)]
        assert 0.4 < np.mean(answers) < 0.6


def test_questions_cover_the_prompt() -> None:
    description = Description((Group(1, "red", "circle"), Group(1, "blue", "square")), relation="left of")
    assert grammar.questions_for(description) == [
        "is there a red circle?",
        "is there a blue square?",
        "is the red circle left of the blue square?",
        "are there two objects?",
    ]


def test_unknown_kinds_are_refused() -> None:
    with pytest.raises(ValueError, match="color9"):
        descriptions("color9")
    with pytest.raises(ValueError, match="color"):
        grammar.sample_question(random_scene(np.random.default_rng(0)), "color", np.random.default_rng(0))


@pytest.mark.parametrize("unit", ["a ", " ", ".", " on a white background", " and ", "a red circle and ", "\u2028"])
def test_texts_of_any_form_are_parsed_in_linear_time(unit: str, seconds: Callable[..., float]) -> None:
    assert seconds(parse, "a red circle" + unit * (100_000 // len(unit))) < 10

"""Grammar, meanings and splits of the Shapes world."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ospo_fast.shapes import grammar
from ospo_fast.shapes.scenes import (
    BACKGROUNDS,
    COLORS,
    KINDS,
    PLACES,
    SHAPES,
    SIZES,
    SPLITS,
    Description,
    Group,
    descriptions,
    held_out,
    parse,
    prompts,
    random_scene,
    sample_scene,
)

EVERYTHING = [(kind, description) for kind in KINDS for description in descriptions(kind)]


def test_every_prompt_reads_back() -> None:
    for _, description in EVERYTHING:
        assert parse(description.text) == description


@settings(deadline=None)
@given(
    st.sampled_from(EVERYTHING),
    st.sampled_from([None, *SIZES]),
    st.sampled_from([None, *BACKGROUNDS]),
    st.sampled_from([None, *PLACES]),
)
def test_scenery_reads_back_and_changes_no_meaning(
    item: tuple[str, Description], size: str | None, background: str | None, place: str | None
) -> None:
    description = item[1]
    place = place if description.total == 1 else None
    dense = Description(
        description.groups, description.relation, description.noun_first, size=size, place=place, background=background
    )
    assert parse(dense.text) == dense
    assert dense.key == description.key
    assert dense.base == description


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a dog",
        "a red circles",
        "two red circle",
        "a red circle and a red circle",
        "two red circles left of a blue square",
        "four red circles and one blue square",
        "a small red circle and a large blue square",
        "a red circle left of",
    ],
)
def test_what_is_no_prompt(text: str) -> None:
    assert parse(text) is None


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
    meanings = {split: {d.key for kind in KINDS for d in prompts(kind, split)} for split in SPLITS}
    assert not meanings["train"] & meanings["test"]
    assert not meanings["train"] & meanings["validation"]
    assert not meanings["test"] & meanings["validation"]
    assert sum(len(prompts(kind, split)) for kind in KINDS for split in SPLITS) == len(EVERYTHING)
    texts = set(held_out())
    assert all((d.text in texts) == (d.split != "train") for _, d in EVERYTHING)
    rng = np.random.default_rng(0)
    for _, description in EVERYTHING[::50]:
        dense = grammar.densify(description, description, rng)[0]
        assert (dense.text in texts) == (description.split != "train")


@settings(deadline=None)
@given(st.sampled_from(EVERYTHING), st.integers(0, 2**32 - 1))
def test_a_sampled_scene_holds_what_was_said(item: tuple[str, Description], seed: int) -> None:
    description = item[1]
    scene = sample_scene(description, np.random.default_rng(seed))
    things = [(thing.color, thing.shape) for thing in scene.objects]
    assert {t: things.count(t) for t in things} == {(g.color, g.shape): g.count for g in description.groups}
    assert len({thing.cell for thing in scene.objects}) == len(things)
    if description.relation:
        first, second = ((group.color, group.shape) for group in description.groups)
        assert grammar.related(scene, first, description.relation, second)


@settings(deadline=None)
@given(st.sampled_from(EVERYTHING), st.integers(0, 2**32 - 1))
def test_variants_change_the_meaning_and_share_the_scenery(item: tuple[str, Description], seed: int) -> None:
    kind, description = item
    rng = np.random.default_rng(seed)
    for method in grammar.METHODS[KINDS[kind][1]]:
        other = grammar.contrast(description, method, KINDS[kind][1], rng)
        assert other.key != description.key
        assert parse(other.text) == other
        first, second = grammar.densify(description, other, rng)
        assert (first.size, first.background) == (second.size, second.background)
        assert first.base == description
        assert second.base == other


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from(["existence", "count", "total", "relation"]))
def test_questions_are_answered_truly(seed: int, kind: str) -> None:
    rng = np.random.default_rng(seed)
    scene = random_scene(rng)
    asked = grammar.ask(scene, kind, rng)
    things = [(thing.color, thing.shape) for thing in scene.objects]
    if asked.kind == "existence":
        expected = tuple(asked.text.removeprefix("is there a ").rstrip("?").split()) in things
    elif asked.kind == "total":
        expected = grammar.TOTALS[asked.text.rstrip("?")] == len(things)
    else:
        return
    assert asked.answer == expected


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1), st.booleans())
def test_places_are_told_truly(seed: int, pair: bool) -> None:
    rng = np.random.default_rng(seed)
    scene = random_scene(rng)
    things = [(thing.color, thing.shape) for thing in scene.objects]
    once = {thing: o.cell for thing, o in zip(things, scene.objects, strict=True) if things.count(thing) == 1}
    asked = grammar.where(scene, rng, pair=pair)
    if asked is None:
        assert len(once) < 1 + pair
        return
    named = [tuple(part.split()) for part in asked[0].removeprefix("where is the ").rstrip("?").split(" and the ")]
    (row, column), *rest = (once[thing] for thing in named)
    if pair:
        ((other_row, other_column),) = rest
        across = "left of" if column < other_column else "right of" if column > other_column else ""
        along = "above" if row < other_row else "below" if row > other_row else ""
        assert asked[1] == f"{across} {along}".strip()
    else:
        assert asked[1] == {place: word for word, place in PLACES.items()}[row, column]


def test_both_answers_are_about_as_frequent() -> None:
    rng = np.random.default_rng(0)
    for kind in ("existence", "count", "total", "relation"):
        answers = [grammar.ask(random_scene(rng), kind, rng).answer for _ in range(2000)]
        assert 0.4 < np.mean(answers) < 0.6


def test_questions_cover_the_prompt() -> None:
    description = Description((Group(1, "red", "circle"), Group(1, "blue", "square")), relation="left of")
    assert grammar.questions_for(description) == [
        "is there a red circle?",
        "is there a blue square?",
        "is the red circle left of the blue square?",
        "are there two objects?",
    ]


def test_unknown_kinds_are_named() -> None:
    with pytest.raises(ValueError, match="color9"):
        descriptions("color9")
    with pytest.raises(ValueError, match="colour"):
        grammar.ask(random_scene(np.random.default_rng(0)), "colour", np.random.default_rng(0))


def test_world_is_as_told() -> None:
    assert len(COLORS) * len(SHAPES) == 24

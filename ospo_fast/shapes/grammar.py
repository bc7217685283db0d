"""What the Shapes model is taught to say in each text stage, and the questions that it is taught to answer.

The forms of the answers are those of every template set (`stages/templates`). All choices come from the generator that
the caller gives; nothing here knows of images beyond the scene that a question is about.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

from ospo_fast.shapes.scenes import (
    BACKGROUNDS,
    COLORS,
    COUNTS,
    OPPOSITE,
    PLACES,
    RELATIONS,
    SHAPES,
    SIZES,
    Description,
    Group,
    Scene,
)

T = TypeVar("T")
METHODS: dict[str, tuple[str, ...]] = {
    "attribute1_color": ("replace",),
    "attribute1_shape": ("replace",),
    "layout2": ("replace",),
    "attribute2": ("replace", "swap", "drop"),
    "layout1": ("replace", "swap", "drop"),
    "layout3": ("replace", "swap", "drop"),
}


def _pick(rng: np.random.Generator, choices: Sequence[T]) -> T:
    return choices[int(rng.integers(len(choices)))]


def stage1_answer(description: Description) -> str:
    """`Prompt: …; Concepts and relations: …; Relation: …`."""
    concepts = ", ".join(group.text().removeprefix("a ") for group in description.groups)
    return f"Prompt: {description.text}; Concepts and relations: {concepts}; Relation: {description.relation or 'none'}"


def _replacements(description: Description) -> list[Description]:
    """All descriptions that differ in one word that matters: a colour, a shape, a number, or the opposite relation.

    Of the other relations one may hold besides (left of and above), so they make no near miss.
    """
    out = []
    for i, group in enumerate(description.groups):
        changed = [replace(group, color=c) for c in COLORS] + [replace(group, shape=s) for s in SHAPES]
        if max(g.count for g in description.groups) > 1:
            changed += [replace(group, count=n) for n in range(1, len(COUNTS) + 1)]
        for new in changed:
            groups = (*description.groups[:i], new, *description.groups[i + 1 :])
            out.append(replace(description, groups=groups))
    if description.relation:
        out.append(replace(description, relation=OPPOSITE[description.relation]))
    return out


def _swaps(description: Description) -> list[Description]:
    if len(description.groups) != 2:
        return []
    a, b = description.groups
    pairs = [
        (replace(a, color=b.color), replace(b, color=a.color)),
        (replace(a, shape=b.shape), replace(b, shape=a.shape)),
    ]
    if description.relation:
        pairs = [(b, a)]
    elif a.count != b.count:
        pairs.append((replace(a, count=b.count), replace(b, count=a.count)))
    return [replace(description, groups=pair) for pair in pairs]


def _valid(description: Description) -> bool:
    kinds = [(group.color, group.shape) for group in description.groups]
    return len(set(kinds)) == len(kinds) and description.total <= len(COUNTS)


def contrast(description: Description, method: str, sub_category: str, rng: np.random.Generator) -> Description:
    """A near miss of `description` by `replace`, `swap` or `drop`; where swapping changes nothing, a replacement."""
    options: list[Description] = []
    if method == "drop" and len(description.groups) == 2:
        options = [replace(description, groups=(group,), relation=None) for group in description.groups]
    elif method == "swap":
        options = _swaps(description)
    options = [d for d in options if _valid(d) and d.key != description.key]
    if not options:
        options = [d for d in _replacements(description) if _valid(d) and d.key != description.key]
        group = description.groups[0]
        if sub_category == "attribute1_color":
            options = [d for d in options if d.groups[0].shape == group.shape]
        elif sub_category == "attribute1_shape":
            options = [d for d in options if d.groups[0].color == group.color]
    return _pick(rng, options)


def scenery(description: Description, rng: np.random.Generator) -> dict[str, str | None]:
    """Size, background and (for a single object) place: what densifying adds to prompt and variant alike."""
    place = _pick(rng, list(PLACES)) if description.total == 1 and rng.random() < 0.5 else None
    return {"size": _pick(rng, list(SIZES)), "background": _pick(rng, list(BACKGROUNDS)), "place": place}


def densify(first: Description, second: Description, rng: np.random.Generator) -> tuple[Description, Description]:
    """Both descriptions in one scenery."""
    fields = scenery(first if first.total > second.total else second, rng)
    return replace(first, **fields), replace(second, **fields)  # type: ignore[arg-type]


def densify_answer(first: Description, second: Description) -> str:
    """`Step 2. Prompt 1 Dense: …; Step 4. Prompt 2 Dense: …`."""
    return f"Step 2. Prompt 1 Dense: {first.text}; Step 4. Prompt 2 Dense: {second.text}"


def existence_question(color: str, shape: str) -> str:
    """`is there a red circle?`"""
    return f"is there a {color} {shape}?"


def count_question(group: Group) -> str:
    """`are there two red circles?`"""
    return f"{'is' if group.count == 1 else 'are'} there {group.text(article=False)}?"


TOTALS = {"is there one object": 1, **{f"are there {word} objects": n for n, word in enumerate(COUNTS[1:], 2)}}


def total_question(total: int) -> str:
    """`are there three objects?`"""
    return next(words for words, number in TOTALS.items() if number == total) + "?"


def relation_question(first: tuple[str, str], relation: str, second: tuple[str, str]) -> str:
    """`is the red circle left of the blue square?`"""
    return f"is the {' '.join(first)} {relation} the {' '.join(second)}?"


def questions_for(description: Description) -> list[str]:
    """The questions that together ask whether a picture shows what `description` says."""
    groups = description.groups
    counted = any(group.count > 1 for group in groups)
    out = [count_question(g) if counted else existence_question(g.color, g.shape) for g in groups]
    if description.relation:
        first, second = ((group.color, group.shape) for group in groups)
        out.append(relation_question(first, description.relation, second))
    return [*out, total_question(description.total)]


def questions_answer(description: Description) -> str:
    """`Questions: …? …?`"""
    return "Questions: " + " ".join(questions_for(description))


def where(scene: Scene, rng: np.random.Generator, *, pair: bool) -> tuple[str, str] | None:
    """`where is the red circle?` and `top left`; of a pair `where is the red circle and the blue square?` and
    `left of above`, how the first lies from the second.

    Only of things that are there once; None where there are too few.
    """
    things = [(thing.color, thing.shape) for thing in scene.objects]
    once = [thing for thing in scene.objects if things.count((thing.color, thing.shape)) == 1]
    if len(once) < 1 + pair:
        return None
    chosen = [once[int(i)] for i in rng.permutation(len(once))[: 1 + pair]]
    names = [f"the {thing.color} {thing.shape}" for thing in chosen]
    if not pair:
        return f"where is {names[0]}?", _place(chosen[0].cell)
    places = [[thing.cell] for thing in chosen]
    found = [relation for relation in RELATIONS if related_places(places[0], relation, places[1])]
    return f"where is {' and '.join(names)}?", " ".join(found)


def _place(cell: tuple[int, int]) -> str:
    return next(place for place, at in PLACES.items() if at == cell)


def caption(scene: Scene) -> str:
    """All that a picture shows, object by object: `a large red circle at the top left and … on a white background`."""
    objects = sorted(scene.objects, key=lambda thing: thing.cell)
    words = [f"a {thing.size} {thing.color} {thing.shape} at the {_place(thing.cell)}" for thing in objects]
    return f"{' and '.join(words)} on a {scene.background} background"


@dataclass(frozen=True)
class Asked:
    """A question about a scene with its true answer; `kind` is existence, count, total or relation."""

    kind: str
    text: str
    answer: bool


def related_places(
    first: Sequence[tuple[float, float]], relation: str, second: Sequence[tuple[float, float]], least: float = 0.0
) -> bool:
    """Whether some place (row, column) of `first` lies `relation` some place of `second`, by more than `least`."""
    rows, columns = RELATIONS[relation]
    return any((a[0] - b[0]) * rows + (a[1] - b[1]) * columns > least for a in first for b in second)


def related(scene: Scene, first: tuple[str, str], relation: str, second: tuple[str, str]) -> bool:
    """Whether some `first` of the scene lies `relation` some `second`."""
    places = {thing: [o.cell for o in scene.objects if (o.color, o.shape) == thing] for thing in (first, second)}
    return related_places(list(places[first]), relation, list(places[second]))


def ask(scene: Scene, kind: str, rng: np.random.Generator) -> Asked:
    """A question of one kind about `scene`; about half are to be answered yes, and the others are near misses."""
    things = [(thing.color, thing.shape) for thing in scene.objects]
    counts = {thing: things.count(thing) for thing in things}
    thing = things[int(rng.integers(len(things)))]
    wrong = rng.random() < 0.5

    def other() -> tuple[str, str]:
        """Something absent: colours and shapes of the scene wrongly joined, one word changed, or anything."""
        style = rng.random()
        for _ in range(20):
            color, shape = _pick(rng, list(COLORS)), _pick(rng, SHAPES)
            if style < 0.35:
                color, shape = things[int(rng.integers(len(things)))][0], things[int(rng.integers(len(things)))][1]
            elif style < 0.55:
                color = thing[0]
            elif style < 0.75:
                shape = thing[1]
            if (color, shape) not in counts:
                return color, shape
            style = rng.random()
        return next((c, s) for c in COLORS for s in SHAPES if (c, s) not in counts)

    if kind == "existence":
        asked = other() if wrong else thing
        return Asked(kind, existence_question(*asked), asked in counts)
    if kind == "count":
        asked, count = thing, counts[thing]
        if wrong:
            if rng.random() < 0.25:
                asked, count = other(), int(rng.integers(1, 3))
            else:
                near = [n for n in (count - 1, count + 1) if 1 <= n <= len(COUNTS)]
                count = near[int(rng.integers(len(near)))] if rng.random() < 0.7 else int(rng.integers(1, 5))
        return Asked(kind, count_question(Group(count, *asked)), counts.get(asked, 0) == count)
    if kind == "total":
        total = len(things)
        if wrong:
            near = [n for n in (total - 1, total + 1) if 1 <= n <= len(COUNTS)]
            total = near[int(rng.integers(len(near)))]
        return Asked(kind, total_question(total), total == len(things))
    if kind == "relation":
        if len(counts) < 2:
            return ask(scene, "existence", rng)
        distinct = sorted(counts)
        i, j = rng.permutation(len(distinct))[:2]
        first, second = distinct[i], distinct[j]
        true = [r for r in RELATIONS if related(scene, first, r, second)]
        relations = [r for r in RELATIONS if r not in true] if wrong else true
        relation = _pick(rng, relations or list(RELATIONS))
        if wrong and rng.random() < 0.15:
            second = other()
        return Asked(kind, relation_question(first, relation, second), related(scene, first, relation, second))
    raise ValueError(f"kind: got {kind!r}, expected existence, count, total or relation")

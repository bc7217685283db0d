"""Answers of the text stages, hard negatives, and questions in the Shapes world.

The answers have the form that the templates of the stages ask for (`stages/templates`). Random choices come from the
`rng` argument.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

from ospo_fast.shapes.scenes import (
    COLORS,
    NUMBERS,
    OPPOSITE,
    PLACES,
    RELATIONS,
    SHAPES,
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


def _choice(rng: np.random.Generator, choices: Sequence[T]) -> T:
    return choices[int(rng.integers(len(choices)))]


def stage1_answer(description: Description) -> str:
    """Return `Prompt: …; Concepts and relations: …; Relation: …`."""
    concepts = ", ".join(group.text().removeprefix("a ") for group in description.groups)
    return f"Prompt: {description.text}; Concepts and relations: {concepts}; Relation: {description.relation or 'none'}"


def _replacements(description: Description) -> list[Description]:
    """List the descriptions that differ in one color, shape or number, or in the opposite relation.

    The other relations are no hard negatives: an object can be both left of and above another one.
    """
    out = []
    for i, group in enumerate(description.groups):
        changed = [replace(group, color=c) for c in COLORS] + [replace(group, shape=s) for s in SHAPES]
        if max(g.count for g in description.groups) > 1:
            changed += [replace(group, count=n) for n in range(1, len(description.world.counts) + 1)]
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
    return len(set(kinds)) == len(kinds) and description.total <= len(description.world.counts)


def perturb(description: Description, method: str, sub_category: str, rng: np.random.Generator) -> Description:
    """Build a hard negative by `replace`, `swap` or `drop`; by `replace` if the method cannot change the meaning."""
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
    return _choice(rng, options)


def sample_scenery(description: Description, rng: np.random.Generator) -> dict[str, str | None]:
    """Sample the scenery of a dense prompt: size, background and, for a single object, place."""
    place = _choice(rng, list(PLACES)) if description.total == 1 and rng.random() < 0.5 else None
    world = description.world
    return {"size": _choice(rng, list(world.sizes)), "background": _choice(rng, world.backgrounds), "place": place}


def densify(first: Description, second: Description, rng: np.random.Generator) -> tuple[Description, Description]:
    """Add the same scenery to both descriptions."""
    scenery = sample_scenery(first if first.total > second.total else second, rng)
    return replace(first, **scenery), replace(second, **scenery)  # type: ignore[arg-type]


def densify_answer(first: Description, second: Description) -> str:
    """Return `Step 2. Prompt 1 Dense: …; Step 4. Prompt 2 Dense: …`."""
    return f"Step 2. Prompt 1 Dense: {first.text}; Step 4. Prompt 2 Dense: {second.text}"


def existence_question(color: str, shape: str) -> str:
    """Ask for one object or more, as in `is there a red circle?`."""
    return f"is there a {color} {shape}?"


def count_question(group: Group) -> str:
    """Ask for an exact number, as in `are there two red circles?`."""
    return f"{'is' if group.count == 1 else 'are'} there {group.text(article=False)}?"


TOTALS = {"is there one object": 1, **{f"are there {word} objects": n for n, word in enumerate(NUMBERS[1:], 2)}}


def total_question(total: int) -> str:
    """Ask for the number of all objects, as in `are there three objects?`."""
    return next(words for words, number in TOTALS.items() if number == total) + "?"


def relation_question(first: tuple[str, str], relation: str, second: tuple[str, str]) -> str:
    """Ask for a relation, as in `is the red circle left of the blue square?`."""
    return f"is the {' '.join(first)} {relation} the {' '.join(second)}?"


def questions_for(description: Description) -> list[str]:
    """List the questions that decide together whether an image satisfies `description`."""
    groups = description.groups
    counted = any(group.count > 1 for group in groups)
    out = [count_question(g) if counted else existence_question(g.color, g.shape) for g in groups]
    if description.relation:
        first, second = ((group.color, group.shape) for group in groups)
        out.append(relation_question(first, description.relation, second))
    return [*out, total_question(description.total)]


def questions_answer(description: Description) -> str:
    """Return `Questions: …? …?`."""
    return "Questions: " + " ".join(questions_for(description))


@dataclass(frozen=True)
class Question:
    """A question about a scene with its true answer; `kind` is existence, count, total or relation."""

    kind: str
    text: str
    answer: bool


def positions_related(
    first: Sequence[tuple[float, float]], relation: str, second: Sequence[tuple[float, float]], margin: float = 0.0
) -> bool:
    """Return whether `relation` holds by more than `margin` for a position (row, column) of each of the two lists."""
    rows, columns = RELATIONS[relation]
    return any((a[0] - b[0]) * rows + (a[1] - b[1]) * columns > margin for a in first for b in second)


def looks_related(scene: Scene, first: tuple[str, str], relation: str, second: tuple[str, str]) -> bool:
    """Return whether `relation` holds for an object of each of two looks (color, shape)."""
    cells = {look: [o.cell for o in scene.objects if (o.color, o.shape) == look] for look in (first, second)}
    return positions_related(list(cells[first]), relation, list(cells[second]))


def sample_question(scene: Scene, kind: str, rng: np.random.Generator) -> Question:
    """Sample a question about `scene`: with equal probability a true statement or a perturbed one."""
    looks = [(obj.color, obj.shape) for obj in scene.objects]
    counts = {look: looks.count(look) for look in looks}
    most = len(scene.world.counts)
    look = looks[int(rng.integers(len(looks)))]
    wrong = rng.random() < 0.5

    def absent() -> tuple[str, str]:
        """A look that the scene lacks: its colors and shapes recombined, one word changed, or any look."""
        style = rng.random()
        for _ in range(20):
            color, shape = _choice(rng, list(COLORS)), _choice(rng, SHAPES)
            if style < 0.35:
                color, shape = looks[int(rng.integers(len(looks)))][0], looks[int(rng.integers(len(looks)))][1]
            elif style < 0.55:
                color = look[0]
            elif style < 0.75:
                shape = look[1]
            if (color, shape) not in counts:
                return color, shape
            style = rng.random()
        return next((c, s) for c in COLORS for s in SHAPES if (c, s) not in counts)

    if kind == "existence":
        asked = absent() if wrong else look
        return Question(kind, existence_question(*asked), asked in counts)
    if kind == "count":
        asked, count = look, counts[look]
        if wrong:
            if rng.random() < 0.25:
                asked, count = absent(), int(rng.integers(1, 3))
            else:
                near = [n for n in (count - 1, count + 1) if 1 <= n <= most]
                count = near[int(rng.integers(len(near)))] if rng.random() < 0.7 else int(rng.integers(1, most + 1))
        return Question(kind, count_question(Group(count, *asked)), counts.get(asked, 0) == count)
    if kind == "total":
        total = len(looks)
        if wrong:
            near = [n for n in (total - 1, total + 1) if 1 <= n <= most]
            total = near[int(rng.integers(len(near)))]
        return Question(kind, total_question(total), total == len(looks))
    if kind == "relation":
        if len(counts) < 2:
            return sample_question(scene, "existence", rng)
        distinct = sorted(counts)
        i, j = rng.permutation(len(distinct))[:2]
        first, second = distinct[i], distinct[j]
        true = [r for r in RELATIONS if looks_related(scene, first, r, second)]
        relations = [r for r in RELATIONS if r not in true] if wrong else true
        relation = _choice(rng, relations or list(RELATIONS))
        if wrong and rng.random() < 0.15:
            second = absent()
        return Question(kind, relation_question(first, relation, second), looks_related(scene, first, relation, second))
    raise ValueError(f"kind: got {kind!r}, expected existence, count, total or relation")

"""Scenes of the Shapes worlds, their prompts, and the split into training and held-out prompts.

There are two worlds of the same shapes, colors and kinds of prompts (`World`). In `SHAPES_WORLD`, the default of all
functions, a scene is one to four objects in the cells of a 3×3 board on a plain background. In `LARGE_WORLD` it is one
to six small objects in the cells of an 8×8 board, on a texture with clutter. A `Description` is the parsed form of a
prompt: `Description.text` writes it, `parse` reads it. This module depends on no model.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np

from ospo_fast.records import write_atomic

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (214, 39, 40),
    "green": (20, 140, 40),
    "blue": (31, 80, 200),
    "yellow": (240, 210, 30),
    "purple": (125, 40, 165),
    "cyan": (30, 200, 215),
}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (250, 250, 250),
    "gray": (172, 172, 172),
    "black": (12, 12, 12),
}
SHAPES = ("circle", "square", "triangle", "cross")
SIZES: dict[str, int] = {"small": 8, "large": 13}  # pixels across
NUMBERS = ("one", "two", "three", "four", "five", "six")
COUNTS = NUMBERS[:4]
RELATIONS: dict[str, tuple[int, int]] = {"left of": (0, -1), "right of": (0, 1), "above": (-1, 0), "below": (1, 0)}
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
BOARD = 3
PLACES: dict[str, tuple[int, int]] = {
    f"{row} {column}".strip() or "center": (r, c)
    for r, row in enumerate(("top", "", "bottom"))
    for c, column in enumerate(("left", "", "right"))
}
KINDS: dict[str, tuple[str, str]] = {  # kind → (category, sub-category), official names
    "color1": ("attribute", "attribute1_color"),
    "shape1": ("attribute", "attribute1_shape"),
    "color2": ("attribute", "attribute2"),
    "2D_spatial": ("layout", "layout1"),
    "numeracy1": ("layout", "layout2"),
    "numeracy2": ("layout", "layout3"),
}


@dataclass(frozen=True, eq=False)
class World:
    """What differs between the worlds.

    Attributes:
        name: of the embedded model, its family of settings and its template set; also the salt of the split.
        board: cells in a row and in a column.
        cell: pixels across a cell.
        sizes: pixels across an object, by name.
        backgrounds: names of the backgrounds: plain ones (`BACKGROUNDS`), or textures.
        textured: whether backgrounds are textures, each drawn from the seed of its scene.
        counts: words for the numbers of objects; a scene has as many objects at most.
        pair_counts: numbers of objects of the two groups in prompts of `numeracy2`.
        spacing: smallest distance between two objects, in cells of the longer direction.

    """

    name: str
    board: int
    cell: int
    sizes: dict[str, int]
    backgrounds: tuple[str, ...]
    textured: bool
    counts: tuple[str, ...]
    pair_counts: tuple[tuple[int, int], ...]
    spacing: int

    @property
    def image_size(self) -> int:
        """Height and width of an image in pixels."""
        return self.board * self.cell

    @property
    def cells(self) -> list[tuple[int, int]]:
        """All cells as (row, column), in row-major order."""
        return [(row, column) for row in range(self.board) for column in range(self.board)]

    def place(self, cell: tuple[int, int]) -> str:
        """Return the name of the third of the rows and of the columns that `cell` is in."""
        return _PLACE_NAMES[cell[0] * 3 // self.board, cell[1] * 3 // self.board]

    def apart(self, first: tuple[int, int], second: tuple[int, int]) -> bool:
        """Return whether two objects may be in these cells."""
        return max(abs(first[0] - second[0]), abs(first[1] - second[1])) >= self.spacing

    def spaced(self, order: Iterable[int], count: int) -> list[tuple[int, int]]:
        """Return the first `count` cells of `order` (numbers of cells) that are apart from all cells before them."""
        found: list[tuple[int, int]] = []
        for number in order:
            cell = (int(number) // self.board, int(number) % self.board)
            if len(found) < count and all(self.apart(cell, other) for other in found):
                found.append(cell)
        return found


_PLACE_NAMES = {position: place for place, position in PLACES.items()}
SHAPES_WORLD = World(
    name="shapes",
    board=BOARD,
    cell=16,
    sizes=SIZES,
    backgrounds=tuple(BACKGROUNDS),
    textured=False,
    counts=COUNTS,
    pair_counts=((1, 2), (2, 1), (2, 2), (1, 3), (3, 1)),
    spacing=1,
)
LARGE_WORLD = World(
    name="shapes-large",
    board=8,
    cell=8,
    sizes={"small": 6, "large": 8},
    backgrounds=("striped", "checkered", "dotted", "speckled", "cloudy"),
    textured=True,
    counts=NUMBERS,
    pair_counts=tuple((n, m) for n in range(1, 6) for m in range(1, 7 - n) if n + m > 2),
    spacing=2,  # a large object fills its cell, so objects in adjacent cells would be one component to the checker
)
WORLDS = {world.name: world for world in (SHAPES_WORLD, LARGE_WORLD)}
_PLURALS = {shape: shape + ("es" if shape.endswith("s") else "s") for shape in SHAPES}
_SINGULARS = {plural: shape for shape, plural in _PLURALS.items()}


@dataclass(frozen=True)
class Object:
    """One object of a scene; `cell` is (row, column) on the board."""

    color: str
    shape: str
    size: str
    cell: tuple[int, int]


@dataclass(frozen=True)
class Scene:
    """The content of an image. `seed` is that of its texture."""

    objects: tuple[Object, ...]
    background: str
    seed: int = 0
    world: World = field(default=SHAPES_WORLD, repr=False)


@dataclass(frozen=True)
class Group:
    """`count` objects of one color and shape."""

    count: int
    color: str
    shape: str

    def text(self, size: str | None = None, *, article: bool = True) -> str:
        """Return `a red circle` or `two small red circles`; without `article`, `one red circle`."""
        number = "a" if self.count == 1 and article else NUMBERS[self.count - 1]
        noun = self.shape if self.count == 1 else _PLURALS[self.shape]
        return " ".join(word for word in (number, size, self.color, noun) if word)


@dataclass(frozen=True)
class Description:
    """The content of a prompt: groups of objects, and optionally their relation and scenery.

    An image satisfies it only if it shows no other object. Scenery is the size, place and background. `noun_first`
    selects the form `a circle in red`, which has the same meaning.
    """

    groups: tuple[Group, ...]
    relation: str | None = None
    noun_first: bool = False
    size: str | None = None
    place: str | None = None
    background: str | None = None
    world: World = field(default=SHAPES_WORLD, repr=False)

    @property
    def text(self) -> str:
        """The prompt."""
        counted = any(group.count > 1 for group in self.groups) and len(self.groups) > 1
        if self.noun_first:
            group = self.groups[0]
            words = " ".join(w for w in ("a", self.size, group.shape, "in", group.color) if w)
        elif self.relation:
            words = f"{self.groups[0].text(self.size)} {self.relation} {self.groups[1].text(self.size)}"
        else:
            words = " and ".join(group.text(self.size, article=not counted) for group in self.groups)
        if self.place:
            words += f" at the {self.place}"
        if self.background:
            words += f" on a {self.background} background"
        return words

    @property
    def key(self) -> str:
        """The meaning without scenery: equal for two prompts if the same images satisfy both."""
        groups = [f"{group.count} {group.color} {group.shape}" for group in self.groups]
        if self.relation in ("right of", "below"):  # `a right of b` is `b left of a`
            return f"{groups[1]} {OPPOSITE[self.relation]} {groups[0]}"
        if self.relation:
            return f"{groups[0]} {self.relation} {groups[1]}"
        return " + ".join(sorted(groups))

    @property
    def split(self) -> str:
        """The split, by a hash of the meaning: `test` for 12% of all meanings, `validation` for 8%, else `train`."""
        share = int.from_bytes(hashlib.sha256(f"{self.world.name} {self.key}".encode()).digest()[:4], "big") / 2**32
        return "test" if share < 0.12 else "validation" if share < 0.20 else "train"

    @property
    def total(self) -> int:
        """The number of objects."""
        return sum(group.count for group in self.groups)


_NUMBER = {"a": 1, **{word: number for number, word in enumerate(NUMBERS, 1)}}
_GROUP = re.compile(
    rf"({'|'.join(_NUMBER)}) (?:({'|'.join(SIZES)}) )?(?:({'|'.join(COLORS)}) )({'|'.join([*SHAPES, *_SINGULARS])})"
)
_NOUN_FIRST = re.compile(rf"a (?:({'|'.join(SIZES)}) )?({'|'.join(SHAPES)}) in ({'|'.join(COLORS)})")
_BACKGROUND = {
    world.name: re.compile(rf" on a ({'|'.join(world.backgrounds)}) background$") for world in WORLDS.values()
}
_PLACE = re.compile(rf" at the ({'|'.join(sorted(PLACES, key=len, reverse=True))})$")


def parse(text: str, world: World = SHAPES_WORLD) -> Description | None:
    """Parse a prompt; None if `text` is not a prompt of the world."""
    words = " ".join(text.strip().rstrip(".").split())
    scenery: dict[str, Any] = {"world": world}
    for name, pattern in (("background", _BACKGROUND[world.name]), ("place", _PLACE)):
        if match := pattern.search(words):
            scenery[name] = match.group(1)
            words = words[: match.start()]
    if match := _NOUN_FIRST.fullmatch(words):
        size, shape, color = match.groups()
        return Description((Group(1, color, shape),), noun_first=True, size=size, **scenery)
    for connective in (*RELATIONS, "and", None):
        parts = words.split(f" {connective} ") if connective else [words]
        if connective and len(parts) != 2:
            continue
        matches = [_GROUP.fullmatch(part) for part in parts]
        if not all(matches):
            return None
        fields = [match.groups() for match in matches if match]
        groups = [Group(_NUMBER[n], c, _SINGULARS.get(s, s)) for n, _, c, s in fields]
        sizes = {size for _, size, _, _ in fields}
        plural = [(s in _SINGULARS) for *_, s in fields]
        if len(sizes) != 1 or any((group.count > 1) != p for group, p in zip(groups, plural, strict=True)):
            return None
        relation = connective if connective in RELATIONS else None
        if sum(g.count for g in groups) > len(world.counts) or (relation and any(g.count > 1 for g in groups)):
            return None
        if len(groups) == 2 and (groups[0].color, groups[0].shape) == (groups[1].color, groups[1].shape):
            return None
        return Description(tuple(groups), relation=relation, size=sizes.pop(), **scenery)
    return None


def descriptions(kind: str, world: World = SHAPES_WORLD) -> list[Description]:
    """List the base prompts of a kind, in a fixed order."""
    return [replace(description, world=world) for description in _descriptions(kind, world)]


def _descriptions(kind: str, world: World) -> list[Description]:
    looks = [(color, shape) for color in COLORS for shape in SHAPES]
    if kind in ("color1", "shape1"):
        return [Description((Group(1, *look),), noun_first=kind == "shape1") for look in looks]
    if kind == "numeracy1":
        return [Description((Group(n, *look),)) for look in looks for n in range(2, len(world.counts) + 1)]
    pairs = list(permutations(looks, 2))
    if kind == "2D_spatial":
        return [Description((Group(1, *a), Group(1, *b)), relation=r) for a, b in pairs for r in RELATIONS]
    if kind == "numeracy2":
        return [Description((Group(n, *a), Group(m, *b))) for a, b in pairs for n, m in world.pair_counts]
    if kind == "color2":  # both colors and shapes differ, so that swapping either changes the scene
        return [Description((Group(1, *a), Group(1, *b))) for a, b in pairs if a[0] != b[0] and a[1] != b[1]]
    raise ValueError(f"kind: got {kind!r}, expected one of {', '.join(KINDS)}")


def prompts(kind: str, split: str, world: World = SHAPES_WORLD) -> list[Description]:
    """List the base prompts of a kind in a split (`train`, `validation` or `test`)."""
    return [description for description in descriptions(kind, world) if description.split == split]


def held_out_prompts(world: World = SHAPES_WORLD) -> list[str]:
    """List all validation and test prompts, with and without scenery. No stage may produce one of them.

    Base prompts come first, in the order of `descriptions`.
    """
    looks = [(color, shape) for color in COLORS for shape in SHAPES]
    # The hard negatives of color2.
    pairs = [Description((Group(1, *a), Group(1, *b)), world=world) for a, b in permutations(looks, 2)]
    base = [d for d in (*(d for kind in KINDS for d in descriptions(kind, world)), *pairs) if d.split != "train"]
    dense = [
        replace(description, size=size, place=place, background=background).text
        for description in base
        for size in (None, *world.sizes)
        for place in ((None, *PLACES) if description.total == 1 else (None,))
        for background in (None, *world.backgrounds)
    ]
    return list(dict.fromkeys([*(description.text for description in base), *dense]))


def write_held_out_prompts(path: Path, world: World = SHAPES_WORLD) -> None:
    """Write a file for `prompts.exclude`: the held-out prompts, one per line."""
    write_atomic(path, ("\n".join(held_out_prompts(world)) + "\n").encode())


def sample_scene(description: Description, rng: np.random.Generator) -> Scene:
    """Sample a scene that satisfies `description`; everything that it does not specify is random."""
    world = description.world
    cells = world.cells
    if description.place:
        inside = [cell for cell in cells if world.place(cell) == description.place]
        occupied = [inside[rng.integers(len(inside))]]
    elif description.relation:
        rows, columns = RELATIONS[description.relation]
        fits = _related_cells(world, rows, columns)
        occupied = list(fits[rng.integers(len(fits))])
    else:
        occupied = world.spaced(rng.permutation(len(cells)), description.total)
    size = description.size or str(rng.choice(list(world.sizes)))
    background = description.background or str(rng.choice(list(world.backgrounds)))
    groups = [group for group in description.groups for _ in range(group.count)]
    objects = [Object(g.color, g.shape, size, cell) for g, cell in zip(groups, occupied, strict=True)]
    return Scene(tuple(objects), background, _texture_seed(world, rng), world)


@cache
def _related_cells(world: World, rows: int, columns: int) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """All pairs of cells whose objects have the relation of these directions."""
    return [
        (a, b)
        for a, b in permutations(world.cells, 2)
        if ((a[0] - b[0]) * rows > 0 or (a[1] - b[1]) * columns > 0) and world.apart(a, b)
    ]


def _texture_seed(world: World, rng: np.random.Generator) -> int:
    return int(rng.integers(2**32)) if world.textured else 0


def random_scene(rng: np.random.Generator, world: World = SHAPES_WORLD) -> Scene:
    """Sample a scene of one object or more. With probability 0.4 an object repeats the look of an earlier one."""
    cells = world.spaced(rng.permutation(world.board**2), int(rng.integers(1, len(world.counts) + 1)))
    size, background = str(rng.choice(list(world.sizes))), str(rng.choice(list(world.backgrounds)))
    objects: list[Object] = []
    for cell in cells:
        if objects and rng.random() < 0.4:
            other = objects[rng.integers(len(objects))]
            color, shape = other.color, other.shape
        else:
            color, shape = str(rng.choice(list(COLORS))), str(rng.choice(SHAPES))
        objects.append(Object(color, shape, size, cell))
    return Scene(tuple(objects), background, _texture_seed(world, rng), world)

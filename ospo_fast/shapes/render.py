"""Render scenes with Pillow: 48×48 pixels, or 64×64 in the world of small objects.

Textures are gray, so that the colors of objects can be told from any of them. Each is drawn from the seed of its scene:
only its name is in the prompt, and the rest is noise to a model.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
from PIL import Image, ImageDraw

from ospo_fast.shapes.scenes import BACKGROUNDS, COLORS, SHAPES_WORLD, Object, Scene, World

CELL = SHAPES_WORLD.cell
IMAGE_SIZE = SHAPES_WORLD.image_size
_OVERSAMPLE = 16


def outline(shape: str, diameter: float, center: tuple[float, float], side: int = CELL) -> np.ndarray:
    """Coverage in [0, 1] of one shape, (side, side) float32; `center` is (x, y) in pixels."""
    scale = _OVERSAMPLE
    image = Image.new("L", (side * scale, side * scale), 0)
    draw = ImageDraw.Draw(image)
    x, y, half = center[0] * scale, center[1] * scale, diameter * scale / 2
    box = (x - half, y - half, x + half - 1, y + half - 1)
    if shape == "circle":
        draw.ellipse(box, fill=255)
    elif shape == "square":
        draw.rectangle(box, fill=255)
    elif shape == "triangle":
        draw.polygon([(x, y - half), (x + half, y + half * 0.9), (x - half, y + half * 0.9)], fill=255)
    elif shape == "cross":
        arm = half * 0.36
        draw.rectangle((x - arm, y - half, x + arm - 1, y + half - 1), fill=255)
        draw.rectangle((x - half, y - arm, x + half - 1, y + arm - 1), fill=255)
    else:
        raise ValueError(f"shape: got {shape!r}, expected circle, square, triangle or cross")
    cells = np.asarray(image, dtype=np.float32).reshape(side, scale, side, scale)
    return np.asarray(cells.mean(axis=(1, 3)) / np.float32(255))


@cache
def _cover(shape: str, diameter: int, cell: int) -> np.ndarray:
    """Coverage of an object in the middle of its cell, (cell, cell, 1)."""
    return outline(shape, diameter, (cell / 2, cell / 2), cell)[..., None]


def texture(name: str, seed: int, side: int) -> np.ndarray:
    """Gray levels of a texture with clutter, (side, side) uint8. ValueError for an unknown name."""
    rng = np.random.default_rng(seed)
    level, contrast = rng.uniform(90, 170), rng.uniform(25, 60)
    y, x = np.mgrid[:side, :side]

    def noise(count: int) -> np.ndarray:
        return np.asarray(rng.uniform(-contrast, contrast, count))

    if name == "striped":  # each stripe has a level of its own
        angle, width = rng.uniform(0, np.pi), rng.uniform(2.5, 6)
        stripe = (x * np.cos(angle) + y * np.sin(angle)) / width + rng.random()
        gray = noise(4 * side)[np.floor(stripe).astype(int) % (4 * side)]
    elif name == "checkered":  # as have the checks
        check, left, top = rng.integers(4, 10), *rng.integers(0, 10, 2)
        rows, columns = (y + top) // check, (x + left) // check
        gray = noise(side * side)[rows * side + columns]
    elif name == "dotted":
        gray = np.zeros((side, side))
        for dot_x, dot_y, radius in zip(*rng.uniform(0, side, (2, side)), rng.uniform(1, 3.5, side), strict=True):
            gray[(x - dot_x) ** 2 + (y - dot_y) ** 2 < radius**2] = rng.uniform(-contrast, contrast)
    elif name == "speckled":
        gray = noise(side * side // 4).reshape(side // 2, side // 2).repeat(2, axis=0).repeat(2, axis=1)
    elif name == "cloudy":
        coarse = Image.fromarray(noise(49).reshape(7, 7).astype(np.float32))
        gray = 1.5 * np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC))
    else:
        raise ValueError(f"name: got {name!r}, expected striped, checkered, dotted, speckled or cloudy")
    gray = gray + level
    for left, top, width, height in zip(*rng.integers(0, side, (2, 5)), *rng.integers(1, 8, (2, 5)), strict=True):
        gray[top : top + height, left : left + width] = rng.uniform(40, 220)
    return np.asarray(np.clip(np.rint(gray), 0, 255), np.uint8)


def _cell_slices(world: World, obj: Object) -> tuple[slice, slice]:
    row, column = obj.cell
    return slice(row * world.cell, (row + 1) * world.cell), slice(column * world.cell, (column + 1) * world.cell)


def render_array(scenes: Sequence[Scene]) -> np.ndarray:
    """Render scenes of one world into (N, H, W, 3) uint8."""
    side = (scenes[0].world if scenes else SHAPES_WORLD).image_size
    pixels = np.empty((len(scenes), side, side, 3), np.uint8)
    for image, scene in zip(pixels, scenes, strict=True):
        world = scene.world
        if world.textured:
            image[:] = texture(scene.background, scene.seed, side)[..., None]
        else:
            image[:] = BACKGROUNDS[scene.background]
        for obj in scene.objects:
            cover, at = _cover(obj.shape, world.sizes[obj.size], world.cell), _cell_slices(world, obj)
            mixed = cover * np.array(COLORS[obj.color], np.float32) + (1 - cover) * image[at].astype(np.float32)
            image[at] = np.rint(mixed)
    return pixels


def render(scene: Scene) -> Image.Image:
    """Render a scene into an RGB image."""
    return Image.fromarray(render_array([scene])[0])

"""Render scenes with Pillow: 48×48 pixels, 16×16 for each cell of the board."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
from PIL import Image, ImageDraw

from ospo_fast.shapes.scenes import BACKGROUNDS, BOARD, COLORS, SIZES, Object, Scene

CELL = 16
IMAGE_SIZE = BOARD * CELL
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
def _tile(color: str, shape: str, size: str, background: str) -> np.ndarray:
    cover = outline(shape, SIZES[size], (CELL / 2, CELL / 2))[..., None]
    mixed = cover * np.array(COLORS[color], np.float32) + (1 - cover) * np.array(BACKGROUNDS[background], np.float32)
    return np.asarray(np.rint(mixed), np.uint8)


def _cell_slices(obj: Object) -> tuple[slice, slice]:
    row, column = obj.cell
    return slice(row * CELL, (row + 1) * CELL), slice(column * CELL, (column + 1) * CELL)


def render_array(scenes: Sequence[Scene]) -> np.ndarray:
    """Render scenes into (N, 48, 48, 3) uint8."""
    pixels = np.empty((len(scenes), IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
    for image, scene in zip(pixels, scenes, strict=True):
        image[:] = BACKGROUNDS[scene.background]
        for obj in scene.objects:
            image[_cell_slices(obj)] = _tile(obj.color, obj.shape, obj.size, scene.background)
    return pixels


def render(scene: Scene) -> Image.Image:
    """Render a scene into a 48×48 RGB image."""
    return Image.fromarray(render_array([scene])[0])

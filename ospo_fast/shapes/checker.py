"""Detect the objects of an image and decide whether it satisfies a prompt, without a model.

- Background: the palette color nearest to most pixels. Of a texture, which is gray, only the chroma is compared: the
  colors without their component along gray, where the background is the median of all pixels.
- Objects: connected components of the pixels that differ from the background.
- Color: the palette color nearest to the core of the component.
- Shape: the best match among templates at sub-pixel offsets.

A component that no template fits, or that has two colors, gets the shape `unknown`. An image with one satisfies no
prompt.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from functools import cache

import numpy as np
from PIL import Image
from scipy import ndimage

from ospo_fast.shapes.render import outline
from ospo_fast.shapes.scenes import (
    BACKGROUNDS,
    COLORS,
    RELATIONS,
    SHAPES,
    SHAPES_WORLD,
    Description,
    World,
    parse,
)

UNKNOWN = "unknown"
_MIN_PIXELS = 9  # the smallest cross covers 20; smaller components are noise
_FOREGROUND = 0.35  # minimum coverage of an object pixel, from background (0) to object color (1)
_MATCH = 0.70  # minimum soft intersection over union with the best template
_WINDOW = 20


@dataclass(frozen=True)
class Detection:
    """An object detected in an image: `x`, `y` center in pixels, `match` in [0, 1], `mask` (H, W) bool."""

    color: str
    shape: str
    size: str
    x: float
    y: float
    match: float
    mask: np.ndarray

    def __repr__(self) -> str:
        return f"Detection({self.size} {self.color} {self.shape} at {self.x:.1f},{self.y:.1f}, match {self.match:.2f})"


@dataclass(frozen=True)
class DetectedScene:
    """Everything that the checker detects in an image."""

    objects: tuple[Detection, ...]
    world: World = field(default=SHAPES_WORLD, repr=False)


_NAMES = list(COLORS)
_RGB = np.array(list(COLORS.values()), np.float32)
_BACK_RGB = np.array(list(BACKGROUNDS.values()), np.float32)


@cache
def _template(shape: str, diameter: int, dx: int, dy: int) -> np.ndarray:
    """Coverage of a shape whose center of mass is `dx`, `dy` quarter pixels from the center of the window."""
    center = _WINDOW / 2
    cover = outline(shape, diameter, (center + dx / 4, center + dy / 4), _WINDOW)
    y, x = ndimage.center_of_mass(cover)
    target = ((_WINDOW - 1) / 2 + dx / 4, (_WINDOW - 1) / 2 + dy / 4)
    return outline(shape, diameter, (center + dx / 4 + target[0] - x, center + dy / 4 + target[1] - y), _WINDOW)


def _match_template(alpha: np.ndarray, x: float, y: float, world: World) -> tuple[str, str, float]:
    """Best (shape, size, overlap) for a coverage `alpha` (H, W) with center of mass (x, y)."""
    half = (_WINDOW - 1) / 2
    left, top = int(np.floor(x - half + 0.5)), int(np.floor(y - half + 0.5))
    dx, dy = round((x - half - left) * 4), round((y - half - top) * 4)
    padded = np.pad(alpha, _WINDOW)
    window = padded[top + _WINDOW : top + 2 * _WINDOW, left + _WINDOW : left + 2 * _WINDOW]
    best = (UNKNOWN, "large", 0.0)
    for shape in SHAPES:
        for size, diameter in world.sizes.items():
            template = _template(shape, diameter, dx, dy)
            overlap = float(np.minimum(window, template).sum() / np.maximum(window, template).sum())
            if overlap > best[2]:
                best = (shape, size, overlap)
    return best


def _chroma(colors: np.ndarray) -> np.ndarray:
    """Colors (…, 3) without their component along gray."""
    return np.asarray(colors - colors.mean(axis=-1, keepdims=True))


def _plain_background(pixels: np.ndarray) -> np.ndarray:
    """The color (3,) of a plain background."""
    palette = np.concatenate([_BACK_RGB, _RGB])
    nearest = ((pixels[:, :, None] - palette) ** 2).sum(-1).argmin(-1)
    back = int(np.bincount(nearest.ravel(), minlength=len(palette))[: len(_BACK_RGB)].argmax())
    return np.asarray(np.median(pixels[nearest == back], axis=0) if (nearest == back).any() else _BACK_RGB[back])


def detect(image: Image.Image | np.ndarray, world: World = SHAPES_WORLD) -> DetectedScene:
    """Detect the objects of an RGB image. Pillow images of another size are resized to that of the world."""
    if isinstance(image, Image.Image):
        image = image.convert("RGB")
        if image.size != (world.image_size, world.image_size):
            image = image.resize((world.image_size, world.image_size), Image.Resampling.BOX)
    pixels, colors = np.asarray(image, dtype=np.float32), _RGB
    if world.textured:
        pixels, colors = _chroma(pixels), _chroma(colors)
        base = np.median(pixels, axis=(0, 1))
    else:
        base = _plain_background(pixels)

    # The coverage of a pixel by a color is its projection on the line from the background to that color.
    toward = colors - base  # (colors, 3)
    cover = ((pixels - base) @ toward.T) / (toward**2).sum(-1)
    distance = ((pixels[:, :, None] - (base + np.clip(cover, 0, 1)[..., None] * toward)) ** 2).sum(-1)
    nearest_line = distance.argmin(-1)
    alpha = np.clip(np.take_along_axis(cover, nearest_line[..., None], -1)[..., 0], 0, 1)
    labels, count = ndimage.label(alpha > _FOREGROUND)
    objects = []
    for index in range(1, count + 1):
        mask = labels == index
        if mask.sum() < _MIN_PIXELS:
            continue
        core = mask & (alpha >= 0.7 * alpha[mask].max())
        votes = np.bincount(((pixels[core][:, None] - colors) ** 2).sum(-1).argmin(-1), minlength=len(colors))
        color = int(votes.argmax())
        own = np.clip(cover[..., color], 0, 1) * ndimage.binary_dilation(mask)
        y, x = ndimage.center_of_mass(own)
        shape, size, match = _match_template(own, x, y, world)
        if match < _MATCH or votes[color] < 0.75 * votes.sum():
            shape = UNKNOWN
        objects.append(Detection(_NAMES[color], shape, size, float(x), float(y), match, mask))
    return DetectedScene(tuple(objects), world)


def matches(scene: DetectedScene, description: Description) -> bool:
    """Return whether the scene shows exactly the groups of `description`, in its relation. Scenery is ignored."""
    expected = {(group.color, group.shape): group.count for group in description.groups}
    if Counter((obj.color, obj.shape) for obj in scene.objects) != expected:
        return False
    if description.relation is None:
        return True
    first, second = (
        next(obj for obj in scene.objects if (obj.color, obj.shape) == (group.color, group.shape))
        for group in description.groups
    )
    rows, columns = RELATIONS[description.relation]
    return (first.y - second.y) * rows + (first.x - second.x) * columns > scene.world.cell / 2


def satisfies(image: Image.Image | np.ndarray, prompt: str, world: World = SHAPES_WORLD) -> bool:
    """Return whether `image` shows what `prompt` says; ValueError if it is not a prompt of the world."""
    description = parse(prompt, world)
    if description is None:
        raise ValueError(f"prompt: got {prompt!r}, expected a prompt of the Shapes world, such as 'a red circle'")
    return matches(detect(image, world), description)

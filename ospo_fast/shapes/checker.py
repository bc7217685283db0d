"""Reads an image back into objects and decides whether it shows what a prompt says. Knows no model.

Background: the palette colour nearest to most pixels. Objects: connected components of what differs from it. Colour:
the palette colour nearest to the component's core. Shape: the best match among sub-pixel templates. A component
that no template fits well, or of two colours, is an object of shape `unknown`: it makes every prompt wrong.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image
from scipy import ndimage

from ospo_fast.shapes.render import IMAGE_SIZE, outline
from ospo_fast.shapes.scenes import BACKGROUNDS, COLORS, RELATIONS, SHAPES, SIZES, Description, parse

UNKNOWN = "unknown"
_MIN_PIXELS = 9  # a small cross covers 25; fewer is a speck
_FOREGROUND = 0.35  # of the way from the background to the nearest object colour
_MATCH = 0.70  # least overlap (soft intersection over union) with the best template
_WINDOW = 20


@dataclass(frozen=True)
class Detection:
    """An object read from an image: `x`, `y` centre in pixels, `mask` (48, 48) bool, `match` in [0, 1]."""

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
    """All that the checker sees in an image."""

    background: str
    objects: tuple[Detection, ...]


_NAMES = list(COLORS)
_RGB = np.array(list(COLORS.values()), np.float32)
_BACK_NAMES = list(BACKGROUNDS)
_BACK_RGB = np.array(list(BACKGROUNDS.values()), np.float32)


@cache
def _template(shape: str, size: str, dx: int, dy: int) -> np.ndarray:
    """Coverage in a window, centred on the centre of mass; `dx`, `dy` are quarter pixels."""
    center = _WINDOW / 2
    cover = outline(shape, SIZES[size], (center + dx / 4, center + dy / 4), _WINDOW)
    y, x = ndimage.center_of_mass(cover)
    target = ((_WINDOW - 1) / 2 + dx / 4, (_WINDOW - 1) / 2 + dy / 4)
    return outline(shape, SIZES[size], (center + dx / 4 + target[0] - x, center + dy / 4 + target[1] - y), _WINDOW)


def _match(alpha: np.ndarray, x: float, y: float) -> tuple[str, str, float]:
    """Best (shape, size, overlap) for the coverage `alpha` (48, 48) whose centre of mass is (x, y)."""
    half = (_WINDOW - 1) / 2
    left, top = int(np.floor(x - half + 0.5)), int(np.floor(y - half + 0.5))
    dx, dy = round((x - half - left) * 4), round((y - half - top) * 4)
    padded = np.pad(alpha, _WINDOW)
    window = padded[top + _WINDOW : top + 2 * _WINDOW, left + _WINDOW : left + 2 * _WINDOW]
    best = (UNKNOWN, "large", 0.0)
    for shape in SHAPES:
        for size in SIZES:
            template = _template(shape, size, dx, dy)
            overlap = float(np.minimum(window, template).sum() / np.maximum(window, template).sum())
            if overlap > best[2]:
                best = (shape, size, overlap)
    return best


def read(image: Image.Image | np.ndarray) -> DetectedScene:
    """The objects in a 48×48 RGB image (another size is resized to it)."""
    if isinstance(image, Image.Image):
        image = image.convert("RGB")
        if image.size != (IMAGE_SIZE, IMAGE_SIZE):
            image = image.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BOX)
    pixels = np.asarray(image, dtype=np.float32)
    palette = np.concatenate([_BACK_RGB, _RGB])
    nearest = ((pixels[:, :, None] - palette) ** 2).sum(-1).argmin(-1)
    back = int(np.bincount(nearest.ravel(), minlength=len(palette))[: len(_BACK_RGB)].argmax())
    base = np.median(pixels[nearest == back], axis=0) if (nearest == back).any() else _BACK_RGB[back]

    toward = _RGB - base  # (colours, 3): coverage by a colour is the projection on the line from the background to it
    cover = ((pixels - base) @ toward.T) / (toward**2).sum(-1)
    far = ((pixels[:, :, None] - (base + np.clip(cover, 0, 1)[..., None] * toward)) ** 2).sum(-1)
    line = far.argmin(-1)
    alpha = np.clip(np.take_along_axis(cover, line[..., None], -1)[..., 0], 0, 1)
    labels, count = ndimage.label(alpha > _FOREGROUND)
    objects = []
    for index in range(1, count + 1):
        mask = labels == index
        if mask.sum() < _MIN_PIXELS:
            continue
        core = mask & (alpha >= 0.7 * alpha[mask].max())
        votes = np.bincount(((pixels[core][:, None] - _RGB) ** 2).sum(-1).argmin(-1), minlength=len(_RGB))
        color = int(votes.argmax())
        own = np.clip(cover[..., color], 0, 1) * ndimage.binary_dilation(mask)
        y, x = ndimage.center_of_mass(own)
        shape, size, match = _match(own, x, y)
        if match < _MATCH or votes[color] < 0.75 * votes.sum():
            shape = UNKNOWN
        objects.append(Detection(_NAMES[color], shape, size, float(x), float(y), match, mask))
    return DetectedScene(_BACK_NAMES[back], tuple(objects))


def holds(reading: DetectedScene, description: Description) -> bool:
    """Whether the picture shows exactly the groups of `description`, related as it says (scenery left aside)."""
    wanted = {(group.color, group.shape): group.count for group in description.groups}
    found: dict[tuple[str, str], int] = {}
    for thing in reading.objects:
        key = (thing.color, thing.shape)
        found[key] = found.get(key, 0) + 1
    if found != wanted:
        return False
    if description.relation is None:
        return True
    first, second = (
        next(t for t in reading.objects if (t.color, t.shape) == (g.color, g.shape)) for g in description.groups
    )
    rows, columns = RELATIONS[description.relation]
    return (first.y - second.y) * rows + (first.x - second.x) * columns > 8  # half a cell


def satisfies(image: Image.Image | np.ndarray, prompt: str) -> bool:
    """Whether `image` shows what `prompt`, a prompt of the Shapes grammar, says."""
    description = parse(prompt)
    if description is None:
        raise ValueError(f"prompt: got {prompt!r}, expected a prompt of the Shapes world, such as 'a red circle'")
    return holds(read(image), description)

"""A picture of attention maps and object masks, word by word."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ospo_fast.errors import OpError, OspoError
from ospo_fast.files import open_image
from ospo_fast.ops import object_masks
from ospo_fast.stages.contact_sheet import with_escapes, wrap

if TYPE_CHECKING:  # functions import Pillow, so that the name `ospo_fast.show` can be imported without it
    from numpy.typing import NDArray
    from PIL import Image

    Mask = NDArray[np.bool_]

PANEL = 256  # px, the longer side of a picture
PIXEL_ART = 96  # px; images of at most this side are enlarged by a whole factor, without smoothing
PER_ROW = 4  # panels
GAP = 16  # px between panels and around them
FONT, LINE = 15, 20  # px
MAX_STRETCH = 4  # between the sides of a cell
MIN_WIDTH = 96  # px for the words of a narrow picture
# Inferno of matplotlib at 0, 1/8, … 1: perceptually uniform, and brighter with every step.
COLORS = np.array(
    [
        (0, 0, 4), (33, 12, 74), (87, 16, 110), (138, 34, 106), (188, 55, 84), (228, 90, 49), (249, 142, 9),
        (249, 203, 53), (252, 255, 164),
    ],
    np.float64,
)  # fmt: skip
OPACITY = 0.65  # of the colors over the gray picture


def show(image: Any, maps: Any, words: Sequence[str]) -> Image.Image:
    r"""Show the attention to each word over an image, with the outline of the word's mask.

    The first panel is the image. Each further panel has one word, the share of the grid inside its mask, and the image
    in gray under the word's map: from dark, the lowest value of this map, to bright yellow, its highest. The outline is
    the word's mask by `object_masks`: the cells above 0.8 × Otsu's threshold of the min-max normalized map.

    Args:
        image: a Pillow image, a path, or an array or tensor: (H, W, 3) uint8, or (3, H, W) float in [0, 1].
        maps: (O, h, w) float array or tensor, one map for each word, over a grid of the whole image, such as
            `AttentionCapture.maps[b]`. (1, O, h, w) is accepted. Cells that are more than four times as long as wide
            over the image are refused: (B, O, rows) without a grid looks like maps of a grid O × rows.
        words: O words. A character that the built-in font lacks is shown as its escape, "é" as "\xe9".

    Returns:
        An RGB image. Notebooks display it; `.save(path)` writes it.

    Raises:
        OspoError: Pillow is not installed.
        OpError: an image, maps or words of a wrong type, shape or number, or values that are not finite.

    """
    try:
        import PIL  # noqa: F401
    except ModuleNotFoundError as error:
        raise OspoError("show needs Pillow; run: pip install pillow") from error
    except Exception as error:  # its binaries do not fit
        remedy = "run: pip install --force-reinstall pillow"
        raise OspoError(f"show needs Pillow, which cannot be imported ({error}); {remedy}") from error
    pixels = _load_pixels(image)
    tensor, labels = _check_maps(maps, pixels.size), _check_words(words)
    if len(labels) != len(tensor):
        raise OpError(f"show: words has length {len(labels)}, maps have {len(tensor)}; give one word for each map")
    unusable = [n for n, cells in enumerate(tensor) if not bool(cells.isfinite().all())]
    if unusable:
        raise OpError(
            f"show: the map of {labels[unusable[0]]!r} holds NaN or infinity, expected finite values; check what "
            "computed it"
        )
    found = object_masks(tensor[None])
    picture = _resize(pixels, max(PANEL, 2 * max(tensor.shape[1:])))
    panels = [(picture, "", "")]
    for word, cells, mask in zip(labels, found.maps[0].double().numpy(), found.masks[0].numpy() > 0, strict=True):
        inside = f"mask: {100 * mask.mean():.0f}% of the cells" if mask.any() else "mask: empty, the map is constant"
        panels.append((_overlay(picture, cells, mask), word, inside))
    return _compose(panels)


def _load_pixels(image: Any) -> Image.Image:
    """The image in RGB."""
    from PIL import Image

    if isinstance(image, (str, os.PathLike)):
        try:
            image = open_image(Path(image))
        except OspoError as error:
            reason = getattr(error.__cause__, "strerror", None) or error.__cause__
            raise OpError(f"show: cannot read the image {os.fspath(image)!r} ({reason}); give an image file") from error
    if isinstance(image, Image.Image):
        mode, size = image.mode, image.size
        try:
            pixels = image.convert("RGB")
        except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
            reason = getattr(error, "strerror", None) or error
            raise OpError(
                f"show: cannot read the image of mode {mode!r} and size {size} ({reason}); give an image file"
            ) from error
        if mode.startswith(("I", "F")):  # Pillow clips their values at 255
            raise OpError(f"show: the image has mode {mode!r}, expected 8 bits; scale its values to 0…255")
        if 0 in size:
            raise OpError(f"show: the image has size {size}, expected at least 1 x 1 pixels")
        return pixels
    array = _to_tensor("image", image, "a Pillow image, a path, or an array or tensor")
    channels_first = array.is_floating_point()
    if array.dim() != 3 or array.shape[0 if channels_first else 2] != 3 or 0 in array.shape:
        expected = "(3, H, W) for float" if channels_first else "(H, W, 3) for uint8"
        raise OpError(
            f"show: image has shape {tuple(array.shape)} and {array.dtype}, expected {expected}; permute its "
            "dimensions, or give image[b] of a batch"
        )
    if channels_first:
        if not bool(((array >= 0) & (array <= 1)).all()):  # False for NaN, too
            raise OpError(
                f"show: image has float values from {float(array.min()):g} to {float(array.max()):g}, expected [0, 1]; "
                "scale them: (x + 1) / 2 for values from -1 to 1, x / 255 for 0 to 255"
            )
        array = (255 * array.double()).round().to(torch.uint8).permute(1, 2, 0)
    elif array.dtype != torch.uint8:
        raise OpError(f"show: image is {array.dtype}, expected uint8 or float; convert it to uint8")
    return Image.fromarray(array.contiguous().numpy())


def _to_tensor(name: str, value: Any, expected: str) -> torch.Tensor:
    """An array or tensor as a tensor on the CPU."""
    if isinstance(value, torch.Tensor):
        if value.layout != torch.strided or (value.element_size() == 1 and value.is_floating_point()):
            raise OpError(
                f"show: {name} is {value.dtype} in layout {value.layout}, expected {expected}; use .to_dense()"
            )
        return value.detach().cpu()
    try:
        if isinstance(value, np.ndarray):
            return torch.from_numpy(value.copy(order="C"))  # a copy: the array may be read-only or reversed
    except (TypeError, ValueError):  # a dtype or byte order that torch does not have
        raise OpError(f"show: {name} is an array of {value.dtype}, expected {expected} of numbers") from None
    raise OpError(f"show: {name} is {type(value).__name__}, expected {expected}")


def _check_maps(maps: Any, size: tuple[int, int]) -> torch.Tensor:
    """The maps as (O, h, w) float on the CPU; `size` is (width, height) of the image."""
    tensor = _to_tensor("maps", maps, "an (O, h, w) array or tensor")
    got = f"show: maps are {tensor.dtype} {tuple(tensor.shape)}, expected float (O, h, w)"
    no_grid = "(O, rows) have no grid: give AttentionCapture grid=(h, w), or use maps.view(O, h, w)"
    if tensor.dim() == 4 and len(tensor) != 1:
        raise OpError(f"{got} of one image; give maps[b] of image b")
    if tensor.dim() == 2:
        raise OpError(f"{got}; {no_grid}; for a single map (h, w) use maps[None]")
    tensor = tensor[0] if tensor.dim() == 4 else tensor
    if tensor.dim() != 3 or not tensor.is_floating_point() or 0 in tensor.shape:
        raise OpError(f"{got}, each at least 1; give one map for each word, such as AttentionCapture.maps[b]")
    stretch = tensor.shape[2] / tensor.shape[1] * size[1] / size[0]
    if not 1 / MAX_STRETCH <= stretch <= MAX_STRETCH:  # (B, O, rows) looks like B maps of a grid O × rows
        raise OpError(f"{got} with a grid of the proportions of the {size[0]} x {size[1]} image; {no_grid}")
    return tensor


def _check_words(words: Any) -> list[str]:
    """The words with white space made single spaces."""
    if isinstance(words, str):
        raise OpError(f"show: words are {words!r}, expected a list of strings; write [{words!r}] for one word")
    if not isinstance(words, (Sequence, np.ndarray)) or np.ndim(words) != 1:
        raise OpError(f"show: words are {type(words).__name__}, expected a list of strings; use list(words)")
    labels = []
    for n, word in enumerate(words):
        if not isinstance(word, str) or not word.strip():
            raise OpError(f"show: words[{n}] is {word!r}, expected a string that is not blank; name the map's word")
        labels.append(" ".join(word.split()))
    return labels


def _resize(picture: Image.Image, side: int) -> Image.Image:
    from PIL import Image

    longest = max(picture.size)
    pixel_art = longest <= PIXEL_ART
    factor = max(1, round(side / longest)) if pixel_art else side / longest
    size = (max(1, round(picture.width * factor)), max(1, round(picture.height * factor)))
    return picture.resize(size, Image.Resampling.NEAREST if pixel_art else Image.Resampling.LANCZOS)


def _overlay(picture: Image.Image, cells: NDArray[np.float64], mask: Mask) -> Image.Image:
    """The gray picture under the colors of the cells, with the outline of the mask."""
    from PIL import Image, ImageDraw

    steps = np.linspace(0, 1, len(COLORS))
    colors = np.stack([np.interp(cells, steps, channel) for channel in COLORS.T], -1)
    heat = Image.fromarray(np.rint(colors).astype(np.uint8)).resize(picture.size, Image.Resampling.NEAREST)
    panel = Image.blend(picture.convert("L").convert("RGB"), heat, OPACITY)
    pen, lines = ImageDraw.Draw(panel), _outline(mask, panel.size)
    stroke = 2 if min(panel.width / mask.shape[1], panel.height / mask.shape[0]) >= 16 else 1
    for color, width in (("black", stroke + 2), ("white", stroke)):  # the black keeps it visible on bright cells
        for line in lines:
            pen.line(line, fill=color, width=width)
    return panel


def _outline(mask: Mask, size: tuple[int, int]) -> list[tuple[int, int, int, int]]:
    """The lines in pixels between the cells of a mask and those outside it, or the border."""
    rows, columns = mask.shape
    padded = np.pad(mask, 1)

    def place(index: int, count: int, length: int) -> int:
        return min(max(round(index * length / count), 1), length - 2)  # the border's line stays inside the picture

    lines = []
    for r, c in np.argwhere(padded[1:] != padded[:-1]):  # between rows r − 1 and r of the mask
        y = place(int(r), rows, size[1])
        lines.append((place(int(c) - 1, columns, size[0]), y, place(int(c), columns, size[0]), y))
    for r, c in np.argwhere(padded[:, 1:] != padded[:, :-1]):
        x = place(int(c), columns, size[0])
        lines.append((x, place(int(r) - 1, rows, size[1]), x, place(int(r), rows, size[1])))
    return lines


def _compose(panels: list[tuple[Image.Image, str, str]]) -> Image.Image:
    """The panels with their two texts below them, in rows."""
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(FONT)
    width, height = max(panels[0][0].width, MIN_WIDTH), panels[0][0].height
    texts = [(wrap(with_escapes(word, font), font, width), wrap(note, font, width)) for _, word, note in panels]
    per_row = min(len(panels), PER_ROW)
    firsts = range(0, len(panels), per_row)
    lines = [max(len(word) + len(note) for word, note in texts[first : first + per_row]) for first in firsts]
    size = (GAP + per_row * (width + GAP), GAP + sum(height + GAP // 2 + LINE * count + GAP for count in lines))
    sheet = Image.new("RGB", size, "white")
    pen, top = ImageDraw.Draw(sheet), GAP
    for first, count in zip(firsts, lines, strict=True):
        for n in range(first, min(first + per_row, len(panels))):
            left = GAP + (n - first) * (width + GAP)
            sheet.paste(panels[n][0], (left, top))
            word, note = texts[n]
            for line, text in enumerate([*word, *note]):
                color = "black" if line < len(word) else "#5f636b"
                pen.text((left, top + height + GAP // 2 + LINE * line), text, fill=color, font=font)
        top += height + GAP // 2 + LINE * count + GAP
    return sheet

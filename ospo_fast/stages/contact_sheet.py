"""Contact sheets: images in rows, each in a frame, with its prompt and seed below it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from PIL.Image import Image

SMALL, LARGE = 192, 384  # px; images of up to half of SMALL are enlarged, and those above LARGE reduced
COLUMNS = 8
PER_SHEET = 64  # a sheet of large images has some 12 megapixels
GAP, FONT, LINE = 12, 13, 17  # px
PROMPT_LINES = 3  # of a caption; a longer prompt is cut


class Entry(NamedTuple):
    """An image of a sheet, its prompt and what is said of it below that."""

    image: Image
    prompt: str
    note: str


def contact_sheet(entries: Sequence[Entry], columns: int) -> Image:
    """Arrange images in rows of `columns`. Pixel art is enlarged by a whole factor, so that its pixels stay sharp."""
    import PIL.Image
    import PIL.ImageDraw
    import PIL.ImageFont

    font = PIL.ImageFont.load_default(FONT)
    pictures = [_fit(entry.image) for entry in entries]
    width = max(SMALL, *(picture.width for picture in pictures))
    captions = [_cut(wrap(with_escapes(entry.prompt, font), font, width), font, width) for entry in entries]
    columns = min(columns, len(entries))
    firsts = range(0, len(entries), columns)
    heights = [max(picture.height for picture in pictures[first : first + columns]) for first in firsts]
    lines = [max(map(len, captions[first : first + columns])) + 1 for first in firsts]  # the note is the last
    total = GAP + sum(height + GAP // 2 + LINE * count + GAP for height, count in zip(heights, lines, strict=True))
    sheet = PIL.Image.new("RGB", (GAP + columns * (width + GAP), total), "white")
    pen, top = PIL.ImageDraw.Draw(sheet), GAP
    for first, height, count in zip(firsts, heights, lines, strict=True):
        for n in range(first, min(first + columns, len(entries))):
            left, picture = GAP + (n - first) * (width + GAP), pictures[n]
            pen.rectangle((left - 1, top - 1, left + picture.width, top + picture.height), outline="#9aa0a8")
            sheet.paste(picture, (left, top))
            for line, text in enumerate([*captions[n], entries[n].note]):
                color = "black" if line < len(captions[n]) else "#5f636b"
                pen.text((left, top + height + GAP // 2 + LINE * line), text, fill=color, font=font)
        top += height + GAP // 2 + LINE * count + GAP
    return sheet


def columns_of(images: int, per_prompt: int) -> int:
    """Return the columns of a sheet: as many whole prompts in a row as fit."""
    return min(COLUMNS, images, per_prompt * max(1, min(COLUMNS, images) // per_prompt))


def _fit(image: Image) -> Image:
    from PIL.Image import Resampling

    longest = max(image.size)
    if 2 * longest <= SMALL:
        factor = SMALL // longest
        return image.resize((image.width * factor, image.height * factor), Resampling.NEAREST)
    if longest > LARGE:
        image = image.copy()
        image.thumbnail((LARGE, LARGE), Resampling.LANCZOS)
    return image


def _cut(lines: list[str], font: Any, width: int) -> list[str]:
    """Return the first lines; the last of them ends in "…" where others are left out."""
    if len(lines) <= PROMPT_LINES:
        return lines
    last = lines[PROMPT_LINES - 1]
    while last and font.getlength(f"{last}…") > width:
        last = last[:-1]
    return [*lines[: PROMPT_LINES - 1], f"{last}…"]


def with_escapes(text: str, font: Any) -> str:
    """Replace the characters that a font lacks, which would all look the same, by their escapes in Python."""
    missing = bytes(font.getmask("\U0010ffff"))
    return "".join(
        char if char == " " or bytes(font.getmask(char)) != missing else char.encode("unicode_escape").decode()
        for char in text
    )


def wrap(text: str, font: Any, width: int) -> list[str]:
    """Return the text in lines of at most `width` pixels, broken at spaces, and inside of longer words."""
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
            continue
        lines.append("")
        for char in word:
            if lines[-1] and font.getlength(lines[-1] + char) > width:
                lines.append("")
            lines[-1] += char
    return lines

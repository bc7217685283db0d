"""The images of a page as data URIs. Each file is embedded once; pixel art stays as it is, photos are scaled down."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from ospo_fast.errors import Failure, OspoError
from ospo_fast.files import open_image
from ospo_fast.report.load import find_file

PIXEL_ART = 96  # px; images of at most this side stay PNG and are shown without smoothing
PHOTO_SIDE = 224  # px; larger images are scaled down to this side and become JPEG, a sixth of the size of PNG
JPEG_QUALITY = 84


@dataclass
class Album:
    """The images of one page.

    Attributes:
        root: the run folder.
        sources: data URIs.
        failures: files that could not be embedded.
        pixelated: whether all of them are pixel art.

    """

    root: Path
    sources: list[str] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    pixelated: bool = True
    _index: dict[Path, int] = field(default_factory=dict)

    def add(self, path: str | None, *fallbacks: str) -> int | Failure:
        """Return the index of the image in `sources`.

        `path` is absolute or relative to the run folder. If it does not exist, because the run folder was moved,
        `fallbacks` are tried. A file outside of the run folder is not embedded.
        """
        found = find_file(self.root, *([path] if path else []), *fallbacks)
        if isinstance(found, Failure):
            return self._fail(found.reason)
        if found not in self._index:
            try:
                uri, pixelated = data_uri(found)
            except OspoError:
                return self._fail(f"{found.name} cannot be read as an image")
            self._index[found] = len(self.sources)
            self.sources.append(uri)
            self.pixelated = self.pixelated and pixelated
        return self._index[found]

    def _fail(self, reason: str) -> Failure:
        self.failures.append(Failure(reason))
        return self.failures[-1]


def data_uri(path: Path) -> tuple[str, bool]:
    """The image as a data URI, encoded again without metadata, and whether it is pixel art."""
    image = open_image(path)
    stream = io.BytesIO()
    pixelated = max(image.size) <= PIXEL_ART
    if pixelated:
        image.save(stream, "PNG", optimize=True)
    else:
        image.thumbnail((PHOTO_SIDE, PHOTO_SIDE), Image.Resampling.LANCZOS)
        image.save(stream, "JPEG", quality=JPEG_QUALITY, optimize=True)
    kind = "png" if pixelated else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(stream.getvalue()).decode('ascii')}", pixelated

"""Images of a run as data URIs: pixel art as it is, larger images scaled down; each file is embedded once."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image, UnidentifiedImageError

PIXEL_ART = 96  # px; images of at most this side are kept whole, as PNG, and shown with hard pixels
PHOTO_SIDE = 224  # px; larger ones are scaled down to this side and kept as JPEG, a sixth of the PNG's weight
JPEG_QUALITY = 84


@dataclass
class Album:
    """The images of one page. `sources` are data URIs; what could not be read is counted in `faults`."""

    root: Path
    sources: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    pixelated: bool = True
    _known: dict[Path, int] = field(default_factory=dict)

    def add(self, path: object, *fallbacks: Path) -> int | str:
        """The index of the image in `sources`, or a short reason why there is none.

        path: as a record holds it: absolute, or relative to the run folder. A run folder may have been moved since:
        where `path` is not there, `fallbacks` are tried.
        """
        candidates = ([self.root / path] if isinstance(path, str) and path else []) + list(fallbacks)
        found = next((candidate for candidate in candidates if candidate.is_file()), None)
        if found is None:
            return self._fault(f"{candidates[0].name if candidates else 'image'} is missing")
        if found not in self._known:
            try:
                uri, pixelated = data_uri(found)
            except (OSError, UnidentifiedImageError, ValueError, SyntaxError, Image.DecompressionBombError):
                return self._fault(f"{found.name} cannot be read as an image")
            self._known[found] = len(self.sources)
            self.sources.append(uri)
            self.pixelated = self.pixelated and pixelated
        return self._known[found]

    def _fault(self, reason: str) -> str:
        self.faults.append(reason)
        return reason


def data_uri(path: Path) -> tuple[str, bool]:
    """The image as a data URI, re-encoded (metadata dropped), and whether it is pixel art."""
    with Image.open(path) as opened:
        image = opened.convert("RGB")
    stream = io.BytesIO()
    pixelated = max(image.size) <= PIXEL_ART
    if pixelated:
        image.save(stream, "PNG", optimize=True)
    else:
        image.thumbnail((PHOTO_SIDE, PHOTO_SIDE), Image.Resampling.LANCZOS)
        image.save(stream, "JPEG", quality=JPEG_QUALITY, optimize=True)
    kind = "png" if pixelated else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(stream.getvalue()).decode('ascii')}", pixelated

#!/usr/bin/env python3
"""Compress the entries of wheels again: `recompress.py WHEEL…`. The deflate streams of zopfli are smaller than zlib's.

Contents and their order stay, so that RECORD holds.
"""

import sys
import zipfile
from pathlib import Path
from unittest import mock

import zopfli.zlib


class Compressor:
    """Takes the place of zlib's in zipfile, which has no argument for another one."""

    def __init__(self, *_: object) -> None:
        self.parts: list[bytes] = []

    def compress(self, data: bytes) -> bytes:
        """Keep the data until the end."""
        self.parts.append(bytes(data))
        return b""

    def flush(self) -> bytes:
        """Return the raw deflate stream: without the header and the checksum of zlib's format."""
        stream: bytes = zopfli.zlib.compress(b"".join(self.parts), numiterations=5)
        return stream[2:-4]


def recompress(wheel: Path) -> None:
    """Write a wheel again."""
    made = wheel.with_suffix(".zopfli")
    with (
        zipfile.ZipFile(wheel) as old,
        mock.patch("zipfile._get_compressor", Compressor),
        zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for entry in old.infolist():
            new.writestr(entry, old.read(entry))
    with zipfile.ZipFile(wheel) as old, zipfile.ZipFile(made) as new:
        assert [(e.filename, e.CRC, e.external_attr) for e in old.infolist()] == [
            (e.filename, e.CRC, e.external_attr) for e in new.infolist()
        ]
        assert new.testzip() is None
    before, after = wheel.stat().st_size, made.stat().st_size
    made.replace(wheel)
    print(f"{wheel.name}: {before} to {after} bytes")


if __name__ == "__main__":
    for name in sys.argv[1:]:
        recompress(Path(name))

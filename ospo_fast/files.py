"""Files of any origin: read only where the user allows it, up to a size, and with errors of the package.

Records, images, masks and codes may come from strangers. `locate` turns the path in a record into a file below the run
folder or a folder that the user names. `open_image`, `load_npz` and `load_tensors` read it: sizes are checked before
memory is allocated, and every failure is an OspoError that names the file and the remedy.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import io
import math
import os
import re
import stat
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ospo_fast.errors import OspoError

if TYPE_CHECKING:
    from torch import Tensor

MAX_BYTES = 2**28  # of a file, and of what an archive holds
MAX_YAML = 10**6  # bytes of a YAML file
MAX_VALUES = 10**5  # in a YAML file, where those of an alias count each time
MAX_NESTING = 100  # of YAML and JSON values in values
MAX_PIXELS = 2**25  # of an image
MAX_SIDE = 2**14
# Pillow knows many more. Some of them, such as EPS, call programs.
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP")


def locate(path: object, out: Path | None, read_from: Sequence[str | Path] = ()) -> Path:
    """Return the file that a record names, if the record may name it.

    Args:
        path: as the record holds it, absolute or relative to the run folder.
        out: the run folder, or that of an iteration. None: the current folder.
        read_from: further folders, which the user names (the setting `read_from`).

    Raises:
        OspoError: the path is not one, or the file is in none of these folders once all symbolic links are followed.

    """
    shown = repr(path)[:300]
    if not isinstance(path, str) or not path:
        raise OspoError(f"Got {shown} as the path of a file, expected a text; correct the record.")
    base = Path() if out is None else out
    folders = [base, *map(Path, read_from)]
    if re.fullmatch(r"iter\d+", base.name) and (base.parent / "config.yaml").is_file():
        folders.append(base.parent)  # the run folder of this iteration
    try:
        found = Path(os.path.realpath(base / path))
        if any(folder in found.parents for folder in map(Path, map(os.path.realpath, folders))):
            return base / path
    except (OSError, ValueError) as error:
        raise OspoError(f"The path {shown} cannot be used ({error}); correct the record.") from error
    # Of official images, in base/CATEGORY/ITEM or negative/CATEGORY/ITEM, one folder above all of them.
    parts = found.parts
    place = next((n for n in range(len(parts) - 4, 0, -1) if parts[n] in ("base", "negative")), len(parts) - 1)
    raise OspoError(
        f"The path {shown} leads out of the folders that records may name: {', '.join(map(str, folders))}; if you "
        f"trust the record, name the folder of the file: read_from=[{str(Path(*parts[:place]))[:300]}]. Where the "
        "records of a stage say so already, start it over with --no-resume."
    )


@contextlib.contextmanager
def reading(what: str, path: Path, remedy: str) -> Iterator[None]:
    """Turn every error of the block, which reads one file, into an OspoError "Cannot read the `what` …; `remedy`."."""
    try:
        yield
    except OspoError:
        raise
    except Exception as error:  # parsers raise anything on damaged files: KeyError, struct.error, MemoryError, …
        raise OspoError(f"Cannot read the {what} {str(path)[:300]}: {reason(error)}; {remedy}.") from error


def reason(error: Exception) -> str:
    """Return what an error of a library says, in one line without a full stop."""
    text = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
    return str(text)[:300].rstrip(".")


def regular(path: Path, *, missing_ok: bool = False) -> Path:
    """Return the path of a file that can be opened: a pipe would block for ever, and a device may have no end.

    Raises OSError for anything else, and for a missing file unless `missing_ok`.
    """
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        if missing_ok:
            return path
        raise
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "it is no regular file", str(path))
    return path


def no_link(path: Path) -> Path:
    """Return the path of a file of a run folder. Raises OspoError for a symbolic link.

    In a run folder of someone else it could lead to any file, to be overwritten, or published in a report.
    """
    with contextlib.suppress(OSError):  # of a path that cannot be looked up: who opens it reports that
        if path.is_symlink():
            raise OspoError(
                f"{path} is a symbolic link, and the files of a run folder are not read or written through links; copy "
                "the file in its place."
            )
    return path


def read_bytes(path: Path, limit: int | None = None) -> bytes:
    """Read a regular file of 1 to `limit` (None: MAX_BYTES) bytes. Raises OSError or ValueError; see `reading`."""
    limit = MAX_BYTES if limit is None else limit
    with regular(path).open("rb") as file:
        size = os.fstat(file.fileno()).st_size  # of this file, and not of one that takes its place meanwhile
        if not 0 < size <= limit:
            raise ValueError(f"it has {size} bytes, expected 1 to {limit}")
        return file.read(size)


def read_yaml(path: Path) -> str:
    """Read a text that passes `check_yaml`. Raises OSError, ValueError or yaml.YAMLError."""
    with regular(path).open("rb") as file:
        data = file.read(MAX_YAML + 1)
    if len(data) > MAX_YAML:
        raise ValueError(f"it has more than {MAX_YAML} bytes")
    text = data.decode("utf-8-sig")
    check_yaml(text)
    return text


def check_yaml(text: str) -> None:
    """Raise ValueError for a text that is too deep or too large for loaders of YAML, and yaml.YAMLError for no YAML.

    The loader in C recurses for each level and ends the process when the stack is full. OmegaConf copies the values of
    an alias, so that ten lines of aliases of aliases fill the memory.
    """
    import yaml

    sizes: dict[str | None, int] = {}  # values below each anchor
    opened: list[tuple[str | None, int]] = []  # anchors of the collections around, and the values before each
    total = 0
    for event in yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # one by one, not recursive
        before = total
        if isinstance(event, yaml.CollectionEndEvent):
            anchor, before = opened.pop()
        elif isinstance(event, yaml.AliasEvent):
            if event.anchor not in sizes:
                raise ValueError(f"the alias *{event.anchor!s:.60} has no value before it; write the value out")
            anchor, total = None, total + sizes[event.anchor]
        elif isinstance(event, yaml.NodeEvent):
            anchor, total = event.anchor, total + 1
            if isinstance(event, yaml.CollectionStartEvent):
                opened.append((anchor, before))
                anchor = None  # it has no size before its end
        else:
            continue
        if anchor is not None:
            sizes[anchor] = total - before
        if len(opened) > MAX_NESTING or total > MAX_VALUES:
            raise ValueError(f"it nests more than {MAX_NESTING} deep, or has more than {MAX_VALUES} values")


@functools.cache
def yaml_loader() -> Any:
    """Return a safe loader of YAML without numbers of base 60, such as 1:30, which take quadratic time to read.

    They are texts, as in YAML 1.2, unless a tag says that they are numbers, which is an error.
    """
    import yaml

    base: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    numbers = "tag:yaml.org,2002:int", "tag:yaml.org,2002:float"

    class Loader(base):
        yaml_implicit_resolvers: ClassVar[Any] = {
            first: [
                (tag, re.compile(f"(?!.*:){rule.pattern}", rule.flags) if tag in numbers else rule)
                for tag, rule in resolvers
            ]
            for first, resolvers in base.yaml_implicit_resolvers.items()
        }

    def construct(loader: Any, node: Any) -> Any:
        if ":" in node.value:
            raise yaml.constructor.ConstructorError(
                None, None, f"{node.value!r:.60} is no number; write it without colons", node.start_mark
            )
        return base.yaml_constructors[node.tag](loader, node)

    for tag in numbers:
        Loader.add_constructor(tag, construct)
    return Loader


def open_image(path: Path) -> Any:
    """Read an RGB image from a PNG, JPEG, WEBP or BMP file; transparency is dropped.

    Raises:
        OspoError: it cannot be read, has more than MAX_PIXELS pixels or a side above MAX_SIDE (both are checked before
            it is decoded), more than 8 bits a channel, or more than one frame.

    """
    with reading("image", path, "replace it by one PNG, JPEG, WEBP or BMP image"):
        return decode_image(read_bytes(path))


def decode_image(data: bytes) -> Any:
    """Decode an RGB image as `open_image`. Raises ValueError and errors of Pillow; see `reading`."""
    from PIL import Image, UnidentifiedImageError

    try:
        opened = Image.open(io.BytesIO(data), formats=IMAGE_FORMATS)
    except UnidentifiedImageError:
        raise ValueError(f"it is none of {', '.join(IMAGE_FORMATS)}") from None
    with opened as image:
        width, height = image.size
        if not 0 < width * height <= MAX_PIXELS or max(width, height) > MAX_SIDE:
            raise ValueError(f"it has {width} x {height} pixels, expected 1 to {MAX_PIXELS} and sides up to {MAX_SIDE}")
        if image.mode.startswith(("I", "F")):  # Pillow would clip their values at 255
            raise ValueError(f"its mode is {image.mode!r}, expected 8 bits a channel")
        # The further frames of an MPO file, the JPEG of some cameras, are previews.
        if image.format != "MPO" and (frames := getattr(image, "n_frames", 1)) != 1:
            raise ValueError(f"it is an animation of {frames} frames, expected one")
        return image.convert("RGB")


def check_archive(data: bytes, limit: int | None = None) -> None:
    """Raise ValueError for a zip archive that unpacks to more than `limit` (None: MAX_BYTES) bytes."""
    limit = MAX_BYTES if limit is None else limit
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        size = sum(entry.file_size for entry in archive.infolist())
    if size > limit:
        raise ValueError(f"it unpacks to {size} bytes, expected at most {limit}")


def load_npz(what: str, path: Path, remedy: str) -> dict[str, Any]:
    """Read the arrays of an .npz without running code of it. Raises OspoError; see `reading`."""
    with reading(what, path, remedy):
        data = read_bytes(path)
        check_archive(data)
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            return {name.removesuffix(".npy"): _parse_array(archive.read(name)) for name in archive.namelist()}


def _parse_array(data: bytes) -> Any:
    """Return the array of an .npy file, if its header agrees with its size."""
    import numpy as np

    stream = io.BytesIO(data)
    version = np.lib.format.read_magic(stream)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"an array has the format version {version}, expected (1, 0) or (2, 0)")
    header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = header(stream)
    size = math.prod(shape) * dtype.itemsize
    if dtype.hasobject or not dtype.itemsize or min(shape, default=0) < 0 or size != len(data) - stream.tell():
        raise ValueError(
            f"an array of shape {shape} and type {dtype} has {len(data) - stream.tell()} bytes, expected {size} of "
            "numbers or text"
        )
    stream.seek(0)
    return np.lib.format.read_array(stream, allow_pickle=False)


def load_tensors(what: str, path: Path, remedy: str) -> dict[str, Tensor]:
    """Read the tensors of a safetensors file. Raises OspoError; see `reading`."""
    from safetensors.torch import load

    with reading(what, path, remedy):
        tensors: dict[str, Tensor] = load(read_bytes(path))
        return tensors

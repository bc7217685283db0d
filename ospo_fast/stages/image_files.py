"""Image files: a PNG and, under the same name, an .npz with the VQ codes and the settings that generated them."""

from __future__ import annotations

import io
import os
from collections.abc import Hashable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ospo_fast.config import SAMPLING, ImagesConfig
from ospo_fast.errors import Failure, OspoError, attempt
from ospo_fast.files import load_npz, locate, open_image, reading
from ospo_fast.generation import ImageGenerator, ImageWriter, Throughput
from ospo_fast.models.base import UnifiedModel, run_check
from ospo_fast.models.layout import image_layout
from ospo_fast.records import SIDES, Pair, os_errors, sync_folder, write_atomic, write_files

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_ROUNDING = 2  # of 255: by which the pixels of the same codes differ on another device


def encode_png(image: Any) -> bytes:
    """Encode an image as PNG. Compression level 1 takes a third of the time of the default level."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()


def save_codes(path: Path, codes: Tensor, **settings: Any) -> None:
    """Write codes (T,) and the settings that generated them to an .npz, atomically."""
    write_atomic(path, encode_codes(codes, **settings))


def encode_codes(codes: Tensor, **settings: Any) -> bytes:
    """Encode codes (T,) and the settings that generated them as .npz."""
    array, buffer = codes.cpu().numpy(), io.BytesIO()
    largest = int(array.max()) if array.size else 0
    np.savez(buffer, codes=array.astype(np.int16 if largest < 2**15 else np.int32), **settings)
    return buffer.getvalue()


def load_codes(path: Path) -> dict[str, Any]:
    """Read codes (T,) int64 and the settings, which are single values, from an .npz; OspoError if it cannot be read."""
    values = load_npz("codes", path, "generate the image again, or delete the file to encode the image")
    codes = values.pop("codes", None)
    if codes is None or codes.dtype.kind not in "iu" or codes.ndim != 1 or any(v.ndim for v in values.values()):
        shapes = ", ".join(
            f"{name} {v.dtype} {v.shape}" for name, v in {"codes": codes, **values}.items() if v is not None
        )
        raise OspoError(
            f"Cannot read the codes {path}: it holds {shapes[:300]}, expected `codes`, a list of integers, and single "
            "values; generate the image again."
        )
    return {"codes": torch.from_numpy(codes.astype(np.int64)), **{name: v.item() for name, v in values.items()}}


def save_image(path: Path, image: Any, codes: Tensor, settings: dict[str, Any]) -> None:
    """Write the PNG and then the .npz, which marks the image as finished; see `is_finished`.

    The .npz of an image that was there before goes first: with a new PNG it would mark that one as finished. If there
    was a PNG, the new one is on disk before the .npz, which would otherwise mark the old one after a crash.
    """
    mark, data = path.with_suffix(".npz"), encode_png(image)
    with os_errors("replace", mark):
        if os.path.lexists(mark):
            mark.unlink()
            sync_folder(mark.parent)
    if os.path.lexists(path):
        write_atomic(path, data)
        save_codes(mark, codes, **settings)
    else:
        write_files({path: data, mark: encode_codes(codes, **settings)})


def is_finished(path: Path, settings: dict[str, Any]) -> bool:
    """Whether a readable image and its codes exist, generated with these settings."""
    codes = path.with_suffix(".npz")
    if not path.exists() or not codes.exists() or isinstance(attempt(open_image, path), Failure):
        return False
    stored = attempt(load_codes, codes)
    return not isinstance(stored, Failure) and all(stored.get(name) == value for name, value in settings.items())


def _check_same(path: Path, codes: Tensor, image: Image) -> None:
    """Raise OspoError if the PNG or the codes that are left of an image are those of another image."""
    stored, left = attempt(load_codes, path.with_suffix(".npz")), attempt(open_image, path)
    if isinstance(stored, Failure):
        same = isinstance(left, Failure) or _max_difference(left, image) <= MAX_ROUNDING
    else:
        same = np.array_equal(stored["codes"].numpy(), codes.cpu().numpy())
    if not same:
        kept = path if isinstance(stored, Failure) else path.with_suffix(".npz")
        raise OspoError(
            f"images: {path} was generated again, but it differs from what {kept.name} has of it; other devices and "
            "versions of torch generate other images, and the records describe the old one. Use those of the run, or "
            "run the stage images with --no-resume."
        )


def _max_difference(left: Image, image: Image) -> int:
    a, b = (np.asarray(x, np.int16) for x in (left, image))
    return int(np.abs(a - b).max()) if a.shape == b.shape else 255


class ImageFiles(ImageWriter):
    """Image generation with files written in the background; leaving the context waits for the files."""

    def __init__(self, model: UnifiedModel, settings: ImagesConfig, *, remake: bool = False) -> None:
        """remake: refuse an image that differs from what is left of it, the PNG or the codes."""
        run_check(model, "check_pixels")
        super().__init__(model, self._save_numbered)
        self.sampling = {name: getattr(settings, name) for name in SAMPLING}
        self.throughput: Throughput | None = None  # of all images so far
        self._generator = ImageGenerator(model, batch_size=settings.batch_size, jacobi_window=settings.jacobi_window)
        self._remake = remake
        self._paths: list[Path] = []  # by the numbers that the writer gets
        self._unwritten: dict[Path, dict[str, Any]] = {}

    def _save_numbered(self, number: int, codes: Tensor, image: Image) -> None:
        path = self._paths[number]
        if self._remake:
            _check_same(path, codes, image)
        save_image(path, image, codes, self._unwritten[path])
        del self._unwritten[path]

    def generate(
        self,
        prompts: Sequence[Tensor],
        files: dict[Path, dict[str, Any]],
        *,
        groups: Sequence[Hashable] | None = None,
        progress: bool = False,
    ) -> dict[Path, Failure]:
        """Generate one image per prompt, and write each to its file in the background.

        Args:
            prompts: ids (S,) of each image.
            files: path → settings of each image, with its `seed`.
            groups: see `ImageGenerator.generate`.
            progress: show a bar on stderr.

        Returns:
            The images that failed: path → why.

        """
        first = len(self._paths)
        self._paths += files
        self._unwritten |= files
        codes = self._generator.generate(
            prompts,
            seeds=[settings["seed"] for settings in files.values()],
            output="codes",
            callback=lambda batch: self.take([first + n for n in batch.indices], batch.codes),
            progress=progress,
            on_error="skip",
            groups=groups,
            **self.sampling,
        )
        if (new := self._generator.throughput) is not None:
            self.throughput = new if self.throughput is None else self.throughput + new
        unknown = Failure("the model's logits were not finite")
        failed = (codes < 0).any(1).nonzero().flatten().tolist()
        failures = {self._paths[first + n]: self._generator.failures.get(n, unknown) for n in failed}
        for path in failures:
            del self._unwritten[path]
        return failures

    def wait_for(self, paths: Iterable[Path]) -> None:
        """Block until these files are written."""
        self.wait(lambda: self._unwritten.keys().isdisjoint(paths))


def locate_image(path: object, out: Path | None, read_from: Sequence[str] = ()) -> Path:
    """Return the image that a record names. Raises OspoError as `locate` does, for its codes as well."""
    image = locate(path, out, read_from)
    locate(str(Path(str(path)).with_suffix(".npz")), out, read_from)
    return image


def image_codes(model: UnifiedModel, paths: Sequence[Path | Failure]) -> list[Tensor | Failure]:
    """Return the codes (T,) int64 of each image: those stored with it, or else the image encoded.

    One is a Failure if the image or its codes cannot be read, if the codes do not fit the model, or if its path is one.
    """
    found: dict[Path | Failure, Any] = {}
    for path in dict.fromkeys(paths):
        if isinstance(path, Failure):
            found[path] = path
        else:
            stored = os.path.exists(path.with_suffix(".npz"))  # noqa: PTH110 (Path.exists raises for long names)
            found[path] = _stored_codes(path, model) if stored else attempt(open_image, path)
    images = {path: image for path, image in found.items() if not isinstance(image, (Tensor, Failure))}
    if images:
        found |= zip(images, model.encode_images(list(images.values())).cpu(), strict=True)
    return [found[path] for path in paths]


def pair_codes(
    model: UnifiedModel, pairs: Sequence[Pair], out: Path | None, read_from: Sequence[str] = ()
) -> list[Tensor | Failure]:
    """Return the codes (2, T) of the chosen and the rejected image of each pair; see `locate` and `image_codes`."""
    paths = [attempt(locate_image, pair.get(side), out, read_from) for pair in pairs for side in SIDES]
    found = image_codes(model, paths)
    return [stack_codes(found[n : n + 2]) for n in range(0, len(found), 2)]


def stack_codes(codes: Sequence[Tensor | Failure]) -> Tensor | Failure:
    """Stack the codes (T,) of N images to (N, T); a Failure with all reasons if one has none."""
    reasons = [entry.reason for entry in codes if isinstance(entry, Failure)]
    if reasons or not codes:
        return Failure("; ".join(reasons) or "there is no image")
    return torch.stack([entry for entry in codes if isinstance(entry, Tensor)])


def _other_size(path: Path, model: UnifiedModel) -> Failure | None:
    """Return a Failure for an image of another size than the model has now: its codes are in another grid."""
    size = getattr(model, "image_size", None)
    if size is None or not path.is_file():
        return None
    from PIL import Image

    with reading("image", path, "make it again with --no-resume"), Image.open(path) as image:  # its header alone
        width, height = image.size
    if (height, width) == tuple(size):
        return None
    return Failure(
        f"{path}: the image has {height} x {width} pixels, the model generates {size[0]} x {size[1]}; use the "
        "image_size of the run"
    )


def _stored_codes(path: Path, model: UnifiedModel) -> Tensor | Failure:
    stored = attempt(load_codes, path.with_suffix(".npz"))
    if isinstance(stored, Failure):
        return stored
    codes: Tensor = stored["codes"]
    if (other := _other_size(path, model)) is not None:
        return other
    size = image_layout(model).codes
    if codes.shape != (size,) or int(codes.min()) < 0 or int(codes.max()) >= model.num_codes:
        largest = f" and values up to {int(codes.max())}" if codes.numel() else ""
        return Failure(
            f"{path}: the codes have shape {tuple(codes.shape)}{largest}; the model expects {size} codes below "
            f"{model.num_codes}. Did another model generate them?"
        )
    return codes

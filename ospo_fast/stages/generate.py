"""Images of a user's prompts: PNGs with codes and settings next to them, and a contact sheet."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ospo_fast.config import Config
from ospo_fast.errors import OspoError
from ospo_fast.files import open_image
from ospo_fast.models.base import UnifiedModel
from ospo_fast.records import check_writable, only_writer, stable_hash, sweep_temporary_files, write_atomic, write_json
from ospo_fast.stages.image_files import ImageFiles, encode_png, is_finished

if TYPE_CHECKING:
    from PIL.Image import Image


def contact_sheet(images: Sequence[Image], columns: int) -> Image:
    """Paste images into rows of `columns`, at the positions of images of the first one's size, 4 pixels apart."""
    import PIL.Image

    width, height = images[0].size
    rows = math.ceil(len(images) / columns)
    sheet = PIL.Image.new("RGB", (columns * (width + 4) + 4, rows * (height + 4) + 4), "white")
    for n, image in enumerate(images):
        sheet.paste(image, (4 + n % columns * (width + 4), 4 + n // columns * (height + 4)))
    return sheet


def _fingerprint(model: UnifiedModel) -> str:
    """Identify the weights: a folder keeps its name when its model is trained again."""
    sums = [float(weight.detach().sum(dtype=torch.float32)) for weight in model.module.parameters()]
    return f"{stable_hash(*sums):x}"


def generate(
    model: UnifiedModel,
    prompts: Sequence[str],
    config: Config,
    *,
    num: int,
    out: Path,
    resume: bool = True,
    progress: bool = True,
) -> dict[str, Any]:
    """Generate `num` images of each prompt: <prompt>_<n>.png with an .npz each, sheet.png and sheet.json.

    Args:
        model: generates the images.
        prompts: texts that `check_prompt` accepts.
        config: section `images`; image n of every prompt has seed `config.seed` + n.
        num: images per prompt.
        out: folder of the files.
        resume: keep the images that exist with the same prompt, seed, settings and weights.
        progress: show a bar on stderr.

    Returns:
        The content of sheet.json (model, settings, and the path, prompt and seed of each image) and `drawing`, the
        throughput (`Throughput.metrics`), None if no image was generated.

    Raises:
        OspoError: `out` cannot be written (checked first) or is being written by another process, or no image could be
            generated.

    """
    files, weights = ImageFiles(model, config.images), _fingerprint(model)
    plan = {
        out / f"{i:04d}_{n}.png": {"prompt": prompt, "seed": config.seed + n, **files.sampling, "weights": weights}
        for i, prompt in enumerate(prompts)
        for n in range(num)
    }
    check_writable(out)
    with only_writer(out / "sheet.json"):  # two calls would mix their images
        sweep_temporary_files(out)
        todo = {path: settings for path, settings in plan.items() if not (resume and is_finished(path, settings))}
        with files:
            ids = [model.image_prompt(settings["prompt"]) for settings in todo.values()]
            failed = files.generate(ids, todo, progress=progress)
        existing = [path for path in plan if path not in failed]
        if not existing:
            reasons = [f"{reason}; check the weights of the model" for reason in failed.values()]
            raise OspoError(f"No image could be generated: {(reasons or ['there is no prompt'])[0]}.")
        entries: list[dict[str, Any]] = []
        for path, settings in plan.items():
            entry = {"path": path.name, "prompt": settings["prompt"], "seed": settings["seed"]}
            entries.append(entry | ({"path": None, "reason": failed[path].reason} if path in failed else {}))
        sheet = out / "sheet.png"
        write_atomic(sheet, encode_png(contact_sheet([open_image(path) for path in existing[:256]], min(num, 8))))
        result = {"model": config.model, "sheet": str(sheet), **files.sampling, "images": entries}
        write_json(out / "sheet.json", result)
    return {**result, "drawing": None if files.throughput is None else files.throughput.metrics()}

"""Images of a user's prompts: PNGs with codes and settings beside them, and a contact sheet."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ospo_fast.config import Config
from ospo_fast.errors import OspoError
from ospo_fast.records import check_writable, stable_hash, write_atomic, write_json
from ospo_fast.stages.common import open_image, png, save_codes
from ospo_fast.stages.images import finished

if TYPE_CHECKING:
    from PIL.Image import Image

    from ospo_fast.models.base import UnifiedModel


def contact_sheet(images: Sequence[Image], columns: int) -> Image:
    """The images in rows of `columns`, all at the size of the first, 4 pixels apart on white."""
    import PIL.Image

    width, height = images[0].size
    rows = math.ceil(len(images) / columns)
    sheet = PIL.Image.new("RGB", (columns * (width + 4) + 4, rows * (height + 4) + 4), "white")
    for n, image in enumerate(images):
        sheet.paste(image, (4 + n % columns * (width + 4), 4 + n // columns * (height + 4)))
    return sheet


def _fingerprint(model: UnifiedModel) -> str:
    """What tells weights apart: a folder's name stays when its model is trained anew."""
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
    """`num` images of each prompt in `out`: <prompt>_<n>.png, .npz beside each, sheet.png and sheet.json.

    Image n of every prompt has seed config.seed + n. With `resume`, images that lie there with the same prompt, seed,
    settings and weights are not drawn again. Returns what sheet.json holds: model, settings, and per image its path,
    prompt and seed; and as `drawing` how fast images were drawn (`Throughput.figures`), None where none was.

    Raises:
        OspoError: `out` cannot be written; nothing has been drawn then.

    """
    from ospo_fast.generation import ImageGenerator, ImageWriter

    settings = config.images
    sampling = {name: getattr(settings, name) for name in ("guidance_scale", "temperature", "top_k", "top_p")}
    weights = _fingerprint(model)
    plan = [
        (out / f"{i:04d}_{n}.png", {"prompt": prompt, "seed": config.seed + n, **sampling, "weights": weights})
        for i, prompt in enumerate(prompts)
        for n in range(num)
    ]
    check_writable(out)
    todo = [(path, values) for path, values in plan if not (resume and finished(path, values))]
    failed = {path for path, _ in todo}

    def save(index: int, codes: Tensor, image: Image) -> None:
        path, values = todo[index]
        write_atomic(path, png(image))
        save_codes(path.with_suffix(".npz"), codes, **values)
        failed.discard(path)

    generator = ImageGenerator(model, batch_size=settings.batch_size, jacobi_window=settings.jacobi_window)
    with ImageWriter(model, save) as writer:
        generator.generate(
            [values["prompt"] for _, values in todo],
            seeds=[values["seed"] for _, values in todo],
            output="codes",
            callback=lambda drawn: writer.take(drawn.indices, drawn.codes),
            progress=progress,
            on_error="skip",
            **sampling,
        )
    drawn = [path for path, _ in plan if path not in failed]
    if not drawn:
        raise OspoError("No image could be drawn: the model's logits were not finite; are its weights whole?")
    entries: list[dict[str, Any]] = []
    for path, values in plan:
        entry = {"path": path.name, "prompt": values["prompt"], "seed": values["seed"]}
        if path in failed:
            entry |= {"path": None, "reason": "the model's logits were not finite"}
        entries.append(entry)
    sheet = out / "sheet.png"
    write_atomic(sheet, png(contact_sheet([open_image(path) for path in drawn[:256]], min(num, 8))))
    result = {"model": config.model, "sheet": str(sheet), **sampling, "images": entries}
    write_json(out / "sheet.json", result)
    return {**result, "drawing": None if generator.throughput is None else generator.throughput.figures()}

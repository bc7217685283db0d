"""Images of a user's prompts: PNGs with codes and settings beside them, and a contact sheet."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ospo_fast.config import Config
from ospo_fast.records import write_atomic, write_json
from ospo_fast.stages.common import open_image, save_codes

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


def _png(image: Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def generate(
    model: UnifiedModel, prompts: Sequence[str], config: Config, *, num: int, out: Path, progress: bool = True
) -> dict[str, Any]:
    """`num` images of each prompt in `out`: <prompt>_<n>.png, .npz beside each, sheet.png and settings.json.

    Image n of every prompt has seed config.seed + n. Returns what settings.json holds: model, settings, and per image
    its path, prompt and seed.
    """
    from ospo_fast.generation import ImageGenerator

    settings = config.images
    sampling = {name: getattr(settings, name) for name in ("guidance_scale", "temperature", "top_k", "top_p")}
    seeds = [config.seed + n for _ in prompts for n in range(num)]
    codes = ImageGenerator(model, batch_size=settings.batch_size).generate(
        list(prompts), seeds=seeds, num_images=num, output="codes", progress=progress, **sampling
    )
    entries: list[dict[str, Any]] = []
    paths = []
    for start in range(0, len(codes), 64):
        for n, image in enumerate(model.decode_codes(codes[start : start + 64]), start):
            path = out / f"{n // num:04d}_{n % num}.png"
            prompt = prompts[n // num]
            write_atomic(path, _png(image))
            save_codes(path.with_suffix(".npz"), codes[n], prompt=prompt, seed=seeds[n], **sampling)
            paths.append(path)
            entries.append({"path": path.name, "prompt": prompt, "seed": seeds[n]})
    sheet = out / "sheet.png"
    write_atomic(sheet, _png(contact_sheet([open_image(path) for path in paths[:256]], min(num, 8))))
    result = {"model": config.model, "sheet": str(sheet), **sampling, "images": entries}
    write_json(out / "settings.json", result)
    return result

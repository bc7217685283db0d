"""Sample images of the policy during training: a few fixed prompts of the training pairs, from fixed seeds."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ospo_fast.config import Config
from ospo_fast.errors import Failure, OspoError, attempt
from ospo_fast.generation import ImageGenerator
from ospo_fast.models.base import UnifiedModel
from ospo_fast.records import ItemPair, stable_hash, write_folder
from ospo_fast.stages.contact_sheet import COLUMNS, Entry, contact_sheet
from ospo_fast.stages.image_files import encode_png

if TYPE_CHECKING:
    from PIL.Image import Image

    from ospo_fast.stages.tracking import Tracker

logger = logging.getLogger(__name__)

COUNT = 8  # a row of a contact sheet


def sample(
    model: UnifiedModel, pairs: Sequence[ItemPair], config: Config, folder: Path, step: int, tracker: Tracker | None
) -> None:
    """Write the samples of a step to `folder`/samples/step-…, and send their contact sheet to the tracker.

    Samples are for the eye alone: where they fail, a warning says why, and training continues.
    """
    sheet = attempt(write_samples, model, pairs, config, folder / "samples" / f"step-{step:06d}", step)
    if isinstance(sheet, Failure):
        logger.warning("train: no samples of step %d: %s", step, sheet)
    elif tracker is not None:
        tracker.sheet(sheet, step)


def write_samples(model: UnifiedModel, pairs: Sequence[ItemPair], config: Config, folder: Path, step: int) -> Image:
    """Generate an image of each of up to 8 prompts of `pairs`, and write 0.png, 1.png, … and sheet.png to `folder`.

    Prompts and seeds depend on `config.seed` and the ids of the pairs alone, so that steps can be compared. The random
    state of torch, and the mode of the model, stay as they are.

    Args:
        model: the policy, in training or evaluation mode.
        pairs: the training pairs, at least one.
        config: section `images` has the sampling settings, guidance included.
        folder: replaced as a whole.
        step: of training, for the captions.

    Returns:
        The contact sheet.

    Raises:
        OspoError: no image could be generated, or the folder cannot be written.

    """
    settings = config.images
    seeds = {item.record["prompt"]: stable_hash(config.seed, "samples", item.pair_id) % 2**31 for item in pairs}
    chosen = sorted(seeds, key=lambda prompt: (seeds[prompt], prompt))[:COUNT]
    # Its buffers, which evaluation does not share, are freed with it: training needs the memory.
    generator = ImageGenerator(model, batch_size=settings.batch_size)
    with torch.random.fork_rng():
        images = generator.generate(
            chosen,
            seeds=[seeds[prompt] for prompt in chosen],
            guidance_scale=settings.guidance_scale,
            temperature=settings.temperature,
            top_k=settings.top_k,
            top_p=settings.top_p,
            progress=False,
            on_error="skip",
        )
    entries = {
        f"{n}.png": Entry(image, prompt, f"step {step}, seed {seeds[prompt]}")
        for n, (image, prompt) in enumerate(zip(images, chosen, strict=True))
        if image is not None
    }
    if not entries:
        raise OspoError(f"No sample image could be generated: {next(iter(generator.failures.values()))}.")
    sheet = contact_sheet(list(entries.values()), COLUMNS)

    def save(place: Path) -> None:
        for name, image in {**{name: entry.image for name, entry in entries.items()}, "sheet.png": sheet}.items():
            (place / name).write_bytes(encode_png(image))

    write_folder(folder, save)
    return sheet

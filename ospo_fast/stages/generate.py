"""Images of a user's prompts: PNGs with codes and settings next to them, and contact sheets."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ospo_fast.config import Config
from ospo_fast.errors import Failure, OspoError
from ospo_fast.files import open_image
from ospo_fast.models.base import UnifiedModel
from ospo_fast.models.quantized import stored_tensors
from ospo_fast.records import (
    check_writable,
    chunked,
    only_writer,
    stable_hash,
    sweep_temporary_files,
    write_atomic,
    write_json,
)
from ospo_fast.stages.contact_sheet import PER_SHEET, Entry, columns_of, contact_sheet
from ospo_fast.stages.image_files import ImageFiles, encode_png, is_finished

MAX_SHEETS = 16


def fingerprint(model: UnifiedModel) -> str:
    """Identify the weights: a folder keeps its name when its model is trained again."""
    sums = [float(tensor.detach().sum(dtype=torch.float32)) for tensor in stored_tensors(model.module)]
    return f"{stable_hash(*sums):x}"


def generate_missing(
    model: UnifiedModel, files: ImageFiles, plan: dict[Path, dict[str, Any]], *, resume: bool = True, progress: bool
) -> dict[Path, Failure]:
    """Generate the images of a plan that do not exist with the same settings, and wait until they are written.

    Args:
        model: generates the images.
        files: writes them.
        plan: path → prompt, seed and settings of each image, which its .npz keeps.
        resume: keep the images that exist with the same settings.
        progress: show a bar on stderr.

    Returns:
        The images that failed: path → why.

    """
    todo = {path: settings for path, settings in plan.items() if not (resume and is_finished(path, settings))}
    with files:
        return files.generate(
            [model.image_prompt(settings["prompt"]) for settings in todo.values()], todo, progress=progress
        )


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
    """Generate `num` images of each prompt: <prompt>_<n>.png with an .npz each, contact sheets and sheet.json.

    sheet.png shows the first 64 images, sheet_2.png the next ones, and so on, up to 16 sheets.

    Args:
        model: generates the images.
        prompts: texts that `check_prompt` accepts.
        config: section `images`; image n of every prompt has seed `config.seed` + n.
        num: images per prompt.
        out: folder of the files.
        resume: keep the images that exist with the same prompt, seed, settings and weights.
        progress: show a bar on stderr.

    Returns:
        The content of sheet.json and `drawing`, the throughput (`Throughput.metrics`), None if no image was generated.
        sheet.json has the model, the settings, path, prompt and seed of each image, the first `sheet`, all `sheets`,
        and how many images they show (`on_sheets`).

    Raises:
        OspoError: `out` cannot be written (checked first) or is being written by another process, or no image could be
            generated.

    """
    files, weights = ImageFiles(model, config.images), fingerprint(model)
    plan = {
        out / f"{i:04d}_{n}.png": {"prompt": prompt, "seed": config.seed + n, **files.sampling, "weights": weights}
        for i, prompt in enumerate(prompts)
        for n in range(num)
    }
    check_writable(out)
    with only_writer(out / "sheet.json"):  # two calls would mix their images
        sweep_temporary_files(out)
        failed = generate_missing(model, files, plan, resume=resume, progress=progress)
        existing = [path for path in plan if path not in failed]
        if not existing:
            reasons = [f"{reason}; check the weights of the model" for reason in failed.values()]
            raise OspoError(f"No image could be generated: {(reasons or ['there is no prompt'])[0]}.")
        entries: list[dict[str, Any]] = []
        for path, settings in plan.items():
            entry = {"path": path.name, "prompt": settings["prompt"], "seed": settings["seed"]}
            entries.append(entry | ({"path": None, "reason": failed[path].reason} if path in failed else {}))
        columns = columns_of(min(len(existing), PER_SHEET), num)
        per_sheet = PER_SHEET // columns * columns  # whole rows
        on_sheets = existing[: per_sheet * MAX_SHEETS]
        sheets = [
            _write_sheet(out, number, {path: plan[path] for path in paths}, columns)
            for number, paths in enumerate(chunked(on_sheets, per_sheet), 1)
        ]
        for path in out.glob("sheet_*.png"):  # of an earlier call with more images
            if re.fullmatch(r"sheet_\d+", path.stem) and path not in sheets:
                path.unlink()
        result = {
            "model": config.model,
            "sheet": str(sheets[0]),
            "sheets": list(map(str, sheets)),
            "on_sheets": len(on_sheets),
            **files.sampling,
            "images": entries,
        }
        write_json(out / "sheet.json", result)
    return {**result, "drawing": None if files.throughput is None else files.throughput.metrics()}


def _write_sheet(out: Path, number: int, images: dict[Path, dict[str, Any]], columns: int) -> Path:
    """Write a contact sheet of images (path → prompt and seed)."""
    entries = [
        Entry(open_image(path), settings["prompt"], f"{path.stem}, seed {settings['seed']}")
        for path, settings in images.items()
    ]
    sheet = out / ("sheet.png" if number == 1 else f"sheet_{number}.png")
    write_atomic(sheet, encode_png(contact_sheet(entries, columns)))
    return sheet

"""The files that records of a run folder name, to notice those that were deleted."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from ospo_fast.records import SIDES, Record, image_verdicts, iter_pairs, read_json

CHECKPOINTS = "step-*"  # in checkpoints/ of a training
# What any training leaves; done.json of an older version does not list more.
TRAINED = ("adapter/adapter_config.json", "adapter/adapter_model.safetensors", "model/config.json")


def made_here(out: Path, stage: str) -> bool:
    """Return whether a stage, or a shard of it, ran in a run folder. Imported records have no settings."""
    return any(key.split(".")[0] == stage for key in read_json(out / "settings.json", {}))


def image_paths(record: Record) -> list[object]:
    """Return the paths of the images of an item."""
    return [verdict.get("path") for *_, verdict in image_verdicts(record)]


def image_and_codes_paths(record: Record) -> list[object]:
    """Return the paths of the images of an item and of their codes."""
    return _with_codes(image_paths(record))


def pair_paths(record: Record) -> list[object]:
    """Return the paths of the images in the pairs of an item, and of their codes."""
    return _with_codes(item.pair.get(side) for item in iter_pairs([record]) for side in SIDES)


def mask_paths(record: Record) -> list[object]:
    """Return the paths of the masks of an item."""
    return [item.pair.get("mask_path") for item in iter_pairs([record])]


def masked_pair_paths(record: Record) -> list[object]:
    """Return the paths of the pairs that have masks: images, codes and masks."""
    sides = (item.pair.get(side) for item in iter_pairs([record]) if item.pair.get("mask_path") for side in SIDES)
    return [*_with_codes(sides), *mask_paths(record)]


def _with_codes(paths: Iterable[object]) -> list[object]:
    return [name for path in paths if isinstance(path, str) for name in (path, str(Path(path).with_suffix(".npz")))]


def missing_files(out: Path, folder: str, paths: Iterable[object]) -> list[Path]:
    """Return those of the paths that are in this folder of the run folder `out` and are not there."""
    own = (path for path in paths if isinstance(path, str) and path.startswith(f"{folder}/") and "\0" not in path)
    return [out / path for path in own if not os.path.exists(out / path)]  # noqa: PTH110 (raises for long names)


def missing_trained(folder: Path, files: object) -> list[Path]:
    """Return the files of a finished training in `folder` that are not there; `files`: those that done.json lists."""
    listed = files if isinstance(files, list) and files and all(isinstance(name, str) for name in files) else TRAINED
    return [folder / name for name in listed if not os.path.isfile(folder / name)]  # noqa: PTH113 (raises for long names)


def describe_missing(paths: list[Path]) -> str:
    """Say which file is missing, and how many others."""
    return f"{paths[0]} is missing" if len(paths) == 1 else f"{paths[0]} and {len(paths) - 1} more files are missing"

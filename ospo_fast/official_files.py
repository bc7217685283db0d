"""Files of the official implementation (KU-AGI/OSPO), read under their own names in place of a run folder's stores.

Its steps write JSON arrays, whole or in parts (`negative_prompt_0.json`): base_prompt.json, negative_prompt.json,
long_prompt.json or dense_prompt.json, init_dataset.json, vqa_question.json, vqa_result.json and train.json. Images are
in images/base|negative/CATEGORY/ITEM/NN.png. The fields of a file say which stage it stands for. What several files
hold of an item is joined: a hard negative can be in one of them and its dense prompt in another.
"""

from __future__ import annotations

import functools
import logging
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

from ospo_fast.errors import OspoError, UsageError
from ospo_fast.records import ROLES, ImageVerdict, Pair, Record, edited_text, os_errors, read_records, shown
from ospo_fast.stages import STAGE_NAMES, STAGES, Stage, find_stage
from ospo_fast.stages.needs import has_image, has_pair, has_question

logger = logging.getLogger(__name__)

FOLDERS = (".", "prompt", *(f"prompt/step{number}" for number in range(1, 5)), "data")  # of a run folder
NAMES = re.compile(
    r"((base|negative|long|dense|vqa)_prompt|init_dataset|vqa_question|vqa_result|train)(_[\w.-]+)?\.json"
)
KNOWN = "base_prompt.json, negative_prompt.json, long_prompt.json, vqa_question.json, vqa_result.json, train.json"
_CANDIDATES = {"base": "chosen_candidate", "negative": "rejected_candidate"}  # lists of paths in init_dataset.json
IMAGES = "images"  # the folder of images of both roles
OnError = Callable[[OspoError], object]


class _Item(NamedTuple):
    """What is known of an item, and the file or store that it is from."""

    record: Record
    source: Path


def find_files(out: Path) -> list[Path]:
    """Return the official files in a run folder, by their names."""
    with os_errors("read", out):
        folders = [folder for name in FOLDERS if (folder := out / name).is_dir()]
        return sorted(path for folder in folders for path in folder.iterdir() if NAMES.fullmatch(path.name))


def read_stage(
    out: Path, stage: str, on_error: OnError, stored: Callable[[str], tuple[Path, list[Record]] | None]
) -> dict[str, tuple[Record, bool]] | None:
    """Return what official files hold in place of the store of a stage; None if it is nothing.

    The items are those of the files of this stage or, if there is none, of the next later one. Where only the image
    folder stands for the stage images, they are those of an earlier one.

    Args:
        out: the run folder.
        stage: its name.
        on_error: gets the errors of records that cannot be used, which are left out.
        stored: path and records of the store of a stage, None where there is no store. What it holds of an item
            completes what files hold.

    Returns:
        By item_id (record, whether it has what the stage adds).

    Raises:
        OspoError: a file holds no record, or an item has different texts in two files.

    """
    if find_stage(stage).adds is None:
        return None
    wanted, drawn = STAGE_NAMES.index(stage), STAGE_NAMES.index("images")
    folder, files = out / IMAGES, find_files(out)
    has_images = any((folder / role).is_dir() for role in ROLES)
    if not (files or has_images):
        return None
    levels = _read_files(files, on_error)
    earlier = next(((n, found) for n in range(wanted)[::-1] if (found := stored(STAGE_NAMES[n]))), None)
    if earlier is not None:
        path, records = earlier[1]
        levels[earlier[0]] = {record["item_id"]: _Item(record, path) for record in records}
    level = min((n for n in levels if n >= wanted), default=None)
    if level is None and wanted == drawn and has_images and levels:
        level = max(levels)
    if level is None:
        return None
    result = {}
    for item_id, item in levels[level].items():
        for lower in sorted((n for n in levels if n < level), reverse=True):
            if (other := levels[lower].get(item_id)) is not None:
                item = _join(item, other)
        record = item.record
        full = _with_folder(record, out) if has_images and not has_image(record) else record
        record = full if wanted >= drawn else record
        if record.get("pairs"):
            record = cast(Record, {**record, "pairs": [_with_prompt(record, pair) for pair in record["pairs"]]})
        # Questions are made of the prompt alone, and need no dense prompts and images before them.
        steps = (stage for stage in STAGES[wanted:] if stage == STAGES[wanted] or stage.adds is not has_question)
        result[item_id] = record, any(_adds(stage, full) for stage in steps)
    return result


def refuse_replacing(folders: Sequence[Path]) -> None:
    """Raise UsageError for official files in folders of results that a start with --no-resume would replace."""
    for folder in folders:
        if not folder.is_dir():
            continue
        with os_errors("read", folder):
            files = [path for path in folder.iterdir() if NAMES.fullmatch(path.name)]
        if found := [*_image_folders(folder), *files]:
            raise UsageError(
                f"{found[0]} holds files of the official code, which starting over would delete with the results in "
                f"{folder}; move them to a folder of their own, for images named by read_from, or use another --out."
            )


def refuse_other_prompts(out: Path, stage: Stage) -> None:
    """Raise UsageError if a stage would make prompts again of which official files name the images."""
    if STAGES.index(stage) >= STAGE_NAMES.index("images"):
        return
    for path in find_files(out):
        records = map(_with_candidates, read_records(path, lambda error: None))
        if any(has_image(record) or has_pair(record) for record in records):
            raise UsageError(
                f"{path} has images, which {stage.name} would make other prompts for; move it out of the run folder, "
                "or use another --out. Hard negatives of official images are in their negative_prompt.json."
            )


def check_prompts(out: Path, file: str | None) -> None:
    """Raise UsageError if a run folder has official images without their prompts, or official prompts next to `file`.

    file: the setting prompts.file.
    """
    if find_files(out):
        if file is not None:
            raise UsageError(
                f"prompts.file: got {file}, and {out} has prompts in official files; leave it out, or use another "
                "--out for these prompts."
            )
    elif found := _image_folders(out / IMAGES):
        raise UsageError(
            f"{found[0]} holds images of the official code, and {out} has no file with their prompts; put the file "
            f"there ({KNOWN}), or use another --out for other prompts."
        )


@functools.cache  # every stage of a run reads them
def tell_of_shapes(out: Path) -> None:
    """Warn that official files are read for the embedded model, which is the default: it was probably not meant."""
    logger.warning(
        "%s has official files, and the model is the embedded one of the Shapes world, with defaults of its own "
        "(select.rejected=own); name your model with --model",
        out,
    )


def _image_folders(folder: Path) -> list[Path]:
    with os_errors("read", folder):
        folders = [inner for role in ROLES if (inner := folder / role).is_dir()]
        return [inner for inner in folders if any(map(Path.is_dir, inner.iterdir()))]


def _adds(stage: Stage, record: Record) -> bool:
    return stage.adds is not None and stage.adds(record)


def _read_files(paths: list[Path], on_error: OnError) -> dict[int, dict[str, _Item]]:
    """Return the items of files by the number of the stage that the fields of the file are of."""
    levels: dict[int, dict[str, _Item]] = {}
    for path in paths:
        errors: list[OspoError] = []
        records = [_with_candidates(record) for record in read_records(path, errors.append)]
        reached = [n for record in records for n, stage in enumerate(STAGES) if _adds(stage, record)]
        if not reached:
            problem = f": {errors[0]}" if errors else ""
            raise OspoError(
                f"{path} has the name of an official file, and holds no usable record{problem.rstrip('.')}; "
                "correct it, or move it out of the run folder."
            )
        for error in errors:
            on_error(error)
        items = levels.setdefault(max(reached), {})
        for record in records:
            item = _Item(record, path)
            if (other := items.get(record["item_id"])) is not None:
                _refuse_other(other, item)
                item = _join(other, item)
            items[record["item_id"]] = item
    return levels


def _refuse_other(item: _Item, other: _Item) -> None:
    """Raise OspoError if two files of one step have different values of an item."""
    fields, others = cast("dict[str, Any]", item.record), cast("dict[str, Any]", other.record)
    for name in fields.keys() & others.keys():
        if None not in (fields[name], others[name]) and fields[name] != others[name]:
            raise OspoError(
                f"Item {item.record['item_id']!r:.60}: `{name}` in {item.source} is not that in {other.source}; keep "
                "one of the two files in the run folder."
            )


def _join(item: _Item, other: _Item) -> _Item:
    """Add the fields of `other` that an item does not have. Raises OspoError for texts that differ."""
    joined = cast(Record, {**other.record, **{k: v for k, v in item.record.items() if v is not None}})
    if (edited := edited_text(other.record, joined)) is not None:
        field, before, after = edited
        remedy = "keep the files of one run of the official code in a folder"
        if other.source.suffix == ".jsonl":
            after_it = STAGES[STAGE_NAMES.index(other.source.name.partition(".")[0]) + 1].name
            remedy += f", or run `ospo-fast {after_it} --no-resume` to make what follows of {other.source.name} again"
        raise OspoError(
            f"Item {item.record['item_id']!r:.60}: `{field}` is {shown(before)} in {other.source}, but {shown(after)} "
            f"in {item.source}; {remedy}."
        )
    return _Item(joined, item.source)


def _with_prompt(record: Record, pair: Pair) -> Pair:
    """Add the rejected prompt of a pair that has none: the hard negative of the number of the rejected image."""
    prompts, stem = record.get("negative_prompt") or [], os.path.basename(pair["rejected"]).partition(".")[0]  # noqa: PTH119
    if pair.get("rejected_prompt") is None and re.fullmatch("[0-9]{1,9}", stem) and int(stem) < len(prompts):
        return cast(Pair, {**pair, "rejected_prompt": prompts[int(stem)]})
    return pair


def _with_candidates(record: Record) -> Record:
    """Name the images of init_dataset.json as those of other files."""
    fields = dict[str, Any](record)
    for role, field in _CANDIDATES.items():
        paths = fields.get(field)
        if isinstance(paths, list) and all(isinstance(path, str) for path in paths):
            fields.setdefault(f"{role}_metadata", _entries(role, paths))
    return cast(Record, fields)


def _with_folder(record: Record, out: Path) -> Record:
    """Add the images of an item in the image folder of the official code."""
    place = [record.get("t2i_category") or "", record["item_id"]]
    if any(not name or name in (".", "..") or "/" in name for name in place):
        return record
    metadata = {}
    for role in ROLES:
        folder = Path(IMAGES, role, *place)
        with os_errors("read", out / folder):
            names = os.listdir(out / folder) if os.path.isdir(out / folder) else []  # noqa: PTH112, PTH208 (long names)
        paths = [str(folder / name) for name in names if name.endswith(".png") and not name.startswith(".")]
        metadata[f"{role}_metadata"] = _entries(role, paths)
    return cast(Record, {**record, **metadata})


def _entries(role: str, paths: list[str]) -> dict[str, ImageVerdict]:
    """Number images as the official scoring does, in the order of their names."""
    return {f"{role}_{number}": {"path": path} for number, path in enumerate(sorted(paths))}

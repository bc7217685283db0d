"""The pairs of a run in the layout of the official implementation, which its trainer reads.

    train.json                                     a list of pairs
    images/base/CATEGORY/ITEM/NN.png               the chosen image
    images/negative/CATEGORY/ITEM/NN.png           the rejected image
    object_mask/base/CATEGORY/ITEM/NN_mask.pt      their masks, (H, W) uint8 of 0 and 1; the trainer looks for both
    object_mask/negative/CATEGORY/ITEM/NN_mask.pt  under the name of the chosen image

NN is the number of the hard negative, so that `negative_prompt[NN]` is the rejected prompt. ITEM is `ItemPair.name`:
each further pair of an item is an entry of its own. Names that an export gave stay in an export of its pairs. What an
entry has of the record is listed in `FIELDS`; nothing else of the run folder, such as a path, is in it.
"""

from __future__ import annotations

import glob
import io
import json
import logging
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ospo_fast import restarts
from ospo_fast.config import Config
from ospo_fast.errors import Failure, OspoError, UsageError, attempt, check_text, some_failed
from ospo_fast.files import locate, no_link, open_image, read_bytes
from ospo_fast.pipeline import read_stage, store_paths
from ospo_fast.records import (
    ROLES,
    SIDES,
    ItemPair,
    check_creatable,
    finite,
    item_name,
    iter_pairs,
    os_errors,
    sweep_temporary_files,
    write_folder,
)
from ospo_fast.stages.train_settings import uses_stored_masks

logger = logging.getLogger(__name__)

FIELDS = (  # of a record, that an entry has
    "sub_category", "prompt", "concepts_and_relations", "relation", "kind", "perturbed_method", "negative_prompt",
    "long_prompt", "negative_long_prompt", "question", "nouns",
)  # fmt: skip
_CATEGORY = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,63}")
_EXPORTED = re.compile(r"[a-z0-9_]{1,64}(-[0-9a-f]{24})?(-[0-9]{1,9})?")  # the form of names of further pairs
_PNG = b"\x89PNG\r\n\x1a\n"

Files = dict[str, Path | bytes]  # what is in a folder, by relative path: a file to copy, or its content


@dataclass
class Export:
    """Pairs in the official layout. `entries` are those of train.json, with paths relative to the folder."""

    entries: list[dict[str, Any]] = field(default_factory=list)
    files: Files = field(default_factory=dict)  # images and masks
    left_out: dict[str, str] = field(default_factory=dict)  # pairs without a mask, and why
    masked: bool = False

    def train_json(self, root: str = "") -> bytes:
        """Return train.json, with `root` in front of its paths."""
        prefix = root if not root or root.endswith("/") else f"{root}/"
        entries = [entry | {side: prefix + entry[side] for side in SIDES} for entry in self.entries]
        return (json.dumps(finite(entries), indent=4, allow_nan=False) + "\n").encode()  # ASCII: read in any locale

    def categories(self) -> dict[str, int]:
        """Return the number of pairs of each category."""
        return dict(sorted(Counter(entry["t2i_category"] for entry in self.entries).items()))


def run_folder(config: Config, iteration: int = 1) -> Path:
    """Return the folder of an iteration of the run `config.out`. Raises UsageError if there is none."""
    out = Path(config.out)
    if not os.path.isdir(out):  # noqa: PTH112 (Path.is_dir raises for long names and closed folders)
        raise UsageError(f"There is no run folder {out}; make one with `ospo-fast run --out {out}`.")
    folder = out if iteration == 1 else out / f"iter{iteration}"
    if not no_link(folder).is_dir():
        raise UsageError(f"There is no iteration {iteration} in {out}; see its folders iter2, iter3, ….")
    return folder


def collect_pairs(config: Config, iteration: int = 1, *, progress: bool = False) -> Export:
    """Read the pairs of a run, in the order of its records, and check their images and masks.

    Pairs without a mask are left out where the run has masks. `progress` shows a bar on stderr.

    Raises:
        UsageError: no run, or a run whose pairs are not selected, or have no masks yet.
        OspoError: no pair, images or masks that are missing or damaged.

    """
    from tqdm.auto import tqdm

    folder = run_folder(config, iteration)
    export = Export(masked=uses_stored_masks(config) or bool(config.masks.enabled and store_paths(folder, "masks")))
    stage = "masks" if export.masked else "select"
    pairs = list(iter_pairs(read_stage(folder, stage)))
    if not pairs:
        raise OspoError(f"There is no pair in {folder}; see the reasons in {stage}.jsonl.")
    failed = []
    for item, name in zip(tqdm(pairs, unit="pair", delay=2, disable=not progress), _names(pairs), strict=True):
        if export.masked and not item.pair.get("mask_path"):
            export.left_out[item.pair_id] = item.pair.get("mask_reason") or "no reason recorded"
        elif isinstance(added := attempt(_add_pair, export, item, name, config, folder), Failure):
            failed.append(f"{item.pair_id}: {added}")
    if failed:
        what = some_failed("pairs", failed, len(pairs)).rstrip(".")
        raise OspoError(f"{what}. `ospo-fast run --out {config.out}` makes files again that were deleted.")
    if export.left_out:
        reasons = [f"{pair_id}: {why}" for pair_id, why in export.left_out.items()]
        if not export.entries:
            raise OspoError(f"There is no pair with a mask in {folder}: {some_failed('pairs', reasons, len(pairs))}.")
        logger.warning("leaving out pairs without a mask: %s", some_failed("pairs", reasons, len(pairs)))
    return export


def _names(pairs: Sequence[ItemPair]) -> list[str]:
    """Return the names of pairs: that of `ItemPair`, or the id of an item that an export named."""
    names = [item.name for item in pairs]
    taken = set(names)
    for number, item in enumerate(pairs):
        item_id = item.record["item_id"]
        if item.pair_id == item_id and _EXPORTED.fullmatch(item_id) and item_id not in taken:
            names[number] = item_id
    return names


def _add_pair(export: Export, item: ItemPair, name: str, config: Config, folder: Path) -> None:
    import torch

    from ospo_fast.stages.image_files import encode_png
    from ospo_fast.stages.masks import load_unions

    record, pair = item.record, item.pair
    if not (record.get("prompt") or "").strip():
        raise OspoError("its item has no `prompt`; add it or delete the item")
    category = record.get("t2i_category") or "unknown"
    if not _CATEGORY.fullmatch(category):
        category = item_name(category)
    entry: dict[str, Any] = {"item_id": name, "t2i_category": category}
    entry |= {key: value for key, value in record.items() if key in FIELDS and value is not None}
    place, number = f"{category}/{name}", f"{_variant(item):02d}"
    for side, role in zip(SIDES, ROLES, strict=True):
        path = locate(pair.get(side), folder, config.read_from)
        image = open_image(path)
        entry[side] = f"images/{role}/{place}/{number}.png"
        export.files[entry[side]] = path if read_bytes(path).startswith(_PNG) else encode_png(image)
    if export.masked:
        for role, union in zip(ROLES, load_unions(pair, folder, config.read_from, soft=False), strict=True):
            buffer = io.BytesIO()
            torch.save(union.to(torch.uint8, copy=True), buffer)
            export.files[f"object_mask/{role}/{place}/{number}_mask.pt"] = buffer.getvalue()
    fields: Mapping[str, Any] = pair
    for key in ("chosen_score", "rejected_score", "rejected_prompt"):
        if fields.get(key) is not None:
            entry[key] = fields[key]
    if name != record["item_id"]:
        entry["source_item_id"] = record["item_id"]
    export.entries.append(entry)


def _variant(item: ItemPair) -> int:
    """Return the number of the hard negative of a pair: its place in `negative_prompt`, else that of its image."""
    prompts, prompt = item.record.get("negative_prompt") or [], item.pair.get("rejected_prompt")
    if prompt in prompts:
        return prompts.index(prompt)
    found = re.search(r"[0-9]{1,9}$", Path(item.pair["rejected"]).stem)
    return int(found[0]) if found else 0


def check_destination(dest: Path, config: Config) -> None:
    """Raise OspoError unless `dest` is a new or an empty folder outside of the run."""
    check_text("DEST", str(dest))
    if Path(os.path.realpath(dest)).is_relative_to(os.path.realpath(config.out)):
        raise UsageError(f"DEST: got {dest}, which is in the run folder {config.out}; choose a folder outside of it.")
    if os.path.lexists(dest):
        with os_errors("read", dest):
            if dest.is_symlink() or not dest.is_dir() or any(dest.iterdir()):
                kind = "a link" if dest.is_symlink() else "a folder with files" if dest.is_dir() else "a file"
                raise UsageError(f"DEST: got {dest}, {kind}, expected a new or an empty folder; choose another one.")
    check_creatable(dest, choose="folder")


def write_export(
    config: Config, dest: Path, *, iteration: int = 1, root: str = "", progress: bool = False
) -> dict[str, Any]:
    """Write the pairs of a run to `dest`, whole or not at all.

    Args:
        config: of the run; `out` is its folder.
        dest: a new or empty folder.
        iteration: of self-improvement.
        root: what train.json has in front of its paths, which are else relative to `dest`.
        progress: show a bar on stderr.

    Returns:
        `out` (of the export), `pairs`, `categories`, `masks` and `left_out` (pairs without a mask, and why).

    """
    run_folder(config, iteration)
    check_destination(dest, config)
    check_text("--root", root)
    with os_errors("read", Path(config.out)), restarts.reading(Path(config.out)):
        export = collect_pairs(config, iteration, progress=progress)
        sweep_temporary_files(dest.parent, f".{glob.escape(dest.name)}.*.tmp")  # of an export that was killed
        files = export.files | {"train.json": export.train_json(root)}
        write_folder(dest, lambda folder: _copy_files(files, folder))
    result = {"out": str(dest), "pairs": len(export.entries), "categories": export.categories()}
    return result | {"masks": export.masked, "left_out": export.left_out}


def _copy_files(files: Files, folder: Path) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content if isinstance(content, bytes) else read_bytes(content))

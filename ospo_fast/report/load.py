"""Reads a run folder as it is found: whatever is absent stays absent, whatever is unreadable is named in `notes`."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

from ospo_fast.errors import OspoError
from ospo_fast.records import iter_pairs

if TYPE_CHECKING:
    from pathlib import Path

Record = dict[str, Any]

STORES = ("prompts", "perturb", "images", "questions", "score", "select", "masks")


@dataclass(frozen=True)
class Run:
    """What a run folder holds.

    `items` has one merged record for each item_id, in the order of its first appearance; `reached[item_id]` names the
    last store that holds the item. `present` names the stores that exist.
    """

    root: Path
    summary: Record = field(default_factory=dict)
    stages: dict[str, Record] = field(default_factory=dict)
    items: list[Record] = field(default_factory=list)
    reached: dict[str, str] = field(default_factory=dict)
    present: tuple[str, ...] = ()
    log: list[Record] = field(default_factory=list)
    gallery: list[Record] = field(default_factory=list)
    config: str | None = None
    notes: list[str] = field(default_factory=list)


def read_run(root: Path) -> Run:
    """Reads everything that the report shows, but for images and masks.

    Raises OspoError where the folder is missing, holds nothing to report, or summary.json or stages.json is broken.
    A line of a store that is no JSON object is left out and counted in `notes`.
    """
    if not root.is_dir():
        raise OspoError(f"run folder {str(root)!r} is not there; give the folder that `ospo-fast run --out` wrote")
    notes: list[str] = []
    summary = mapping(_json(root / "summary.json", dict))
    merged: dict[str, Record] = {}
    reached: dict[str, str] = {}
    present = []
    for store in STORES:
        # A stage that ran in shards has left one store for each.
        for path in (root / f"{store}.jsonl", *sorted(root.glob(f"{store}.*-of-*.jsonl"))):
            if not path.is_file():
                continue
            present.append(store)
            nameless = 0
            for record in _lines(path, notes):
                if "item_id" not in record:
                    nameless += 1
                    continue
                item_id = str(record["item_id"])
                merged.setdefault(item_id, {}).update(record)
                reached[item_id] = store
            if nameless:
                notes.append(f"{path.name}: {nameless} record(s) without item_id left out")
    log = _lines(root / "train" / "log.jsonl", notes)
    later = sorted(path.name for path in root.glob("iter*") if path.is_dir())
    if later:
        notes.append(
            "the items below are those of the first iteration, the figures of pairs and masks those of the last; later "
            f"iterations have reports of their own: `ospo-fast report` on {', '.join(later)} writes them"
        )
    gallery = _lines(root / "evaluation" / "gallery.jsonl", notes)
    if not (summary or merged or log or gallery):
        raise OspoError(
            f"run folder {str(root)!r} holds nothing to report: no summary.json, no record in any of "
            f"{', '.join(f'{store}.jsonl' for store in STORES)}, no training log; run a stage with --out {root} first"
        )
    return Run(
        root=root,
        summary=summary,
        stages=_stages(_json(root / "stages.json", (dict, list)), summary.get("stages")),
        items=list(merged.values()),
        reached=reached,
        present=tuple(present),
        log=log,
        gallery=gallery,
        config=_text(root / "config.yaml"),
        notes=notes,
    )


def number(value: object) -> float | None:
    """`value` as a finite float, or None; of an object its mean, value or alignment. Booleans are no numbers."""
    if isinstance(value, dict):
        value = next((value[name] for name in ("mean", "value", "alignment") if name in value), None)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if math.isfinite(value) else None


def text(value: object) -> str:
    """A field of a record as text; lists are joined by commas, None is empty."""
    if value is None:
        return ""
    if isinstance(value, (list, tuple)):
        return ", ".join(text(entry) for entry in value)
    return str(value)


def entries(value: object) -> list[Any]:
    """A field that holds one value per variant as a list; a single value becomes a list of one."""
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def mapping(value: object) -> Record:
    """`value` where it is an object, else an empty one."""
    return value if isinstance(value, dict) else {}


def pairs(record: Record) -> Iterator[Record]:
    """The item, and a record for each further pair of it."""
    further = [pair for pair in entries(record.get("further_pairs")) if isinstance(pair, dict)]
    yield from cast("Iterator[Record]", iter_pairs([cast(Any, {**record, "further_pairs": further})]))


def kind_of(record: Record) -> str:
    """The kind of an item; records of the official implementation name it by category alone."""
    return next(
        (text(record[name]) for name in ("kind", "t2i_category", "sub_category") if record.get(name)), "unknown"
    )


def _json(path: Path, kinds: type | tuple[type, ...]) -> Any:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise OspoError(f"{str(path)!r} cannot be read as JSON ({error}); mend it or take it away") from error
    if not isinstance(value, kinds):
        raise OspoError(f"{str(path)!r} holds a JSON {type(value).__name__}, not what a run writes; take it away")
    return value


def _lines(path: Path, notes: list[str]) -> list[Record]:
    if not path.is_file():
        return []
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise OspoError(f"{str(path)!r} cannot be read ({error})") from error
    records, broken = [], 0
    for line in lines:
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError:
            broken += 1
            continue
        if isinstance(record, dict):
            records.append(record)
        else:
            broken += 1
    if broken:
        notes.append(f"{path.name}: {broken} line(s) are no JSON objects and were left out")
    return records


def _stages(own: object, from_summary: object) -> dict[str, Record]:
    """Figures of each stage: those of stages.json, one entry for each time a stage ran, under those of the summary."""
    stages: dict[str, Record] = {}
    for entry in own if isinstance(own, list) else ():
        if not isinstance(entry, dict) or "stage" not in entry:
            continue
        row = stages.setdefault(str(entry["stage"]), {})
        for name, join in (("seconds", sum), ("items", sum), ("peak_mb", max)):
            values = [value for value in (number(row.get(name)), number(entry.get(name))) if value is not None]
            if values:
                row[name] = join(values)
    for source in (mapping(own), mapping(from_summary)):
        for name, value in source.items():
            stages[str(name)] = {**stages.get(str(name), {}), **mapping(value)}
    return {name: figures for name, figures in stages.items() if figures}


def _text(path: Path, limit: int = 20_000) -> str | None:
    if not path.is_file():
        return None
    try:
        return path.read_text(encoding="utf-8", errors="replace")[:limit]
    except OSError:
        return None

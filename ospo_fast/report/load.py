"""Load a run folder. Files that are missing stay empty; broken lines are skipped and named in `notes`."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ospo_fast.errors import Failure, OspoError, attempt
from ospo_fast.files import locate
from ospo_fast.pipeline import stage_metrics, store_paths
from ospo_fast.records import Record, from_official, parse_json, validate
from ospo_fast.stages import STAGES

KEPT, DROPPED, UNFINISHED = "kept", "dropped", "unfinished"


@dataclass(frozen=True)
class Item:
    """One prompt of the run: its record, merged from all stores, and the last stage that processed it."""

    record: Record
    stage: str

    @property
    def kind(self) -> str:
        """The kind of prompt. Records of the official implementation have a category only."""
        names = (self.record.get(name) for name in ("kind", "t2i_category", "sub_category"))
        return next((str(name) for name in names if name), "unknown")

    @property
    def status(self) -> str:
        """Status: kept (has a pair), dropped (selection found none), or unfinished (selection has not processed it)."""
        if self.record.get("pairs"):
            return KEPT
        return DROPPED if self.record.get("kept") is False else UNFINISHED

    @property
    def reason(self) -> str:
        """Reason why the item has no pair; empty for a kept one."""
        if self.status == KEPT:
            return ""
        default = "no reason recorded" if self.status == DROPPED else f"reached the {self.stage} stage only"
        return self.record.get("reason") or default


@dataclass(frozen=True)
class Run:
    """The contents of a run folder. `stages` has the metrics of each stage, in order; `items` are in file order."""

    root: Path
    summary: dict[str, Any] = field(default_factory=dict)
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)
    items: list[Item] = field(default_factory=list)
    log: list[dict[str, Any]] = field(default_factory=list)
    gallery: list[dict[str, Any]] = field(default_factory=list)
    config: str = ""
    notes: list[str] = field(default_factory=list)


def load_run(root: Path) -> Run:
    """Load everything that the report shows, except images and masks.

    Raises:
        OspoError: the folder is missing or holds nothing to report, or summary.json or stages.json is broken.

    """
    if not root.is_dir():
        raise OspoError(f"run folder {str(root)!r} does not exist; give the folder that `ospo-fast run --out` wrote")
    notes: list[str] = []
    summary = _read_summary(root / "summary.json")
    merged: dict[str, dict[str, Any]] = {}
    reached: dict[str, str] = {}
    for stage in STAGES:
        for path in store_paths(root, stage.name):
            for record in _read_lines(path, notes, validate):
                merged.setdefault(record["item_id"], {}).update(record)
                reached[record["item_id"]] = stage.name
    log = _read_lines(root / "train" / "log.jsonl", notes)
    gallery = _read_lines(root / "evaluation" / "gallery.jsonl", notes)
    if not (summary or merged or log or gallery):
        raise OspoError(
            f"run folder {str(root)!r} holds nothing to report (no summary, records or training log); "
            f"run a stage with --out {root} first"
        )
    iterations = sorted(path.name for path in root.glob("iter*") if path.is_dir())
    if iterations:
        notes.append(
            "the prompts below are those of the first iteration, the metrics of pairs and masks those of the last; "
            f"`ospo-fast report` on {', '.join(iterations)} writes reports of the later iterations"
        )
    metrics = {**stage_metrics(root), **mapping(summary, "stages")}
    names = [*(stage.name for stage in STAGES if stage.name in metrics), *metrics]
    config = root / "config.yaml"
    return Run(
        root=root,
        summary=summary,
        stages={name: mapping(metrics, name) for name in names},
        items=[Item(from_official(record), reached[item_id]) for item_id, record in merged.items()],
        log=log,
        gallery=gallery,
        config=config.read_text(encoding="utf-8", errors="replace") if config.is_file() else "",
        notes=notes,
    )


def find_file(root: Path, *paths: str) -> Path | Failure:
    """Return the first of the files that exists; see `locate`. The later ones are for run folders that were moved."""
    reasons = []
    for path in paths:
        found = attempt(locate, path, root)
        if isinstance(found, Path) and os.path.isfile(found):  # noqa: PTH113 (Path.is_file raises for long names)
            return found
        outside = isinstance(found, Failure)
        reasons.append(f"{Path(path).name[:100]} is {'outside of the run folder' if outside else 'missing'}")
    return Failure(reasons[0] if reasons else "image is missing")


def number(value: object) -> float | None:
    """Return `value` as a float if it is a finite number, else None."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)


def mapping(value: object, *keys: str) -> dict[str, Any]:
    """Return the object at value[key][key]…; empty if there is none."""
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value if isinstance(value, dict) else {}


def _expect_object(value: object, where: str) -> Any:
    if not isinstance(value, dict):
        raise OspoError(f"{where}: got {type(value).__name__}, expected a JSON object")
    return value


def _read_summary(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        summary: dict[str, Any] = _expect_object(parse_json(path.read_bytes()), path.name)
    except (OSError, ValueError, OspoError) as error:
        raise OspoError(f"{str(path)!r} cannot be read ({error}); fix or delete the file") from error
    return summary


def _read_lines(path: Path, notes: list[str], check: Callable[[object, str], Any] = _expect_object) -> list[Any]:
    """The lines of a JSONL file that pass `check`. The others are counted in `notes`, with the first error."""
    if not path.is_file():
        return []
    lines = enumerate(path.read_bytes().split(b"\n"), 1)
    values = [_parse_line(line, f"line {number}", check) for number, line in lines if line.strip()]
    failures = [value for value in values if isinstance(value, Failure)]
    if failures:
        notes.append(f"{path.name}: skipped {len(failures)} broken line(s), the first at {failures[0]}")
    return [value for value in values if not isinstance(value, Failure)]


def _parse_line(line: bytes, where: str, check: Callable[[object, str], Any]) -> Any:
    try:
        return check(parse_json(line), where)
    except OspoError as error:
        return Failure(str(error))
    except ValueError as error:
        return Failure(f"{where}: {error}")

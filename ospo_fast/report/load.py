"""Load a run folder, which a stranger may have written.

Files that are missing stay empty. A broken file or line is left out, and a value that no stage writes (a number that is
not finite, values nested hundreds deep) is taken as missing; `notes` names each of them.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ospo_fast.errors import Failure, OspoError, attempt
from ospo_fast.files import locate, regular
from ospo_fast.pipeline import check_stage_row, store_paths, sum_stage_rows
from ospo_fast.records import ROLES, Record, edited_text, from_official, image_index, parse_json, shown, validate
from ospo_fast.stages import STAGES

KEPT, DROPPED, UNFINISHED = "kept", "dropped", "unfinished"
MAX_BYTES = 2**20  # bytes of a line, or of summary.json, stages.json and config.yaml; real ones have a tenth of it
MAX_DEPTH = 100  # of values in values
MAX_ENTRIES = 300  # images, questions, hard negatives or pairs of an item: the page has a column or row for each
LARGEST = 1e100  # of numbers, so that sums, products and differences of them are finite


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
    own: bool = False  # a run without the summary that the demo writes
    kept: dict[str, Any] = field(default_factory=dict)  # of train/done.json: which weights training kept
    adapter: dict[str, Any] = field(default_factory=dict)  # adapter_config.json
    versions: dict[str, Any] = field(default_factory=dict)


def load_run(root: Path) -> Run:
    """Load everything that the report shows, except images and masks.

    Raises:
        OspoError: the folder is missing, or holds nothing that can be reported.

    """
    if not os.path.isdir(root):  # noqa: PTH112 (Path.is_dir raises for long names)
        raise OspoError(f"run folder {str(root)!r} does not exist; give the folder that `ospo-fast run --out` wrote")
    notes: list[str] = []
    summary = _read_json(root, "summary.json", notes, {})
    items = _merge_stores(root, notes)
    log = _read_lines(root, "train/log.jsonl", notes)
    gallery = _read_lines(root, "evaluation/gallery.jsonl", notes)
    if not (summary or items or log or gallery):
        broken = f": {'; '.join(notes)}; fix or delete what is broken, or" if notes else ";"
        raise OspoError(
            f"run folder {str(root)!r} holds nothing to report (no summary, records or training log){broken} "
            f"run a stage with --out {root} first"
        )
    iterations = sorted(path.name for path in root.glob("iter*") if path.is_dir())
    own = not os.path.lexists(root / "summary.json")
    if iterations:
        shows = (
            "this page is of the first iteration, also its times and counts"
            if own
            else "the prompts below are those of the first iteration, the metrics of pairs and masks those of the last"
        )
        notes.append(f"{shows}; `ospo-fast report` on {', '.join(iterations)} writes reports of the later iterations")
    rows = _checked_rows(_read_json(root, "stages.json", notes, []), notes)
    taken: dict[str, list[str]] = {}
    for row in (row for row in rows if row.get("from") is not None):
        taken.setdefault(shown(row["from"]), []).append(row["stage"])
    for run, stages in taken.items():
        notes.append(f"{', '.join(dict.fromkeys(stages))}: taken over from the run {run}, with its time and cost there")
    metrics = {**sum_stage_rows(rows), **mapping(summary, "stages")}
    names = [*(stage.name for stage in STAGES if stage.name in metrics), *metrics]

    def read(name: str) -> dict[str, Any]:
        # The note of a train/ that is a link is that of its log.
        return {} if (root / "train").is_symlink() else mapping(_read_json(root, name, notes, {}))

    versions = {name: value for row in rows for name, value in mapping(row, "versions").items()}
    return Run(
        root=root,
        summary=summary,
        stages={name: mapping(metrics, name) for name in names},
        items=items,
        log=log,
        gallery=gallery,
        config=_read_bytes(root, "config.yaml", notes).decode("utf-8", "replace"),
        notes=notes,
        own=own,
        kept=mapping(read("train/done.json"), "kept"),
        adapter=read("train/adapter/adapter_config.json"),
        versions=mapping(summary, "versions") or versions,
    )


def refuse_empty(root: Path) -> None:
    """Raise the OspoError of `load_run` for a folder without any file of a run; cheaper than the imports of a page."""
    names = ("summary.json", "train/log.jsonl", "evaluation/gallery.jsonl")
    has_files = any(os.path.lexists(root / name) for name in names)
    if not has_files and not any(store_paths(root, stage.name) for stage in STAGES):
        load_run(root)


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
    """Return `value` as a float if it is a number of at most `LARGEST`, else None. Tiny ones become 0."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= LARGEST:
        return None
    return float(value) if abs(value) >= 1 / LARGEST else 0.0


def text(value: object) -> str:
    """Return `value` if it is a string, else an empty one."""
    return value if isinstance(value, str) else ""


def mapping(value: object, *keys: str) -> dict[str, Any]:
    """Return the object at value[key][key]…; empty if there is none."""
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value if isinstance(value, dict) else {}


def _merge_stores(root: Path, notes: list[str]) -> list[Item]:
    """Merge the records of all stores by item. `notes` gets the stores that are empty and the texts that differ."""
    merged: dict[str, dict[str, Any]] = {}
    reached: dict[str, str] = {}
    for stage in STAGES:
        paths = store_paths(root, stage.name)
        records = [record for path in paths for record in _read_lines(root, path.name, notes, _check_record)]
        if paths and merged and not any(map(os.path.getsize, paths)):
            notes.append(
                f"{stage.name}.jsonl is empty, but the stages before it made {len(merged)} records; run `ospo-fast "
                f"{stage.name}` to make its own"
            )
        edited = []
        for record in records:
            known = merged.setdefault(record["item_id"], {})
            edited += [(record["item_id"], *difference)] if (difference := edited_text(known, record)) else []
            known.update(record)
            reached[record["item_id"]] = stage.name
        if edited:
            item_id, field, before, after = edited[0]
            notes.append(
                f"{stage.name}.jsonl: texts of {len(edited)} item(s) differ from those of the stages before it, so "
                f"they were edited after a stage had read them; the first is `{field}` of item {shown(item_id)}: "
                f"{before!r:.200} before, {after!r:.200} after"
            )
    return [Item(from_official(record), reached[item_id]) for item_id, record in merged.items()]


def _check_record(value: object, where: str) -> dict[str, Any]:
    """`validate`, and lists and names of images that the page can show."""
    record = validate(value, where)
    for name, entries in record.items():
        if isinstance(entries, (list, dict)) and len(entries) > MAX_ENTRIES:
            raise OspoError(f"{where}: `{name}` has {len(entries)} entries, expected at most {MAX_ENTRIES}")
    for role in ROLES:
        for name in record.get(f"{role}_metadata") or {}:
            if not name.startswith(f"{role}_") or image_index(name) >= MAX_ENTRIES:
                raise OspoError(f"{where}: image {shown(name)} should be {role}_0 to {role}_{MAX_ENTRIES - 1}")
    return record


def _check_object(value: object, where: str) -> Any:
    if not isinstance(value, dict):
        raise OspoError(f"{where}: got {type(value).__name__}, expected a JSON object")
    return value


def _checked_rows(rows: list[Any], notes: list[str]) -> list[dict[str, Any]]:
    """The rows of stages.json that can be summed."""
    checked = [attempt(check_stage_row, row, f"entry {index}") for index, row in enumerate(rows, 1)]
    _note_failures("stages.json", "entries", [row for row in checked if isinstance(row, Failure)], notes)
    return [row for row in checked if not isinstance(row, Failure)]


def _own(root: Path, name: str) -> Path | None:
    """The path of a file of the run folder; None if it is missing. Raises OSError for one behind a symbolic link.

    The folder may be a stranger's, whose links lead to any file, and a report is made to be shown to others.
    """
    path = root / name
    for part in (*reversed(path.relative_to(root).parents[:-1]), path.relative_to(root)):
        if (root / part).is_symlink():
            raise OSError(errno.ELOOP, f"{part} is a symbolic link, whose target is not shown; copy it in its place")
    return path if path.exists() else None


def _read_json(root: Path, name: str, notes: list[str], default: Any) -> Any:
    """The value of a JSON file of the type of `default`; `default` if the file is missing or broken."""
    if not (data := _read_bytes(root, name, notes)):
        return default
    name = Path(name).name
    try:
        value, dropped = _without_extremes(parse_json(data))
    except ValueError as error:
        notes.append(f"{name} cannot be read ({error}); fix or delete the file")
        return default
    if not isinstance(value, type(default)):
        notes.append(
            f"{name} cannot be read (it holds {type(value).__name__}, expected {type(default).__name__}); fix or "
            "delete the file"
        )
        return default
    _note_dropped(name, dropped, notes)
    return value


def _read_bytes(root: Path, name: str, notes: list[str]) -> bytes:
    """The content of a file; empty if it is missing, unreadable or too large."""
    try:
        if (path := _own(root, name)) is None:
            return b""
        with regular(path).open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        notes.append(f"{Path(name).name} cannot be read ({error.strerror or error}); fix or delete the file")
        return b""
    if len(data) > MAX_BYTES:
        notes.append(f"{path.name} is left out: it has more than {MAX_BYTES} bytes")
        return b""
    return data


def _read_lines(
    root: Path, name: str, notes: list[str], check: Callable[[object, str], Any] = _check_object
) -> list[Any]:
    """The lines of a JSONL file that pass `check`. The others are counted in `notes`, with the first error."""
    values, failures, dropped = [], [], 0
    try:
        path = _own(root, name)
        for place, line in enumerate(() if path is None else _lines(path), 1):
            if line.strip():
                value = attempt(_parse_line, line, f"line {place}", check)
                if isinstance(value, Failure):
                    failures.append(value)
                else:
                    values.append(value[0])
                    dropped += value[1]
    except OSError as error:
        notes.append(f"{Path(name).name} cannot be read ({error.strerror or error}); fix or delete the file")
    _note_failures(Path(name).name, "broken line(s)", failures, notes)
    _note_dropped(Path(name).name, dropped, notes)
    return values


def _lines(path: Path) -> Iterator[bytes]:
    """The lines of a file; of one that is too long, the first `MAX_BYTES` + 1 bytes."""
    with regular(path).open("rb") as file:
        while line := file.readline(MAX_BYTES + 1):
            yield line
            while len(line) > MAX_BYTES and not line.endswith(b"\n"):  # skip the rest of it
                line = file.readline(MAX_BYTES + 1)


def _parse_line(line: bytes, where: str, check: Callable[[object, str], Any]) -> tuple[Any, int]:
    """The checked value of a line, and how many values in it were dropped. Raises OspoError."""
    if len(line) > MAX_BYTES:
        raise OspoError(f"{where}: it has more than {MAX_BYTES} bytes")
    try:
        value, dropped = _without_extremes(parse_json(line))
    except ValueError as error:
        raise OspoError(f"{where}: {error}") from error
    return check(value, where), dropped


def _without_extremes(value: Any, depth: int = 0) -> tuple[Any, int]:
    """Replace numbers beyond `LARGEST` and values deeper than `MAX_DEPTH` by None; also return their count."""
    if isinstance(value, (dict, list)):
        if depth == MAX_DEPTH:
            return None, 1
        keys = value if isinstance(value, dict) else range(len(value))
        dropped = 0
        for key in keys:
            value[key], count = _without_extremes(value[key], depth + 1)
            dropped += count
        return value, dropped
    if isinstance(value, (int, float)) and not abs(value) <= LARGEST:
        return None, 1
    return value, 0


def _note_failures(name: str, what: str, failures: list[Failure], notes: list[str]) -> None:
    if failures:
        notes.append(f"{name}: skipped {len(failures)} {what}, the first at {failures[0]}")


def _note_dropped(name: str, dropped: int, notes: list[str]) -> None:
    if dropped:
        notes.append(
            f"{name}: {dropped} value(s) are taken as missing: numbers that are not finite or beyond {LARGEST:g}, or "
            f"values nested more than {MAX_DEPTH} deep"
        )

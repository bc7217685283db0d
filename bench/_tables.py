"""Of a file of rows: its CSV, its plot, and its comparison with another folder of results."""

import csv
import io
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ospo_fast.errors import UsageError
from ospo_fast.records import write_atomic

Row = dict[str, Any]
TEXTS, TIMES = ("op", "variant", "dtype", "device", "commit"), ("median_ms", "p20_ms", "p80_ms")
KEYS = {*TEXTS, *TIMES, "shapes", "versions"}
MAX_PANELS = 40  # of a plot, which is read on a screen


def read_rows(path: Path) -> list[Row]:
    """Return the rows of a file that have times. Raises UsageError for a line that is not a row of a benchmark."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror}); give a folder of results.") from None
    rows = []
    for number, line in enumerate(text.splitlines(), 1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        remedy = "delete the line or run the benchmark again"
        if not isinstance(row, dict):
            raise UsageError(f"{path}:{number} is not a JSON object; {remedy}.")
        if row.keys() >= KEYS:
            if wrong := _wrong_key(row):
                raise UsageError(f"{path}:{number} has {wrong} = {row[wrong]!r:.40}; {remedy}.")
            rows.append(row)
    return rows


def _wrong_key(row: Row) -> str | None:
    """Return the first key whose value is not of a row of a benchmark."""
    numbers = [*TIMES, *(["peak_mb"] if "peak_mb" in row else [])]
    wrong = [key for key in TEXTS if not isinstance(row[key], str)]
    wrong += [key for key in ("shapes", "versions") if not isinstance(row[key], dict)]
    wrong += [key for key in numbers if type(row[key]) not in (int, float) or not 0 <= row[key] <= sys.float_info.max]
    return wrong[0] if wrong else None


# ---------------------------------------------------------------- CSV


def _flat(row: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in row.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def write_csv(path: Path) -> Path:
    """Write the rows of NAME.jsonl as NAME.csv, with a column for each key; nested keys are joined by dots."""
    rows = [dict(_flat(json.loads(line))) for line in path.read_text(encoding="utf-8").splitlines()]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    target = path.with_suffix(".csv")
    write_atomic(target, text.getvalue().encode())
    return target


# ---------------------------------------------------------------- plot


def _case(row: Row) -> str:
    return " ".join([row["op"], *(f"{name}={size}" for name, size in row["shapes"].items()), row["dtype"]])


def plot(path: Path, *, first_only: bool = False) -> Path | None:
    """Plot times, and memory where it was measured, of NAME.jsonl as NAME.png; one row of panels per case.

    `first_only` plots the first case, as a panel takes half a second. Returns None if the file has no row with times.
    Raises ImportError without matplotlib.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    groups: dict[str, list[Row]] = {}
    for row in read_rows(path):
        groups.setdefault(_case(row), []).append(row)
    if not groups:
        return None
    groups = dict(list(groups.items())[: 1 if first_only else MAX_PANELS])
    heights = [0.9 + 0.23 * len(rows) for rows in groups.values()]
    figure, axes = plt.subplots(
        len(groups), 2, figsize=(12, sum(heights) + 0.5), squeeze=False, layout="constrained",
        gridspec_kw={"height_ratios": heights},
    )  # fmt: skip
    for (case, rows), (left, right) in zip(groups.items(), axes, strict=True):
        rows = rows[::-1]
        places = range(len(rows))
        colors = ["#c2410c" if row["variant"].startswith("ospo_fast") else "#94a3b8" for row in rows]
        low = [row["median_ms"] - row["p20_ms"] for row in rows]
        high = [row["p80_ms"] - row["median_ms"] for row in rows]
        left.barh(places, [row["median_ms"] for row in rows], color=colors, xerr=(low, high))
        left.set_yticks(places, [row["variant"] for row in rows])
        left.set_xlabel("ms (median, 20 to 80 %)")
        left.set_title(case, loc="left", fontsize=10)
        if any("peak_mb" in row for row in rows):
            right.barh(places, [row.get("peak_mb", 0) for row in rows], color=colors)
            right.set_yticks(places, [])
            right.set_xlabel("peak memory above the inputs, MB")
        else:
            right.set_axis_off()
    first = next(iter(groups.values()))[0]
    figure.suptitle(f"{first['device']}, torch {first['versions']['torch']}, {first['commit']}")
    target = path.with_suffix(".png")
    figure.savefig(target, dpi=80)
    plt.close(figure)
    return target


# ---------------------------------------------------------------- comparison

Key = tuple[str, str, str, str]


def load_folder(folder: Path) -> list[tuple[str, Row]]:
    """Return the rows of a folder of results, or of one device within it, with the names of their files.

    Raises UsageError if there is no such folder, or if it has no rows.
    """
    if not folder.is_dir():
        raise UsageError(f"compare: there is no folder {folder}; give a folder that --out wrote.")
    files = sorted([*folder.glob("*.jsonl"), *folder.glob("*/*.jsonl")])
    rows = [(path.stem, row) for path in files for row in read_rows(path)]
    if not rows:
        raise UsageError(f"compare: {folder} has no rows (NAME.jsonl or DEVICE/NAME.jsonl); run a benchmark into it.")
    return rows


def _by_key(first: list[tuple[str, Row]], second: list[tuple[str, Row]]) -> Iterator[dict[Key, Row]]:
    """Return the rows of two folders by file, op and shapes, variant, and device, unless each folder has one device."""
    several = any(len({row["device"] for _, row in rows}) > 1 for rows in (first, second))
    for rows in (first, second):
        yield {(stem, _case(row), row["variant"], row["device"] if several else ""): row for stem, row in rows}


def compare(first: Path, second: Path) -> str:
    """Return a table of the ratios second / first of time and memory, of the rows that both folders have."""
    one, two = _by_key(load_folder(first), load_folder(second))
    lines = [
        f"{label}: {folder}: {'; '.join(sorted({row['device'] for row in rows.values()}))}; "
        f"commit {', '.join(sorted({row['commit'] for row in rows.values()}))}"
        for label, folder, rows in (("A", first, one), ("B", second, two))
    ]
    both = [key for key in one if key in two]
    if not both:
        lines.append("no row is in both: op, variant, shapes and dtype must be equal.")
    else:
        width = max(len(f"{key[2]}{key[3] and ', '}{key[3]}") for key in both)
        lines.append(f"\n{'':<{width + 2}}{'A, ms':>12}{'B, ms':>12}{'B/A':>8}{'memory B/A':>12}")
    case = None
    for key in both:
        if key[:2] != case:
            case = key[:2]
            lines.append(f"{key[1]}" + ("" if key[1].startswith(key[0]) else f"  ({key[0]})"))
        a, b = one[key], two[key]
        memory = f"{b['peak_mb'] / a['peak_mb']:.3f}" if a.get("peak_mb") and "peak_mb" in b else "-"
        name = f"{key[2]}{key[3] and ', '}{key[3]}"
        ratio = f"{b['median_ms'] / a['median_ms']:.3f}" if a["median_ms"] else "-"
        quick = "  small sizes of --quick" if a.get("quick") or b.get("quick") else ""
        lines.append(f"  {name:<{width}}{a['median_ms']:>12.3f}{b['median_ms']:>12.3f}{ratio:>8}{memory:>12}{quick}")
    for label, rows, others in (("A", one, two), ("B", two, one)):
        lines += [f"only in {label}: {key[1]}: {key[2]}{key[3] and ', '}{key[3]}" for key in rows if key not in others]
    return "\n".join(lines)

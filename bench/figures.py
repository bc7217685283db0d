"""The GPU figures: what each is, its goal and its floor, read from bench/results/, and the README's table of them.

    python bench/figures.py            # writes the table into README.md
    python bench/figures.py --check    # exit code 1 where README.md and the results say different things
    python bench/figures.py --print    # the table as text, of all devices

A figure that was not measured reads "not measured". Ratios compare rows of one run. Floors come from the ceilings that
the run measured; `share` is floor / time.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _source import ROOT

from ospo_fast.records import write_atomic

BEGIN, END = "<!-- GPU figures: written by bench/figures.py -->", "<!-- end of the GPU figures -->"
NOT_MEASURED = "not measured"
Row = dict[str, Any]
# What every row has, and of which types.
NEEDED: dict[str, Any] = {
    **dict.fromkeys(("op", "variant", "dtype", "device", "commit", "date"), str),
    **dict.fromkeys(("shapes", "versions"), dict),
    "median_ms": (int, float),
}


@dataclass(frozen=True)
class Reading:
    """A measured figure: value and floor with their units, share of the floor, whether the goal is reached."""

    value: str
    floor: str = ""
    share: float | None = None
    reached: bool | None = None  # None: there is no goal


class Results:
    """Rows of one device."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = [row for row in rows if not row.get("quick")]

    def one(self, op: str, variant: str, **shapes: int) -> Row | None:
        """The latest row of this op and variant with these sizes."""
        found = [row for row in self.rows if (row["op"], row["variant"], row["shapes"]) == (op, variant, shapes)]
        return max(found, key=lambda row: str(row["date"]), default=None)

    def pair(self, op: str, variant: str, other: str, **shapes: int) -> tuple[Row, Row] | None:
        """Rows of two variants that were measured in one run."""
        one, two = self.one(op, variant, **shapes), self.one(op, other, **shapes)
        return (one, two) if one and two and one["commit"] == two["commit"] else None


@dataclass(frozen=True)
class Figure:
    """One line of the table."""

    part: int  # of bench/gpu.sh that measures it
    name: str
    goal: str
    read: Callable[[Results], Reading | None]


def _tests(results: Results) -> Reading | None:
    row = results.one("gpu_tests", "pytest -m gpu")
    if row is None:
        return None
    counts = ", ".join(f"{row[name]} {name}" for name in ("passed", "failed", "skipped"))
    counts += "" if row["complete"] else ", stopped before the end"
    return Reading(counts, reached=row["complete"] and row["failed"] == 0 and row["passed"] > 0)


def _rounded(value: float) -> float:
    """To the digits that are shown, which a goal is judged by."""
    return float(f"{value:.4g}")


def _milliseconds(value: float) -> str:
    return f"{_rounded(value * 1e3):g} µs" if value < 1 else f"{_rounded(value):g} ms"


def _time(
    op: str,
    variant: str,
    *,
    at_most_ms: float | None = None,
    of_floor: float | None = None,
    each: int = 1,
    **shapes: int,
) -> Callable[[Results], Reading | None]:
    """Reads a time, of `each` equal parts one, that should be at most so much, or at most so many times its floor."""

    def read(results: Results) -> Reading | None:
        row = results.one(op, variant, **shapes)
        if row is None:
            return None
        time, floor, reached = row["median_ms"] / each, row.get("floor_ms"), None
        if at_most_ms is not None:
            reached = _rounded(time) <= at_most_ms
        if of_floor is not None:
            reached = floor is not None and time <= of_floor * floor / each
        return Reading(
            _milliseconds(time), "" if floor is None else _milliseconds(floor / each), row.get("share"), reached
        )

    return read


def _rate(
    key: str, unit: str, op: str, variant: str, share: float, **shapes: int
) -> Callable[[Results], Reading | None]:
    """Reads a rate, whose share of the floor should be at least so much."""

    def read(results: Results) -> Reading | None:
        row = results.one(op, variant, **shapes)
        if row is None:
            return None
        floor = f"{_rounded(row[key] / row['share']):g} {unit}"
        return Reading(f"{_rounded(row[key]):g} {unit}", floor, row["share"], round(row["share"], 3) >= share)

    return read


def _ratio(
    op: str, variant: str, other: str, at_least: float | None, **shapes: int
) -> Callable[[Results], Reading | None]:
    """Reads how many times as fast as another variant this one is."""

    def read(results: Results) -> Reading | None:
        rows = results.pair(op, variant, other, **shapes)
        if rows is None:
            return None
        ratio = _rounded(rows[1]["median_ms"] / rows[0]["median_ms"])
        return Reading(f"{ratio:g}×", reached=None if at_least is None else ratio >= at_least)

    return read


def _memory(op: str, variant: str, at_most_gb: float, **shapes: int) -> Callable[[Results], Reading | None]:
    def read(results: Results) -> Reading | None:
        row = results.one(op, variant, **shapes)
        if row is None:
            return None
        peak = _rounded(row["peak_mb"] / 1e3)
        return Reading(f"{peak:g} GB", reached=peak <= at_most_gb)

    return read


def _overhead(op: str, variant: str, base: str, at_most: float, **shapes: int) -> Callable[[Results], Reading | None]:
    def read(results: Results) -> Reading | None:
        rows = results.pair(op, variant, base, **shapes)
        if rows is None:
            return None
        more = round(rows[0]["median_ms"] / rows[1]["median_ms"] - 1, 4)
        return Reading(f"{more:+.2%}", reached=more <= at_most)

    return read


_LOGPS, _COLUMNS, _CAPTURE = "token_logprobs", "attention_columns", "AttentionCapture"
_HEAD = {"N": 18432, "D": 4096, "V": 16384}
_LINEAR = {**_HEAD, "linear": 1}
_7B, _1B = {"hidden": 4096, "layers": 30, "tokens": 576}, {"hidden": 2048, "layers": 24, "tokens": 576}
_7B_DECODER = {"L": 30, "H": 32, "D": 4096, "T": 576}

FIGURES: tuple[Figure, ...] = (
    Figure(1, "gpu-marked tests", "all pass", _tests),
    Figure(
        1, "`object_masks`, 32 × 4 maps of 24 × 24", "≤ 20 µs",
        _time("object_masks", "ospo_fast", at_most_ms=0.02, B=32, O=4, H=24, W=24),
    ),
    Figure(1, "`sample_codes`, 64 × 16384", "", _time("sample_codes", "ospo_fast", B=64, V=16384)),
    Figure(
        1, "decode attention, 128 rows × 32 heads × 640 positions", "≥ 85% of copy bandwidth",
        _rate("gb_s", "GB/s", "decode_attention", "triton", 0.85, rows=128, heads=32, width=128, length=640),
    ),
    Figure(
        2, "`token_logprobs`, forward and backward, 18432 × 4096 × 16384, two-layer head", "≤ 1.15× the floor",
        _time(_LOGPS, "ospo_fast", of_floor=1.15, **_HEAD),
    ),
    Figure(
        2, "the same, against the official computation", "≥ 1.5×",
        _ratio(_LOGPS, "ospo_fast", "official", 1.5, **_HEAD),
    ),
    Figure(2, "the same, memory above the inputs", "≤ 0.5 GB", _memory(_LOGPS, "ospo_fast", 0.5, **_HEAD)),
    Figure(
        2, "linear head of that size, against Liger", "≥ 1.2×",
        _ratio(_LOGPS, "ospo_fast", "Liger", 1.2, **_LINEAR),
    ),
    Figure(
        2, "the same, against `linear_cross_entropy` of torch 2.13", "≥ 1.2×",
        _ratio(_LOGPS, "ospo_fast", "torch linear_cross_entropy", 1.2, **_LINEAR),
    ),
    Figure(
        2, "the same, against cut-cross-entropy", "",
        _ratio(_LOGPS, "ospo_fast", "cut-cross-entropy", None, **_LINEAR),
    ),
    Figure(
        2, "`attention_columns`, a layer of 16 sequences of 600, log-sum-exp given", "",
        _time(_COLUMNS, "LSE given", each=25, L=25, B=16, H=32, S=600, D=128),
    ),
    Figure(
        2, "`AttentionCapture` in a 7B forward, 16 sequences of 600", "≤ 1% of the forward",
        _overhead(_CAPTURE, "forward with capture", "forward", 0.01, B=16, **_7B_DECODER),
    ),
    Figure(
        2, "masks of an image, 7B, against `output_attentions`, 16 images", "≥ 8×",
        _ratio(_CAPTURE, "masks", "output_attentions", 8, B=16, **_7B_DECODER),
    ),
    Figure(2, "the same, 1 image", "≥ 3×", _ratio(_CAPTURE, "masks", "output_attentions", 3, B=1, **_7B_DECODER)),
    Figure(
        3, "Janus-Pro-7B, 64 prompts, guidance", "≥ 75% of the floor",
        _rate("images_s", "images/s", "generation", "ospo_fast", 0.75, prompts=64, **_7B),
    ),
    Figure(
        3, "the same, against the official loop", "≥ 5×",
        _ratio("generation", "ospo_fast", "official", 5, prompts=64, **_7B),
    ),
    Figure(
        3, "the same, against transformers' `generate`", "≥ 3×",
        _ratio("generation", "ospo_fast", "transformers", 3, prompts=64, **_7B),
    ),
    Figure(
        4, "Janus-Pro-7B, 1 prompt", "≥ 80% of the floor",
        _rate("images_s", "images/s", "generation", "ospo_fast", 0.8, prompts=1, **_7B),
    ),
    Figure(
        4, "`skinny_linear`, a layer of 7B, 2 rows, against single kernels", "≥ 1.02×, to be switched on",
        _ratio("skinny_linear", "triton", "single kernels", 1.02, rows=2, depth=4096, columns=49408),
    ),
    Figure(
        4, "Janus-Pro-1B, 64 prompts", "≥ 70% of the floor",
        _rate("images_s", "images/s", "generation", "ospo_fast", 0.7, prompts=64, **_1B),
    ),
    Figure(
        4, "Janus-Pro-1B, 1 prompt", "≥ 70% of the floor",
        _rate("images_s", "images/s", "generation", "ospo_fast", 0.7, prompts=1, **_1B),
    ),
)  # fmt: skip


def text(results: Results, part: int | None = None) -> str:
    """The figures of a part, or of all, as a table for a terminal: figure, measured, goal, floor, share, reached."""
    lines = [("figure", "measured", "goal", "floor", "share", "goal reached")]
    for figure in FIGURES:
        if part not in (None, figure.part):
            continue
        found = figure.read(results)
        if found is None:
            lines.append((figure.name, NOT_MEASURED, figure.goal, "", "", ""))
            continue
        share = "" if found.share is None else f"{found.share:.1%}"
        reached = "" if found.reached is None else "yes" if found.reached else "no"
        lines.append((figure.name, found.value, figure.goal, found.floor, share, reached))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rows = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    return "\n".join([rows[0], "-" * len(rows[0]), *rows[1:]])


def rows_of(name: str, text: str) -> list[Row]:
    """The rows of a file of results; ValueError that names the file and the line where one is none."""
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"line {number} of {name} is no JSON: {error}") from error
        if not isinstance(row, dict) or not all(isinstance(row.get(key), kind) for key, kind in NEEDED.items()):
            raise ValueError(f"line {number} of {name} lacks what a result says of itself")
        found.append(row)
    return found


def load(results: Path) -> dict[str, Results]:
    """The rows of every GPU in a folder of results, by the device's name."""
    found: dict[str, list[Row]] = {}
    for path in sorted(results.glob("*/*.jsonl")):
        if path.parent.name != "shapes":  # trials of the method, in rows of another form
            for row in rows_of(str(path), path.read_text()):
                if row.get("driver"):
                    found.setdefault(row["device"], []).append(row)
    return {device: Results(rows) for device, rows in sorted(found.items())}


def _cell(found: Reading | None) -> str:
    if found is None:
        return NOT_MEASURED
    floor = f"; floor {found.floor}" if found.floor else ""
    share = f", {found.share:.1%} of it" if found.share is not None and found.floor else ""
    return found.value + floor + share + ("; goal missed" if found.reached is False else "")


def markdown(devices: dict[str, Results]) -> str:
    """The README's table: a column for each GPU, and what each was measured with."""
    columns = devices or {"measured": Results([])}
    lines = [f"| figure | goal | {' | '.join(columns)} |", f"| --- | --- |{' --- |' * len(columns)}"]
    for figure in FIGURES:
        cells = " | ".join(_cell(figure.read(results)) for results in columns.values())
        lines.append(f"| {figure.name} | {figure.goal or '-'} | {cells} |")
    for device, results in devices.items():
        by = {
            f"driver {row['driver']}, torch {row['versions'].get('torch')}, commit {row['commit']}, {row['date'][:10]}"
            for row in results.rows
        }
        lines += ["", f"{device}: {'; '.join(sorted(by))}."]
    return "\n".join(lines)


def with_table(readme: str, table: str) -> str:
    """The README with this table between its marks; ValueError where it has no such marks."""
    head, begin, rest = readme.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"README.md: expected {BEGIN} and {END} around the table of GPU figures")
    return f"{head}{BEGIN}\n\n{table}\n\n{END}{tail}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Write, check or print the table; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--check", action="store_true", help="exit with 1 where the README differs, and write nothing")
    which.add_argument("--print", action="store_true", help="print the figures of every device, and write nothing")
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results", help="folder of the results")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md", help="file with the table")
    options = parser.parse_args(arguments)
    try:
        devices = load(options.results)
        if options.print:
            for device, results in (devices or {"no GPU": Results([])}).items():
                print(f"{device}\n{text(results)}\n")
            return 0
        before = options.readme.read_bytes().decode()  # with the line ends that it has
        after = with_table(before, markdown(devices))
    except (OSError, ValueError, KeyError) as error:
        parser.error(f"{error}")
    if options.check:
        print(
            "README.md says what the results say" if before == after else "README.md differs: python bench/figures.py"
        )
        return int(before != after)
    if before != after:
        write_atomic(options.readme, after.encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())

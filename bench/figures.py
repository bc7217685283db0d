"""The GPU metrics of docs/benchmarks.md with their goals, computed from the rows in bench/results/.

    python bench/figures.py            # write the table into docs/benchmarks.md
    python bench/figures.py --check    # exit with 1 if that table is out of date
    python bench/figures.py --print    # print the table of every device as text

Ratios compare rows of one run. Floors of times and rooflines of rates come from the bandwidth and the matrix product
that the run measured on its device; `share` is floor / time.
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

BEGIN, END = "<!-- GPU metrics: written by bench/figures.py -->", "<!-- end of the GPU metrics -->"
NOT_MEASURED = "not measured"
Row = dict[str, Any]
# Keys of every row, with their types.
REQUIRED: dict[str, Any] = {
    **dict.fromkeys(("op", "variant", "dtype", "device", "commit", "date"), str),
    **dict.fromkeys(("shapes", "versions"), dict),
    "median_ms": (int, float),
}


@dataclass(frozen=True)
class Measurement:
    """Value of a metric and its bound ("floor 3 ms" or "roofline 14 images/s"), with units, for display."""

    value: str
    bound: str = ""
    share: float | None = None  # of the bound
    reached: bool | None = None  # whether the goal is; None without a goal


class Results:
    """Rows of one device."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = [row for row in rows if not row.get("quick")]

    def one(self, op: str, variant: str, **shapes: int) -> Row | None:
        """Return the latest row of this op and variant with these shapes."""
        rows = [row for row in self.rows if (row["op"], row["variant"], row["shapes"]) == (op, variant, shapes)]
        return max(rows, key=lambda row: str(row["date"]), default=None)

    def pair(self, op: str, variant: str, other: str, **shapes: int) -> tuple[Row, Row] | None:
        """Return the rows of two variants, if they are of the same commit."""
        one, two = self.one(op, variant, **shapes), self.one(op, other, **shapes)
        return (one, two) if one and two and one["commit"] == two["commit"] else None


@dataclass(frozen=True)
class Metric:
    """One line of the table."""

    part: int  # part of bench/gpu.sh that measures it
    name: str
    goal: str
    measure: Callable[[Results], Measurement | None]


def _tests(results: Results) -> Measurement | None:
    row = results.one("gpu_tests", "pytest -m gpu")
    if row is None:
        return None
    counts = ", ".join(f"{row[name]} {name}" for name in ("passed", "failed", "skipped"))
    counts += "" if row["complete"] else ", stopped before the end"
    return Measurement(counts, reached=row["complete"] and row["failed"] == 0 and row["passed"] > 0)


def _rounded(value: float) -> float:
    """Round to the digits that are shown. Goals are compared with the rounded value."""
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
) -> Callable[[Results], Measurement | None]:
    """Measure a time, divided by `each`. The goal is at most `at_most_ms`, or at most `of_floor` times its floor."""

    def measure(results: Results) -> Measurement | None:
        row = results.one(op, variant, **shapes)
        if row is None:
            return None
        time, floor, reached = row["median_ms"] / each, row.get("floor_ms"), None
        if at_most_ms is not None:
            reached = _rounded(time) <= at_most_ms
        if of_floor is not None:
            reached = floor is not None and time <= of_floor * floor / each
        bound = "" if floor is None else f"floor {_milliseconds(floor / each)}"
        return Measurement(_milliseconds(time), bound, row.get("share"), reached)

    return measure


def _rate(
    key: str, unit: str, op: str, variant: str, share: float, **shapes: int
) -> Callable[[Results], Measurement | None]:
    """Measure a rate. The goal is at least `share` of its roofline."""

    def measure(results: Results) -> Measurement | None:
        row = results.one(op, variant, **shapes)
        if row is None:
            return None
        bound = f"roofline {_rounded(row[key] / row['share']):g} {unit}"
        return Measurement(f"{_rounded(row[key]):g} {unit}", bound, row["share"], round(row["share"], 3) >= share)

    return measure


def _ratio(
    op: str, variant: str, other: str, at_least: float | None, **shapes: int
) -> Callable[[Results], Measurement | None]:
    """Measure the speedup over another variant."""

    def measure(results: Results) -> Measurement | None:
        rows = results.pair(op, variant, other, **shapes)
        if rows is None:
            return None
        ratio = _rounded(rows[1]["median_ms"] / rows[0]["median_ms"])
        return Measurement(f"{ratio:g}×", reached=None if at_least is None else ratio >= at_least)

    return measure


def _memory(op: str, variant: str, at_most_gb: float, **shapes: int) -> Callable[[Results], Measurement | None]:
    """Measure the peak memory above the inputs."""

    def measure(results: Results) -> Measurement | None:
        row = results.one(op, variant, **shapes)
        if row is None:
            return None
        peak = _rounded(row["peak_mb"] / 1e3)
        return Measurement(f"{peak:g} GB", reached=peak <= at_most_gb)

    return measure


def _overhead(
    op: str, variant: str, base: str, at_most: float, **shapes: int
) -> Callable[[Results], Measurement | None]:
    def measure(results: Results) -> Measurement | None:
        rows = results.pair(op, variant, base, **shapes)
        if rows is None:
            return None
        more = round(rows[0]["median_ms"] / rows[1]["median_ms"] - 1, 4)
        return Measurement(f"{more:+.2%}", reached=more <= at_most)

    return measure


_LOGPS, _COLUMNS, _CAPTURE = "token_logprobs", "attention_columns", "AttentionCapture"
_HEAD = {"N": 18432, "D": 4096, "V": 16384}
_LINEAR = {**_HEAD, "linear": 1}
_7B, _1B = {"hidden": 4096, "layers": 30, "tokens": 576}, {"hidden": 2048, "layers": 24, "tokens": 576}
_7B_DECODER = {"L": 30, "H": 32, "D": 4096, "T": 576}

METRICS: tuple[Metric, ...] = (
    Metric(1, "gpu-marked tests", "all pass", _tests),
    Metric(
        1, "`object_masks`, 32 × 4 maps of 24 × 24", "≤ 20 µs",
        _time("object_masks", "ospo_fast", at_most_ms=0.02, B=32, O=4, H=24, W=24),
    ),
    Metric(1, "`sample_codes`, 64 × 16384", "", _time("sample_codes", "ospo_fast", B=64, V=16384)),
    Metric(
        1, "decode attention, 128 rows × 32 heads × 640 positions", "≥ 85% of copy bandwidth",
        _rate("gb_s", "GB/s", "decode_attention", "triton", 0.85, rows=128, heads=32, width=128, length=640),
    ),
    Metric(
        2, "`token_logprobs`, forward and backward, 18432 × 4096 × 16384, two-layer head", "≤ 1.15× floor",
        _time(_LOGPS, "ospo_fast", of_floor=1.15, **_HEAD),
    ),
    Metric(
        2, "the same, against the official computation", "≥ 1.5×",
        _ratio(_LOGPS, "ospo_fast", "official", 1.5, **_HEAD),
    ),
    Metric(2, "the same, memory above the inputs", "≤ 0.5 GB", _memory(_LOGPS, "ospo_fast", 0.5, **_HEAD)),
    Metric(
        2, "linear head of that size, against Liger", "≥ 1.2×",
        _ratio(_LOGPS, "ospo_fast", "Liger", 1.2, **_LINEAR),
    ),
    Metric(
        2, "the same, against `linear_cross_entropy` of torch 2.13", "≥ 1.2×",
        _ratio(_LOGPS, "ospo_fast", "torch linear_cross_entropy", 1.2, **_LINEAR),
    ),
    Metric(
        2, "the same, against cut-cross-entropy", "",
        _ratio(_LOGPS, "ospo_fast", "cut-cross-entropy", None, **_LINEAR),
    ),
    Metric(
        2, "`attention_columns`, a layer of 16 sequences of 600, log-sum-exp given", "",
        _time(_COLUMNS, "LSE given", each=25, L=25, B=16, H=32, S=600, D=128),
    ),
    Metric(
        2, "`AttentionCapture` in a 7B forward, 16 sequences of 600", "≤ 1% of the forward",
        _overhead(_CAPTURE, "forward with capture", "forward", 0.01, B=16, **_7B_DECODER),
    ),
    Metric(
        2, "masks of an image, 7B, against `output_attentions`, 16 images", "≥ 8×",
        _ratio(_CAPTURE, "masks", "output_attentions", 8, B=16, **_7B_DECODER),
    ),
    Metric(2, "the same, 1 image", "≥ 3×", _ratio(_CAPTURE, "masks", "output_attentions", 3, B=1, **_7B_DECODER)),
    Metric(
        3, "Janus-Pro-7B, 64 prompts, guidance", "≥ 75% of roofline",
        _rate("images_s", "images/s", "generation", "ospo_fast", 0.75, prompts=64, **_7B),
    ),
    Metric(
        3, "the same, against the official loop", "≥ 5×",
        _ratio("generation", "ospo_fast", "official", 5, prompts=64, **_7B),
    ),
    Metric(
        3, "the same, against transformers' `generate`", "≥ 3×",
        _ratio("generation", "ospo_fast", "transformers", 3, prompts=64, **_7B),
    ),
    Metric(
        4, "Janus-Pro-7B, 1 prompt", "≥ 80% of roofline",
        _rate("images_s", "images/s", "generation", "ospo_fast", 0.8, prompts=1, **_7B),
    ),
    Metric(
        4, "`skinny_linear`, a layer of 7B, 2 rows, against single kernels", "≥ 1.02× (then it becomes the default)",
        _ratio("skinny_linear", "triton", "single kernels", 1.02, rows=2, depth=4096, columns=49408),
    ),
    Metric(
        4, "Janus-Pro-1B, 64 prompts", "≥ 70% of roofline",
        _rate("images_s", "images/s", "generation", "ospo_fast", 0.7, prompts=64, **_1B),
    ),
    Metric(
        4, "Janus-Pro-1B, 1 prompt", "≥ 70% of roofline",
        _rate("images_s", "images/s", "generation", "ospo_fast", 0.7, prompts=1, **_1B),
    ),
)  # fmt: skip


def text(results: Results, part: int | None = None) -> str:
    """Return the metrics of a part, or of all, as a table for a terminal."""
    lines = [("metric", "value", "goal", "bound", "share", "goal reached")]
    for metric in METRICS:
        if part not in (None, metric.part):
            continue
        found = metric.measure(results)
        if found is None:
            lines.append((metric.name, NOT_MEASURED, metric.goal, "", "", ""))
            continue
        share = "" if found.share is None else f"{found.share:.1%}"
        reached = "" if found.reached is None else "yes" if found.reached else "no"
        lines.append((metric.name, found.value, metric.goal, found.bound, share, reached))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rows = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    return "\n".join([rows[0], "-" * len(rows[0]), *rows[1:]])


def parse_rows(name: str, text: str) -> list[Row]:
    """Parse a file of results; ValueError with file and line if a line is not a valid row."""
    rows = []
    for number, line in enumerate(text.splitlines(), 1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"line {number} of {name} is not JSON: {error}") from error
        if not isinstance(row, dict) or not all(isinstance(row.get(key), kind) for key, kind in REQUIRED.items()):
            raise ValueError(f"line {number} of {name} lacks a required key, or has a value of a wrong type")
        rows.append(row)
    return rows


def load(results: Path) -> dict[str, Results]:
    """Load the rows of every GPU in a folder of results, by device name."""
    rows: dict[str, list[Row]] = {}
    for path in sorted(results.glob("*/*.jsonl")):
        if path.parent.name not in ("shapes", "shapes-large"):  # trials of the method, in another format
            for row in parse_rows(str(path), path.read_text()):
                if row.get("driver"):
                    rows.setdefault(row["device"], []).append(row)
    return {device: Results(found) for device, found in sorted(rows.items())}


def _cell(found: Measurement | None) -> str:
    if found is None:
        return NOT_MEASURED
    bound = f"; {found.bound}" if found.bound else ""
    share = f" ({found.share:.1%})" if found.share is not None and found.bound else ""
    return found.value + bound + share + ("; goal missed" if found.reached is False else "")


def markdown(devices: dict[str, Results]) -> str:
    """Return the table of the page, with a column and a line of versions for each GPU."""
    columns = devices or {"value": Results([])}
    lines = [f"| metric | goal | {' | '.join(columns)} |", f"| --- | --- |{' --- |' * len(columns)}"]
    for metric in METRICS:
        cells = " | ".join(_cell(metric.measure(results)) for results in columns.values())
        lines.append(f"| {metric.name} | {metric.goal or '-'} | {cells} |")
    for device, results in devices.items():
        versions = {
            f"driver {row['driver']}, torch {row['versions'].get('torch')}, commit {row['commit']}, {row['date'][:10]}"
            for row in results.rows
        }
        lines += ["", f"{device}: {'; '.join(sorted(versions))}."]
    return "\n".join(lines)


def with_table(page: str, table: str) -> str:
    """Replace the table between the marks of the page; ValueError if the marks are missing."""
    head, begin, rest = page.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the page: expected {BEGIN} and {END} around the GPU table")
    return f"{head}{BEGIN}\n\n{table}\n\n{END}{tail}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Write, check or print the table; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--check", action="store_true", help="exit with 1 if the table is out of date; write nothing")
    which.add_argument("--print", action="store_true", help="print the metrics of every device; write nothing")
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results", help="folder of the results")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "benchmarks.md", help="file with the table")
    options = parser.parse_args(arguments)
    try:
        devices = load(options.results)
        if options.print:
            for device, results in (devices or {"no GPU": Results([])}).items():
                print(f"{device}\n{text(results)}\n")
            return 0
        before = options.page.read_bytes().decode()  # keeps its line ends
        after = with_table(before, markdown(devices))
    except (OSError, ValueError, KeyError) as error:
        parser.error(f"{error}")
    if options.check:
        print("the table is up to date" if before == after else "the table is out of date; run python bench/figures.py")
        return int(before != after)
    if before != after:
        write_atomic(options.page, after.encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())

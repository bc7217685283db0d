"""Run the parts of a soak and print one table: PYTHONPATH=bench python -m soak --out FOLDER. Exit code 1: a failure."""

import argparse
import datetime as dt
import importlib
import json
import os
import platform
import re
import sys
import time
import traceback
from pathlib import Path

import _source

from ospo_fast.records import write_atomic
from soak.parts import Options, Outcome

# Of each part its module, and its share of the minutes.
PARTS = {
    "kills": ("runs", 0.28), "disk": ("runs", 0.1), "fuzz": ("fuzz", 0.33), "memory": ("steady", 0.12),
    "threads": ("steady", 0.04), "sanitizers": ("steady", 0.13),
}  # fmt: skip
DOCUMENT = _source.ROOT / "docs" / "reliability.md"
MARKERS = ("<!-- soak: begin -->", "<!-- soak: end -->")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="soak", description=__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="parts to run (all)")
    parser.add_argument("--kills", type=int, default=300, help="kills (300); a third as many disk faults")
    parser.add_argument("--inputs", type=int, default=100_000, help="inputs of each parser and reader (100000)")
    parser.add_argument("--minutes", type=float, default=18, help="time of all parts, of which each has a share (18)")
    parser.add_argument("--seed", type=int, default=int(time.time()) % 10**6, help="printed, to repeat a soak")
    parser.add_argument("--jobs", type=int, default=min(os.cpu_count() or 1, 8), help="processes (one per core)")
    parser.add_argument("--out", type=Path, default=Path("soak-out"), help="failed cases and soak.jsonl (soak-out)")
    parser.add_argument("--write", action="store_true", help="write the table into docs/reliability.md")
    given = parser.parse_args(arguments)
    given.out.mkdir(parents=True, exist_ok=True)
    print(f"seed {given.seed}", flush=True)
    total = sum(PARTS[part][1] for part in given.parts)
    begin, outcomes, spent = time.monotonic(), [], 0.0
    for part in given.parts:
        spent += PARTS[part][1]  # what a part leaves over is for the later ones
        deadline = begin + given.minutes * 60 * spent / total
        options = Options(given.out, given.kills, given.inputs, given.seed, given.jobs, deadline)
        outcomes.append(_outcome(part, options))
        print(_summary(outcomes[-1]), flush=True)
    rows = [_row(outcome, given.seed) for outcome in outcomes]
    write_atomic(given.out / "soak.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())
    table = _table(outcomes, rows[0])
    print(f"\n{table}")
    if given.write:
        text = DOCUMENT.read_text(encoding="utf-8")
        first, last = (re.escape(marker) for marker in MARKERS)
        text = re.sub(f"({first}\n).*?({last})", lambda m: f"{m[1]}{table}\n{m[2]}", text, flags=re.DOTALL)
        write_atomic(DOCUMENT, text.encode())
    return 1 if any(outcome.failures for outcome in outcomes) else 0


def _outcome(part: str, options: Options) -> Outcome:
    started = time.monotonic()
    try:
        outcome: Outcome = getattr(importlib.import_module(f"soak.{PARTS[part][0]}"), part)(options)
    except Exception as error:  # the other parts run
        traceback.print_exc()
        outcome = Outcome(part, "", failures=[f"the part itself failed: {type(error).__name__}: {error}"])
    outcome.seconds = time.monotonic() - started
    if outcome.cases < outcome.wanted and not outcome.failures:
        outcome.failures.append(f"only {outcome.cases:,} of {outcome.wanted:,} cases; give it more --minutes")
    return outcome


def _summary(outcome: Outcome) -> str:
    lines = [f"{outcome.part}: {outcome.cases} cases, {len(outcome.failures)} failures, {outcome.seconds:.0f} s"]
    return "\n  ".join([*lines, *(failure[:300] for failure in outcome.failures[:40])])


def _row(outcome: Outcome, seed: int) -> dict[str, object]:
    import _measure

    return {
        "part": outcome.part,
        "cases": outcome.cases,
        "failures": outcome.failures,
        "seconds": round(outcome.seconds, 1),
        "rows": outcome.rows,
        "seed": seed,
        "device": _measure.device(),
        "cores": os.cpu_count(),
        "versions": {name: version for name, version in _measure._environment()["versions"].items() if version},
        "platform": platform.platform(),
        "commit": _measure.commit(),
        "date": dt.datetime.now(dt.timezone.utc).isoformat(timespec="seconds"),
    }


def _table(outcomes: list[Outcome], row: dict[str, object]) -> str:
    lines = ["| part | goal | cases | failures | seconds |", "| --- | --- | ---: | ---: | ---: |"]
    for outcome in outcomes:
        numbers = f"{outcome.cases:,} | {len(outcome.failures)} | {outcome.seconds:.0f}"
        lines.append(f"| {outcome.part} | {outcome.goal} | {numbers} |")
        for inner in outcome.rows:
            numbers = f"{inner['cases']:,} | {inner['failures']} | {inner['seconds']:.0f}"
            lines.append(f"| {outcome.part}: {inner['name']} | {inner['goal']} | {numbers} |")
    where = f"{row['device']}, {row['cores']} cores, {row['platform']}"
    return "\n".join([*lines, "", f"Commit {row['commit']}, seed {row['seed']}, {row['date']}, {where}."])


if __name__ == "__main__":
    sys.exit(main())

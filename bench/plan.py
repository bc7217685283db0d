"""The plan of a Shapes run, made right before it, against the run: seconds of each stage and of all of them.

The plan is that of `ospo-fast plan --calibrate`, the run is `ospo-fast run` in a new process. `deviation` is planned
seconds / seconds of the run - 1, of each of several pairs of plan and run: the median, the least and the largest. The
row of the total has the rates of the run that took the median time, which plans on this device use.
"""

import dataclasses
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import _measure as measure

from ospo_fast import plan
from ospo_fast.config import load_config
from ospo_fast.pipeline import stage_metrics
from ospo_fast.shapes.commands import build_evaluation

QUICK = ("prompts.counts={color1: 2, shape1: 1, color2: 2, 2D_spatial: 2, numeracy1: 1, numeracy2: 2}", "train.steps=2")
FULL = (
    "prompts.counts={color1: 16, shape1: 16, color2: 80, 2D_spatial: 100, numeracy1: 30, numeracy2: 100}",
    "train.steps=100",
    "train.eval_every=50",
)


REPEATS = 5


def _plan_and_run(overrides: list[str]) -> tuple[dict[str, float], dict[str, float], dict[str, Any]]:
    """Return planned seconds and seconds of the stages and of all, and what the row of the total has besides."""
    with tempfile.TemporaryDirectory() as folder:
        config = load_config([*overrides, f"out={folder}"], family="shapes")
        planned = plan.make_plan(config, rates=plan.calibrate(config, build_evaluation))
        command = [sys.executable, "-m", "ospo_fast", "run", "--json", "--out", folder, *overrides]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        seconds = {name: row["seconds"] for name, row in stage_metrics(Path(folder)).items()}
        rates, ratios = plan.read_rates(config)
    expected = {row["stage"]: row["seconds"] for row in planned["stages"]} | {"total": planned["seconds"]}
    seconds["total"] = sum(seconds.values())
    found = {"model": config.model, "rates": rates, "ratios": dataclasses.asdict(ratios)}
    return expected, seconds, {"items": planned["items"], "found": found}


def run(out: Path, quick: bool) -> None:
    runs = [
        _plan_and_run([*QUICK, "evaluate.watch_per_kind=4"] if quick else list(FULL))
        for _ in range(1 if quick else REPEATS)
    ]
    runs.sort(key=lambda one: one[1]["total"])
    of_median = runs[len(runs) // 2][2]
    rows = []
    for name in runs[0][1]:
        timing = measure.timing_of([seconds[name] * 1e3 for _, seconds, _ in runs])
        deviations = sorted(expected[name] / seconds[name] - 1 for expected, seconds, _ in runs)
        metrics = {
            "planned_s": round(statistics.median(expected[name] for expected, _, _ in runs), 3),
            "deviation": round(statistics.median(deviations), 4),
            "least_deviation": round(deviations[0], 4),
            "largest_deviation": round(deviations[-1], 4),
        }
        if name == "total":
            metrics |= of_median["found"]
        rows.append(measure.row("plan", name, {"items": of_median["items"]}, "fp32", timing, **metrics))
        values = f"planned {metrics['planned_s']:7.1f} s, took {timing.median_ms / 1e3:7.1f} s"
        print(f"{name:<10} {values} ({deviations[0]:+.1%} to {deviations[-1]:+.1%})")
    measure.write(rows, out, "plan")

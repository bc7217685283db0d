"""The plan of a Shapes run, made right before it, against the run: seconds of each stage and of all of them.

The plan is that of `ospo-fast plan --calibrate`, the run is `ospo-fast run` in a new process. `deviation` is planned
seconds / seconds of the run - 1. The row of the total has the rates of the run, which plans on this device use.
This is one run and no median: on a busy machine the run and its calibration see another load.
"""

import dataclasses
import subprocess
import sys
import tempfile
from pathlib import Path

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


def run(out: Path, quick: bool) -> None:
    overrides = [*(QUICK if quick else FULL), "evaluate.watch_per_kind=4"] if quick else list(FULL)
    with tempfile.TemporaryDirectory() as folder:
        config = load_config([*overrides, f"out={folder}"], family="shapes")
        planned = plan.make_plan(config, rates=plan.calibrate(config, build_evaluation))
        command = [sys.executable, "-m", "ospo_fast", "run", "--json", "--out", folder, *overrides]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        seconds = {name: row["seconds"] for name, row in stage_metrics(Path(folder)).items()}
        rates, ratios = plan.read_rates(config)
    expected = {row["stage"]: row["seconds"] for row in planned["stages"]}
    expected["total"], seconds["total"] = planned["seconds"], sum(seconds.values())
    rows = []
    for name, value in seconds.items():
        timing = measure.Timing(value * 1e3, value * 1e3, value * 1e3, 1)
        metrics = {"planned_s": expected[name], "deviation": round(expected[name] / value - 1, 4)}
        if name == "total":
            metrics |= {"model": config.model, "rates": rates, "ratios": dataclasses.asdict(ratios)}
        rows.append(measure.row("plan", name, {"items": planned["items"]}, "fp32", timing, **metrics))
        print(f"{name:<10} planned {expected[name]:7.1f} s, took {value:7.1f} s ({metrics['deviation']:+.1%})")
    measure.write(rows, out, "plan")

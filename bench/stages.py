"""Each stage of a run of the Shapes model on a handful of items: seconds, items a second, and the stage's peak memory.

A row's time is that of the whole stage, loading of modules and the store included; the runs repeat everything in a new
folder, one after another, and the first, which loads, does not count. `train` counts steps.
"""

import statistics
import tempfile
from pathlib import Path

import _measure as measure

from ospo_fast.config import load_config
from ospo_fast.models import load_model
from ospo_fast.pipeline import STAGES, Pipeline, StageReport

SMALL = ("prompts.counts={color1: 4, shape1: 4, color2: 8, 2D_spatial: 8, numeracy1: 4, numeracy2: 8}", "train.steps=4")
LARGE = (
    "prompts.counts={color1: 12, shape1: 12, color2: 48, 2D_spatial: 64, numeracy1: 16, numeracy2: 64}",
    "train.steps=20",
)


REPEATS = 5


def once(overrides: tuple[str, ...]) -> list[StageReport]:
    with tempfile.TemporaryDirectory() as folder:
        # Training changes the model in place, so each run loads its own.
        config = load_config([*overrides, f"out={folder}", "train.eval_every=0"], family="shapes")
        model = load_model("shapes")
        return Pipeline(config, progress=False, model=model).run()


def run(out: Path, quick: bool) -> None:
    runs = [once(SMALL)] if quick else [once(LARGE) for _ in range(REPEATS + 1)][1:]
    dtype = measure.dtype_name(load_model("shapes").dtype)
    rows = []
    for stage, reports in zip(STAGES, zip(*runs, strict=True), strict=True):
        times = [report.seconds * 1e3 for report in reports]
        fifths = statistics.quantiles(times, n=5, method="inclusive") if len(times) > 1 else times * 4
        timing = measure.Timing(statistics.median(times), fifths[0], fifths[3], len(times))
        items = reports[0].items
        figures = {
            "items_s": round(items / timing.median_ms * 1e3, 3),
            "failed": reports[0].failed,
            "peak_mb": max(report.peak_mb for report in reports),
        }
        if reports[0].cuda_peak_mb is not None:
            figures["cuda_peak_mb"] = max(report.cuda_peak_mb or 0.0 for report in reports)
        unit = "steps" if stage == "train" else "items"
        rows.append(measure.row("stages", stage, {unit: items}, dtype, timing, **figures))
    measure.write(rows, out, "stages")
    measure.show(rows)

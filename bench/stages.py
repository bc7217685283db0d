"""Each stage of a run of the Shapes model on a few items: seconds, items per second and peak memory.

The time of a row is that of the whole stage, including the store. Every run starts in a new folder. The first run is
not counted, because it loads modules. `train` counts steps.
"""

import tempfile
from pathlib import Path

import _measure as measure

from ospo_fast.config import load_config
from ospo_fast.models import load_model
from ospo_fast.pipeline import Pipeline, StageReport
from ospo_fast.stages import STAGES

SMALL = ("prompts.counts={color1: 2, shape1: 2, color2: 6, 2D_spatial: 6, numeracy1: 3, numeracy2: 5}", "train.steps=4")
LARGE = (
    "prompts.counts={color1: 12, shape1: 12, color2: 48, 2D_spatial: 64, numeracy1: 16, numeracy2: 64}",
    "train.steps=20",
)
REPEATS = 5


def once(overrides: tuple[str, ...]) -> list[StageReport]:
    with tempfile.TemporaryDirectory() as folder:
        # Training changes the model in place, so each run loads a new one.
        config = load_config([*overrides, f"out={folder}", "train.eval_every=0"], family="shapes")
        model = load_model("shapes")
        return Pipeline(config, progress=False, model=model).run()


def run(out: Path, quick: bool) -> None:
    runs = [once(SMALL)] if quick else [once(LARGE) for _ in range(REPEATS + 1)][1:]
    dtype = measure.dtype_name(load_model("shapes").dtype)
    rows = []
    for stage, reports in zip(STAGES, zip(*runs, strict=True), strict=True):
        times = [report.seconds * 1e3 for report in reports]
        timing = measure.timing_of(times)
        items = reports[0].items
        metrics = {
            "items_s": round(items / timing.median_ms * 1e3, 3),
            "failed": reports[0].failed,
            "peak_mb": max(report.peak_mb for report in reports),
        }
        if reports[0].cuda_peak_mb is not None:
            metrics["cuda_peak_mb"] = max(report.cuda_peak_mb or 0.0 for report in reports)
        rows.append(measure.row("stages", stage.name, {f"{stage.unit}s": items}, dtype, timing, **metrics))
    measure.write(rows, out, "stages")
    measure.show(rows)

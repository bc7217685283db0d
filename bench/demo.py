"""The demo as a user runs it: seconds, peak memory and the metrics of its summary.

This is one run and no median, so compare it only with runs of the same machine. `quick` runs a small demo to check that
it works.
"""

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import _measure as measure
import torch

QUICK = (
    "prompts.counts={color1: 3, shape1: 2, color2: 4, 2D_spatial: 4, numeracy1: 2, numeracy2: 4}",
    "train.steps=2",
    "train.eval_every=0",
    "evaluate.per_kind=2",
)
METRICS = (
    "alignment_before",
    "alignment_after",
    "alignment_gain",
    "alignment_std",
    "vqa_accuracy",
    "vqa_by_kind",
    "vqa_accuracy_own_drawings",
    "pairs",
    "pair_purity",
    "pair_purity_std",
    "mask_iou",
    "mask_iou_std",
    "mask_iou_all_ones",
    "seeds",
    "evaluation",
    "stages",
)


def run(out: Path, quick: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "ospo_fast", "demo", "--out", folder, "--json", *(QUICK if quick else ())]
        started = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        seconds = time.perf_counter() - started
        summary = json.loads((Path(folder) / "summary.json").read_text(encoding="utf-8"))
    peak_mb = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 1e6  # KiB on Linux
    once = measure.timing_of([seconds * 1e3])
    metrics = {name: summary.get(name) for name in METRICS}
    shapes = {"pairs": summary["pairs"]}
    variant = "quick" if quick else "shapes"
    dtype = "bf16" if torch.cuda.is_available() else "fp32"  # the default of load_model
    line = measure.row("demo", variant, shapes, dtype, once, peak_mb=round(peak_mb, 1), **metrics)
    measure.write([line], out, "demo")
    measure.show([line])

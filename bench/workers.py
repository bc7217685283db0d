"""Runs of the Shapes model by 1, 2 and 4 workers: equal records, equal training, kills, and the scaling of each stage.

`equal`: the records, images and masks of a run by N workers, compared byte by byte with those of one process; the
largest relative difference of the losses of training, and of its weights (of the norm of all of them).
`kills`: a random worker of 2 to 4 is killed at a random time; then the command is started again, by another number of
workers, until it ends. A third of the runs start over, in the folder of a run with another seed. Counted are kills that
came while the workers ran, runs that the others ended by themselves, and items that are lost or doubled, or that differ
from those of one process.
`scaling`: seconds of each stage by one worker over N times those of N workers. Each has one thread and its own core,
because the images stage uses a second core where it has one. Only as many workers as there are cores are measured, and
interleaved with one. `machine` is the same of N runs by one process each at the same time, which share nothing: what is
missing to 1 the cores take from each other. `step` is the median step of training, without what is before and after.
`memory`: `scaling` with the run folders in memory. Each record is on disk before the next one is made, and there is one
disk for all cores.

Workers are forks of this process, so that no time of theirs is that of imports.
"""

import contextlib
import functools
import itertools
import json
import os
import random
import shutil
import signal
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import _forked
import _measure as measure
import torch

from ospo_fast import cli, restarts, workers
from ospo_fast.stages import STAGES

SMALL = ("prompts.counts={color1: 2, shape1: 2, color2: 3, 2D_spatial: 3, numeracy1: 2, numeracy2: 3}",)
MIDDLE = ("prompts.counts={color1: 6, shape1: 6, color2: 12, 2D_spatial: 12, numeracy1: 6, numeracy2: 12}",)
LARGE = ("prompts.counts={color1: 24, shape1: 24, color2: 96, 2D_spatial: 128, numeracy1: 32, numeracy2: 128}",)
TRAINING = ("train.eval_every=0", "train.lora_dropout=0")
SIZES = (1, 2, 4)
KILLS = 100
REPEATS = 5
MEMORY = Path("/dev/shm")
Rows = list[dict[str, Any]]


def start(
    out: Path, settings: tuple[str, ...], size: int, *, bound: bool = False, over: bool = False, **options: Any
) -> list[_forked.Ended]:
    """Run all stages in `out` by `size` workers. bound: each has a core of its own; over: with --no-resume."""

    def do(rank: int) -> int:
        torch.set_num_threads(1)
        # A worker that is killed leaves the others waiting for it: before it has come, and before training.
        workers.PATIENCE, workers.SILENCE, workers.NOTICE = 5.0, 2.0, 0.5
        if bound:
            os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[rank]})
        return cli.main(["run", "--out", str(out), "--json", *(["--no-resume"] if over else []), *TRAINING, *settings])

    return _forked.run_workers(do, size, out.with_name(f"{out.name}-output"), **options)


def ended_well(ended: list[_forked.Ended]) -> None:
    """Raise RuntimeError with the output of all workers if one of them failed."""
    if any(worker.code for worker in ended):
        raise RuntimeError("\n".join(f"worker {n} ended with {w.code}: {w.output}" for n, w in enumerate(ended)))


def made(out: Path) -> dict[str, bytes]:
    """Return all files of records, images and masks."""
    paths = [path for path in out.rglob("*") if path.suffix in (".jsonl", ".png", ".npz", ".safetensors")]
    names = {str(path.relative_to(out)): path for path in sorted(paths) if path.is_file()}
    return {name: path.read_bytes() for name, path in names.items() if not name.startswith("train/")}


def trained(out: Path) -> tuple[list[float], torch.Tensor]:
    """Return the losses of all steps, and all trained weights in one vector."""
    from safetensors.torch import load_file

    log = (out / "train" / "log.jsonl").read_text().splitlines()
    weights = load_file(out / "train" / "adapter" / "adapter_model.safetensors")
    return [json.loads(line)["loss"] for line in log], torch.cat(
        [tensor.double().flatten() for _, tensor in sorted(weights.items())]
    )


def equal(folder: Path, settings: tuple[str, ...]) -> Rows:
    """Compare runs by several workers with that of one process."""
    rows, first, losses, weights = [], {}, [], torch.zeros(0)
    for size in SIZES:
        out, started = folder / f"equal-{size}", time.perf_counter()
        ended_well(start(out, settings, size))
        once = (time.perf_counter() - started) * 1e3
        files, (own_losses, own_weights) = made(out), trained(out)
        if size == 1:
            first, losses, weights = files, own_losses, own_weights
        metrics = {
            "files": len(files),
            "different_files": sum(files.get(name) != first.get(name) for name in {*files, *first}),
            "steps": len(own_losses),
            "loss_difference": max(abs(a - b) / abs(b) for a, b in zip(own_losses, losses, strict=True)),
            "weight_difference": float((own_weights - weights).norm() / weights.norm()),
        }
        items = len((out / "prompts.jsonl").read_bytes().splitlines())
        rows.append(_row("equal", {"workers": size, "items": items}, [once], **metrics))
    return rows


def kills(folder: Path, settings: tuple[str, ...], goal: int, seed: int) -> Rows:
    """Kill workers at random, and compare what the runs end with."""
    rng, whole, old = random.Random(seed), folder / "whole", folder / "old"
    ended_well(start(old, (*settings, "seed=1"), 1))
    settings = (*settings, "seed=2")  # by name, because a run folder keeps the values that are not named
    ended_well(start(whole, settings, 1))
    expected, seconds = made(whole), []
    counted = ("kills", "too_late", "over", "taken_over", "started_again", "lost", "doubled", "different")
    counts = dict.fromkeys(counted, 0)
    for number in itertools.count():
        if counts["kills"] >= goal:
            break
        out, over, ended = folder / f"kill-{number}", rng.random() < 1 / 3, []
        if over:
            shutil.copytree(old, out)
        counts["over"] += over
        started = time.perf_counter()
        for attempt in itertools.count():
            size = rng.randint(2, 4)
            kill = (rng.randrange(size), rng.uniform(0.1, 6.0)) if attempt == 0 else None
            begun = (restarts.folder(out) / "config.yaml").exists() or made(out) == expected
            ended = start(out, settings, size, kill=kill, over=over and not begun)
            if kill is not None:
                hit = ended[kill[0]].code == -signal.SIGKILL
                counts["kills" if hit else "too_late"] += 1
                names = [name for name in expected if name.endswith(".jsonl")]
                places = [made(out), made(restarts.folder(out))]
                whole_records = any(all(files.get(n) == expected[n] for n in names) for files in places)
                counts["taken_over"] += hit and whole_records
            counts["started_again"] += attempt > 0
            if not any(worker.code for worker in ended):
                break
            if attempt > 3:
                ended_well(ended)
        seconds.append((time.perf_counter() - started) * 1e3)
        found = made(out)
        for stage in STAGES[:-1]:
            name = f"{stage.name}.jsonl"
            ids, right = (
                [json.loads(line)["item_id"] for line in files.get(name, b"").splitlines()]
                for files in (found, expected)
            )
            counts["lost"] += len(set(right) - set(ids))
            counts["doubled"] += len(ids) - len(set(ids))
        counts["different"] += sum(found.get(name) != expected.get(name) for name in {*found, *expected})
        shutil.rmtree(out)
        shutil.rmtree(out.with_name(f"{out.name}-output"))
    return [_row("kills", {"workers": 4, "kills": counts["kills"]}, seconds, seed=seed, **counts)]


def scaling(folder: Path, settings: tuple[str, ...], repeats: int, name_of_case: str = "scaling") -> Rows:
    """Measure the stages by one worker, by one for each core, and by as many runs of one worker at the same time."""
    cores = max(size for size in SIZES if size <= (os.cpu_count() or 1))
    found: dict[tuple[str, str], list[float]] = {}
    items: dict[str, int] = {}
    for repeat, case in itertools.product(range(repeats), ("one", "several", "apart")):
        outs = [folder / f"scaling-{case}-{repeat}-{n}" for n in range(cores if case == "apart" else 1)]
        if case == "apart":
            ended_well(_forked.run_workers(functools.partial(_alone, outs, settings), cores, folder / "apart"))
        else:
            ended_well(start(outs[0], settings, cores if case == "several" else 1, bound=True))
        for stage in STAGES:
            rows = [json.loads((out / "stages.json").read_text()) for out in outs]
            own = [[row for row in each if row["stage"] == stage.name] for each in rows]
            counts = [row["items"] for row in own[0]]
            items[stage.name] = max(counts) if stage.counts_steps else sum(counts)
            # Of runs at the same time the mean: none waits for another.
            seconds = statistics.mean(max(row["seconds"] for row in each) for each in own)
            found.setdefault((stage.name, case), []).append(seconds * 1e3)
        logs = [(out / "train" / "log.jsonl").read_text().splitlines() for out in outs]
        steps = [[json.loads(line)["seconds"] for line in log] for log in logs]
        found.setdefault(("step", case), []).append(statistics.mean(map(statistics.median, steps)) * 1e3)
        items["step"] = len(steps[0])
        for out in outs:
            shutil.rmtree(out)
    rows = []
    for name, count in items.items():
        one, several, apart = (found[name, case] for case in ("one", "several", "apart"))
        metrics = {
            "one_ms": round(statistics.median(one), 1),
            "efficiency": round(statistics.median(one) / cores / statistics.median(several), 4),
            "machine": round(statistics.median(one) / statistics.median(apart), 4),
        }
        rows.append(_row(f"{name_of_case}_{name}", {"workers": cores, "items": count}, several, **metrics))
    return rows


def in_memory(settings: tuple[str, ...], repeats: int) -> Rows:
    """Measure as `scaling` does, without a disk."""
    if not MEMORY.is_dir():
        print(f"memory: not measured, without {MEMORY}")
        return []
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        return scaling(Path(folder), settings, repeats, "memory")


def _alone(outs: list[Path], settings: tuple[str, ...], core: int) -> int:
    """Run all stages as one process on a core."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        del os.environ[name]
    torch.set_num_threads(1)
    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[core]})
    return cli.main(["run", "--out", str(outs[core]), "--json", *TRAINING, *settings])


def _row(variant: str, shapes: dict[str, int], times: list[float], **metrics: Any) -> dict[str, Any]:
    return measure.row("workers", variant, shapes, "fp32", measure.timing_of(times), **metrics)


def run(out: Path, quick: bool) -> None:
    """Run all parts. `quick`: with few items and two kills."""
    small, middle, large = (SMALL, SMALL, SMALL) if quick else (SMALL, MIDDLE, LARGE)
    few = ("train.steps=2", "train.batch_size=4", "train.save_every=1")
    several = few if quick else ("train.steps=20", "train.batch_size=4")
    many = few if quick else ("train.steps=20",)
    parts: dict[str, Callable[[Path], Rows]] = {
        "equal": lambda folder: equal(folder, (*middle, *several)),
        "scaling": lambda folder: scaling(folder, (*large, *many), 1 if quick else REPEATS),
        "memory": lambda folder: in_memory((*large, *many), 1 if quick else REPEATS),
        "kills": lambda folder: kills(folder, (*small, *few), 2 if quick else KILLS, 0),
    }
    rows: Rows = []
    with tempfile.TemporaryDirectory() as scratch:
        with contextlib.redirect_stdout(None):  # load what is imported and cached when stages first run
            cli.main(["run", "--out", f"{scratch}/first", "--json", *TRAINING, *small, *few])
        for name, part in parts.items():
            if measure.chosen(name):
                rows += part(Path(scratch))
                measure.write(rows, out, "workers")
    measure.show(rows)
    for line in rows:
        print({name: value for name, value in line.items() if name in ("variant", "shapes") or name in _METRICS})


_METRICS = (
    "different_files", "loss_difference", "weight_difference", "efficiency", "machine", "kills", "too_late",
    "over", "taken_over", "started_again", "lost", "doubled", "different",
)  # fmt: skip

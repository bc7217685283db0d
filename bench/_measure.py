"""Shared by all benchmarks: interleaved timing, peak memory above the inputs, and rows with device and versions."""

import argparse
import contextlib
import datetime as dt
import functools
import gc
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import _source
import torch

from ospo_fast import env
from ospo_fast.config import MODEL_FILES
from ospo_fast.packages import silence_imports
from ospo_fast.records import finite, write_atomic

L2_BYTES = 256 * 2**20  # larger than the L2 cache of the supported GPUs
LEAD = 2_000_000  # clock cycles (about 1 ms) that a GPU sleeps while the host launches a run
_cases: list[str] = []
_rehearsal = [False]
_sizes: dict[str, int] = {}
_written: dict[Path, None] = {}
silence_imports()


@dataclass(frozen=True)
class Timing:
    """Times of one variant in milliseconds: median, 20th and 80th percentile of its repeats."""

    median_ms: float
    p20_ms: float
    p80_ms: float
    repeats: int


@dataclass(frozen=True)
class Prepared:
    """A variant of which only a part is timed: run(*prepare(*inputs)), such as a backward after its forward."""

    prepare: Callable[..., tuple[Any, ...]]
    run: Callable[..., object]

    def __call__(self, *inputs: Any) -> object:
        """Run both parts."""
        return self.run(*self.prepare(*inputs))


def interleaved(
    variants: Mapping[str, Callable[..., object]],
    inputs: Callable[[], tuple[Any, ...]],
    *,
    seconds: float = 0.1,
    warmup: int = 2,
    max_turns: int = 1000,
    cold: bool = False,
) -> dict[str, Timing]:
    """Time the variants in turns, so that all of them see the same noise, until each has run for `seconds`.

    On a GPU this is GPU time: the GPU sleeps for about a millisecond while the host launches the run, so that the time
    of the kernels is not hidden by the time of their launches. After a synchronization within a run, launches count.

    Args:
        variants: functions to time, by name; of a `Prepared` one, the second part.
        inputs: makes the arguments of one turn, outside the timing. They should be random, because zeros run faster.
        seconds: time that each variant runs for in total.
        warmup: turns that are not timed.
        max_turns: limit of timed turns, for variants that are far faster than the others.
        cold: flush the L2 cache of the GPU before every run.

    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    flush = torch.empty(L2_BYTES, dtype=torch.uint8, device=device) if cold and device == "cuda" else None
    times: dict[str, list[float]] = {name: [] for name in variants}
    turn = 0
    while turn < warmup + 3 or (turn < warmup + max_turns and min(map(sum, times.values())) < seconds * 1e3):
        arguments = inputs()
        for name, run in variants.items():
            state = run.prepare(*arguments) if isinstance(run, Prepared) else arguments
            if flush is not None:
                flush.zero_()
            elapsed = _milliseconds(run.run if isinstance(run, Prepared) else run, state, device)
            del state
            if turn >= warmup:
                times[name].append(elapsed)
        turn += 1
    return {name: timing_of(values) for name, values in times.items()}


def _milliseconds(run: Callable[..., object], arguments: tuple[Any, ...], device: str) -> float:
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        torch.cuda._sleep(LEAD)
        start.record()
        run(*arguments)
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end))
    begin = time.perf_counter()
    run(*arguments)
    return (time.perf_counter() - begin) * 1e3


def timing_of(values: list[float]) -> Timing:
    """Return the median and the percentiles of times in milliseconds."""
    fifths = statistics.quantiles(values, n=5, method="inclusive") if len(values) > 1 else values * 4
    return Timing(statistics.median(values), fifths[0], fifths[3], len(values))


@dataclass(frozen=True)
class Ceilings:
    """Measured limits of this device for the roofline."""

    bandwidth: float  # bytes read plus bytes written per second, of a copy
    product: float  # FLOP per second of a matrix product, bf16 on a GPU, fp32 on a CPU

    def floor_ms(self, *, bytes_moved: float = 0.0, flop: float = 0.0) -> float:
        """Return the lower bound in milliseconds for moving these bytes and for these operations."""
        return 1e3 * max(bytes_moved / self.bandwidth, flop / self.product)

    def metrics(self, floor_ms: float, timing: Timing) -> dict[str, float]:
        """Return the metrics of a row: floor_ms, share = floor / median, and both limits."""
        metrics = {"floor_ms": floor_ms, "share": floor_ms / timing.median_ms}
        metrics |= {"copy_gb_s": self.bandwidth / 1e9, "product_tflop_s": self.product / 1e12}
        return {name: float(f"{value:.6g}") for name, value in metrics.items()}


@functools.cache
def ceilings() -> Ceilings:
    """Measure the limits of this device, once per process, so that they belong to the run that uses them.

    A copy of 1 GiB and a product of 8192 × 8192 matrices on a GPU, of 64 MiB and 1024 × 1024 on a CPU. The data is
    random, because zeros run faster. The 20th percentile excludes disturbances.
    """
    cuda = torch.cuda.is_available()
    kind, dtype, size, side = ("cuda", torch.bfloat16, 2**30, 8192) if cuda else ("cpu", torch.float32, 2**26, 1024)
    source = torch.randint(256, (size,), dtype=torch.uint8, device=kind)
    target = torch.empty_like(source)
    a, b = torch.randn(2, side, side, device=kind).to(dtype)
    out = torch.empty_like(a)
    runs = {"copy": lambda: target.copy_(source), "product": lambda: torch.mm(a, b, out=out)}
    times = interleaved(runs, tuple, seconds=0.02 if _rehearsal[0] else 0.2)
    return Ceilings(2 * size / times["copy"].p20_ms * 1e3, 2 * side**3 / times["product"].p20_ms * 1e3)


def peak_mb(run: Callable[..., object], *arguments: Any) -> float:
    """Return the peak of torch's allocations during run(*arguments) minus those before it, in 10⁶ bytes."""
    gc.collect()  # what is freed during the run would be taken off
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(*arguments)
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        kept = run(*arguments)
    del kept
    allocated = peak = 0
    events = profile.profiler.kineto_results.events()
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        allocated += event.nbytes()
        peak = max(peak, allocated)
    return peak / 1e6


def dtype_name(dtype: torch.dtype) -> str:
    """Return fp32, bf16, fp16 or fp64."""
    return {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "float64": "fp64"}[str(dtype)[6:]]


@functools.cache  # a report takes 40 ms, and a benchmark makes many rows
def _environment() -> dict[str, Any]:
    info = env.collect()
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        info["versions"]["trl"] = importlib.metadata.version("trl")  # a peer, which the report does not list
    return info


def device() -> str:
    """Return the name of the GPU, or of the processor where there is no GPU."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else str(_environment()["system"]["cpu"])


@functools.cache  # the commit of the code that was loaded, even if the checkout changes during the run
def commit() -> str:
    """Return `_source.commit()` of the first call."""
    return _source.commit()


def rehearse(quick: bool) -> None:
    """Mark the rows that follow as those of a rehearsal with small sizes."""
    _rehearsal[:] = [quick]


def only_cases(names: list[str]) -> None:
    """Measure only the cases whose names contain one of these; an empty list selects all."""
    _cases[:] = names


def use_sizes(sizes: Mapping[str, int]) -> None:
    """Measure the benchmarks that take sizes with these, such as N, D and V, in place of their own."""
    _sizes.clear()
    _sizes.update(sizes)


def given_sizes() -> dict[str, int]:
    """Return the sizes of `use_sizes`."""
    return dict(_sizes)


def take_written() -> list[Path]:
    """Return the files of rows that were written since the last call."""
    paths = list(_written)
    _written.clear()
    return paths


def grown_memory(module: str, case: str, variant: str, quick: bool) -> dict[str, float]:
    """Return what `_peak_rss.py` measures in a new process; nothing where it cannot be measured."""
    command = [sys.executable, str(Path(__file__).parent / "_peak_rss.py"), module, case, variant]
    done = subprocess.run(
        [*command, *(["--quick"] if quick else [])],
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
    )
    if done.returncode:
        print(f"{variant}: no resident memory: {(done.stderr.splitlines() or [''])[-1]}")
        return {}
    found: dict[str, float] = json.loads(done.stdout)
    return found


def chosen(case: str) -> bool:
    """Return whether to measure this case of a benchmark (`only_cases`)."""
    return not _cases or any(name in case for name in _cases)


def row(op: str, variant: str, shapes: Mapping[str, int], dtype: str, timing: Timing, **metrics: Any) -> dict[str, Any]:
    """Build a row: times, `metrics` such as peak_mb, gb_s and share, device and versions."""
    info = _environment()
    return {
        "op": op,
        "variant": variant,
        "shapes": dict(shapes),
        "dtype": dtype,
        "median_ms": round(timing.median_ms, 6),
        "p20_ms": round(timing.p20_ms, 6),
        "p80_ms": round(timing.p80_ms, 6),
        "repeats": timing.repeats,
        **metrics,
        **({"quick": True} if _rehearsal[0] else {}),
        "device": device(),
        "threads": torch.get_num_threads(),
        "driver": _driver(),
        "versions": {name: version for name, version in info["versions"].items() if version},
        "platform": platform.platform(),
        "commit": commit(),
        "date": dt.datetime.now(dt.timezone.utc).isoformat(timespec="seconds"),
    }


def _driver() -> str | None:
    if not torch.cuda.is_available():
        return None
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, check=True, capture_output=True, text=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "unknown"


def result_path(out: Path, name: str) -> Path:
    """Return out/<device>/<name>.jsonl."""
    return _source.device_folder(out, device()) / f"{name}.jsonl"


def write(rows: list[dict[str, Any]], out: Path, name: str) -> Path:
    """Replace the rows in `result_path(out, name)` by these, one JSON object per line.

    After `only_cases`, existing rows of the same commit and of another op, shape or dtype stay. Benchmarks call this
    after every case, so that an interrupted run keeps the rows that it measured.
    """
    path = result_path(out, name)
    if _cases and path.exists():
        kept = [json.loads(line) for line in path.read_text().splitlines()]
        measured = [(line["op"], line["shapes"], line["dtype"]) for line in rows]
        kept = [line for line in kept if (line["op"], line["shapes"], line["dtype"]) not in measured]
        rows = [*(line for line in kept if line["commit"] == commit()), *rows]
    write_atomic(path, "".join(json.dumps(finite(line), allow_nan=False) + "\n" for line in rows).encode())
    _written[path] = None
    return path


def show(rows: list[dict[str, Any]]) -> None:
    """Print the rows as a table."""
    for line in rows:
        shapes = " ".join(f"{name}={size}" for name, size in line["shapes"].items())
        spread = f"({line['p20_ms']:.3f} to {line['p80_ms']:.3f})"
        memory = f"{line['peak_mb']:9.2f} MB" if "peak_mb" in line else ""
        print(f"{line['op']:<18} {line['variant']:<14} {shapes:<32} {line['median_ms']:10.3f} ms {spread:<24} {memory}")


def of_world(document: str, measured: Callable[[Path, bool, str], None]) -> None:
    """Be the command line of a benchmark of a Shapes world: call `measured(out, quick, world)`."""
    parser = argparse.ArgumentParser(description=document.partition("\n")[0])
    parser.add_argument("--world", choices=MODEL_FILES, default="shapes")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "results")
    options = parser.parse_args()
    measured(options.out, False, options.world)

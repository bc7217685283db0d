"""What every part of a soak has: its options, its outcome, and processes that share its cases."""

import atexit
import functools
import importlib.util
import itertools
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from _source import ROOT


@dataclass(frozen=True)
class Options:
    """Options of a soak. A part ends at its `deadline`, a value of `time.monotonic`, with the cases that it has."""

    out: Path
    kills: int
    inputs: int
    seed: int
    jobs: int
    deadline: float


@dataclass
class Outcome:
    """What a part found. `failures` are sentences; `rows` are the lines of a part that has a table of its own.

    A part with fewer cases than `wanted` has failed: it ran out of time, or did nothing.
    """

    part: str
    goal: str
    wanted: int = 1
    cases: int = 0
    failures: list[str] = field(default_factory=list)
    seconds: float = 0.0
    rows: list[dict[str, Any]] = field(default_factory=list)


def share(function: Callable[..., Any], arguments: Iterator[tuple[Any, ...]], options: Options) -> Iterator[Any]:
    """Yield the results of `function(*arguments)` in forked processes, in the order in which they end.

    No call begins after the deadline. A process that dies ends the part with an error.
    """
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("fork")) as pool:
        running = {pool.submit(function, *given) for given in itertools.islice(arguments, options.jobs)}
        while running:
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                yield future.result()
            free = options.jobs - len(running) if time.monotonic() < options.deadline else 0
            running |= {pool.submit(function, *given) for given in itertools.islice(arguments, free)}


@functools.cache
def scripted() -> Any:
    """Load tests/scripted.py: the tiny model of the tests and a script of its texts."""
    spec = importlib.util.spec_from_file_location("scripted", ROOT / "tests" / "scripted.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def _scratch() -> Path:
    """Make the folder of this soak, in memory where the system has such a folder; its end deletes it."""
    memory, process = Path("/dev/shm"), os.getpid()
    folder = Path(tempfile.mkdtemp(prefix="ospo-soak-", dir=memory if os.access(memory, os.W_OK) else None))

    @atexit.register
    def delete() -> None:
        if os.getpid() == process:  # and not a forked one
            shutil.rmtree(folder, ignore_errors=True)

    return folder


def scratch(name: str) -> Path:
    """Return a folder for files that are read once."""
    folder = _scratch() / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder

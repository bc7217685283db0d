"""Part `fuzz`: hostile inputs for every parser and reader, from hypothesis and from changed seeds; see `targets`.

Hypothesis draws the first inputs of a target, and reduces one that fails. A faster generator draws the rest with the
same functions. A failure is kept as JSON in the form of tests/soak/corpus, where a fixed one belongs.
"""

import base64
import json
import logging
import os
import random
import resource
import signal
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, Verbosity, given, settings
from hypothesis import strategies as st
from hypothesis.errors import HypothesisException

from ospo_fast.errors import OspoError
from soak.parts import Options, Outcome, scratch, share
from soak.targets import TARGETS, Target, tiny

BY_HYPOTHESIS = 300  # inputs, in at most a tenth of a target's time: it draws a few dozen a second
DEATHS = 10  # processes of a target that may die
SECONDS = 30  # that one input may take
TRIED = 30  # inputs of each target, to see how fast it is
LEAST = 1000  # inputs of each target; fewer of them would show nothing
MEMORY = 8 * 2**30  # bytes of address space above those at the start


class _TimeIsUp(BaseException):
    """Ends hypothesis, which would take an exception for a failure."""


def failure(target: Target, data: bytes) -> str | None:
    """Call a target. Return an error that is none of the package's own, with its line; None without one."""
    try:
        target.call(data)
    except OspoError:
        return None
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        inside = [frame for frame in frames if "ospo_fast" in Path(frame.filename).parts] or frames[-1:]
        where = f"{Path(inside[-1].filename).name}:{inside[-1].lineno}"
        return f"{type(error).__name__} at {where}: {str(error)[:120]}"
    return None


def entry(data: bytes, error: str, count: int) -> dict[str, str]:
    """Return an input as an entry of the corpus."""
    about = f"{error} ({count} inputs)"
    try:
        return {"about": about, "text": data.decode()}
    except UnicodeDecodeError:
        return {"about": about, "base64": base64.b64encode(data).decode()}


@contextmanager
def _guards() -> Iterator[None]:
    """Turn endless calls and huge allocations into errors, and silence logs and warnings."""

    def stop(number: int, frame: object) -> None:
        raise TimeoutError(f"the input took more than {SECONDS} s")

    signal.signal(signal.SIGALRM, stop)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, resource.RLIM_INFINITY))
    logging.disable()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _by_hypothesis(target: Target, seeds: Any, count: int, end: float, call: Callable[[bytes], str | None]) -> None:
    """Call with inputs that hypothesis draws; it reduces one that fails."""

    @settings(
        max_examples=count, database=None, deadline=None, suppress_health_check=list(HealthCheck),
        phases=(Phase.generate, Phase.shrink), report_multiple_bugs=False, print_blob=False,
        verbosity=Verbosity.quiet,
    )  # fmt: skip
    @given(st.randoms(use_true_random=False))
    def check(rng: random.Random) -> None:
        data = target.generate(rng, seeds)  # first, because hypothesis checks that repetitions draw the same
        if time.monotonic() > end:
            raise _TimeIsUp
        if (error := call(data)) is not None:
            raise AssertionError(error)

    with suppress(AssertionError, _TimeIsUp, HypothesisException):  # the last one: time ended a repetition
        check()


def _call_all(name: str, number: int, goal: int, end: float, report: Path) -> None:
    """Call a target with `goal` inputs, or as many as fit before `end`; write counts and failing inputs to `report`."""
    target, last = TARGETS[name], report.with_suffix(".last")
    found: dict[str, list[Any]] = {}  # of each error: the shortest input, and how many there were
    cases = 0

    def call(data: bytes) -> str | None:
        nonlocal cases
        cases += 1
        last.write_bytes(data)  # for the case that the process dies
        signal.alarm(SECONDS)
        error = failure(target, data)
        signal.alarm(0)
        if error is not None:
            entry = found.setdefault(error.split(": ")[0], [data, error, 0])
            entry[2] += 1
            if len(data) < len(entry[0]):
                entry[:2] = data, error
        return error

    with _guards():
        seeds, rng = target.seeds(), random.Random(number)
        tenth = (end - time.monotonic()) / 10
        _by_hypothesis(target, seeds, max(1, min(BY_HYPOTHESIS, goal // 2)), time.monotonic() + tenth, call)
        begin, before = time.monotonic(), cases
        while cases < goal and time.monotonic() < end:
            call(target.generate(rng, seeds))
        each = (time.monotonic() - begin) / max(cases - before, 1)
    failures = [entry(data, error, count) for data, error, count in found.values()]
    report.write_text(json.dumps({"cases": cases, "failures": failures, "each": each}))


def fuzz_target(name: str, number: int, goal: int, seconds: float, keep: Path, part: int = 0) -> dict[str, Any]:
    """Call a target in processes of its own; one that dies is a failure, too, and another one continues."""
    started, each = time.monotonic(), 0.0
    report = scratch("fuzz") / f"{name}-{os.getpid()}"
    cases, failures = 0, []
    for turn in range(DEATHS):
        process = os.fork()
        if process == 0:
            code = 1
            try:
                _call_all(name, number + turn, goal, started + seconds, report)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        if code == 0:
            told = json.loads(report.read_text())
            cases += told["cases"]
            failures += told["failures"]
            each = told["each"]
            break
        data = report.with_suffix(".last").read_bytes() if report.with_suffix(".last").exists() else b""
        failures.append(entry(data, f"the process died: {code}", 1))
        if time.monotonic() - started > seconds:
            break
    texts = [f"{name}: {each['about']}" for each in failures]
    if not failures and cases < min(goal, LEAST):
        texts = [f"{name}: only {cases:,} inputs in {seconds:.0f} s; give it more --minutes"]
    if failures:
        keep.mkdir(parents=True, exist_ok=True)
        (keep / f"{name}{f'-{part}' if part else ''}.json").write_text(json.dumps(failures, indent=1) + "\n")
    seconds = time.monotonic() - started
    return {"name": name, "cases": cases, "failures": len(texts), "seconds": seconds, "texts": texts, "each": each}


def fuzz(options: Options) -> Outcome:
    """Fuzz every target, the fastest ones first, each in as many parts as there are processes.

    A target may take an equal share of the time that is left, or the share of its inputs in all that are still to be
    called, if that is more: the slowest ones take a hundred times as long as others. What a target leaves over is for
    the later ones. Where the time is not enough for all, the slow ones get equal shares.
    """
    # What takes seconds at the first call is done before the processes are forked.
    tiny()
    _by_hypothesis(TARGETS["shards"], ["0/1"], 3, options.deadline, lambda data: None)
    outcome = Outcome("fuzz", f"{len(TARGETS)} parsers and readers, 0 uncaught")
    keep, goal = options.out / "failed", -(-options.inputs // options.jobs)
    tried = ((name, options.seed - 1, TRIED, 5.0, keep) for name in TARGETS)
    each = {row["name"]: row["each"] for row in share(fuzz_target, tried, options)}
    names = sorted(TARGETS, key=lambda name: each.get(name, 0.0))
    parts = iter([(name, part) for name in names for part in range(options.jobs)])
    waiting = sum(each.values()) * options.jobs
    left = len(names) * options.jobs

    def arguments() -> Iterator[tuple[Any, ...]]:
        nonlocal left, waiting
        for name, part in parts:
            time_left = max(options.deadline - time.monotonic(), 1.0)
            equal = options.jobs / (left + options.jobs - 1)
            own = options.jobs * each.get(name, 0.0) / max(waiting, 1e-9)
            seconds = time_left * min(1.0, max(equal, own))
            left, waiting = left - 1, waiting - each.get(name, 0.0)
            yield name, options.seed + 1000 * part, goal, seconds, keep, part

    rows: dict[str, dict[str, Any]] = {}
    for found in share(fuzz_target, arguments(), options):
        outcome.failures += [text for text in found["texts"] if text not in outcome.failures]
        outcome.cases += found["cases"]
        row = rows.setdefault(
            found["name"],
            {"name": found["name"], "goal": f"{options.inputs:,} inputs", "cases": 0, "failures": 0, "seconds": 0.0},
        )
        for column in ("cases", "failures", "seconds"):
            row[column] += found[column]
    outcome.failures += [f"{name}: there was no time to call part {part} of it" for name, part in parts]
    outcome.rows = [rows[name] for name in sorted(rows)]
    return outcome

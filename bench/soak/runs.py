"""Parts `kills` and `disk`: a small run of all stages, disturbed, resumed, and compared with an undisturbed one.

The parent loads torch and the model once and forks a process for each attempt, which runs the command line.
"""

import contextlib
import functools
import io
import itertools
import json
import os
import random
import resource
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ospo_fast import cli, models
from ospo_fast.errors import OspoError
from ospo_fast.shapes import scenes
from ospo_fast.stages import STAGES
from soak.faults import ERRORS, Faults
from soak.parts import Options, Outcome, scratch, scripted, share

SMALL = (
    "prompts.counts={color1: 1, shape1: 1, color2: 2, 2D_spatial: 1, numeracy1: 1, numeracy2: 1}",
    "images.batch_size=8", "images.draws=2", "images.temperature=1.0",
    "masks.batch_size=3", "masks.layers=[0]", "select.pairs=2",
    "train.steps=4", "train.batch_size=2", "train.save_every=1", "train.eval_every=0", "train.lora_rank=4",
)  # fmt: skip
KILLS_OF_A_RUN = 6
OLD = "images.temperature=0.5"  # a setting that the old files of a run that starts over were made with
HANG = 120  # seconds
FILE_SIZES = (0, 100, 4_000, 20_000, 100_000, 400_000)  # limits of the size of a file, in bytes
IGNORED = ("stages.json", ".lock", ".stages.lock", ".shards.lock", ".train.lock")  # times; locks are empty


class Ending(NamedTuple):
    """How an attempt ended."""

    code: int  # exit code, or minus a signal
    seconds: float
    operations: int  # on files, of an attempt that ended by itself
    error: str  # type and message of what was raised; empty without
    expected: bool  # whether the error is one of the package


@functools.cache
def model_folder() -> Path:
    """Save the tiny model of the tests, whose texts follow a script, and load it once for all attempts."""
    torch.set_num_threads(1)
    script = scripted()
    script.install()
    for module, name in ((script, "descriptions"), (scenes, "held_out_prompts")):  # most of a run's time
        setattr(module, name, functools.cache(getattr(module, name)))
    folder: Path = script.save_tiny(scratch("model"))
    with contextlib.redirect_stdout(io.StringIO()):  # load what is imported and cached when stages first run
        cli.main([*_command(folder, scratch("runs") / "first"), "--no-resume"])
    load = models.load_model
    loaded = load(folder, device="cpu")
    models.load_model = lambda name, **settings: loaded if str(name) == str(folder) else load(name, **settings)
    return folder


def _command(model: Path, out: Path) -> list[str]:
    return ["run", "--model", str(model), "--out", str(out), "--json", *SMALL]


def attempt(
    out: Path,
    faults: Faults | None = None,
    *options: str,
    delay: float | None = None,
    number: int = signal.SIGKILL,
    file_size: int | None = None,
) -> Ending:
    """Run all stages in a forked process, and send it signal `number` after `delay` seconds."""
    command = [*_command(model_folder(), out), *options]
    started = time.monotonic()
    reader, writer = os.pipe()
    process = os.fork()
    if process == 0:
        _child([*command, "--debug"], out, faults, file_size, writer)
    os.close(writer)
    status = None
    while status is None:
        ended, found = os.waitpid(process, os.WNOHANG)
        passed = time.monotonic() - started
        if ended:
            status = found
        elif passed > HANG:
            os.kill(process, signal.SIGKILL)
        elif delay is not None and passed > delay:
            os.kill(process, number)
            delay = None
        else:
            time.sleep(0.002)
    with open(reader, "rb") as pipe:  # noqa: PTH123  # a file descriptor
        told = json.loads(pipe.read() or b'[0, "", false]')
    return Ending(os.waitstatus_to_exitcode(status), time.monotonic() - started, *told)


def _child(arguments: list[str], out: Path, faults: Faults | None, file_size: int | None, writer: int) -> None:
    """Run the command and end the process; tell through a pipe what was raised."""
    faults = faults or Faults(out)
    code, error, expected = 70, "", False
    try:
        with open(os.devnull, "w") as null, contextlib.redirect_stdout(null), contextlib.redirect_stderr(null):  # noqa: PTH123
            faults.install()
            if file_size is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
            code = cli.main(arguments)
    except KeyboardInterrupt as stop:  # by SIGTERM, which without --debug is the exit code
        code = 128 + getattr(stop, "number", signal.SIGINT)
    except OspoError as raised:
        code, error, expected = 1, f"{type(raised).__name__}: {raised}", True
    except BaseException as raised:
        error = f"{type(raised).__name__}: {raised}"
    finally:
        os.write(writer, json.dumps([faults.count, error[:500], expected]).encode())
        os._exit(code)


def _plain(value: Any) -> Any:
    """Return a value of a checkpoint with its tensors as dtype, shape and bytes."""
    if isinstance(value, torch.Tensor):
        return str(value.dtype), tuple(value.shape), value.contiguous().numpy().tobytes()
    if isinstance(value, dict):
        return [(name, _plain(inner)) for name, inner in value.items()]
    return [_plain(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def contents(out: Path) -> dict[str, Any]:
    """Return what a run folder holds, without times."""
    found: dict[str, Any] = {}
    for path in sorted(path for path in out.rglob("*") if path.is_file() and path.name not in IGNORED):
        name = str(path.relative_to(out))
        found[name] = path.read_bytes()
        if path.suffix == ".pt":  # its pickle depends on which equal values are one object
            state = torch.load(path, weights_only=True)
            state.pop("log", None)  # the checksum of the log, which has times
            found[name] = _plain(state)
        if path.name == "log.jsonl":
            found[name] = [_without_time(line) for line in found[name].splitlines()]
    return found


def _without_time(line: bytes) -> Any:
    """Return a line of a training log without its time; one that a kill has torn as it is."""
    try:
        return {key: value for key, value in json.loads(line).items() if key not in ("seconds", "tokens_s")}
    except ValueError:
        return line


def differences(whole: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """Return what is lost, doubled, different or left over in a run folder, as sentences that begin with that word."""
    problems = []
    for stage in STAGES:
        name = f"{stage.name}.jsonl"
        expected, ids = (
            [json.loads(line)["item_id"] for line in each.get(name, b"").splitlines()] for each in (whole, found)
        )
        problems += [f"lost: {item} of {name}" for item in expected if item not in ids]
        problems += [f"doubled: {item} of {name}" for item in sorted(set(ids)) if ids.count(item) > 1]
    problems += [f"lost: {name}" for name in whole if name not in found]
    problems += [f"left over: {name}" for name in found if name not in whole]
    problems += [f"different: {name}" for name in whole if name in found and whole[name] != found[name]]
    return problems


def half_written(out: Path) -> list[str]:
    """Return temporary files, and stores whose last line is torn."""
    left = list(out.rglob("*.tmp"))
    left += [path for path in out.glob("*.jsonl") if (data := path.read_bytes()) and not data.endswith(b"\n")]
    return [f"half written: {path.relative_to(out)}" for path in left]


class Whole(NamedTuple):
    """The undisturbed run."""

    files: dict[str, Any]
    operations: int
    seconds: float


@functools.cache
def whole() -> Whole:
    """Run all stages twice without a fault, and check that both give the same files."""
    runs = []
    for name in ("whole", "again"):
        out = scratch("runs") / name
        shutil.rmtree(out, ignore_errors=True)
        ending = attempt(out)
        if ending.code:
            raise RuntimeError(f"the undisturbed run ended with {ending}")
        runs.append(Whole(contents(out), ending.operations, ending.seconds))
        shutil.rmtree(out)
    if found := differences(runs[0].files, runs[1].files):
        raise RuntimeError(f"two undisturbed runs differ: {found[:5]}")
    return runs[1]


@functools.cache
def old() -> Path:
    """Return the folder of a run of other settings, for runs that start over in a copy of it."""
    out = scratch("runs") / "old"
    shutil.rmtree(out, ignore_errors=True)
    if (ending := attempt(out, None, OLD)).code:  # the last of two values counts
        raise RuntimeError(f"the run of other settings ended with {ending}")
    return out


@functools.cache
def _old_files() -> dict[str, Any]:
    return contents(old())


def changed_old(out: Path) -> list[str]:
    """Return what is wrong with the old files of a run that starts over, before the new ones are whole."""
    if (out / ".restart" / ".whole.json").exists():  # the new files are taking their places
        return []
    visible = {name: value for name, value in contents(out).items() if not name.startswith(".")}
    if not (problems := differences(_old_files(), visible)) or not differences(whole().files, visible):
        return []
    return [f"not the old files: {problem}" for problem in problems[:5]]


def _finish(out: Path, problems: list[str], keep: Path) -> list[str]:
    """Compare a finished run; keep its folder if there is a problem."""
    problems = [*problems, *(differences(whole().files, contents(out)) if not problems else [])]
    if problems:
        shutil.copytree(out, keep / out.name, dirs_exist_ok=True)
    shutil.rmtree(out, ignore_errors=True)
    return [f"{out.name}: {problem}" for problem in problems]


def kill_case(seed: int, keep: Path) -> tuple[int, list[str]]:
    """Kill a run up to six times at random points, let it end, and compare. Return kills and problems.

    Every third run starts over in the folder of a run of other settings.
    """
    rng, out = random.Random(seed), scratch("runs") / f"kill-{seed}"
    shutil.rmtree(out, ignore_errors=True)
    done, kills, problems = 0.0, 0, []
    options: list[str] = []
    if over := seed % 3 == 0:
        shutil.copytree(old(), out)
        options = ["--no-resume"]
    while not problems:
        left = max(1 - done / whole().seconds, 0.1)
        number, before = rng.choices((signal.SIGKILL, signal.SIGTERM), (3, 1))[0], half_written(out)
        if kills == KILLS_OF_A_RUN:
            ending = attempt(out, None, *options)
        elif rng.random() < 0.5:
            faults = Faults(out, rng.randint(1, max(1, int(left * whole().operations))), number)
            ending = attempt(out, faults, *options)
        else:
            ending = attempt(out, None, *options, delay=rng.uniform(0, left * whole().seconds), number=number)
        done += ending.seconds
        if ending.code == 0:
            break
        if over and "was made with" in ending.error:  # killed before the new run had begun
            options = ["--no-resume"]
            continue
        problems = changed_old(out) if over else []
        options = []
        if ending.code == 128 + signal.SIGTERM:
            problems += [problem for problem in half_written(out) if problem not in before]
        elif ending.code != -signal.SIGKILL and ending.code != -signal.SIGTERM:
            problems += [f"an attempt after {kills} kills ended with {ending.code}: {ending.error}"]
        kills += 1
    return kills, _finish(out, problems, keep)


def disk_case(seed: int, keep: Path) -> tuple[int, list[str]]:
    """Let the disk fail once in a run, repeat the run, and compare."""
    rng, out = random.Random(seed), scratch("runs") / f"disk-{seed}"
    shutil.rmtree(out, ignore_errors=True)
    if rng.random() < 0.2:
        ending = attempt(out, file_size=rng.choice(FILE_SIZES))
    else:
        at, error = rng.randint(1, whole().operations), rng.choice(ERRORS)
        ending = attempt(out, Faults(out, at, error, error=True))
    problems = []
    if ending.code and not ending.expected:
        problems.append(f"the disk fault ended with {ending.code}: {ending.error}")
    again = attempt(out)
    if again.code:
        problems.append(f"the repeated run ended with {again.code}: {again.error}")
    return 1, _finish(out, problems, keep)


def _run(part: str, case: Any, goal: int, options: Options) -> Outcome:
    outcome = Outcome(part, "0 lost, doubled, different, left over", goal)
    whole(), _old_files()  # before the processes are forked
    numbers = itertools.count(options.seed * 1_000_000)
    remaining = ((next(numbers), options.out / "failed") for _ in iter(lambda: outcome.cases < goal, False))
    for cases, problems in share(case, remaining, options):
        outcome.cases += cases
        outcome.failures += problems
        if sys.stdout.isatty():
            print(f"\r{part}: {outcome.cases}", end="", flush=True)
    return outcome


def kills(options: Options) -> Outcome:
    """Kill runs at random points."""
    return _run("kills", kill_case, options.kills, options)


def disk(options: Options) -> Outcome:
    """Let writes, syncs and renames fail; a third as many cases as kills."""
    return _run("disk", disk_case, max(options.kills // 3, 1), options)

"""Build for the GPU, run the GPU tests, and measure every GPU metric of docs/benchmarks.md. Run by bench/gpu.sh.

  bench/gpu.sh 1|2|3|4     run one part, at most nine minutes; the results are in gpu-out/part-N.tar.gz
  bench/gpu.sh all         run the four parts, then print the whole table
  bench/gpu.sh merge DIR   merge the rows of the archives in DIR into bench/results/<device>/

Part 1: the gpu-marked tests, object_masks, sample_codes, decode_attention. Part 2: token_logprobs and attention_columns
with peers. Part 3: Janus-Pro-7B at 64 prompts. Part 4: Janus-Pro-7B at 1 prompt, skinny_linear, Janus-Pro-1B.

Every part first builds the extension in the checkout, for this GPU only, unless it is up to date. (`make clean install`
builds for all architectures again.) A step that exceeds its time limit is stopped and keeps the rows that it wrote. The
archive is rewritten after every step and every 20 seconds within a step.

Environment: OUT, folder of the archives (gpu-out); OSPO_FAST_COMMIT, commit of files that were copied without .git;
CUDA_HOME, the toolkit (else nvcc on the PATH, or /usr/local/cuda). Wheels in .whl/ are installed for the run only
(`make gpu-wheels` fetches the peers and omegaconf).

Exit codes: 0 all steps done, 1 a step failed or exceeded its limit, 2 wrong use or an unsuitable machine.
"""

import argparse
import contextlib
import ctypes
import gzip
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import xml.etree.ElementTree as ET
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import _source
import figures

from ospo_fast.errors import OspoError
from ospo_fast.records import check_writable, write_atomic

HERE = Path(__file__).resolve().parent
ROOT = _source.ROOT
WHEELS = ROOT / ".whl"
PART_SECONDS = 505.0  # of nine minutes; the rest is for checks, stopping a step, and the archive
PACK_SECONDS = 20.0
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
GRACE = 15.0  # seconds between SIGINT and SIGKILL of a step
MIN_SECONDS = 10.0  # a step with less time left is not started
TEST_SECONDS = 180  # limit of one test; several tests compile kernels at once
LOG_BYTES = 2**20
SHOWN = 30  # failed tests that a part lists at its end
COMMIT = re.compile(r"[0-9a-f]{7,40}")
TESTS = "gpu_tests"
MODULES = (
    "torch",
    "triton",
    "transformers",
    "numpy",
    "pybind11",
    "ninja",
    "pytest",
    "xdist",
    "pytest_timeout",
    "setuptools",
    "skimage",
    "matplotlib",
    "PIL",
)


@dataclass(frozen=True)
class Step:
    """One command of a part: a benchmark with its cases, or the tests."""

    name: str
    seconds: float
    cases: tuple[str, ...] = ()
    quick: tuple[str, ...] = ()  # cases of a rehearsal; empty: all


# Seconds are limits. A step may use the time that earlier steps left, but not the time of later ones.
PARTS: dict[int, tuple[Step, ...]] = {
    1: (Step(TESTS, 400), Step("object_masks", 40), Step("sample_codes", 40), Step("decode_attention", 60)),
    2: (
        Step("token_logprobs", 270, ("7B", "1B")),
        Step("attention_columns", 220, ("columns, ", "decoder, ")),
    ),
    3: (Step("generation", 500, ("Janus-Pro-7B, 64 prompts",), ("2 prompts",)),),
    4: (
        Step("generation", 220, ("Janus-Pro-7B, 1 prompt",), ("2 prompts",)),
        Step("skinny_linear", 50, ("4096 hidden, 2 rows, layer",)),
        Step("generation", 60, ("Janus-Pro-1B, 1 prompt",), ("2 prompts",)),
        Step("generation", 130, ("Janus-Pro-1B, 64 prompts",), ("2 prompts",)),
    ),
}


class RefusedError(Exception):
    """The run cannot start; the message is one sentence with its remedy."""


# ---------------------------------------------------------------- checks of the machine

PROBE = f"""
import ctypes, importlib.util, json
found = {{"missing": [name for name in {MODULES!r} if importlib.util.find_spec(name) is None]}}
if "torch" not in found["missing"]:
    import torch
    found |= {{"torch": torch.__version__, "cuda": torch.version.cuda, "card": None}}
    if torch.cuda.is_available():
        found |= {{"card": torch.cuda.get_device_name(0), "capability": torch.cuda.get_device_capability(0)}}
try:
    version = ctypes.c_int()
    ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    found["driver"] = version.value
except OSError:
    found["driver"] = 0
print(json.dumps(found))
"""


@dataclass
class Machine:
    """Software and GPU that a run depends on."""

    missing: list[str] = field(default_factory=list)  # modules
    torch: str = ""
    cuda: str | None = None  # version that torch was built for
    driver: int = 0  # newest CUDA version of the driver, such as 13000; 0: no driver
    card: str | None = None
    capability: tuple[int, int] = (0, 0)
    nvcc: str | None = None
    nvcc_release: str = ""
    nvcc_archs: frozenset[str] = frozenset()

    @property
    def arch(self) -> str:
        """Return the architecture of the GPU as in OSPO_FAST_CUDA_ARCHS, such as 90."""
        return "{}{}".format(*self.capability)

    def check(self, quick: bool) -> None:
        """Raise RefusedError if this machine cannot run the benchmarks; a rehearsal needs no GPU."""
        if self.missing:
            raise RefusedError(
                f"{sys.executable} lacks {', '.join(self.missing)}; install the extras pipeline and dev of this package"
            )
        if quick and self.card is None:
            return
        needed = max(_major(self.cuda), _major(self.nvcc_release))
        if self.driver and self.driver // 1000 < needed:
            raise RefusedError(
                f"the driver runs CUDA {self.driver // 1000}.{self.driver % 1000 // 10} and older, torch {self.torch} "
                f"and nvcc {self.nvcc_release or 'none'} need {needed}.0; update the driver or use an older toolkit"
            )
        if self.card is None:
            kind = f"CUDA {self.cuda}" if self.cuda else "no CUDA"
            raise RefusedError(
                f"torch {self.torch}, built for {kind}, finds no GPU; expected an NVIDIA GPU of sm_80 or newer"
            )
        if self.capability < (8, 0):
            raise RefusedError(f"{self.card} is of sm_{self.arch}; expected sm_80 (A100) or newer")
        if self.nvcc is None:
            raise RefusedError(
                "no nvcc was found in CUDA_HOME, on the PATH or in /usr/local/cuda; install the CUDA toolkit"
            )
        if self.arch not in self.nvcc_archs:
            raise RefusedError(
                f"{self.nvcc} {self.nvcc_release} cannot compile for sm_{self.arch} of {self.card}; "
                "install a newer toolkit or set CUDA_HOME"
            )


def _major(version: str | None) -> int:
    return int((version or "0").partition(".")[0] or 0)


def probe(env: dict[str, str]) -> Machine:
    """Inspect the machine. torch runs in another process, so that this one has no CUDA context."""
    done = subprocess.run([sys.executable, "-c", PROBE], env=env, cwd=ROOT, check=False, capture_output=True, text=True)
    if done.returncode:
        raise RefusedError(f"torch cannot be imported ({_last(done.stderr)}); reinstall it")
    found = json.loads(done.stdout.splitlines()[-1])
    machine = Machine(**{**found, "capability": tuple(found.get("capability", (0, 0)))})
    home = env.get("CUDA_HOME") or env.get("CUDA_PATH")
    places = [f"{home}/bin"] if home else [env.get("PATH", ""), "/usr/local/cuda/bin"]  # as in setup.py
    machine.nvcc = next(filter(None, (shutil.which("nvcc", path=place) for place in places)), None)
    if machine.nvcc:
        try:
            version, archs = (
                subprocess.run([machine.nvcc, option], check=True, capture_output=True, text=True).stdout
                for option in ("--version", "--list-gpu-code")
            )
        except (OSError, subprocess.CalledProcessError) as error:
            raise RefusedError(
                f"{machine.nvcc} does not run ({error}); reinstall the CUDA toolkit or set CUDA_HOME"
            ) from error
        release = re.search(r"release ([\d.]+)", version)
        machine.nvcc_release = release[1] if release else ""
        machine.nvcc_archs = frozenset(re.findall(r"sm_(\d+)", archs))
    return machine


def _last(text: str) -> str:
    return (text.strip().splitlines() or ["no reason given"])[-1][:200]


def commit(quick: bool) -> str:
    """Return the commit for the rows; RefusedError if it is unknown, or if `merge` would refuse the rows."""
    found = _source.commit()
    if not COMMIT.fullmatch(found.removesuffix("+")):
        raise RefusedError(
            f"these files are in no git checkout, and OSPO_FAST_COMMIT is {os.environ.get('OSPO_FAST_COMMIT', '')!r}; "
            "expected their commit, 7 to 40 hexadecimal digits"
        )
    if found.endswith("+") and not quick:
        raise RefusedError(f"files differ from commit {found[:-1]}, which the rows would name; commit them first")
    return found


def wheels(folder: Path) -> list[Path]:
    """List the wheels in a folder, if there is one; RefusedError for two versions of a package."""
    if folder.exists() and not folder.is_dir():
        raise RefusedError(f"{folder.name} is a file; expected a folder of wheels, which `make gpu-wheels` makes")
    found = sorted(folder.glob("*.whl"))
    names = Counter(re.sub(r"[-_.]+", "-", path.name.partition("-")[0]).lower() for path in found)
    if twice := [name for name, count in names.items() if count > 1]:
        raise RefusedError(f"{folder.name}/ has several versions of {', '.join(twice)}; keep one wheel of each package")
    return found


def install(found: Sequence[Path], site: Path) -> None:
    """Install wheels into a folder for PYTHONPATH; RefusedError if pip fails."""
    options = [
        "--quiet",
        "--no-index",
        "--no-deps",
        "--no-compile",
        "--disable-pip-version-check",
        "--target",
        str(site),
    ]
    command = [sys.executable, "-m", "pip", "install", *options, *map(str, found)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise RefusedError(
            f"pip cannot install the wheels of .whl/ ({_last(done.stderr)}); run `make gpu-wheels` again, or "
            "remove the folder"
        )


# ---------------------------------------------------------------- running a part


_LIBC = ctypes.CDLL(None)  # loaded before a fork


def _own_group() -> None:
    """In the process of a step: start a process group, and (on Linux) die with the parent process."""
    os.setpgid(0, 0)
    if sys.platform == "linux":
        _LIBC.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


class Part:
    """A running part: its folder, log, states of its steps, and archive."""

    def __init__(self, number: int, out: Path, env: dict[str, str], machine: Machine, quick: bool, source: str) -> None:
        self.number, self.env, self.machine, self.quick, self.source = number, env, machine, quick, source
        self.archive = out / f"part-{number}.tar.gz"
        self.folder = Path(tempfile.mkdtemp(prefix="ospo-fast-"))
        self.results = self.folder / "results"
        self.steps: list[dict[str, Any]] = []
        self._begin = time.monotonic()
        self._log = (self.folder / "log.txt").open("w")

    def say(self, line: str) -> None:
        """Print and log a line."""
        print(line, flush=True)
        if not self._log.closed:
            self._log.write(line + "\n")

    def run(self, steps: Sequence[Step] | None = None) -> bool:
        """Run steps (those of the part) until the time of the part is over; return whether all are done."""
        steps = PARTS[self.number] if steps is None else steps
        try:
            if all(self._step(name, 180, command) for name, command in self._preparation().items()):
                for i, step in enumerate(steps):
                    reserved = sum(later.seconds for later in steps[i + 1 :])
                    self._step(step.name, step.seconds, self._command(step), reserved)
                    if step.name == TESTS and (self.folder / f"{TESTS}.xml").exists():
                        self._step("counts of the tests", 60, self._counts(self.steps[-1]["state"]))
        finally:
            self._log.close()
            try:
                self.pack()
            finally:
                shutil.rmtree(self.folder)
        return all(step["state"] == "done" for step in self.steps)

    def _preparation(self) -> dict[str, list[str]]:
        """Commands that run before the steps."""
        build = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace", "--build-temp", "build/gpu"]
        if self.machine.card is None:  # a rehearsal uses an existing build, for any architecture
            built = list(ROOT.glob("ospo_fast/_C.*.so")) and not (ROOT / "build" / "gpu").exists()
            return {} if built else {"build": build}
        return {"build": build, "kernels": [sys.executable, "-c", "import _gpu_day; _gpu_day.check_kernels()"]}

    def _command(self, step: Step) -> list[str]:
        if step.name == TESTS:
            workers = max(1, min(8, (os.cpu_count() or 1) // 2))
            options = ["-m", "gpu", "-n", str(workers), "-q", "--tb=short", "-p", "no:cacheprovider"]
            # The timeout runs in a thread and ends the worker: during a hanging kernel no signal handler runs.
            options += [f"--timeout={TEST_SECONDS}", "--timeout-method=thread"]
            options += [f"--junitxml={self.folder / TESTS}.xml", "-o", "junit_logging=no"]
            return [sys.executable, "-m", "pytest", *options]
        cases = step.quick if self.quick else step.cases
        options = [*(["--quick"] if self.quick else []), *(word for case in cases for word in ("--case", case))]
        return [sys.executable, "bench/run.py", "--only", step.name, "--out", str(self.results), *options]

    def _counts(self, state: str) -> list[str]:
        complete = state in ("done", "failed with 1")  # exit codes of a complete pytest run
        code = "import sys, _gpu_day; _gpu_day.record_tests(*sys.argv[1:])"
        flags = [str(int(flag)) for flag in (self.quick, complete)]
        return [sys.executable, "-c", code, f"{self.folder / TESTS}.xml", str(self.results), *flags]

    def _step(self, name: str, seconds: float, command: list[str], reserved: float = 0.0) -> bool:
        left = PART_SECONDS - GRACE - (time.monotonic() - self._begin)
        limit = min(seconds, max(left - reserved, MIN_SECONDS), left)
        if limit < MIN_SECONDS:
            self.say(f"== {name}: not started, the time of part {self.number} is over")
            self.steps.append({"name": name, "state": "not started", "seconds": 0.0})
            return False
        self.say(f"== {name}: at most {limit:.0f} s: {shlex.join(command)}")
        begin = time.monotonic()
        state = self._watch(command, limit)
        took = time.monotonic() - begin
        self.say(f"== {name}: {state}, {took:.0f} s")
        self.steps.append({"name": name, "state": state, "seconds": round(took, 1)})
        self.pack()
        return state == "done"

    def _watch(self, command: list[str], limit: float) -> str:
        """Run a command and log its output; at the limit, end it and its child processes."""
        process = subprocess.Popen(
            command, cwd=ROOT, env=self.env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, errors="replace", preexec_fn=_own_group,  # noqa: PLW1509 - no other thread runs between two steps
        )  # fmt: skip

        def show() -> None:
            assert process.stdout is not None
            for line in process.stdout:
                self.say(line.rstrip("\n"))

        reader, end = threading.Thread(target=show, daemon=True), time.monotonic() + limit
        reader.start()
        try:
            while process.poll() is None and time.monotonic() < end:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(min(PACK_SECONDS, max(end - time.monotonic(), 0.0)))
                self.pack()  # keeps the rows so far, even if this process is killed
            code = process.poll()
        finally:
            self._end(process)
        reader.join(GRACE)
        return f"stopped after {limit:.0f} s" if code is None else "done" if code == 0 else f"failed with {code}"

    @staticmethod
    def _end(process: "subprocess.Popen[str]") -> None:
        """End a step and its child processes, first by SIGINT, on which pytest writes its report.

        Signals are ignored meanwhile, because a process that is left would occupy the GPU.
        """
        before = {sign: signal.signal(sign, signal.SIG_IGN) for sign in SIGNALS}
        try:
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(GRACE)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        finally:
            for sign, handler in before.items():
                signal.signal(sign, handler)

    def pack(self) -> None:
        """Write the archive of all files so far, atomically."""
        if not self._log.closed:
            self._log.flush()
        manifest = {
            "part": self.number, "quick": self.quick, "commit": self.source, "card": self.machine.card,
            "driver": self.machine.driver, "torch": self.machine.torch, "nvcc": self.machine.nvcc_release,
            "steps": self.steps,
        }  # fmt: skip
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w:gz") as archive:
            _add(archive, "manifest.json", json.dumps(manifest, indent=2).encode())
            for path in self.files():
                data = path.read_bytes()
                if path.name == "log.txt" and len(data) > LOG_BYTES:
                    data = data[: LOG_BYTES // 4] + b"\n...\n" + data[-LOG_BYTES // 4 * 3 :]
                if path.suffix == ".xml":
                    data = re.sub(rb' hostname="[^"]*"', b"", data)
                _add(archive, path.name, data)
        write_atomic(self.archive, packed.getvalue())

    def files(self) -> list[Path]:
        """List the files so far: log, test report, rows and plots."""
        files = [*self.folder.glob("*.txt"), *self.folder.glob("*.xml")]
        return files + sorted(path for path in self.results.glob("*/*") if path.suffix in (".jsonl", ".png"))


def _add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size, entry.mtime = len(data), int(time.time())
    archive.addfile(entry, io.BytesIO(data))


def check_kernels() -> None:
    """Exit with 1 if an operation would run without its kernel, since PyTorch would be measured in its place."""
    from ospo_fast.ops._dispatch import backends

    if missing := without_kernel(backends("cuda")):
        sys.exit("\n".join(missing))
    print("all kernels are available")


def without_kernel(table: dict[str, list[tuple[str, bool, str]]]) -> list[str]:
    """Return why operations cannot run their CUDA or Triton kernels, from a table of backends."""
    missing = []
    for op, rows in table.items():
        reasons = {name: reason for name, _, reason in rows if name in ("cuda", "triton")}
        if reasons and not any(available for name, available, _ in rows if name in reasons):
            missing.append(f"{op}: {'; '.join(reasons.values())}")
    return missing


def record_tests(xml: str, out: str, quick: str, complete: str) -> None:
    """Write the row of the tests from pytest's report: counts by outcome, and the names of failed tests."""
    import _measure

    _measure.rehearse(bool(int(quick)))
    cases = list(ET.parse(xml).getroot().iter("testcase"))

    def named(*kinds: str) -> list[str]:
        """List tests once: a test that ends its worker is reported twice."""
        found = (f"{c.get('classname')}::{c.get('name')}" for c in cases if any(c.find(k) is not None for k in kinds))
        return list(dict.fromkeys(found))

    failed, skipped = named("failure", "error"), named("skipped")
    total = len({(case.get("classname"), case.get("name")) for case in cases})
    seconds = sum(float(case.get("time", 0)) for case in cases)
    timing = _measure.timing_of([seconds * 1e3])
    counts = {"passed": total - len(failed) - len(skipped), "failed": len(failed), "skipped": len(skipped)}
    more = {"complete": bool(int(complete)), "failures": failed}
    row = _measure.row(TESTS, "pytest -m gpu", {}, "", timing, **counts, **more)
    _measure.write([row], Path(out), TESTS)


def run_parts(numbers: Sequence[int], quick: bool) -> int:
    """Run parts one after the other; return the exit code."""
    source, found = commit(quick), wheels(WHEELS)
    out = Path(os.environ.get("OUT") or ROOT / "gpu-out").resolve()
    with tempfile.TemporaryDirectory(prefix="ospo-fast-wheels-") as site:
        paths = [ROOT, HERE, *([site] if found else []), *filter(None, [os.environ.get("PYTHONPATH")])]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths)), "PYTHONUNBUFFERED": "1"}
        env["OSPO_FAST_COMMIT"] = source
        if quick:
            env.setdefault("OMP_NUM_THREADS", "1")  # threads slow down small sizes on a CPU
        machine = probe(env)
        machine.check(quick)
        if found:
            install(found, Path(site))
        try:
            check_writable(out)
        except OspoError as error:
            raise RefusedError(f"OUT: {str(error).rstrip('.')}; set OUT to another folder") from error
        if machine.nvcc:
            env["OSPO_FAST_CUDA"] = "1"
            env["OSPO_FAST_CUDA_ARCHS"] = machine.arch if machine.card else "90"
        else:
            env["OSPO_FAST_CUDA"] = "0"
        done, rehearsed = True, set[str]()
        for number in numbers:
            part = Part(number, out, env, machine, quick, source)
            steps = PARTS[number]
            if quick:  # each benchmark once, in the first part that has it
                steps = tuple({step.name: step for step in steps if step.name not in rehearsed}.values())
                rehearsed |= {step.name for step in steps}
            print(f"== part {number} on {machine.card or 'the CPU'}, commit {source}", flush=True)
            done = part.run(steps) and done
            print(_summary(part), flush=True)
        if len(numbers) > 1:
            rows = [row for n in numbers for row in read_archive(out / f"part-{n}.tar.gz").rows]
            print(figures.text(figures.Results(rows)), flush=True)
    return 0 if done else 1


def _summary(part: Part) -> str:
    """Return what a part prints last: failures, archive, and its metrics."""
    rows = read_archive(part.archive).rows
    failed = [name for row in rows if row["op"] == TESTS for name in row["failures"]]
    lines = [f"failed: {name}" for name in failed[:SHOWN]]
    lines += [f"and {len(failed) - SHOWN} more, in the archive"] if len(failed) > SHOWN else []
    lines += [f"{step['name']}: {step['state']}" for step in part.steps if step["state"] != "done"]
    lines.append(f"{part.archive}: {part.archive.stat().st_size / 1e3:.0f} kB")
    return "\n".join([*lines, figures.text(figures.Results(rows), part.number)])


# ---------------------------------------------------------------- merging


@dataclass(frozen=True)
class Archive:
    """The archive of a part: rows by file name, and plots."""

    path: Path
    manifest: dict[str, Any]
    files: dict[str, list[dict[str, Any]]]
    plots: dict[str, bytes]

    @property
    def rows(self) -> list[dict[str, Any]]:
        """Return all rows."""
        return [row for rows in self.files.values() for row in rows]


def read_archive(path: Path) -> Archive:
    """Read an archive of a part; RefusedError if it is not one."""
    manifest, files, plots = None, {}, {}
    try:
        # Decompress all of it to verify the checksum; tarfile alone accepts some damaged files.
        with tarfile.open(fileobj=io.BytesIO(gzip.decompress(path.read_bytes()))) as archive:
            for entry in archive:
                name, data = entry.name, archive.extractfile(entry)
                if data is None or not re.fullmatch(r"\w+\.(json|jsonl|png|txt|xml)", name):
                    raise ValueError(f"it holds {name!r}")
                if name == "manifest.json":
                    manifest = json.load(data)
                elif name.endswith(".jsonl"):
                    files[name] = figures.parse_rows(name, data.read().decode())
                elif name.endswith(".png"):
                    plots[name] = data.read()
        if not isinstance(manifest, dict):
            raise ValueError("it has no manifest.json")
    except (OSError, EOFError, ValueError, tarfile.TarError, zlib.error) as error:
        raise RefusedError(f"{path} cannot be read ({error}); expected an archive of bench/gpu.sh") from error
    return Archive(path, manifest, files, plots)


def _group(row: dict[str, Any]) -> str:
    """Key of the rows that are measured and replaced together, since ratios compare rows of one run."""
    return json.dumps([row["op"], row["shapes"], row["dtype"]], sort_keys=True)


def merge_rows(old: list[dict[str, Any]], new: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], int]:
    """Merge rows; of two runs of a group the later one stays. Returns the rows and the number of old rows removed."""

    def latest(rows: list[dict[str, Any]]) -> dict[str, str]:
        found: dict[str, str] = {}
        for row in rows:
            found[_group(row)] = max(row["date"], found.get(_group(row), ""))
        return found

    before, after = latest(old), latest(new)
    kept = [row for row in old if before[_group(row)] > after.get(_group(row), "")]
    added = [row for row in new if after[_group(row)] >= before.get(_group(row), "")]
    return [*kept, *added], len(old) - len(kept)


def merge(folder: Path, results: Path = HERE / "results") -> int:
    """Merge the rows of all archives in a folder into the results, or none if one archive is refused."""
    archives = [read_archive(path) for path in sorted(folder.glob("*.tar.gz"))]
    if not archives:
        raise RefusedError(f"{folder} has no archive (part-N.tar.gz); expected the output folder of bench/gpu.sh")
    for archive in archives:
        for row in archive.rows:
            if row.get("quick") or not row.get("driver"):
                raise RefusedError(f"{archive.path} is of a rehearsal; expected rows of a run on a GPU")
            if not COMMIT.fullmatch(row["commit"]):
                raise RefusedError(
                    f"{archive.path} has rows of commit {row['commit']!r}; expected a commit without changes: "
                    "commit and measure again"
                )
            if _source.device_folder(results, row["device"]) == results:
                raise RefusedError(f"{archive.path}: a row's device is {row['device']!r}; expected the name of a GPU")
    written: dict[Path, bytes] = {}
    current: dict[Path, list[dict[str, Any]]] = {}
    messages = []
    for archive in sorted(archives, key=lambda archive: max((row["date"] for row in archive.rows), default="")):
        for name, device in sorted({(name, row["device"]) for name, rows in archive.files.items() for row in rows}):
            path = _source.device_folder(results, device) / name
            if path not in current:
                try:
                    current[path] = figures.parse_rows(str(path), path.read_text()) if path.exists() else []
                except ValueError as error:
                    raise RefusedError(f"{error}; fix or delete the line, then merge again") from error
            merged, removed = merge_rows(current[path], [row for row in archive.files[name] if row["device"] == device])
            if merged == current[path]:
                messages.append(f"{path}: nothing new in {archive.path.name}")
                continue
            messages.append(
                f"{path}: {len(merged) - len(current[path]) + removed} rows added, {removed} of earlier runs removed"
            )
            current[path] = merged
            written[path] = "".join(json.dumps(row) + "\n" for row in merged).encode()
            plot = archive.plots.get(f"{path.stem}.png")
            if plot is not None and max(merged, key=lambda row: str(row["date"])) in archive.files[name]:
                written[path.with_suffix(".png")] = plot
    for path, data in written.items():
        write_atomic(path, data)
    print("\n".join(messages))
    print("run python bench/figures.py to update the table in docs/benchmarks.md")
    return 0


class Parser(argparse.ArgumentParser):
    """Argument parser that prints errors in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        """Exit with code 2."""
        self.exit(2, f"gpu.sh: {message}; see bench/gpu.sh --help\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line and run it; return the exit code."""
    parser = Parser(prog="bench/gpu.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "what", metavar="PART", choices=[*map(str, PARTS), "all", "merge"], help="1, 2, 3, 4, all, merge"
    )
    parser.add_argument("folder", metavar="DIR", nargs="?", type=Path, help="folder of the archives to merge")
    parser.add_argument("--quick", action="store_true", help="rehearse with small sizes, also without a GPU")
    options = parser.parse_args(arguments)
    if (options.what == "merge") != (options.folder is not None):
        parser.error("expected a folder with merge, and only with merge")
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the parent process may have it ignored
    for sign in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(
            sign, lambda number, _: sys.exit(128 + number)
        )  # an exception, so that the processes of the step end too
    try:
        if options.what == "merge":
            return merge(options.folder)
        return run_parts(list(PARTS) if options.what == "all" else [int(options.what)], options.quick)
    except RefusedError as error:
        print(f"gpu.sh: {error}", file=sys.stderr)
        return 2
    except (OSError, OspoError) as error:  # such as a full disk
        print(f"gpu.sh: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("gpu.sh: interrupted; the archive holds the rows so far", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())

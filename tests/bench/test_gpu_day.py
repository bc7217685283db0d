"""The GPU day: refusals, parts with their archives, merging, and a rehearsal of everything."""

import contextlib
import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tarfile
import time
from pathlib import Path
from typing import Any

import _gpu_day
import figures
import pytest
from _gpu_day import Machine, Part, RefusedError, Step

ROOT = Path(__file__).parents[2]
COMMIT = "0123456789ab"
CARD = "NVIDIA H100 80GB HBM3"
H100 = Machine(
    torch="2.11.0+cu130", cuda="13.0", driver=13000, card=CARD, capability=(9, 0), nvcc="/cuda/bin/nvcc",
    nvcc_release="13.0", nvcc_archs=frozenset({"80", "90", "100"}),
)  # fmt: skip


def changed(**more: Any) -> Machine:
    return Machine(**{**H100.__dict__, **more})


# ---------------------------------------------------------------- what is refused


def test_unsuitable_machines_are_refused() -> None:
    for machine, message in (
        (
            changed(card=None, cuda=None, torch="2.13.0+cpu", driver=0),
            "built for no CUDA, finds no GPU; expected an NVIDIA",
        ),
        (changed(card=None, driver=0), "built for CUDA 13.0, finds no GPU"),
        (changed(nvcc=None, nvcc_archs=frozenset()), "no nvcc was found"),
        (changed(card="Tesla V100", capability=(7, 0)), "Tesla V100 is of sm_70; expected sm_80"),
        (changed(driver=12040), "the driver runs CUDA 12.4 and older, torch 2.11.0+cu130 and nvcc 13.0 need 13.0"),
        (changed(driver=12040, card=None), "update the driver or use an older toolkit"),  # torch sees no GPU then
        (changed(driver=12040, cuda="12.8"), "need 13.0"),  # because of nvcc
        (changed(capability=(12, 0)), "cannot compile for sm_120"),
        (changed(missing=["xdist"]), "lacks xdist; install the extras"),
    ):
        with pytest.raises(RefusedError) as refusal:
            machine.check(quick=False)
        assert message in str(refusal.value)
        assert "\n" not in str(refusal.value)


def test_suitable_machines() -> None:
    H100.check(quick=False)
    changed(driver=13010).check(quick=False)
    changed(driver=13000, nvcc_release="13.2").check(quick=False)  # minor versions are compatible
    changed(card=None, nvcc=None, driver=0).check(quick=True)


def gpu_sh(*arguments: str, cwd: Path = ROOT, **env: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("OSPO_FAST_")}
    given = {"PYTHON": sys.executable, "OSPO_FAST_COMMIT": COMMIT, **env}
    command = ["bash", str(cwd / "bench" / "gpu.sh"), *arguments]
    return subprocess.run(command, check=False, cwd=cwd, env=clean | given, capture_output=True, text=True)


def refused(done: subprocess.CompletedProcess[str], message: str) -> None:
    """Check for exit code 2 and a message of one line."""
    assert done.returncode == 2, done.stdout + done.stderr
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("gpu.sh: ")
    assert done.stdout == ""


@pytest.fixture
def fake_torch(tmp_path: Path) -> Any:
    """Makes an environment for gpu.sh with a torch that reports this GPU."""

    def make(card: str | None, capability: tuple[int, int] = (0, 0)) -> dict[str, str]:
        package = tmp_path / "stub" / "torch"
        package.mkdir(parents=True, exist_ok=True)
        (package / "__init__.py").write_text(
            "import types\n__version__ = '2.11.0+cu130'\nversion = types.SimpleNamespace(cuda='13.0')\n"
            f"cuda = types.SimpleNamespace(is_available=lambda: {card is not None},\n"
            f"    get_device_name=lambda _: {card!r}, get_device_capability=lambda _: {capability})\n"
        )
        return {"PYTHONPATH": str(package.parent), "OUT": str(tmp_path / "out")}

    return make


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The sources, without .git and without built files."""
    folder = tmp_path / "copy"
    ignore = shutil.ignore_patterns("__pycache__", "*.so", "results")
    for name in ("bench", "csrc", "docs", "kernels", "ospo_fast", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignore)
    for name in ("pyproject.toml", "setup.py", "README.md"):
        shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_a_refused_machine_gets_one_sentence_and_no_output(copy: Path, fake_torch: Any, tmp_path: Path) -> None:
    library = tmp_path / "lib" / "libcuda.so.1"
    library.parent.mkdir()

    def run(card: str | None, capability: tuple[int, int], driver: int) -> subprocess.CompletedProcess[str]:
        source = f'extern "C" int cuDriverGetVersion(int* version) {{ *version = {driver}; return 0; }}\n'
        command = ["g++", "-shared", "-fPIC", "-x", "c++", "-", "-o", str(library)]
        subprocess.run(command, input=source, text=True, check=True)
        env = {"CUDA_HOME": str(tmp_path / "cuda"), "LD_LIBRARY_PATH": str(library.parent)}
        return gpu_sh("1", cwd=copy, **env, **fake_torch(card, capability))

    refused(run("Tesla V100", (7, 0), 13000), "sm_70; expected sm_80 (A100) or newer")
    refused(run(None, (0, 0), 12020), "the driver runs CUDA 12.2 and older")
    refused(run(None, (0, 0), 13000), "finds no GPU")
    refused(run(CARD, (9, 0), 13000), "no nvcc was found")
    nvcc = tmp_path / "cuda" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    for text in ("no program", "#!/bin/sh\nexit 3\n"):
        nvcc.write_text(text)
        nvcc.chmod(0o755)
        refused(run(CARD, (9, 0), 13000), "does not run")
    nvcc.write_text("#!/bin/sh\necho sm_80 release 13.0\n")
    refused(run(CARD, (9, 0), 13000), "cannot compile for sm_90")
    assert not (tmp_path / "out").exists()


def test_wrong_use(tmp_path: Path) -> None:
    for arguments, message in (
        (("5",), "invalid choice: '5'"),
        ((), "the following arguments are required: PART"),
        (("merge",), "expected a folder with merge"),
        (("1", "folder"), "expected a folder with merge, and only with merge"),
        (("merge", "/nowhere"), "/nowhere has no archive"),
        (("1", "--fast"), "unrecognized arguments: --fast"),
    ):
        refused(gpu_sh(*arguments), message)
    refused(gpu_sh("1", PYTHON="/nowhere/python"), "interpreter /nowhere/python was not found")
    old = tmp_path / "python"
    old.write_text("#!/bin/sh\ncase $1 in --version) echo Python 3.9.18;; *) exit 1;; esac\n")
    old.chmod(0o755)
    refused(gpu_sh("1", PYTHON=str(old)), "got Python 3.9.18; expected Python 3.10 or newer")


def test_paths_are_relative_to_the_caller(tmp_path: Path) -> None:
    archive(tmp_path / "came" / "part-1.tar.gz", {"a.jsonl": [result("a", quick=True)]})
    (tmp_path / "python").symlink_to(sys.executable)
    (tmp_path / "gpu.sh").symlink_to(ROOT / "bench" / "gpu.sh")
    env = {**os.environ, "PYTHON": "./python"}
    for script in (ROOT / "bench" / "gpu.sh", tmp_path / "gpu.sh"):
        command = ["bash", str(script), "merge", "came"]
        done = subprocess.run(command, check=False, cwd=tmp_path, env=env, capture_output=True, text=True)
        refused(done, "came/part-1.tar.gz is of a rehearsal")


def test_uncommitted_changes_are_refused(copy: Path, fake_torch: Any) -> None:
    """`merge` would refuse their rows after the measurement."""

    def git(*arguments: str) -> None:
        identity = ("-c", "user.name=a", "-c", "user.email=a@b.c")
        subprocess.run(["git", *identity, *arguments], cwd=copy, check=True, capture_output=True)

    git("init", "-q")
    git("add", "setup.py", "bench/gpu.sh")
    git("commit", "-qm", "first")
    env = fake_torch(None) | {"OSPO_FAST_COMMIT": ""}
    refused(gpu_sh("1", cwd=copy, **env), "finds no GPU")
    (copy / "setup.py").write_text("# changed")
    refused(gpu_sh("1", cwd=copy, **env), "commit them first")


def test_unknown_commits_wrong_wheels_and_blocked_folders_are_refused(copy: Path, fake_torch: Any) -> None:
    env = fake_torch(None)
    for wrong in ("", "main", "0123456789abcdefg"):
        refused(gpu_sh("--quick", "1", cwd=copy, **env | {"OSPO_FAST_COMMIT": wrong}), "expected their commit")
    (copy / ".whl").mkdir()
    for name in ("liger_kernel-0.8.5", "liger_kernel-0.8.4", "omegaconf-2.4.0"):
        (copy / ".whl" / f"{name}-py3-none-any.whl").touch()
    refused(gpu_sh("--quick", "1", cwd=copy, **env), ".whl/ has several versions of liger-kernel")
    (copy / ".whl" / "liger_kernel-0.8.4-py3-none-any.whl").unlink()
    refused(gpu_sh("--quick", "1", cwd=copy, **env), "pip cannot install the wheels of .whl/")  # the files are empty
    (copy / "blocked").touch()
    shutil.rmtree(copy / ".whl")
    (copy / ".whl").touch()
    refused(gpu_sh("--quick", "1", cwd=copy, **env), ".whl is a file; expected a folder")
    (copy / ".whl").unlink()
    refused(gpu_sh("--quick", "1", cwd=copy, **env | {"OUT": str(copy / "blocked")}), "OUT: Cannot write")
    assert not (copy / "gpu-out").exists()
    assert not (copy / "build").exists()


# ---------------------------------------------------------------- a part


@pytest.fixture
def part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes part 9 with these steps, each a line of Python; RESULTS is replaced by the folder of its rows."""

    def make(*steps: tuple[str, float, str]) -> Part:
        made = Part(9, tmp_path, dict(os.environ), H100, False, COMMIT)
        code = {name: text.replace("RESULTS", repr(str(made.results))) for name, _, text in steps}
        monkeypatch.setitem(_gpu_day.PARTS, 9, tuple(Step(name, seconds) for name, seconds, _ in steps))
        monkeypatch.setattr(made, "_preparation", lambda: {"build": [sys.executable, "-c", "pass"]})
        monkeypatch.setattr(made, "_command", lambda step: [sys.executable, "-c", code[step.name]])
        return made

    monkeypatch.setattr(_gpu_day, "MIN_SECONDS", 0.5)
    monkeypatch.setattr(_gpu_day, "GRACE", 1.0)
    return make


def files(archive: Path) -> dict[str, bytes]:
    with tarfile.open(archive) as opened:
        return {entry.name: opened.extractfile(entry).read() for entry in opened}  # type: ignore[union-attr]


WRITE = "import pathlib; p = pathlib.Path(RESULTS, 'card'); p.mkdir(parents=True); (p / 'op.jsonl').write_text('1')"


def test_a_stopped_step_keeps_its_rows_and_the_next_one_runs(part: Any, tmp_path: Path) -> None:
    child = "import subprocess, sys, time; subprocess.Popen(['sleep', '60']); " + WRITE + "; time.sleep(60)"
    made = part(("slow", 2.0, child), ("next", 5.0, "print('here')"), ("wrong", 5.0, "raise ValueError('no')"))
    begin = time.monotonic()
    assert not made.run()
    assert time.monotonic() - begin < 55  # the step would take a minute
    states = {step["name"]: step["state"] for step in made.steps}
    assert states == {"build": "done", "slow": "stopped after 2 s", "next": "done", "wrong": "failed with 1"}
    found = files(tmp_path / "part-9.tar.gz")
    assert set(found) == {"manifest.json", "log.txt", "op.jsonl"}
    assert b"ValueError: no" in found["log.txt"]
    manifest = json.loads(found["manifest.json"])
    assert (manifest["commit"], manifest["card"], manifest["steps"]) == (COMMIT, CARD, made.steps)
    assert not made.folder.exists()


def test_a_step_without_time_is_not_started(part: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made = part(("late", 60.0, "import time; time.sleep(60)"), ("later", 60.0, "pass"))
    monkeypatch.setattr(_gpu_day, "PART_SECONDS", 4.0)
    monkeypatch.setattr(made, "_preparation", dict)
    monkeypatch.setattr(_gpu_day, "MIN_SECONDS", 1.5)  # too little is left after the first step
    assert not made.run()
    assert [step["state"] for step in made.steps] == ["stopped after 2 s", "not started"]


def test_time_is_reserved_for_later_steps(part: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_gpu_day, "PART_SECONDS", 9.0)
    made = part(("long", 60.0, "import time; time.sleep(60)"), ("late", 6.0, "print('here')"))
    assert not made.run()
    assert [step["state"] == "done" for step in made.steps] == [True, False, True]


def test_rows_are_archived_while_a_step_runs(part: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_gpu_day, "PACK_SECONDS", 0.3)
    made, seen = part(("slow", 20.0, WRITE + "; import time; time.sleep(2)")), []
    pack = made.pack

    def watched() -> None:
        pack()
        if not made.steps[1:]:
            seen.append("op.jsonl" in files(tmp_path / "part-9.tar.gz"))

    monkeypatch.setattr(made, "pack", watched)
    assert made.run()
    assert True in seen


SLEEPER = """
import os, sys, _gpu_day
from _gpu_day import Machine, Part, Step
from pathlib import Path

folder, seconds = sys.argv[1:]
_gpu_day.PARTS[9] = (Step("sleep", 60.0),)
_gpu_day.GRACE = 1.0
made = Part(9, Path(folder), dict(os.environ), Machine(), False, "0123456789ab")
made._preparation = dict
code = "import subprocess, sys, time; subprocess.Popen(['sleep', sys.argv[1]]); time.sleep(60)"
made._command = lambda step: [sys.executable, "-c", code, seconds]
_gpu_day.run_parts = lambda *_: int(not made.run())
sys.exit(_gpu_day.main(["1"]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize("signs", [["INT"], ["HUP"], ["TERM", "TERM"], ["KILL"]], ids="-".join)
def test_the_step_ends_with_its_part(signs: list[str], tmp_path: Path) -> None:
    """Started as in the background of a script, where SIGINT is ignored. A process that is left occupies the GPU."""
    seconds = f"61.{random.SystemRandom().randrange(10**9)}"  # identifies these processes
    process = subprocess.Popen(
        ["bash", "-c", 'trap "" INT; exec "$@"', "bash", sys.executable, "-c", SLEEPER, str(tmp_path), seconds],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "bench")])}, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        while f"sleep {seconds}" not in " ".join(running(seconds).values()):
            assert process.poll() is None
            time.sleep(0.05)
        step = [pid for pid in running(seconds) if pid != process.pid]
        assert len(step) == 2  # the step and its child
        for name in signs:
            process.send_signal(getattr(signal, f"SIG{name}"))
            time.sleep(0.2)
        assert process.wait(20) == {"INT": 130, "TERM": 143, "HUP": 129, "KILL": -9}[signs[0]]
        if signs == ["KILL"]:  # the step dies with its parent; its child may remain
            time.sleep(0.5)
            assert [command.split()[0] for command in running(seconds).values()] in ([], ["sleep"])
        else:
            assert not running(seconds)
            assert "manifest.json" in files(tmp_path / "part-9.tar.gz")
    finally:
        for pid in running(seconds):
            os.kill(pid, signal.SIGKILL)


def running(word: str) -> dict[int, str]:
    """The processes with this word in their command, and their commands."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            command = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
            if word in command:
                found[int(path.parent.name)] = command
    return found


def test_operations_without_their_kernel_are_reported() -> None:
    table = {
        "object_masks": [
            ("cuda", False, "ospo_fast._C was built without CUDA"),
            ("cpp", False, "a CPU"),
            ("torch", True, ""),
        ],
        "decode_attention": [("triton", True, ""), ("flash_attn", False, "not installed"), ("torch", True, "")],
        "preference_loss": [("torch", True, "")],
    }
    assert _gpu_day.without_kernel(table) == ["object_masks: ospo_fast._C was built without CUDA"]


def test_nothing_is_measured_after_a_failed_build(part: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made = part(("measured", 5.0, "pass"))
    broken = [sys.executable, "-c", "raise SystemExit('ptxas: out of order')"]
    monkeypatch.setattr(made, "_preparation", lambda: {"build": broken})
    assert not made.run()
    assert [step["state"] for step in made.steps] == ["failed with 1"]


def test_archives_are_small_and_without_host_name(part: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_gpu_day, "LOG_BYTES", 4000)
    made = part(("loud", 20.0, "import random\nfor _ in range(999): print(random.random())"))
    (made.folder / "gpu_tests.xml").write_text('<testsuites><testsuite hostname="secret" tests="0"/></testsuites>')
    assert made.run()
    found = files(tmp_path / "part-9.tar.gz")
    assert len(found["log.txt"]) < 4100
    assert b"secret" not in found["gpu_tests.xml"]
    assert (tmp_path / "part-9.tar.gz").stat().st_size < 4 * 2**20


def test_a_part_ends_with_failed_tests_and_metrics(part: Any) -> None:
    failures = [f"tests.a::test_{i}" for i in range(40)]
    row = result("gpu_tests", "pytest -m gpu", passed=1, failed=40, skipped=0, complete=True, failures=failures)
    made = part(("tests", 20.0, WRITE.replace("op.jsonl", "gpu_tests.jsonl").replace("'1'", repr(json.dumps(row)))))
    assert made.run()
    made.number = 1  # the part with metrics of tests
    lines = _gpu_day._summary(made).splitlines()
    assert lines[:30] == [f"failed: {name}" for name in failures[:30]]
    assert lines[30] == "and 10 more, in the archive"
    assert lines[-1].startswith("decode attention")


def test_the_row_of_the_tests_lists_failed_tests(tmp_path: Path) -> None:
    path = tmp_path / "gpu_tests.xml"
    path.write_text(
        '<testsuites><testsuite><testcase classname="tests.a" name="one" time="1.5"/>'
        '<testcase classname="tests.a" name="two[x]" time="0.5"><failure message="m">text</failure></testcase>'
        '<testcase classname="tests.a" name="two[x]" time="0"><failure message="crashed">text</failure></testcase>'
        '<testcase classname="tests.b" name="three" time="0"><skipped message="m"/></testcase>'
        '<testcase classname="tests.b" name="four" time="0"><error message="m">text</error></testcase>'
        "</testsuite></testsuites>"
    )
    _gpu_day.record_tests(str(path), str(tmp_path / "results"), "0", "1")
    (written,) = (tmp_path / "results").glob("*/gpu_tests.jsonl")
    row = json.loads(written.read_text())
    assert (row["passed"], row["failed"], row["skipped"], row["median_ms"]) == (1, 2, 1, 2000.0)
    assert row["failures"] == ["tests.a::two[x]", "tests.b::four"]
    assert row["complete"] is True
    _gpu_day.record_tests(str(path), str(tmp_path / "results"), "0", "0")  # the step was stopped
    assert json.loads(written.read_text())["complete"] is False


def test_cases_of_the_parts_exist_in_the_benchmarks() -> None:
    import generation
    import token_logprobs

    cases = {f"{size.name}, {count} {kind if count > 1 else kind[:-1]}" for size, kind, count in generation.GPU_CASES}
    used = {case for number in (3, 4) for step in _gpu_day.PARTS[number] for case in step.cases if "Janus" in case}
    assert used <= cases
    assert {"7B", "linear 7B", "1B"} <= {shape.name for shape in token_logprobs.GPU_SHAPES}
    for steps in _gpu_day.PARTS.values():
        assert all((ROOT / "bench" / f"{step.name}.py").exists() for step in steps if step.name != _gpu_day.TESTS)
        assert steps[0].seconds <= _gpu_day.PART_SECONDS


# ---------------------------------------------------------------- merging


def result(op: str, variant: str = "ospo_fast", *, date: str = "2026-11-26T10:00:00", **more: Any) -> dict[str, Any]:
    return {
        "op": op, "variant": variant, "shapes": {"B": 1}, "dtype": "bf16", "median_ms": 1.0, "device": CARD,
        "driver": "580.1", "versions": {}, "commit": COMMIT, "date": date, **more,
    }  # fmt: skip


def archive(path: Path, rows: dict[str, list[dict[str, Any]]], plots: tuple[str, ...] = (), **extra: bytes) -> Path:
    path.parent.mkdir(exist_ok=True)
    contents = {"manifest.json": b"{}", "log.txt": b"", **dict.fromkeys(plots, b"\x89PNG")}
    contents |= {name: "".join(json.dumps(row) + "\n" for row in given).encode() for name, given in rows.items()}
    with tarfile.open(path, "w:gz") as opened:
        for name, data in (contents | extra).items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            opened.addfile(entry, io.BytesIO(data))
    return path


def rows_in(results: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (results / "nvidia-h100-80gb-hbm3" / name).read_text().splitlines()]


def test_rows_are_merged_into_the_folder_of_their_device(tmp_path: Path) -> None:
    came, results = tmp_path / "came", tmp_path / "results"
    first = [result("a"), result("a", "peer"), result("b")]
    archive(came / "part-1.tar.gz", {"a.jsonl": first}, ("a.png",))
    archive(came / "part-2.tar.gz", {"a.jsonl": [result("c")], "d.jsonl": [result("d")]})
    assert _gpu_day.merge(came, results) == 0
    assert rows_in(results, "a.jsonl") == [*first, result("c")]
    assert rows_in(results, "d.jsonl") == [result("d")]
    assert (results / "nvidia-h100-80gb-hbm3" / "a.png").read_bytes() == b"\x89PNG"
    before = {path: path.read_bytes() for path in results.rglob("*.*")}
    assert _gpu_day.merge(came, results) == 0  # a second time: nothing new
    assert {path: path.read_bytes() for path in results.rglob("*.*")} == before


def test_only_a_later_run_replaces_rows(tmp_path: Path) -> None:
    came, results = tmp_path / "came", tmp_path / "results"
    archive(came / "part-1.tar.gz", {"a.jsonl": [result("a"), result("a", "peer"), result("b")]})
    _gpu_day.merge(came, results)
    later = result("a", date="2026-11-27T10:00:00", commit="ba9876543210")
    archive(came / "part-1.tar.gz", {"a.jsonl": [later]})
    _gpu_day.merge(came, results)
    # The row of the peer is removed, since ratios compare rows of one run.
    assert rows_in(results, "a.jsonl") == [result("b"), later]
    archive(came / "part-1.tar.gz", {"a.jsonl": [result("a", date="2026-11-25T10:00:00")]})
    _gpu_day.merge(came, results)
    assert rows_in(results, "a.jsonl") == [result("b"), later]


def test_refused_archives_change_nothing(tmp_path: Path) -> None:
    came, results = tmp_path / "came", tmp_path / "results"
    for rows, extra, message in (
        ([result("a", quick=True)], {}, "is of a rehearsal"),
        ([result("a", driver=None)], {}, "expected rows of a run on a GPU"),
        ([result("a", commit="unknown")], {}, "commit 'unknown'; expected a commit without changes"),
        ([result("a", commit=f"{COMMIT}+")], {}, "commit and measure again"),
        ([{"op": "a"}], {}, "line 1 of a.jsonl lacks"),
        ([result("a"), result("a", device=7)], {}, "line 2 of a.jsonl lacks"),
        ([result("a", median_ms="fast")], {}, "line 1 of a.jsonl lacks"),
        ([7], {}, "line 1 of a.jsonl lacks"),
        ([result("a", device="../..")], {}, "expected the name of a GPU"),
        ([], {"../evil.jsonl": b""}, "holds '../evil.jsonl'"),
        ([], {"/evil.jsonl": b""}, "holds '/evil.jsonl'"),
        ([], {"b.jsonl": b"not JSON"}, "line 1 of b.jsonl is not JSON"),
        ([], {"manifest.json": b"[]"}, "it has no manifest.json"),
    ):
        archive(came / "part-1.tar.gz", {"c.jsonl": [result("c")]})
        archive(came / "part-2.tar.gz", {"a.jsonl": rows}, **extra)
        with pytest.raises(RefusedError, match=re.escape(message)):
            _gpu_day.merge(came, results)
        assert not results.exists()


def test_damaged_archives_are_refused(tmp_path: Path) -> None:
    intact = archive(tmp_path / "came" / "part-1.tar.gz", {"a.jsonl": [result("a")]}).read_bytes()
    broken = [b"", b"text", intact[: len(intact) // 2]]
    for seed in range(60):  # one byte changed: in the header, the data or the checksum
        data = bytearray(intact)
        data[random.Random(seed).randrange(len(data))] ^= 0x55
        broken.append(bytes(data))
    refusals = []
    for data in broken:
        (tmp_path / "came" / "part-1.tar.gz").write_bytes(data)
        try:
            _gpu_day.merge(tmp_path / "came", tmp_path / "results")
        except RefusedError as error:
            refusals.append(str(error))
        else:
            assert rows_in(tmp_path / "results", "a.jsonl") == [result("a")]  # a byte of the gzip header
    assert all("part-1.tar.gz cannot be read" in reason for reason in refusals)
    assert len(refusals) > 50


def test_an_invalid_line_in_the_results_is_named_and_nothing_is_written(tmp_path: Path) -> None:
    came, folder = tmp_path / "came", tmp_path / "results" / "nvidia-h100-80gb-hbm3"
    archive(came / "part-1.tar.gz", {"a.jsonl": [result("a")], "b.jsonl": [result("b")]})
    folder.mkdir(parents=True)
    (folder / "b.jsonl").write_text("{}\n")
    with pytest.raises(RefusedError, match=r"line 1 of .*b\.jsonl lacks .*; fix or delete the line"):
        _gpu_day.merge(came, tmp_path / "results")
    assert [path.name for path in folder.iterdir()] == ["b.jsonl"]


def test_the_plot_belongs_to_the_latest_rows(tmp_path: Path) -> None:
    came, results = tmp_path / "came", tmp_path / "results"
    archive(came / "part-9.tar.gz", {"a.jsonl": [result("old"), result("more")]}, **{"a.png": b"old"})
    archive(came / "part-1.tar.gz", {"a.jsonl": [result("new", date="2026-11-27T10:00:00")]}, **{"a.png": b"new"})
    _gpu_day.merge(came, results)
    assert (results / "nvidia-h100-80gb-hbm3" / "a.png").read_bytes() == b"new"
    archive(came / "part-1.tar.gz", {"a.jsonl": [result("late", date="2026-11-26T12:00:00")]}, **{"a.png": b"late"})
    _gpu_day.merge(came, results)
    assert (results / "nvidia-h100-80gb-hbm3" / "a.png").read_bytes() == b"new"
    assert len(rows_in(results, "a.jsonl")) == 4


# ---------------------------------------------------------------- the rehearsal


@pytest.fixture
def bare_python(tmp_path: Path) -> Path:
    """An interpreter with the packages of this one, except omegaconf and this project."""
    folder = tmp_path / "env"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    python = folder / "bin" / "python"
    where = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(subprocess.run([python, "-c", where], check=True, capture_output=True, text=True).stdout.strip())
    for source in {sysconfig.get_path(name) for name in ("purelib", "platlib")}:
        for path in Path(source).iterdir():
            name = path.name.lower().replace("-", "_")
            if not name.startswith(("omegaconf", "ospo_fast", "__editable__")) and not (site / path.name).exists():
                (site / path.name).symlink_to(path)
    for name in ("omegaconf", "ospo_fast"):
        assert subprocess.run([python, "-c", f"import {name}"], check=False, capture_output=True, cwd="/").returncode
    return python


def test_a_rehearsal_of_all_parts_in_a_bare_copy(copy: Path, bare_python: Path, tmp_path: Path) -> None:
    """Small sizes, without GPU, .git, omegaconf and an installed package."""
    out, begin = tmp_path / "out", time.monotonic()
    # Without visible devices the gpu-marked tests are skipped, and no kernel runs: little optimization shortens the
    # build to a half.
    env = {"CUDA_VISIBLE_DEVICES": "", "CXXFLAGS": "-O0", "NVCC_APPEND_FLAGS": "-O0 -Xcicc -O1 -Xptxas -O0"}
    done = gpu_sh("--quick", "all", cwd=copy, PYTHON=str(bare_python), OUT=str(out), **env)
    print(f"{time.monotonic() - begin:.0f} s")
    assert done.returncode == 0, done.stdout + done.stderr
    archives = sorted(out.iterdir())
    assert [path.name for path in archives] == [f"part-{n}.tar.gz" for n in (1, 2, 3, 4)]
    ops: dict[int, set[str]] = {}
    for number, path in enumerate(archives, 1):
        assert path.stat().st_size <= 4 * 2**20
        found = _gpu_day.read_archive(path)
        assert all(step["state"] == "done" for step in found.manifest["steps"]), found.manifest
        assert all(row["quick"] and row["commit"] == COMMIT for row in found.rows)
        ops[number] = {row["op"] for row in found.rows}
    assert "gpu_tests.xml" in files(archives[0])
    assert "--timeout=180 --timeout-method=thread" in done.stdout  # of each test
    assert " -m gpu -n " in done.stdout
    assert ops[1] >= {"gpu_tests", "object_masks", "sample_codes", "decode_attention"}
    assert ops[2] == {"token_logprobs", "attention_columns", "AttentionCapture"}
    assert ops[3] == {"generation"}
    assert ops[4] == {"skinny_linear"}  # generation was rehearsed in part 3
    (tests,) = (row for row in _gpu_day.read_archive(archives[0]).rows if row["op"] == "gpu_tests")
    assert tests["skipped"] > 150
    assert tests["failed"] == tests["passed"] == 0
    assert all(metric.name in done.stdout for metric in figures.METRICS)
    assert "not measured" in done.stdout
    refused(gpu_sh("merge", str(out), cwd=copy, PYTHON=str(bare_python)), "is of a rehearsal")
    assert not (copy / "bench" / "results").exists()
    # The package and its build are also found without gpu.sh.
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    without_cwd = "import sys; sys.path.remove(''); "
    imports = without_cwd + "sys.path.append('bench'); import _measure, ospo_fast._C"
    collects = without_cwd + "import pytest; sys.exit(pytest.main(sys.argv[1:]))"
    test_file = "tests/ops/test_token_logprobs_gpu.py"
    for code, *arguments in ((imports,), (collects, "-m", "gpu", "--collect-only", "-q", test_file)):
        command = [bare_python, "-c", code, *arguments]
        done = subprocess.run(command, check=False, cwd=copy, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr

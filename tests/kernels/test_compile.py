"""Every Triton kernel compiles as it is launched: no spills, shared memory within the limit, IEEE divisions."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is only there on Linux")

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_name("launches.py")
ARCHS = ((90,), (80, 100))  # one process each, all at once


def launched_kernels(arch: int) -> set[str]:
    """The names of functions with a grid; those of experimental kernels for sm_90 only."""
    paths = list((ROOT / "kernels").glob("*.py"))
    paths += (ROOT / "ospo_fast" / "experimental").glob("*_kernel.py") if arch == 90 else []
    return {name for path in paths for name in re.findall(r"(\w+_kernel)\[", path.read_text())}


def check(arch: int, lines: list[str], summary: str) -> None:
    assert {line.split()[0] for line in lines} == launched_kernels(arch)
    assert not [line for line in lines if " 0 bytes of spills" not in line]
    # Threads of a split synchronize after its blocks, not in each.
    assert not [line for line in lines if line.startswith("split_kernel") and "barriers in loops" in line]
    # Kernels of a decoder step divide as the PyTorch reference does.
    step = ("combine_", "store_", "add_rms_norm_", "silu_mul_", "skinny_linear_")
    assert not [line for line in lines if line.startswith(step) and "approximate" in line]
    expected = rf"sm_{arch}: {len(lines)} kernels, 0 with spills; largest shared memory \d+ of \d+ bytes .*"
    assert re.fullmatch(expected, summary)


def test_every_kernel_compiles_as_it_is_launched(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # In other processes, because this one may run kernels in the interpreter.
    path = os.pathsep.join([str(ROOT), str(ROOT / "bench"), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": path, "TRITON_CACHE_DIR": str(tmp_path)}
    commands = [[sys.executable, str(SCRIPT), *map(str, archs)] for archs in ARCHS]
    processes = [
        subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for command in commands
    ]
    try:
        for process, archs in zip(processes, ARCHS, strict=True):
            out, err = process.communicate(timeout=900)
            assert process.returncode == 0, out + err
            for arch in archs:
                lines = [line for line in out.splitlines() if f" sm_{arch} " in line]
                summary = next(line for line in out.splitlines() if line.startswith(f"sm_{arch}: "))
                with capsys.disabled():
                    print(f"\n{summary}")
                check(arch, lines, summary)
    finally:
        for process in processes:
            process.kill()
            process.communicate()

"""A test that loses the GPU context ends its worker, and fails no other test."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("xdist")

CONFTEST = f"""
import importlib.util

spec = importlib.util.spec_from_file_location("shared", {str(Path(__file__).with_name("conftest.py"))!r})
shared = importlib.util.module_from_spec(spec)
spec.loader.exec_module(shared)
pytest_runtest_protocol = shared.pytest_runtest_protocol
"""
TESTS = """
import pytest
import torch

lost = []


def synchronize():
    if lost:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")


torch.cuda.is_initialized, torch.cuda.synchronize = lambda: True, synchronize


def test_first():
    assert not lost


def test_illegal_access():
    lost.append(True)
    synchronize()


@pytest.mark.parametrize("n", range(5))
def test_later(n):
    assert not lost
"""


def test_illegal_access_ends_one_worker(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text(CONFTEST)
    (tmp_path / "test_kernels.py").write_text(TESTS)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-n",
        "1",
        "-q",
        "-p",
        "no:cacheprovider",
        "--tb=short",
        "-c",
        "/dev/null",
    ]
    done = subprocess.run([*command, "--rootdir", tmp_path], check=False, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "6 passed" in done.stdout
    assert "an illegal memory access was encountered" in done.stdout
    failed = {line.split()[1] for line in done.stdout.splitlines() if line.startswith("FAILED")}
    assert failed == {"test_kernels.py::test_illegal_access"}

import importlib.util
from pathlib import Path

import pytest

CHECKS = Path(__file__).with_name("vocab_parallel_checks.py")


def test_two_processes(tmp_path: Path) -> None:
    """Run the checks of vocab_parallel_checks.py, whose names say what they check."""
    pytest.importorskip("peft")
    spec = importlib.util.spec_from_file_location("two_processes", CHECKS.parents[1] / "two_processes.py")
    assert spec is not None
    assert spec.loader is not None
    two_processes = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(two_processes)
    two_processes.run_checks(CHECKS, tmp_path)

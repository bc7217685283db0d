"""Every kernel compiles as it is launched: without spills, within the card's shared memory, with IEEE divisions."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is only there on Linux")

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_name("launches.py")


def kernels() -> set[str]:
    """The names of all that is launched: of functions with a grid."""
    sources = (path.read_text() for path in (ROOT / "kernels").glob("*.py"))
    return {name for source in sources for name in re.findall(r"(\w+_kernel)\[", source)}


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_every_kernel_compiles_as_it_is_launched(arch: int, tmp_path: Path) -> None:
    # In a process of its own: this one runs kernels in the interpreter where there is no GPU.
    path = os.pathsep.join([str(ROOT), str(ROOT / "bench"), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": path}
    command = [sys.executable, str(SCRIPT), str(arch)]
    done = subprocess.run(command, check=False, env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    *lines, summary = done.stdout.splitlines()
    print(summary)
    assert {line.split()[0] for line in lines} == kernels()
    assert all(f" sm_{arch} " in line for line in lines)
    assert not [line for line in lines if " 0 bytes of spills" not in line]
    # Threads of a split wait for one another after its blocks, not in each.
    assert not [line for line in lines if line.startswith("split_kernel") and "barriers in loops" in line]
    # Kernels of a decoder step divide as the PyTorch reference does.
    step = ("combine_", "store_", "add_rms_norm_", "silu_mul_", "skinny_linear_")
    assert not [line for line in lines if line.startswith(step) and "approximate" in line]
    assert re.fullmatch(
        rf"sm_{arch}: {len(lines)} kernels, 0 with spills; most shared memory \d+ of \d+ bytes .*", summary
    )


def test_a_kernel_that_needs_more_than_the_card_has_is_an_error(tmp_path: Path) -> None:
    """The stand-in refuses what a card would refuse; sm_120 has less than half of the shared memory of sm_90."""
    code = (
        "import launches, skinny_linear as bench\n"
        "from ospo_fast.kernels import skinny_linear as kernels\n"
        "kernels.COLUMNS, kernels.STAGES = 64, 5\n"
        "with launches.standing_in(launches.Card(120)):\n"
        "    launches.skinny(4096, 11008)\n"
    )
    path = os.pathsep.join([str(ROOT), str(ROOT / "bench"), str(SCRIPT.parent)])
    env = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, "-c", code], check=False, env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 1
    assert "OutOfResources" in done.stderr
    assert "Hardware limit: 101376" in done.stderr

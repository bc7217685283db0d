import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is only there on Linux")

SCRIPT = Path(__file__).with_name("compile_ahead.py")


def test_every_kernel_compiles_for_every_architecture(tmp_path: Path) -> None:
    # In a process of its own: this one runs kernels in the interpreter where there is no GPU.
    env = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, SCRIPT], check=False, env=env, capture_output=True, text=True, timeout=900)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert {"sm_80:", "sm_90:", "sm_100:"} <= set(done.stdout.split())
    columns = [line for line in lines if line.startswith(("columns_kernel", "row_lse_kernel"))]
    assert len(columns) == 3 * 21
    assert not [line for line in columns if " 0 bytes of spills" not in line]
    assert len([line for line in lines if line.startswith("sum_parts_kernel")]) == 3
    # Threads of a split wait for one another after its blocks, not in each.
    splits = [line for line in lines if line.startswith("split_kernel")]
    assert len(splits) == 18
    assert not [line for line in splits if " 0 bytes of spills" not in line or "barriers in loops" in line]
    # Kernels of a decoder step divide as their twins do.
    step = [line for line in lines if line.startswith(("combine_", "store_", "add_rms_norm_", "silu_mul_"))]
    assert len(step) == 36
    assert not [line for line in step if "approximate" in line]
    skinny = [line for line in lines if line.startswith("skinny_linear_")]
    assert len(skinny) == 15
    assert not [line for line in skinny if "approximate" in line]

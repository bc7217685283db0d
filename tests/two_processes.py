"""Run the checks of a file in two processes: the functions `check_*`, one after the other, with the rank.

A test calls `run_checks`. It starts `python two_processes.py CHECKS RANK STORE` for each rank. Both processes run every
check, and both end at the first failure.
"""

import datetime as dt
import importlib.util
import os
import subprocess
import sys
import traceback
from pathlib import Path

TIMEOUT = dt.timedelta(seconds=60)  # of a collective that one process does not reach


def run_checks(checks: Path, folder: Path) -> None:
    """Fail with the output of both processes if a check fails in one of them."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    processes = [
        subprocess.Popen(
            [sys.executable, Path(__file__).with_name("run_script.py"), __file__, checks, str(rank), folder / "store"],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=240)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)


def main(checks: str, rank: int, store: str) -> None:
    import torch
    import torch.distributed as dist

    spec = importlib.util.spec_from_file_location("checks", checks)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=TIMEOUT)
    for name, check in list(vars(module).items()):
        if name.startswith("check_"):
            torch.manual_seed(0)
            try:
                check(rank)
            except BaseException:
                traceback.print_exc()
                print(f"process {rank}: {name} failed", flush=True)
                os._exit(1)  # at once, so that the other process does not wait for this one
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])

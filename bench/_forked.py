"""Start several workers as forks of this process, which has imported everything, and collect how they end."""

import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

HANG = 120  # seconds


class Ended(NamedTuple):
    """How a worker ended."""

    code: int  # exit code, or minus a signal
    output: str
    seconds: float


def free_port() -> int:
    """Return a port that no process listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def run_workers(
    do: Callable[[int], int],
    size: int,
    folder: Path,
    *,
    kill: tuple[int, float | Callable[[], bool]] | None = None,
    number: int = signal.SIGKILL,
    environ: Mapping[int, Mapping[str, str]] | None = None,
) -> list[Ended]:
    """Call `do(rank)` in `size` workers; its result is the exit code.

    kill: (rank, when): a worker that gets the signal `number` after some seconds, or once `when()` is true. environ:
    further variables of ranks.
    """
    folder.mkdir(parents=True, exist_ok=True)
    port, started = str(free_port()), time.monotonic()
    processes: dict[int, int] = {}
    for rank in range(size):
        process = os.fork()
        if process == 0:
            _child(do, rank, size, port, folder / f"{rank}.txt", (environ or {}).get(rank, {}))
        processes[process] = rank
    ended: dict[int, Ended] = {}
    while len(ended) < size:
        passed = time.monotonic() - started
        for process, rank in processes.items():
            if rank in ended:
                continue
            found, status = os.waitpid(process, os.WNOHANG)
            if found:
                output = (folder / f"{rank}.txt").read_text()
                ended[rank] = Ended(os.waitstatus_to_exitcode(status), output, passed)
            elif passed > HANG or (kill is not None and kill[0] == rank and _is_due(kill[1], passed)):
                os.kill(process, signal.SIGKILL if passed > HANG else number)
                kill = None
        time.sleep(0.005)
    return [ended[rank] for rank in range(size)]


def _is_due(when: float | Callable[[], bool], passed: float) -> bool:
    return when() if callable(when) else passed > when


def _child(do: Callable[[int], int], rank: int, size: int, port: str, output: Path, environ: Mapping[str, str]) -> None:
    code = 70
    try:
        handle = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        own = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ |= {name: str(value) for name, value in own.items()} | {"GLOO_SOCKET_IFNAME": "lo"} | environ
        # The lock of its bars is one for all forks, and a killed one would keep it.
        tqdm.set_lock(threading.RLock())
        # The threads of OpenMP are not in a fork, where a parallel region waits for them without end.
        torch.set_num_threads(1)
        code = do(rank)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

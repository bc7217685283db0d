"""Print how far one step of a benchmark raises the resident memory of this process, which is new, as JSON.

    python bench/_peak_rss.py MODULE CASE VARIANT [--quick]

MODULE.steps(CASE, VARIANT, quick) returns two functions: a step of a tiny size and the measured one. `rss_mb` is the
growth from after the tiny step to the peak of the measured one. Unlike the peak of torch's allocations it includes
workspaces, fragmentation of the heap, and memory that torch did not allocate. `imports_mb` is the growth during the
tiny step: of modules that are imported at the first call, and of threads. Both in 10⁶ bytes. `ms` is the time of the
step, its only run. Linux only.
"""

import ctypes
import importlib
import json
import re
import sys
import time
from pathlib import Path

PROC = Path("/proc/self")


def status_mb(key: str) -> float:
    """Return VmRSS, the resident memory, or VmHWM, its peak, in 10⁶ bytes."""
    found = re.search(rf"^{key}:\s*(\d+) kB", (PROC / "status").read_text(), re.MULTILINE)
    assert found is not None, key
    return int(found[1]) * 1024 / 1e6


def main(module: str, case: str, variant: str, *flags: str) -> None:
    tiny, step = importlib.import_module(module).steps(case, variant, "--quick" in flags)
    # Returns memory to the system that made the inputs: the step would use it without growth.
    trim = getattr(ctypes.CDLL(None), "malloc_trim", lambda _: 0)
    trim(0)
    start = status_mb("VmRSS")
    tiny()
    trim(0)
    before = status_mb("VmRSS")
    (PROC / "clear_refs").write_text("5")  # resets the peak to the present size
    begin = time.perf_counter()
    results = step()
    found = {"rss_mb": status_mb("VmHWM") - before, "imports_mb": before - start}
    found["ms"] = 1e3 * (time.perf_counter() - begin)
    print(json.dumps({name: round(value, 1) for name, value in found.items()}))
    del results


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Peak memory of a block of code: of the process on the host, and of torch on the GPU where there is one."""

from __future__ import annotations

import re
import resource
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing_extensions import Self

_HIGH_WATER_MARK = re.compile(r"^VmHWM:\s*(\d+) kB", re.MULTILINE)
_INTERVAL = 0.02  # seconds between two samples


def resident_mb() -> float:
    """Return the resident memory of the process in MB."""
    import psutil

    return round(float(psutil.Process().memory_info().rss) / 2**20, 1)


def lifetime_peak_mb() -> float:
    """Return the peak resident memory of the process since its start in MB, from the kernel's high-water mark."""
    try:
        # Not getrusage, because a child process inherits the value of its parent.
        found = _HIGH_WATER_MARK.search(Path("/proc/self/status").read_text(encoding="utf-8"))
    except OSError:
        found = None
    if found is not None:
        return round(int(found[1]) / 2**10, 1)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (2**20 if sys.platform == "darwin" else 2**10), 1)


class PeakMemory:
    """Measure peak memory inside a `with` block.

    The kernel's high-water mark gives an exact `mb` when the block exceeds every earlier peak of the process. Otherwise
    `mb` is the maximum of 50 samples per second, and a short peak may be missed. The mark is not reset, because tools
    that measure the whole process (`time -v`, batch systems) read it too.

    Attributes:
        mb: peak resident memory of the process.
        cuda_mb: peak memory allocated by torch, exact. None without a GPU.

    """

    mb: float
    cuda_mb: float | None = None

    def __enter__(self) -> Self:
        import torch

        self._before = lifetime_peak_mb()
        self.mb = resident_mb()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        self._ended = threading.Event()
        self._sampler = threading.Thread(target=self._sample, name="peak memory", daemon=True)
        self._sampler.start()
        return self

    def _sample(self) -> None:
        while not self._ended.wait(_INTERVAL):
            self.mb = max(self.mb, resident_mb())

    def __exit__(self, *error: object) -> None:
        import torch

        self._ended.set()
        self._sampler.join()
        self.mb = max(self.mb, resident_mb())
        if (peak := lifetime_peak_mb()) > self._before:
            self.mb = peak
        if torch.cuda.is_available():
            self.cuda_mb = round(torch.cuda.max_memory_allocated() / 2**20, 1)

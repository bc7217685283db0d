"""The most memory that a part of a process held: on the host, and on the GPU where there is one."""

from __future__ import annotations

import re
import resource
import sys
import threading
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import psutil
    from typing_extensions import Self

_MARK = re.compile(r"^VmHWM:\s*(\d+) kB", re.MULTILINE)
_INTERVAL = 0.02  # seconds between two samples


def resident_mb(process: psutil.Process | None = None) -> float:
    """What a process, by default this one, holds now, in MB."""
    import psutil

    return round(float((process or psutil.Process()).memory_info().rss) / 2**20, 1)


def lifetime_peak_mb() -> float:
    """The most that the process ever held, in MB, by the kernel's high-water mark."""
    try:
        # Not getrusage, whose figure a child process inherits from its parent.
        found = _MARK.search(Path("/proc/self/status").read_text(encoding="utf-8"))
    except OSError:
        found = None
    if found is not None:
        return round(int(found[1]) / 2**10, 1)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (2**20 if sys.platform == "darwin" else 2**10), 1)


class PeakMemory:
    """A context; `mb` is the most that the process held resident while it was open, `cuda_mb` what torch allocated.

    Exact where it is more than the process held ever before, since the kernel's high-water mark rises then. Else the
    largest of 50 samples a second, which can miss a short peak. The mark is not reset, which would be exact always:
    whoever measures the process as a whole (`time -v`, a batch system) reads the same mark. `cuda_mb` is exact, and
    None without a GPU.
    """

    mb: float
    cuda_mb: float | None = None

    def __enter__(self) -> Self:
        import psutil
        import torch

        self._process = psutil.Process()
        self._before = lifetime_peak_mb()
        self.mb = resident_mb(self._process)
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        self._ended = threading.Event()
        self._sampler = threading.Thread(target=self._sample, name="peak memory", daemon=True)
        self._sampler.start()
        return self

    def _sample(self) -> None:
        while not self._ended.wait(_INTERVAL):
            self.mb = max(self.mb, resident_mb(self._process))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        import torch

        self._ended.set()
        self._sampler.join()
        self.mb = max(self.mb, resident_mb(self._process))
        if (peak := lifetime_peak_mb()) > self._before:
            self.mb = peak
        if torch.cuda.is_available():
            self.cuda_mb = round(torch.cuda.max_memory_allocated() / 2**20, 1)

"""Peak memory of a block: independent of earlier allocations, without resetting the process's high-water mark."""

import gc
import mmap
import subprocess
import sys
import time

import pytest
import torch

from ospo_fast.peak_memory import PeakMemory, lifetime_peak_mb, resident_mb

MB = 2**20


def resident(size: int) -> mmap.mmap:
    """Map new pages and touch each of them, since the allocator may reuse resident ones."""
    held = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    held[:: mmap.PAGESIZE] = b"\1" * len(range(0, size, mmap.PAGESIZE))
    return held


def test_new_peak_is_exact():
    rise = int((lifetime_peak_mb() - resident_mb() + 300) * MB)
    with PeakMemory() as peak:
        resident(rise).close()
    assert peak.mb == lifetime_peak_mb()
    assert peak.mb > resident_mb() + 250


def test_peak_below_an_earlier_one_is_sampled():
    resident(400 * MB).close()
    before = resident_mb()
    with PeakMemory() as peak:
        held = resident(100 * MB)
        time.sleep(0.2)
        held.close()
    assert before + 90 < peak.mb < before + 200 < lifetime_peak_mb()


def test_high_water_mark_is_not_reset():
    """The parent of a process that measures itself reads the same peak as without the measurement."""
    code = (
        "import resource; from ospo_fast.peak_memory import PeakMemory\n"
        "held = bytearray(500 * 2**20); del held\n"
        "with PeakMemory(): pass\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert int(done.stdout) * (1 if sys.platform == "darwin" else 1024) > 500 * MB


def test_error_ends_the_measurement():
    with pytest.raises(ValueError, match="stop"), PeakMemory() as peak:
        raise ValueError("stop")
    assert not peak._sampler.is_alive()
    assert peak.mb > 0
    assert (peak.cuda_mb is None) == (not torch.cuda.is_available())


@pytest.mark.gpu
def test_gpu_peak_is_that_of_the_block():
    torch.empty(256 * MB, dtype=torch.uint8, device="cuda")
    gc.collect()  # tensors of earlier tests that only a later collection would free
    before = torch.cuda.memory_allocated() / MB
    with PeakMemory() as peak:
        torch.empty(64 * MB, dtype=torch.uint8, device="cuda")
    assert peak.cuda_mb == pytest.approx(before + 64, abs=3)

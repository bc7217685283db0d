"""csrc/shared_memory.h with a fake CUDA runtime, and the limits of shared memory in Python."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from ospo_fast.ops.otsu import SHARED_FLOATS
from ospo_fast.ops.token_weights import MAX_BLURRED_CELLS

CSRC = Path(__file__).parents[2] / "csrc"
PROGRAM = r"""
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

using cudaError_t = int;
enum { cudaSuccess = 0, failed = 77 };
enum { cudaDevAttrMaxSharedMemoryPerBlockOptin, cudaFuncAttributeMaxDynamicSharedMemorySize };
struct cudaFuncAttributes {
    size_t sharedSizeBytes;
};
bool broken = true;
std::vector<int> limits;  // that were set
int cudaDeviceGetAttribute(int* value, int, int device) { return *value = device ? 101376 : 232448, cudaSuccess; }
template <class Kernel>
int cudaFuncGetAttributes(cudaFuncAttributes* found, Kernel) {
    return found->sharedSizeBytes = 224, cudaSuccess;
}
template <class Kernel>
int cudaFuncSetAttribute(Kernel, int, int bytes) {
    if (broken) return failed;
    return limits.push_back(bytes), cudaSuccess;
}
#include "shared_memory.h"

template <class T>
void kernel(T) {}

int main() {
    size_t bytes = 0;
    std::printf("%d\n", ospo::raise_shared_limit<kernel<int>>(0, bytes));  // an error is not cached
    broken = false;
    std::vector<std::thread> threads;
    for (int i = 0; i < 8; ++i) {
        threads.emplace_back([] {
            size_t bytes = 0;
            for (int j = 0; j < 1000; ++j) {
                if (ospo::raise_shared_limit<kernel<int>>(0, bytes) || bytes != 232448 - 224) std::abort();
            }
        });
    }
    for (auto& thread : threads) thread.join();
    ospo::raise_shared_limit<kernel<int>>(1, bytes);
    std::printf("%zu\n", bytes);
    ospo::raise_shared_limit<kernel<float>>(0, bytes);
    for (int limit : limits) std::printf("%d ", limit);
}
"""


def test_the_limit_is_set_once_for_each_kernel_and_device(tmp_path: Path) -> None:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")
    (tmp_path / "limits.cpp").write_text(PROGRAM)
    flags = ["-std=c++17", "-pthread", f"-I{CSRC}"]
    subprocess.run([compiler, *flags, tmp_path / "limits.cpp", "-o", tmp_path / "limits"], check=True)
    done = subprocess.run([tmp_path / "limits"], check=True, capture_output=True, text=True)
    assert done.stdout.splitlines() == ["77", "101152", "232224 101152 232224 "]


def test_every_device_has_the_shared_memory_that_python_allows() -> None:
    smallest = 99 * 1024  # bytes of a block of compute capability 8.6, 8.9 and 12.0
    found = re.search(r"MAX_SHARED = (\d+) \* 1024;", (CSRC / "object_masks.cu").read_text())
    assert found is not None
    static = 8 * 5 * 4  # OtsuScratch: five words for each of 8 warps
    assert SHARED_FLOATS * 4 == MAX_BLURRED_CELLS * 2 * 8 == int(found[1]) * 1024 <= smallest - static

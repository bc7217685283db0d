"""csrc/shared_memory.h with a runtime that records what it is asked for, and the sizes that Python allows."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from ospo_fast.ops.otsu import SHARED_FLOATS
from ospo_fast.ops.token_weights import BLURRED_CELLS

CSRC = Path(__file__).parents[2] / "csrc"
SMALLEST = 99 * 1024  # bytes of a block: compute capability 8.6, 8.9 and 12.0; 8.0 allows 163 KiB, 9.0 227 KiB
PROGRAM = r"""
#include <cstdio>
#include <thread>
#include <vector>

using cudaError_t = int;
enum { cudaSuccess = 0, cudaErrorInvalidValue = 1, failed = 77 };
enum { cudaDevAttrMaxSharedMemoryPerBlockOptin, cudaFuncAttributeMaxDynamicSharedMemorySize };
struct cudaFuncAttributes {
    size_t sharedSizeBytes;
};
bool broken = true;
std::vector<int> limits;  // that were set
int cudaDeviceGetAttribute(int* value, int, int device) { return *value = device ? 101376 : 232448, cudaSuccess; }
template <class Kernel>
int cudaFuncGetAttributes(cudaFuncAttributes* found, Kernel kernel) {
    return found->sharedSizeBytes = kernel == nullptr ? 0 : 224, cudaSuccess;
}
template <class Kernel>
int cudaFuncSetAttribute(Kernel, int, int bytes) {
    if (broken) return failed;
    return limits.push_back(bytes), cudaSuccess;
}
#include "shared_memory.h"

void first(int) {}
template <class T>
void second(T) {}

int main() {
    // What failed is tried again.
    std::printf("%d\n", ospo::allow_shared<first>(0, 100));
    broken = false;
    std::vector<std::thread> threads;
    for (int i = 0; i < 8; ++i) {
        threads.emplace_back([i] {
            for (int j = 0; j < 1000; ++j) {
                if (ospo::allow_shared<first>(0, 100 * i)) std::abort();
            }
        });
    }
    for (auto& thread : threads) thread.join();
    // Another device, another kernel.
    for (size_t bytes : {101376 - 224, 101376 - 223}) std::printf("%d ", ospo::allow_shared<first>(1, bytes));
    size_t most = 0;
    const int status = ospo::raise_shared_limit<second<float>>(0, most);
    std::printf("%d %zu\n", status, most);
    for (int limit : limits) std::printf("%d ", limit);
}
"""


def test_the_limit_is_set_once_for_each_kernel_and_device(tmp_path: Path) -> None:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")
    (tmp_path / "limits.cpp").write_text("#include <cstdlib>\n" + PROGRAM)
    flags = ["-std=c++17", "-pthread", f"-I{CSRC}"]
    subprocess.run([compiler, *flags, tmp_path / "limits.cpp", "-o", tmp_path / "limits"], check=True)
    done = subprocess.run([tmp_path / "limits"], check=True, capture_output=True, text=True)
    assert done.stdout.splitlines() == ["77", "0 1 0 232224", "232224 101152 232224 "]


def test_every_device_allows_what_python_sends_to_object_mask() -> None:
    source = (CSRC / "object_masks.cu").read_text()
    found = re.search(r"MOST_ROOM = (\d+) \* 1024;", source)
    assert found is not None
    together = int(found[1]) * 1024
    scratch = 8 * (2 * 8 + 3 * 4)  # of 8 warps: two doubles and three words each
    assert SHARED_FLOATS * 4 == BLURRED_CELLS * 2 * 8 == together <= SMALLEST - scratch

// The limit of dynamic shared memory of a kernel.
#pragma once

#include <cstddef>
#include <map>
#include <mutex>

namespace ospo {

// Raise the limit of `kernel` on the current `device` to what the device allows in addition to the kernel's static
// shared memory, and set `max_bytes` to it. The limit belongs to the kernel, not to a launch: if each launch set its own
// size, it could fall below that of a launch in another thread. So it is set once, to the maximum.
template <auto kernel>
cudaError_t raise_shared_limit(int device, size_t& max_bytes) {
    static std::mutex mutex;
    static std::map<int, size_t> limits;  // by device
    const std::lock_guard<std::mutex> lock(mutex);
    const auto found = limits.find(device);
    if (found != limits.end()) {
        max_bytes = found->second;
        return cudaSuccess;
    }
    int total = 0;
    cudaError_t status = cudaDeviceGetAttribute(&total, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    if (status != cudaSuccess) return status;
    cudaFuncAttributes attributes{};
    status = cudaFuncGetAttributes(&attributes, kernel);
    if (status != cudaSuccess) return status;
    const size_t available = static_cast<size_t>(total), used = attributes.sharedSizeBytes;
    max_bytes = available > used ? available - used : 0;
    status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(max_bytes));
    if (status == cudaSuccess) limits[device] = max_bytes;
    return status;
}

}  // namespace ospo

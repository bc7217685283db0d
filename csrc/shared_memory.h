// The limit of dynamic shared memory of a kernel.
#pragma once

#include <cstddef>
#include <map>
#include <mutex>

namespace ospo {

// Set the limit of `kernel` on the current `device` to the maximum, once, and return it in `max_bytes`: what the device
// allows minus the kernel's static shared memory. A limit per launch could fall below that of a concurrent launch,
// because it belongs to the kernel.
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

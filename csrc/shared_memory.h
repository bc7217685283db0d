// How much dynamic shared memory a kernel may have. For the CUDA sources alone.
#pragma once

#include <cstddef>
#include <map>
#include <mutex>

namespace ospo {

// Raises the limit of `kernel` on the current `device` to what the device allows besides the kernel's static shared
// memory, and sets `most` to it. The limit belongs to the kernel, not to a launch: set to the size of each launch, it
// could drop below that of a launch in another thread. So it is set once, to the largest value.
template <auto kernel>
cudaError_t raise_shared_limit(int device, size_t& most) {
    static std::mutex mutex;
    static std::map<int, size_t> limits;  // by device
    const std::lock_guard<std::mutex> lock(mutex);
    const auto found = limits.find(device);
    if (found != limits.end()) {
        most = found->second;
        return cudaSuccess;
    }
    int optin = 0;
    cudaError_t status = cudaDeviceGetAttribute(&optin, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    if (status != cudaSuccess) return status;
    cudaFuncAttributes attributes{};
    status = cudaFuncGetAttributes(&attributes, kernel);
    if (status != cudaSuccess) return status;
    const size_t whole = static_cast<size_t>(optin), fixed = attributes.sharedSizeBytes;
    most = whole > fixed ? whole - fixed : 0;
    status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(most));
    if (status == cudaSuccess) limits[device] = most;
    return status;
}

// Before a launch with `bytes` of dynamic shared memory; cudaErrorInvalidValue for more than the device allows.
template <auto kernel>
cudaError_t allow_shared(int device, size_t bytes) {
    size_t most = 0;
    const cudaError_t status = raise_shared_limit<kernel>(device, most);
    if (status != cudaSuccess) return status;
    return bytes <= most ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace ospo

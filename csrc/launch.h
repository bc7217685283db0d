// The only place that launches CUDA kernels. Tests replace this header to run the kernels on the host.
#pragma once

#include <climits>

#include "device_guard.h"
#include "shared_memory.h"

namespace ospo {

// Launch `kernel` on a stream of `device` with shared_bytes of dynamic shared memory. cudaErrorInvalidValue if that is
// more than the device allows, or for more blocks than a grid may have.
template <auto kernel, class... Values>
int launch(int64_t blocks, int threads, size_t shared_bytes, int device, void* stream, const Values&... arguments) {
    if (blocks == 0) return cudaSuccess;
    if (blocks < 0 || blocks > INT_MAX) return cudaErrorInvalidValue;
    const DeviceGuard guard(device);
    if (guard.status != cudaSuccess) return guard.status;
    if (shared_bytes > 0) {
        size_t max_bytes = 0;
        const cudaError_t status = raise_shared_limit<kernel>(device, max_bytes);
        if (status != cudaSuccess) return status;
        if (shared_bytes > max_bytes) return cudaErrorInvalidValue;
    }
    kernel<<<static_cast<unsigned>(blocks), threads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(arguments...);
    return cudaGetLastError();
}

}  // namespace ospo

// Replaces csrc/launch.h: a launch runs the kernel on the host.
#pragma once

#include "device_guard.h"
#include "shared_memory.h"

namespace ospo {

template <auto kernel, class... Values>
int launch(int64_t blocks, int threads, size_t shared_bytes, int device, void*, const Values&... values) {
    size_t max_bytes = 0;
    raise_shared_limit<kernel>(device, max_bytes);
    if (shared_bytes > max_bytes) return cudaErrorInvalidValue;
    host::run([&] { kernel(values...); }, blocks, threads, shared_bytes);
    return cudaSuccess;
}

}  // namespace ospo

// Runs CUDA kernels of one dimension on the host, for tests of what they compute: every thread of a block is a fiber, and
// all of them run in turns from one barrier or shuffle to the next. `launch_on_host` stands in for <<<>>>.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define __device__
#define __global__
#define __shared__ static  // one block runs at a time
#define __launch_bounds__(...)

struct uint4 {
    uint32_t x, y, z, w;
};
struct Index {
    unsigned x;
};
using cudaStream_t = void*;
using cudaError_t = int;
enum { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
inline int cudaGetDevice(int* device) { return *device = 0; }
inline int cudaSetDevice(int) { return cudaSuccess; }
inline int cudaGetLastError() { return cudaSuccess; }

inline Index threadIdx, blockIdx;

namespace host {
constexpr int stack_size = 1 << 15;
struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack{new char[stack_size]};
    bool done;
};
inline std::vector<Fiber> fibers;
inline std::vector<float> lanes;
inline ucontext_t scheduler;
inline std::function<void()> body;
inline bool backwards = false;  // the order in which threads run between two barriers

inline void pause() {
    const unsigned self = threadIdx.x;
    swapcontext(&fibers[self].context, &scheduler);
    threadIdx.x = self;
}

inline void enter() {
    const unsigned self = threadIdx.x;
    body();
    fibers[self].done = true;
    swapcontext(&fibers[self].context, &scheduler);
}
}  // namespace host

template <typename Kernel, typename Arguments>
void launch_on_host(Kernel kernel, unsigned blocks, unsigned threads, const Arguments& arguments) {
    host::body = [&] { kernel(arguments); };
    host::lanes.resize(threads);
    host::fibers.resize(threads);
    for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x) {
        for (auto& fiber : host::fibers) {
            fiber.done = false;
            getcontext(&fiber.context);
            fiber.context.uc_stack.ss_sp = fiber.stack.get();
            fiber.context.uc_stack.ss_size = host::stack_size;
            makecontext(&fiber.context, host::enter, 0);
        }
        for (unsigned running = threads; running > 0;) {
            for (unsigned i = 0; i < threads; ++i) {
                threadIdx.x = host::backwards ? threads - 1 - i : i;
                auto& fiber = host::fibers[threadIdx.x];
                if (fiber.done) continue;
                swapcontext(&host::scheduler, &fiber.context);
                running -= fiber.done;
            }
        }
    }
}

inline void __syncthreads() { host::pause(); }

inline float __shfl_xor_sync(unsigned, float value, int mask) {
    const unsigned self = threadIdx.x;
    host::lanes[self] = value;
    host::pause();
    value = host::lanes[self ^ mask];
    host::pause();
    return value;
}

inline float __fdividef(float a, float b) { return a / b; }
inline uint4 __ldcs(const uint4* from) { return *from; }

// ex2.approx.ftz.f32
inline float exp2_on_host(float x) {
    const float y = std::exp2(x);
    return y < 0x1p-126f ? 0.0f : y;
}

struct __nv_bfloat16 {
    uint16_t raw;
};
using __half = _Float16;

inline float __half2float(__half value) { return value; }
inline __half __float2half_rn(float value) { return static_cast<__half>(value); }
inline float __bfloat162float(__nv_bfloat16 value) {
    const uint32_t bits = uint32_t{value.raw} << 16;
    float wide;
    std::memcpy(&wide, &bits, 4);
    return wide;
}
inline __nv_bfloat16 __float2bfloat16_rn(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    if (value != value) return {0x7FC0};
    return {static_cast<uint16_t>((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16)};
}

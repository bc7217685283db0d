// Runs CUDA kernels of one dimension on the host, for tests of what they compute: every thread of a block is a fiber,
// which runs to its next barrier or shuffle and waits there for its block or warp. `launch_on_host` is for <<<>>>.
#pragma once

#include <ucontext.h>

#include <math.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define __device__
#define __global__
#define __shared__ static  // one block runs at a time
#define __launch_bounds__(...)
#define __align__(bytes)  // what stands for dynamic shared memory is aligned

struct uint4 {
    uint32_t x, y, z, w;
};
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
struct Index {
    unsigned x;
};
using cudaStream_t = void*;
using cudaError_t = int;
enum { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
inline int cudaGetDevice(int* device) { return *device = 0; }
inline int cudaSetDevice(int) { return cudaSuccess; }
inline int cudaGetLastError() { return cudaSuccess; }
enum { cudaDevAttrMaxSharedMemoryPerBlockOptin, cudaFuncAttributeMaxDynamicSharedMemorySize };
inline int most_shared = 227 * 1024;  // bytes of a block
inline int cudaDeviceGetAttribute(int* value, int, int) { return *value = most_shared, cudaSuccess; }
struct cudaFuncAttributes {
    size_t sharedSizeBytes;
};
template <typename Kernel>
int cudaFuncGetAttributes(cudaFuncAttributes* found, Kernel) {
    return found->sharedSizeBytes = 18704, cudaSuccess;  // what draw_truncated has
}
template <typename Kernel>
int cudaFuncSetAttribute(Kernel, int, int bytes) {
    return bytes <= most_shared ? cudaSuccess : cudaErrorInvalidValue;
}

inline Index threadIdx, blockIdx;

namespace host {
constexpr int stack_size = 1 << 15;
struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack{new char[stack_size]};
    bool done;
};
struct Barrier {
    unsigned arrived = 0, round = 0;
};
inline std::vector<Fiber> fibers;
inline std::vector<uint64_t> lanes;
inline std::vector<Barrier> barriers;  // of the warps, then of the block
inline std::vector<uint64_t> room;     // dynamic shared memory
inline ucontext_t scheduler;
inline std::function<void()> body;
inline bool backwards = false;  // the order in which threads run between two barriers
inline bool moving;             // whether some barrier has opened, or some thread ended

inline void pause() {
    const unsigned self = threadIdx.x;
    swapcontext(&fibers[self].context, &scheduler);
    threadIdx.x = self;
}

inline void wait(Barrier& barrier, unsigned threads) {
    const unsigned round = barrier.round;
    if (++barrier.arrived == threads) {
        barrier.arrived = 0;
        ++barrier.round;
        moving = true;
    }
    while (barrier.round == round) pause();
}

inline void enter() {
    const unsigned self = threadIdx.x;
    body();
    fibers[self].done = moving = true;
    swapcontext(&fibers[self].context, &scheduler);
}

// What read(lanes) finds once all threads of the barrier have written their value there.
template <typename T, typename Read>
auto exchange(Barrier& barrier, unsigned threads, T value, Read read) {
    lanes[threadIdx.x] = 0;
    std::memcpy(&lanes[threadIdx.x], &value, sizeof value);
    wait(barrier, threads);
    const auto found = read(lanes.data() + threadIdx.x / threads * threads);
    wait(barrier, threads);
    return found;
}

template <typename T, typename Read>
auto in_warp(T value, Read read) {
    return exchange(barriers[threadIdx.x / 32], 32, value, read);
}

template <typename T>
T from_lane(T value, unsigned lane) {
    return in_warp(value, [=](const uint64_t* values) {
        T other;
        std::memcpy(&other, values + lane, sizeof other);
        return other;
    });
}
}  // namespace host

template <typename Kernel, typename Arguments>
void launch_on_host(Kernel kernel, unsigned blocks, unsigned threads, const Arguments& arguments, size_t shared = 0) {
    host::body = [&] { kernel(arguments); };
    host::lanes.resize(threads);
    host::fibers.resize(threads);
    for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x) {
        host::room.assign((shared + 7) / 8, 0x7777777777777777);
        host::barriers.assign(threads / 32 + 1, {});
        for (auto& fiber : host::fibers) {
            fiber.done = false;
            getcontext(&fiber.context);
            fiber.context.uc_stack.ss_sp = fiber.stack.get();
            fiber.context.uc_stack.ss_size = host::stack_size;
            makecontext(&fiber.context, host::enter, 0);
        }
        for (unsigned running = threads; running > 0;) {
            host::moving = false;
            for (unsigned i = 0; i < threads; ++i) {
                threadIdx.x = host::backwards ? threads - 1 - i : i;
                auto& fiber = host::fibers[threadIdx.x];
                if (fiber.done) continue;
                swapcontext(&host::scheduler, &fiber.context);
                running -= fiber.done;
            }
            if (!host::moving) {
                std::fputs("the threads of a block wait at different barriers\n", stderr);
                std::abort();
            }
        }
    }
}

inline void __syncthreads() { host::wait(host::barriers.back(), static_cast<unsigned>(host::fibers.size())); }
inline int __syncthreads_or(int value) {
    const unsigned threads = static_cast<unsigned>(host::fibers.size());
    return host::exchange(host::barriers.back(), threads, value, [=](const uint64_t* values) {
        int found = 0;
        for (unsigned i = 0; i < threads; ++i) found |= values[i] != 0;
        return found;
    });
}
inline unsigned __ballot_sync(unsigned, int value) {
    return host::in_warp(value, [](const uint64_t* values) {
        unsigned votes = 0;
        for (int lane = 0; lane < 32; ++lane) votes |= unsigned{values[lane] != 0} << lane;
        return votes;
    });
}
template <typename T>
T __shfl_sync(unsigned, T value, int lane) {
    return host::from_lane(value, lane);
}
template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
    return host::from_lane(value, threadIdx.x % 32 ^ mask);
}
template <typename T>
T __shfl_down_sync(unsigned, T value, unsigned distance) {
    const unsigned lane = threadIdx.x % 32;
    return host::from_lane(value, lane + distance < 32 ? lane + distance : lane);
}
template <typename T>
T __shfl_up_sync(unsigned, T value, unsigned distance) {
    const unsigned lane = threadIdx.x % 32;
    return host::from_lane(value, lane >= distance ? lane - distance : lane);
}
inline uint32_t atomicAdd(uint32_t* at, uint32_t value) {
    const uint32_t before = *at;
    *at += value;
    return before;
}
inline uint32_t atomicMax(uint32_t* at, uint32_t value) {
    const uint32_t before = *at;
    if (value > before) *at = value;
    return before;
}

inline uint32_t max(uint32_t a, uint32_t b) { return a > b ? a : b; }
inline int __ffs(int bits) { return __builtin_ffs(bits); }
inline int __clz(int bits) { return bits == 0 ? 32 : __builtin_clz(static_cast<unsigned>(bits)); }
inline uint32_t __umulhi(uint32_t a, uint32_t b) { return static_cast<uint32_t>(uint64_t{a} * b >> 32); }
template <typename To, typename From>
To bits_as(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}
inline uint32_t __float_as_uint(float value) { return bits_as<uint32_t>(value); }
inline float __uint_as_float(uint32_t bits) { return bits_as<float>(bits); }
inline double __longlong_as_double(int64_t bits) { return bits_as<double>(bits); }

// Compile with -ffp-contract=off.
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dsub_rn(double a, double b) { return a - b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __ull2double_rn(uint64_t value) { return static_cast<double>(value); }
inline uint64_t __double2ull_rn(double value) { return static_cast<uint64_t>(rint(value)); }
inline uint64_t __double2ull_ru(double value) { return static_cast<uint64_t>(ceil(value)); }
inline float __fdividef(float a, float b) { return a / b; }
inline uint4 __ldcs(const uint4* from) { return *from; }
namespace host {
inline int64_t wide_loads = 0;  // of 16 bytes
}
template <typename T>
T __ldg(const T* from) {
    if (sizeof(T) == 16) {
        if (reinterpret_cast<uintptr_t>(from) % 16) {
            std::fputs("a load of 16 bytes is not aligned\n", stderr);
            std::abort();
        }
        ++host::wide_loads;
    }
    return *from;
}

// ex2.approx.ftz.f32
inline float exp2_on_host(float x) {
    const float y = exp2f(x);
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

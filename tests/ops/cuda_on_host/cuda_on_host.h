// The part of CUDA that the kernels of csrc/ use, on the host, to test their arithmetic and synchronization without a
// GPU. Every thread of a block is a fiber. It runs to its next barrier or shuffle and waits there for its block, warp
// or team. Compile with -ffp-contract=off.
#pragma once

#include <math.h>
#include <setjmp.h>
#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define __device__
#define __host__
#define __global__
#define __shared__ static  // blocks run one after the other
#define __launch_bounds__(...)

struct uint4 {
    uint32_t x, y, z, w;
};
struct Index {
    unsigned x;
};
inline Index threadIdx, blockIdx;

// What the tests set and read.
extern "C" {
inline bool reverse_threads = false;         // run the threads in descending order between two barriers
inline int max_shared_bytes = 227 * 1024;    // of a block
inline int64_t wide_loads = 0;               // loads of 16 bytes by __ldg
}

// The runtime ---------------------------------------------------------------------------------------------------------

using cudaError_t = int;
enum { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
enum { cudaDevAttrMaxSharedMemoryPerBlockOptin, cudaFuncAttributeMaxDynamicSharedMemorySize };
struct cudaFuncAttributes {
    size_t sharedSizeBytes;
};
inline int cudaGetDevice(int* device) { return *device = 0; }
inline int cudaSetDevice(int) { return cudaSuccess; }
inline int cudaDeviceGetAttribute(int* value, int, int) { return *value = max_shared_bytes, cudaSuccess; }
template <class Kernel>
int cudaFuncGetAttributes(cudaFuncAttributes* found, Kernel) {
    return found->sharedSizeBytes = 18704, cudaSuccess;  // of sample_truncated
}
template <class Kernel>
int cudaFuncSetAttribute(Kernel, int, int bytes) {
    return bytes <= max_shared_bytes ? cudaSuccess : cudaErrorInvalidValue;
}

// Fibers --------------------------------------------------------------------------------------------------------------

namespace host {

constexpr int kStackBytes = 1 << 15;

struct Fiber {
    std::unique_ptr<char[]> stack{new char[kStackBytes]};
    ucontext_t start;
    jmp_buf resume;
    bool started, done;
};
struct Barrier {
    unsigned arrived = 0, round = 0;
};

inline std::vector<Fiber> fibers;
inline jmp_buf scheduler;
inline std::function<void()> body;
inline bool progress;                 // whether a barrier has opened or a thread has ended
inline std::vector<Barrier> warps;
inline Barrier block, teams[16];
inline std::vector<uint64_t> lanes;   // values that threads exchange
inline std::vector<uint64_t> shared;  // dynamic shared memory

template <class T>
T* dynamic_shared() {
    return reinterpret_cast<T*>(shared.data());
}

// setjmp and longjmp, because swapcontext makes two system calls per switch.
inline void pause() {
    if (_setjmp(fibers[threadIdx.x].resume) == 0) _longjmp(scheduler, 1);
}

inline void wait(Barrier& barrier, unsigned threads) {
    const unsigned round = barrier.round;
    if (++barrier.arrived == threads) {
        barrier.arrived = 0;
        ++barrier.round;
        progress = true;
    }
    while (barrier.round == round) pause();
}

inline void enter() {
    body();
    fibers[threadIdx.x].done = progress = true;
    _longjmp(scheduler, 1);
}

inline void step(Fiber& fiber) {
    if (_setjmp(scheduler) != 0) return;
    if (fiber.started) _longjmp(fiber.resume, 1);
    fiber.started = true;
    setcontext(&fiber.start);
}

inline void run(std::function<void()> kernel, int64_t blocks, unsigned threads, size_t shared_bytes) {
    body = std::move(kernel);
    lanes.resize(threads);
    fibers.resize(threads);
    for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x) {
        shared.assign((shared_bytes + 7) / 8, ~uint64_t{0});  // NaN
        warps.assign(threads / 32, {});
        for (auto& fiber : fibers) {
            fiber.started = fiber.done = false;
            getcontext(&fiber.start);
            fiber.start.uc_stack.ss_sp = fiber.stack.get();
            fiber.start.uc_stack.ss_size = kStackBytes;
            makecontext(&fiber.start, enter, 0);
        }
        for (unsigned running = threads; running > 0;) {
            progress = false;
            for (unsigned i = 0; i < threads; ++i) {
                threadIdx.x = reverse_threads ? threads - 1 - i : i;
                auto& fiber = fibers[threadIdx.x];
                if (fiber.done) continue;
                step(fiber);
                running -= fiber.done;
            }
            if (!progress) {
                std::fputs("the threads of a block wait at different barriers\n", stderr);
                std::abort();
            }
        }
    }
}

// read(values) after all threads of the barrier have written theirs.
template <class T, class Read>
auto exchange(Barrier& barrier, unsigned threads, T value, Read read) {
    lanes[threadIdx.x] = 0;
    std::memcpy(&lanes[threadIdx.x], &value, sizeof value);
    wait(barrier, threads);
    const auto found = read(lanes.data() + threadIdx.x / threads * threads);
    wait(barrier, threads);
    return found;
}

template <class T, class Read>
auto in_warp(T value, Read read) {
    return exchange(warps[threadIdx.x / 32], 32, value, read);
}

template <class T>
T from_lane(T value, unsigned lane) {
    return in_warp(value, [=](const uint64_t* values) {
        T other;
        std::memcpy(&other, values + lane, sizeof other);
        return other;
    });
}

// ex2.approx.ftz.f32
inline float exp2(float x) {
    const float y = exp2f(x);
    return y < 0x1p-126f ? 0.0f : y;
}

template <class To, class From>
To bits_as(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}

}  // namespace host

// Synchronization -----------------------------------------------------------------------------------------------------

inline void __syncthreads() { host::wait(host::block, static_cast<unsigned>(host::fibers.size())); }
inline void __barrier_sync_count(unsigned barrier, unsigned threads) { host::wait(host::teams[barrier], threads); }
inline int __syncthreads_or(int value) {
    const unsigned threads = static_cast<unsigned>(host::fibers.size());
    return host::exchange(host::block, threads, value, [=](const uint64_t* values) {
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
template <class T>
T __shfl_sync(unsigned, T value, int lane) {
    return host::from_lane(value, lane);
}
template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
    return host::from_lane(value, threadIdx.x % 32 ^ mask);
}
template <class T>
T __shfl_down_sync(unsigned, T value, unsigned distance) {
    const unsigned lane = threadIdx.x % 32;
    return host::from_lane(value, lane + distance < 32 ? lane + distance : lane);
}
template <class T>
T __shfl_up_sync(unsigned, T value, unsigned distance) {
    const unsigned lane = threadIdx.x % 32;
    return host::from_lane(value, lane >= distance ? lane - distance : lane);
}
template <class T>
T atomicAdd(T* target, T value) {
    const T before = *target;
    *target += value;
    return before;
}
inline uint32_t atomicMax(uint32_t* target, uint32_t value) {
    const uint32_t before = *target;
    if (value > before) *target = value;
    return before;
}

// Arithmetic ----------------------------------------------------------------------------------------------------------

inline uint32_t max(uint32_t a, uint32_t b) { return a > b ? a : b; }
inline int __ffs(int bits) { return __builtin_ffs(bits); }
inline double __longlong_as_double(int64_t bits) { return host::bits_as<double>(bits); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fdividef(float a, float b) { return a / b; }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dsub_rn(double a, double b) { return a - b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __ull2double_rn(uint64_t value) { return static_cast<double>(value); }
inline uint64_t __double2ull_rn(double value) { return static_cast<uint64_t>(rint(value)); }
inline uint64_t __double2ull_ru(double value) { return static_cast<uint64_t>(ceil(value)); }

inline uint4 __ldcs(const uint4* from) { return *from; }
template <class T>
T __ldg(const T* from) {
    if (sizeof(T) == 16) {
        if (reinterpret_cast<uintptr_t>(from) % 16) {
            std::fputs("a load of 16 bytes is not aligned\n", stderr);
            std::abort();
        }
        ++wide_loads;
    }
    return *from;
}

using __half = _Float16;
struct __nv_bfloat16 {
    uint16_t raw;
};
inline float __half2float(__half value) { return value; }
inline __half __float2half_rn(float value) { return static_cast<__half>(value); }
inline float __bfloat162float(__nv_bfloat16 value) { return host::bits_as<float>(uint32_t{value.raw} << 16); }
inline __nv_bfloat16 __float2bfloat16_rn(float value) {
    if (value != value) return {0x7FC0};
    const uint32_t bits = host::bits_as<uint32_t>(value);
    return {static_cast<uint16_t>((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16)};
}

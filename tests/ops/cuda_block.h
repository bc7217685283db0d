// Runs the thread blocks of a CUDA kernel on host threads, one block after the other: enough of CUDA for
// csrc/object_masks.cu, so that its arithmetic is tested where there is no GPU. Compile with -ffp-contract=off.
#pragma once

#include <pthread.h>

#include <cmath>
#include <cstdint>
#include <thread>
#include <vector>

#define __device__
#define __host__
#define __global__
#define __shared__ static
#define __launch_bounds__(threads)

struct Index {
    int x = 0;
};
inline thread_local Index threadIdx, blockIdx;

constexpr int BLOCK_THREADS = 256;  // at most
inline pthread_barrier_t block_barrier, team_barrier[16], warp_barrier[BLOCK_THREADS / 32];
inline double exchanged[BLOCK_THREADS];  // holds any float, double or int exactly
inline double shared_room[1 << 16];

inline void __syncthreads() { pthread_barrier_wait(&block_barrier); }
inline void __barrier_sync_count(int barrier, int) { pthread_barrier_wait(team_barrier + barrier); }

template <typename T>
T __shfl_xor_sync(unsigned, T value, int step) {
    pthread_barrier_t* const barrier = warp_barrier + threadIdx.x / 32;
    exchanged[threadIdx.x] = value;
    pthread_barrier_wait(barrier);
    const T other = static_cast<T>(exchanged[threadIdx.x ^ step]);
    pthread_barrier_wait(barrier);
    return other;
}

inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline int atomicAdd(int* address, int value) { return __atomic_fetch_add(address, value, __ATOMIC_SEQ_CST); }

// `teams` of the threads of a block wait for each other by __barrier_sync_count.
template <typename Kernel>
void launch(int blocks, int block_threads, int teams, Kernel kernel) {
    pthread_barrier_init(&block_barrier, nullptr, block_threads);
    for (auto& barrier : team_barrier) pthread_barrier_init(&barrier, nullptr, block_threads / teams);
    for (auto& barrier : warp_barrier) pthread_barrier_init(&barrier, nullptr, 32);
    for (int block = 0; block < blocks; ++block) {
        std::vector<std::thread> threads;
        for (int thread = 0; thread < block_threads; ++thread) {
            threads.emplace_back([=] {
                threadIdx.x = thread;
                blockIdx.x = block;
                kernel();
            });
        }
        for (auto& thread : threads) thread.join();
    }
}

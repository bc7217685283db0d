// Threads of a block that work on one map, and the reduction of its extrema.
#pragma once

namespace ospo {

constexpr int MAX_THREADS = 256;  // per block
constexpr int MAX_WARPS = MAX_THREADS / 32;

// A whole block, or a power of two of neighboring warps. Each such team has its named barrier.
template <bool WHOLE_BLOCK>
struct ThreadTeam {
    int threads, index, thread, warp;
    __device__ explicit ThreadTeam(int threads)
        : threads(threads), index(WHOLE_BLOCK ? 0 : threadIdx.x / threads), thread(threadIdx.x - index * threads),
          warp(threadIdx.x / 32) {}
    __device__ int first_warp() const { return index * (threads / 32); }
    __device__ int end_warp() const { return (index + 1) * (threads / 32); }
    __device__ void sync() const {
        if constexpr (WHOLE_BLOCK) {
            __syncthreads();
        } else {
            __barrier_sync_count(1 + index, threads);
        }
    }
};

// Shared memory of reduce_extrema: one element per warp.
template <class T>
struct ExtremaScratch {
    T low[MAX_WARPS], high[MAX_WARPS];
};

// The minimum of low and the maximum of high over the team, in each of its threads.
template <class T, class Team>
__device__ void reduce_extrema(const Team& team, T& low, T& high, ExtremaScratch<T>& scratch) {
    for (int step = 16; step; step >>= 1) {
        low = fmin(low, __shfl_xor_sync(~0u, low, step));
        high = fmax(high, __shfl_xor_sync(~0u, high, step));
    }
    if (team.thread % 32 == 0) {
        scratch.low[team.warp] = low;
        scratch.high[team.warp] = high;
    }
    team.sync();
    for (int w = team.first_warp(); w < team.end_warp(); ++w) {
        low = fmin(low, scratch.low[w]);
        high = fmax(high, scratch.high[w]);
    }
    team.sync();
}

}  // namespace ospo

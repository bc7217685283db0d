// Otsu's threshold of one map by a team of threads, for otsu.cu and object_masks.cu. Float operations that decide a bit
// of the threshold are intrinsics, which the compiler does not contract to FMA: the results are those of otsu.cpp.
#pragma once

#include <cfloat>
#include <cmath>

#include "thread_team.cuh"

namespace ospo {

// Static shared memory of a block. Each warp or team uses its own element.
struct OtsuScratch {
    ExtremaScratch<float> extrema;
    float variance[MAX_WARPS];
    int bin[MAX_WARPS];
    int invalid[MAX_WARPS];
};

// Dynamic shared memory of one map and its histogram.
struct OtsuBuffers {
    float* map;    // (cells)
    float* edges;  // (bins + 1)
    float* sums;   // (3, bins): mass from the first bin on, mass from the last bin on, counts from the first bin on
    int* counts;   // (bins)
    __device__ OtsuBuffers(float* start, int cells, int bins)
        : map(start), edges(map + cells), sums(edges + bins + 1), counts(reinterpret_cast<int*>(sums + 3 * bins)) {}
    __host__ __device__ static constexpr size_t bytes(size_t cells, size_t bins) {
        return (cells + 5 * bins + 1) * sizeof(float);
    }
};

// The first bin with the maximum variance, in every thread of the team.
template <class Team>
__device__ int first_argmax(const Team& team, float variance, int bin, OtsuScratch& scratch) {
    const auto take_better = [&](float other, int other_bin) {
        if (other > variance || (other == variance && other_bin < bin)) {
            variance = other;
            bin = other_bin;
        }
    };
    for (int step = 16; step; step >>= 1) {
        take_better(__shfl_xor_sync(~0u, variance, step), __shfl_xor_sync(~0u, bin, step));
    }
    if (team.thread % 32 == 0) {
        scratch.variance[team.warp] = variance;
        scratch.bin[team.warp] = bin;
    }
    team.sync();
    for (int w = team.first_warp(); w < team.end_warp(); ++w) take_better(scratch.variance[w], scratch.bin[w]);
    team.sync();
    return bin;
}

// Copy a map to shared memory, or zeros if raw is null, and reduce its extrema. False if a cell or the range is not
// finite.
template <class Team>
__device__ bool load_map(const Team& team, const float* raw, int cells, float* map, float& low, float& high,
                         OtsuScratch& scratch) {
    low = INFINITY;
    high = -INFINITY;
    for (int i = team.thread; i < cells; i += team.threads) {
        const float value = raw == nullptr ? 0.0f : raw[i];
        map[i] = value;
        low = fminf(low, value);
        high = value == value ? fmaxf(high, value) : INFINITY;  // fminf and fmaxf ignore NaN
    }
    reduce_extrema(team, low, high, scratch.extrema);
    return __fsub_rn(high, low) <= FLT_MAX;
}

// Prefix sums in place by one thread: scikit-image adds in the order of the bins, and the last bits decide ties. Values
// are loaded and stored in batches, so that only the additions depend on one another.
__device__ inline void prefix_sums(float* values, int count) {
    constexpr int BATCH = 16;
    float sum = 0.0f, batch[BATCH];
    int from = 0;
    for (; from + BATCH <= count; from += BATCH) {
#pragma unroll
        for (int i = 0; i < BATCH; ++i) batch[i] = values[from + i];
#pragma unroll
        for (int i = 0; i < BATCH; ++i) sum = batch[i] = __fadd_rn(sum, batch[i]);
#pragma unroll
        for (int i = 0; i < BATCH; ++i) values[from + i] = batch[i];
    }
    for (; from < count; ++from) sum = values[from] = __fadd_rn(sum, values[from]);
}

// As in otsu.cpp.
__device__ inline float unit_scale(float low, float high) {
    const float size = fmaxf(fabsf(low), fabsf(high));
    int exponent;
    return fminf(fmaxf(__fdiv_rn(frexpf(size, &exponent), size), 0x1p-126f), 0x1p126f);
}

// Otsu's threshold of the map in the buffers, which reaches from low to high, in every thread of the team. NaN if the
// range is too small for the bins.
template <class Team>
__device__ float otsu(const Team& team, const OtsuBuffers& buffers, int cells, float low, float high, int bins,
                      OtsuScratch& scratch) {
    const float *const map = buffers.map, *const edges = buffers.edges;
    const float delta = __fsub_rn(high, low), bin_count = static_cast<float>(bins);
    const float step = __fdiv_rn(delta, bin_count);
    for (int i = team.thread; i <= bins; i += team.threads) {
        const float index = static_cast<float>(i);
        const float offset = step == 0.0f ? __fmul_rn(__fdiv_rn(index, bin_count), delta) : __fmul_rn(index, step);
        buffers.edges[i] = i == bins ? high : __fadd_rn(offset, low);
        if (i < bins) buffers.counts[i] = 0;
    }
    int& invalid = scratch.invalid[team.first_warp()];
    if (team.thread == 0) invalid = 0;
    team.sync();
    for (int i = team.thread; i < bins; i += team.threads) {
        if (!(edges[i] < edges[i + 1])) invalid = 1;
    }
    team.sync();
    if (invalid) return NAN;
    for (int i = team.thread; i < cells; i += team.threads) {
        const float value = map[i];
        int bin = static_cast<int>(__fmul_rn(__fdiv_rn(__fsub_rn(value, low), delta), bin_count));
        bin -= bin == bins;
        bin -= value < edges[bin];
        bin += value >= edges[bin + 1] && bin != bins - 1;
        atomicAdd(buffers.counts + bin, 1);
    }
    team.sync();
    const float scale = unit_scale(low, high);
    const auto center = [edges, scale](int i) {
        return __fmul_rn(__fadd_rn(__fmul_rn(edges[i], scale), __fmul_rn(edges[i + 1], scale)), 0.5f);
    };
    float *const front = buffers.sums, *const back = front + bins, *const weight = back + bins;
    for (int i = team.thread; i < bins; i += team.threads) {
        weight[i] = static_cast<float>(buffers.counts[i]);  // exact, and so are its sums
        front[i] = back[bins - 1 - i] = __fmul_rn(weight[i], center(i));
    }
    team.sync();
    if (team.thread < 3) prefix_sums(buffers.sums + team.thread * bins, bins);
    team.sync();
    float max = -1.0f;
    int best = 0;
    for (int i = team.thread; i + 1 < bins; i += team.threads) {
        const float below = weight[i], above = __fsub_rn(static_cast<float>(cells), below);
        const float gap = __fsub_rn(__fdiv_rn(front[i], below), __fdiv_rn(back[bins - 2 - i], above));
        const float variance = __fmul_rn(__fmul_rn(below, above), __fmul_rn(gap, gap));
        if (variance > max) {
            max = variance;
            best = i;
        }
    }
    return __fdiv_rn(center(first_argmax(team, max, best, scratch)), scale);
}

}  // namespace ospo

// Object masks and token weights on the GPU: one thread block per image, its objects side by side in one launch, and
// nothing is waited for. Every float operation that decides a bit of a threshold or mask is spelt as an intrinsic, which
// the compiler may not contract into FMA: the results are those of object_masks.cpp.
#include <cfloat>
#include <cmath>

#include "common.h"
#include "device_guard.h"
#include "shared_memory.h"

namespace ospo {
namespace {

constexpr int THREADS = 256;
constexpr int WARPS = THREADS / 32;
constexpr int OTSU_THREADS = 64;  // of a block for one map: the running sums of its bins take most of its time
constexpr int BATCH = 16;         // bins whose sums are in registers at once
constexpr size_t MOST_ROOM = 96 * 1024;  // bytes of a block that has several maps at once: every device allows it

// What a block shares besides its arrays, each warp and each team at its own place.
struct Scratch {
    double low[WARPS], high[WARPS];
    float variance[WARPS];
    int bin[WARPS];
    int wrong[WARPS];
};

// The threads that work on one map: a whole block, or neighbouring warps, a power of two of them, that wait for one
// another alone, each such team at a barrier of its own.
template <bool WHOLE>
struct Team {
    int threads, index, thread, warp;
    __device__ explicit Team(int threads)
        : threads(threads), index(WHOLE ? 0 : threadIdx.x / threads), thread(threadIdx.x - index * threads),
          warp(threadIdx.x / 32) {}
    __device__ int first_warp() const { return index * (threads / 32); }
    __device__ int end_warp() const { return (index + 1) * (threads / 32); }
    __device__ void sync() const {
        if constexpr (WHOLE) {
            __syncthreads();
        } else {
            __barrier_sync_count(1 + index, threads);
        }
    }
};

// Shared room for one map and its histogram.
struct Room {
    float* map;    // (cells)
    float* edges;  // (bins + 1)
    float* sums;   // (3, bins): mass from the first bin on, mass from the last bin on, counts from the first bin on
    int* counts;   // (bins)
    __device__ Room(float* start, int cells, int bins)
        : map(start), edges(map + cells), sums(edges + bins + 1), counts(reinterpret_cast<int*>(sums + 3 * bins)) {}
};
__host__ __device__ constexpr size_t room_size(size_t cells, size_t bins) { return cells + 5 * bins + 1; }

// The least and the greatest of what the threads have, in all threads.
template <class T, class Threads>
__device__ void reduce_extrema(const Threads& team, T& low, T& high, Scratch& scratch) {
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
        low = fmin(low, static_cast<T>(scratch.low[w]));
        high = fmax(high, static_cast<T>(scratch.high[w]));
    }
    team.sync();
}

// The first bin of the greatest variance, in all threads.
template <class Threads>
__device__ int first_argmax(const Threads& team, float variance, int bin, Scratch& scratch) {
    for (int step = 16; step; step >>= 1) {
        const float other = __shfl_xor_sync(~0u, variance, step);
        const int where = __shfl_xor_sync(~0u, bin, step);
        if (other > variance || (other == variance && where < bin)) {
            variance = other;
            bin = where;
        }
    }
    if (team.thread % 32 == 0) {
        scratch.variance[team.warp] = variance;
        scratch.bin[team.warp] = bin;
    }
    team.sync();
    for (int w = team.first_warp(); w < team.end_warp(); ++w) {
        const float other = scratch.variance[w];
        if (other > variance || (other == variance && scratch.bin[w] < bin)) {
            variance = other;
            bin = scratch.bin[w];
        }
    }
    team.sync();
    return bin;
}

// Copies a map into its room, zeros where raw is null; its extrema in all threads. False where a cell, or the range, is
// not finite.
template <class Threads>
__device__ bool load_map(const Threads& team, const float* raw, int cells, float* map, float& low, float& high,
                         Scratch& scratch) {
    low = INFINITY;
    high = -INFINITY;
    for (int i = team.thread; i < cells; i += team.threads) {
        const float value = raw == nullptr ? 0.0f : raw[i];
        map[i] = value;
        low = fminf(low, value);
        high = value == value ? fmaxf(high, value) : INFINITY;  // fminf and fmaxf leave NaN out
    }
    reduce_extrema(team, low, high, scratch);
    return __fsub_rn(high, low) <= FLT_MAX;
}

// Running sums in place, one by one: scikit-image adds in the order of the bins, and the last bits decide ties. Only
// the additions wait for one another.
__device__ void accumulate(float* values, int count) {
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

// Otsu's threshold of the map in a room, which reaches from low to high, in all threads; NaN where its range is too
// small for the bins.
template <class Threads>
__device__ float otsu(const Threads& team, const Room& room, int cells, float low, float high, int bins,
                      Scratch& scratch) {
    const float *const map = room.map, *const edges = room.edges;
    const float delta = __fsub_rn(high, low), whole = static_cast<float>(bins);
    const float step = __fdiv_rn(delta, whole);
    for (int i = team.thread; i <= bins; i += team.threads) {
        const float index = static_cast<float>(i);
        const float offset = step == 0.0f ? __fmul_rn(__fdiv_rn(index, whole), delta) : __fmul_rn(index, step);
        room.edges[i] = i == bins ? high : __fadd_rn(offset, low);
        if (i < bins) room.counts[i] = 0;
    }
    int& wrong = scratch.wrong[team.first_warp()];
    if (team.thread == 0) wrong = 0;
    team.sync();
    for (int i = team.thread; i < bins; i += team.threads) {
        if (!(edges[i] < edges[i + 1])) wrong = 1;
    }
    team.sync();
    if (wrong) return NAN;
    for (int i = team.thread; i < cells; i += team.threads) {
        const float value = map[i];
        int bin = static_cast<int>(__fmul_rn(__fdiv_rn(__fsub_rn(value, low), delta), whole));
        bin -= bin == bins;
        bin -= value < edges[bin];
        bin += value >= edges[bin + 1] && bin != bins - 1;
        atomicAdd(room.counts + bin, 1);
    }
    team.sync();
    const auto center = [edges](int i) { return __fmul_rn(__fadd_rn(edges[i], edges[i + 1]), 0.5f); };
    float *const front = room.sums, *const back = front + bins, *const weight = back + bins;
    for (int i = team.thread; i < bins; i += team.threads) {
        weight[i] = static_cast<float>(room.counts[i]);  // exact, and so are its sums
        front[i] = back[bins - 1 - i] = __fmul_rn(weight[i], center(i));
    }
    team.sync();
    if (team.thread < 3) accumulate(room.sums + team.thread * bins, bins);
    team.sync();
    float most = -1.0f;
    int best = 0;
    for (int i = team.thread; i + 1 < bins; i += team.threads) {
        const float below = weight[i], above = __fsub_rn(static_cast<float>(cells), below);
        const float gap = __fsub_rn(__fdiv_rn(front[i], below), __fdiv_rn(back[bins - 2 - i], above));
        const float variance = __fmul_rn(__fmul_rn(below, above), __fmul_rn(gap, gap));
        if (variance > most) {
            most = variance;
            best = i;
        }
    }
    return center(first_argmax(team, most, best, scratch));
}

__device__ void blur_axis(const double* in, double* out, int cells, int width, int height, bool across,
                          const Blur& blur) {
    const int step = across ? 1 : width, length = across ? width : height;
    for (int at = threadIdx.x; at < cells; at += THREADS) {
        const int i = across ? at % width : at / width;
        double sum = __dmul_rn(in[at], blur.tap[0]);
        for (int t = 1; t <= blur.radius; ++t) {
            const double before = i >= t ? in[at - t * step] : 0.0;
            const double after = i + t < length ? in[at + t * step] : 0.0;
            sum = __dadd_rn(sum, __dmul_rn(__dadd_rn(before, after), blur.tap[t]));
        }
        out[at] = sum;
    }
    __syncthreads();
}

// Weights of one image, whose mask is grid; half is room of the same size.
__device__ void weigh(double* grid, double* half, float* weights, int height, int width, double alpha, double gamma,
                      const Blur& blur, Scratch& scratch) {
    const int cells = height * width;
    if (blur.radius > 0) {
        blur_axis(grid, half, cells, width, height, true, blur);
        blur_axis(half, grid, cells, width, height, false, blur);
    }
    double low = INFINITY, high = -INFINITY;
    for (int i = threadIdx.x; i < cells; i += THREADS) {
        low = fmin(low, grid[i]);
        high = fmax(high, grid[i]);
    }
    reduce_extrema(Team<true>(THREADS), low, high, scratch);
    const double range = high - low + 1e-8;
    for (int i = threadIdx.x; i < cells; i += THREADS) {
        double value = (grid[i] - low) / range;
        if (gamma != 1.0) value = pow(value, gamma);
        weights[i] = static_cast<float>(1.0 + alpha * value);
    }
}

__global__ void __launch_bounds__(OTSU_THREADS)
    otsu_threshold_kernel(const float* maps, float* thresholds, int cells, int bins) {
    extern __shared__ double room[];
    __shared__ Scratch scratch;
    const Team<true> team(OTSU_THREADS);
    const Room own(reinterpret_cast<float*>(room), cells, bins);
    const int64_t n = blockIdx.x;
    float low, high, threshold = NAN;
    if (load_map(team, maps + n * cells, cells, own.map, low, high, scratch)) {
        threshold = low == high ? low : otsu(team, own, cells, low, high, bins, scratch);
    }
    if (team.thread == 0) thresholds[n] = threshold;
}

__global__ void __launch_bounds__(THREADS)
    object_masks_kernel(MaskTensors t, int objects, int teams, int height, int width, float scaler, int bins,
                        float* weights, double alpha, double gamma, Blur blur) {
    extern __shared__ double room[];
    __shared__ Scratch scratch;
    const int cells = height * width;
    // The doubles of the blur come after the maps, in the same room.
    const Team<false> team(THREADS / teams);
    const Room own(reinterpret_cast<float*>(room) + team.index * room_size(cells, bins), cells, bins);
    const int64_t image = blockIdx.x;
    uint8_t* const any = t.any + image * cells;

    for (int i = threadIdx.x; i < cells; i += THREADS) any[i] = 0;
    __syncthreads();
    for (int64_t n = image * objects + team.index; n < (image + 1) * objects; n += teams) {
        const bool valid = t.valid == nullptr || t.valid[n];
        float* const map = own.map;
        float low, high;
        const bool fine = load_map(team, valid ? t.raw + n * cells : nullptr, cells, map, low, high, scratch);
        const float span = __fsub_rn(high, low), range = __fadd_rn(span, 1e-8f);
        for (int i = team.thread; i < cells; i += team.threads) {
            map[i] = fine ? __fdiv_rn(__fsub_rn(map[i], low), range) : NAN;
        }
        team.sync();
        float threshold = fine ? 0.0f : NAN;
        if (fine && span > 0.0f) {
            threshold = otsu(team, own, cells, 0.0f, __fdiv_rn(span, range), bins, scratch);
        }
        const float cut = __fmul_rn(threshold, scaler);
        for (int i = team.thread; i < cells; i += team.threads) {
            const bool inside = map[i] > cut;
            t.maps[n * cells + i] = map[i];
            t.masks[n * cells + i] = inside;
            if (inside) any[i] = 1;
        }
        if (team.thread == 0) t.thresholds[n] = threshold;
        team.sync();
    }
    if (weights == nullptr) return;
    __syncthreads();
    for (int i = threadIdx.x; i < cells; i += THREADS) room[i] = any[i];
    __syncthreads();
    weigh(room, room + cells, weights + image * cells, height, width, alpha, gamma, blur, scratch);
}

__global__ void __launch_bounds__(THREADS) token_weights_kernel(const float* masks, float* weights, int height,
                                                                int width, double alpha, double gamma, Blur blur) {
    extern __shared__ double room[];
    __shared__ Scratch scratch;
    const int cells = height * width;
    const int64_t first = static_cast<int64_t>(blockIdx.x) * cells;
    for (int i = threadIdx.x; i < cells; i += THREADS) room[i] = masks[first + i];
    __syncthreads();
    weigh(room, room + cells, weights + first, height, width, alpha, gamma, blur, scratch);
}

}  // namespace

int otsu_threshold_cuda(const float* maps, float* thresholds, int64_t count, int cells, int bins, int device,
                        void* stream) {
    const OnDevice current(device);
    if (current.status != cudaSuccess) return current.status;
    const size_t bytes = room_size(cells, bins) * sizeof(float);
    const cudaError_t status = allow_shared<otsu_threshold_kernel>(device, bytes);
    if (status != cudaSuccess) return status;
    otsu_threshold_kernel<<<static_cast<unsigned>(count), OTSU_THREADS, bytes, static_cast<cudaStream_t>(stream)>>>(
        maps, thresholds, cells, bins);
    return cudaGetLastError();
}

int object_masks_cuda(const MaskTensors& t, int64_t images, int objects, int height, int width, float scaler, int bins,
                      float* weights, double alpha, double gamma, const Blur& blur, int device, void* stream) {
    const OnDevice current(device);
    if (current.status != cudaSuccess) return current.status;
    const size_t cells = static_cast<size_t>(height) * width;
    const size_t one = room_size(cells, bins) * sizeof(float);
    int teams = 1;
    while (teams < objects && teams < WARPS && 2 * teams * one <= MOST_ROOM) teams *= 2;
    const size_t masks = teams * one, blurred = weights ? 2 * cells * sizeof(double) : 0;
    const size_t bytes = masks > blurred ? masks : blurred;
    const cudaError_t status = allow_shared<object_masks_kernel>(device, bytes);
    if (status != cudaSuccess) return status;
    object_masks_kernel<<<static_cast<unsigned>(images), THREADS, bytes, static_cast<cudaStream_t>(stream)>>>(
        t, objects, teams, height, width, scaler, bins, weights, alpha, gamma, blur);
    return cudaGetLastError();
}

int token_weights_cuda(const float* masks, float* weights, int64_t images, int height, int width, double alpha,
                       double gamma, const Blur& blur, int device, void* stream) {
    const OnDevice current(device);
    if (current.status != cudaSuccess) return current.status;
    const size_t bytes = 2 * static_cast<size_t>(height) * width * sizeof(double);
    const cudaError_t status = allow_shared<token_weights_kernel>(device, bytes);
    if (status != cudaSuccess) return status;
    token_weights_kernel<<<static_cast<unsigned>(images), THREADS, bytes, static_cast<cudaStream_t>(stream)>>>(
        masks, weights, height, width, alpha, gamma, blur);
    return cudaGetLastError();
}

}  // namespace ospo

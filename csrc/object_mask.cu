// Object masks and token weights on the GPU: one thread block per image, all of its objects in one launch, nothing is
// waited for. Every float operation that decides a bit of a threshold or mask is spelt as an intrinsic, which the
// compiler may not contract into FMA: the results are those of object_mask.cpp.
#include <cfloat>
#include <cmath>

#include "common.h"
#include "on_device.h"

namespace ospo {
namespace {

constexpr int THREADS = 256;
constexpr int WARPS = THREADS / 32;

// What a block shares besides its arrays.
struct Scratch {
    double low[WARPS], high[WARPS];
    float variance[WARPS];
    int bin[WARPS];
    int wrong;
};

// The least and the greatest of what the threads have, in all threads.
template <class T>
__device__ void reduce_extrema(T& low, T& high, Scratch& scratch) {
    for (int step = 16; step; step >>= 1) {
        low = fmin(low, __shfl_xor_sync(~0u, low, step));
        high = fmax(high, __shfl_xor_sync(~0u, high, step));
    }
    if (threadIdx.x % 32 == 0) {
        scratch.low[threadIdx.x / 32] = low;
        scratch.high[threadIdx.x / 32] = high;
    }
    __syncthreads();
    for (int w = 0; w < WARPS; ++w) {
        low = fmin(low, static_cast<T>(scratch.low[w]));
        high = fmax(high, static_cast<T>(scratch.high[w]));
    }
    __syncthreads();
}

// The first bin of the greatest variance, in all threads.
__device__ int first_argmax(float variance, int bin, Scratch& scratch) {
    for (int step = 16; step; step >>= 1) {
        const float other = __shfl_xor_sync(~0u, variance, step);
        const int where = __shfl_xor_sync(~0u, bin, step);
        if (other > variance || (other == variance && where < bin)) {
            variance = other;
            bin = where;
        }
    }
    if (threadIdx.x % 32 == 0) {
        scratch.variance[threadIdx.x / 32] = variance;
        scratch.bin[threadIdx.x / 32] = bin;
    }
    __syncthreads();
    for (int w = 0; w < WARPS; ++w) {
        const float other = scratch.variance[w];
        if (other > variance || (other == variance && scratch.bin[w] < bin)) {
            variance = other;
            bin = scratch.bin[w];
        }
    }
    __syncthreads();
    return bin;
}

// Otsu's threshold of `cells` shared floats from low to high, in all threads. Shared room: edges (bins + 1) and, each
// of `bins`: counts, running (counts from the front), forward and backward (mass of each bin, then the means of either
// side).
__device__ float otsu(const float* map, int cells, float low, float high, int bins, float* edges, int* counts,
                      int* running, float* forward, float* backward, Scratch& scratch) {
    const float delta = __fsub_rn(high, low), whole = static_cast<float>(bins);
    const float step = __fdiv_rn(delta, whole);
    for (int i = threadIdx.x; i <= bins; i += THREADS) {
        const float index = static_cast<float>(i);
        const float offset = step == 0.0f ? __fmul_rn(__fdiv_rn(index, whole), delta) : __fmul_rn(index, step);
        edges[i] = i == bins ? high : __fadd_rn(offset, low);
        if (i < bins) counts[i] = 0;
    }
    if (threadIdx.x == 0) scratch.wrong = 0;
    __syncthreads();
    for (int i = threadIdx.x; i < bins; i += THREADS) {
        if (!(edges[i] < edges[i + 1])) scratch.wrong = 1;
    }
    __syncthreads();
    if (scratch.wrong) return NAN;
    for (int i = threadIdx.x; i < cells; i += THREADS) {
        const float value = map[i];
        int bin = static_cast<int>(__fmul_rn(__fdiv_rn(__fsub_rn(value, low), delta), whole));
        bin -= bin == bins;
        bin -= value < edges[bin];
        bin += value >= edges[bin + 1] && bin != bins - 1;
        atomicAdd(counts + bin, 1);
    }
    __syncthreads();
    const auto center = [edges](int i) { return __fmul_rn(__fadd_rn(edges[i], edges[i + 1]), 0.5f); };
    for (int i = threadIdx.x; i < bins; i += THREADS) {
        forward[i] = backward[i] = __fmul_rn(static_cast<float>(counts[i]), center(i));
    }
    __syncthreads();
    // One by one: scikit-image adds in the order of the bins, and the last bits decide ties. Two warps, one each way.
    if (threadIdx.x == 0) {
        float mass = 0.0f;
        int weight = 0;
        for (int i = 0; i < bins; ++i) {
            mass = __fadd_rn(mass, forward[i]);
            running[i] = weight += counts[i];
            forward[i] = __fdiv_rn(mass, static_cast<float>(weight));
        }
    } else if (threadIdx.x == 32) {
        float mass = 0.0f;
        int weight = 0;
        for (int i = bins - 1; i >= 0; --i) {
            mass = __fadd_rn(mass, backward[i]);
            weight += counts[i];
            backward[i] = __fdiv_rn(mass, static_cast<float>(weight));
        }
    }
    __syncthreads();
    float most = -1.0f;
    int best = 0;
    for (int i = threadIdx.x; i + 1 < bins; i += THREADS) {
        const float gap = __fsub_rn(forward[i], backward[i + 1]);
        const float weights = __fmul_rn(static_cast<float>(running[i]), static_cast<float>(cells - running[i]));
        const float variance = __fmul_rn(weights, __fmul_rn(gap, gap));
        if (variance > most) {
            most = variance;
            best = i;
        }
    }
    return center(first_argmax(most, best, scratch));
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
    reduce_extrema(low, high, scratch);
    const double range = high - low + 1e-8;
    for (int i = threadIdx.x; i < cells; i += THREADS) {
        double value = (grid[i] - low) / range;
        if (gamma != 1.0) value = pow(value, gamma);
        weights[i] = static_cast<float>(1.0 + alpha * value);
    }
}

__global__ void __launch_bounds__(THREADS)
    object_masks_kernel(MaskTensors t, int objects, int height, int width, float scaler, int bins, float* weights,
                        double alpha, double gamma, Blur blur) {
    extern __shared__ double room[];
    const int cells = height * width;
    // The doubles of the blur come after the masks, in the same room.
    float* const map = reinterpret_cast<float*>(room);
    float* const edges = map + cells;
    int* const counts = reinterpret_cast<int*>(edges + bins + 1);
    int* const running = counts + bins;
    float* const forward = reinterpret_cast<float*>(running + bins);
    float* const backward = forward + bins;
    __shared__ Scratch scratch;
    const int64_t image = blockIdx.x;
    uint8_t* const any = t.any + image * cells;

    for (int i = threadIdx.x; i < cells; i += THREADS) any[i] = 0;
    for (int64_t n = image * objects; n < (image + 1) * objects; ++n) {
        const float* const raw = t.raw + n * cells;
        const bool valid = t.valid == nullptr || t.valid[n];
        float low = INFINITY, high = -INFINITY;
        int wrong = 0;
        for (int i = threadIdx.x; i < cells; i += THREADS) {
            map[i] = valid ? raw[i] : 0.0f;
            low = fminf(low, map[i]);
            high = fmaxf(high, map[i]);
            wrong |= !(fabsf(map[i]) <= FLT_MAX);
        }
        reduce_extrema(low, high, scratch);
        wrong = __syncthreads_or(wrong) || !(__fsub_rn(high, low) <= FLT_MAX);
        const float span = __fsub_rn(high, low), range = __fadd_rn(span, 1e-8f);
        for (int i = threadIdx.x; i < cells; i += THREADS) {
            map[i] = wrong ? NAN : __fdiv_rn(__fsub_rn(map[i], low), range);
        }
        __syncthreads();
        float threshold = wrong ? NAN : 0.0f;
        if (!wrong && span > 0.0f) {
            threshold =
                otsu(map, cells, 0.0f, __fdiv_rn(span, range), bins, edges, counts, running, forward, backward,
                             scratch);
        }
        const float cut = __fmul_rn(threshold, scaler);
        for (int i = threadIdx.x; i < cells; i += THREADS) {
            const bool inside = map[i] > cut;
            t.maps[n * cells + i] = map[i];
            t.masks[n * cells + i] = inside;
            if (inside) any[i] = 1;
        }
        if (threadIdx.x == 0) t.thresholds[n] = threshold;
        __syncthreads();
    }
    if (weights == nullptr) return;
    for (int i = threadIdx.x; i < cells; i += THREADS) room[i] = any[i];  // each thread reads what it wrote
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

// More shared memory than a kernel may have without asking.
template <typename Kernel>
cudaError_t allow_room(Kernel kernel, size_t bytes) {
    if (bytes + sizeof(Scratch) <= 48 * 1024) return cudaSuccess;
    return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
}

}  // namespace

int object_masks_cuda(const MaskTensors& t, int64_t images, int objects, int height, int width, float scaler, int bins,
                      float* weights, double alpha, double gamma, const Blur& blur, int device, void* stream) {
    const OnDevice current(device);
    if (current.status != cudaSuccess) return current.status;
    const size_t cells = static_cast<size_t>(height) * width;
    const size_t masks = (cells + 5 * static_cast<size_t>(bins) + 1) * sizeof(float);
    const size_t blurred = weights ? 2 * cells * sizeof(double) : 0, bytes = masks > blurred ? masks : blurred;
    const cudaError_t status = allow_room(object_masks_kernel, bytes);
    if (status != cudaSuccess) return status;
    object_masks_kernel<<<static_cast<unsigned>(images), THREADS, bytes, static_cast<cudaStream_t>(stream)>>>(
        t, objects, height, width, scaler, bins, weights, alpha, gamma, blur);
    return cudaGetLastError();
}

int token_weights_cuda(const float* masks, float* weights, int64_t images, int height, int width, double alpha,
                       double gamma, const Blur& blur, int device, void* stream) {
    const OnDevice current(device);
    if (current.status != cudaSuccess) return current.status;
    const size_t bytes = 2 * static_cast<size_t>(height) * width * sizeof(double);
    const cudaError_t status = allow_room(token_weights_kernel, bytes);
    if (status != cudaSuccess) return status;
    token_weights_kernel<<<static_cast<unsigned>(images), THREADS, bytes, static_cast<cudaStream_t>(stream)>>>(
        masks, weights, height, width, alpha, gamma, blur);
    return cudaGetLastError();
}

}  // namespace ospo

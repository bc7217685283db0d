// The softmax step of token_logprobs on the GPU, one block per row. A row of up to 32768 logits of two bytes, or 16384
// of fp32, is read from memory once and stays in registers. A longer one, or one that cannot be read 16 bytes at a
// time, is read twice, the second time mostly from the second-level cache. Sums are fp32.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "common.h"
#include "on_device.h"

namespace ospo {
namespace {

struct Arguments {
    void* logits;
    const void* bias;  // in the dtype of the logits, or null
    const int64_t* labels;
    const float* scales;  // or null
    float* logps;
    bool write;
    int codes;
};

__device__ float widen(float value) { return value; }
__device__ float widen(__half value) { return __half2float(value); }
__device__ float widen(__nv_bfloat16 value) { return __bfloat162float(value); }

template <typename T>
__device__ T narrow(float value);
template <>
__device__ float narrow<float>(float value) {
    return value;
}
template <>
__device__ __half narrow<__half>(float value) {
    return __float2half_rn(value);
}
template <>
__device__ __nv_bfloat16 narrow<__nv_bfloat16>(float value) {
    return __float2bfloat16_rn(value);
}

// N values that are moved at once.
template <typename T, int N>
struct alignas(sizeof(T) * N) Vector {
    T value[N];
};

// Logits pass through once: they leave the first-level cache to the bias, which every row reads.
template <typename T, int N>
__device__ Vector<T, N> load_once(const T* from) {
    Vector<T, N> vector;
    if constexpr (sizeof(vector) == 16) {
        const float4 words = __ldcs(reinterpret_cast<const float4*>(from));
        memcpy(&vector, &words, 16);
    } else {
        vector = *reinterpret_cast<const Vector<T, N>*>(from);
    }
    return vector;
}

// A largest value, and the sum of exp(z - most), of a part of a row.
struct Part {
    float most, sum;
};

// From this point exponents are taken; a part with nothing but -inf has the sum 0, not NaN.
__device__ float origin(float most) { return most == -INFINITY ? 0.0f : most; }

struct Merge {
    __device__ Part operator()(Part a, Part b) const {
        const float most = fmaxf(a.most, b.most), at = origin(most);
        return {most, a.sum * __expf(a.most - at) + b.sum * __expf(b.most - at)};
    }
};

struct Larger {
    __device__ float operator()(float a, float b) const { return fmaxf(a, b); }
};

struct Add {
    __device__ float operator()(float a, float b) const { return a + b; }
};

__device__ float from_lane(float value, int mask) { return __shfl_xor_sync(0xFFFFFFFFu, value, mask); }
__device__ Part from_lane(Part part, int mask) { return {from_lane(part.most, mask), from_lane(part.sum, mask)}; }

// The values of all threads as one, known to all of them. Once per kernel and operation: `shared` is not used again.
template <int threads, typename Value, typename Operation>
__device__ Value over_block(Value value, Operation operation) {
    constexpr int warps = threads / 32;
    __shared__ Value shared[warps];
    for (int mask = 16; mask > 0; mask /= 2) value = operation(value, from_lane(value, mask));
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = value;
    __syncthreads();
    value = shared[threadIdx.x % warps];
    for (int mask = warps / 2; mask > 0; mask /= 2) value = operation(value, from_lane(value, mask));
    return value;
}

// Values first.. of a row and their bias, in fp32.
template <typename T, int N>
__device__ void logits_of(const Vector<T, N>& row, const T* bias, int first, float* value) {
    Vector<T, N> shift;
    if (bias) shift = *reinterpret_cast<const Vector<T, N>*>(bias + first);
#pragma unroll
    for (int i = 0; i < N; ++i) value[i] = bias ? widen(row.value[i]) + widen(shift.value[i]) : widen(row.value[i]);
}

// scale·onehot + factor·exponential, of values first.. of a row.
template <typename O, int N>
__device__ void store_residual(O* row, int first, const float* exponential, float factor, float scale, int label) {
    Vector<O, N> out;
#pragma unroll
    for (int i = 0; i < N; ++i) out.value[i] = narrow<O>((first + i == label ? scale : 0.0f) + factor * exponential[i]);
    *reinterpret_cast<Vector<O, N>*>(row + first) = out;
}

// codes <= threads·per_thread, a multiple of the 16 / sizeof(T) values that a thread moves at once.
template <typename T, typename O, int threads, int per_thread>
__global__ void __launch_bounds__(threads) row_in_registers(const Arguments a) {
    constexpr int N = 16 / sizeof(T), vectors = per_thread / N;
    const int64_t row = blockIdx.x;  // rows·codes passes 2^31
    T* const z = static_cast<T*>(a.logits) + row * a.codes;
    const T* const bias = static_cast<const T*>(a.bias);
    const int label = static_cast<int>(a.labels[row]);
    const float target = bias ? widen(z[label]) + widen(bias[label]) : widen(z[label]);

    Vector<T, N> raw[vectors];
#pragma unroll
    for (int v = 0; v < vectors; ++v) {
        const int first = (v * threads + threadIdx.x) * N;
        if (first < a.codes) raw[v] = load_once<T, N>(z + first);
    }
    float value[per_thread];
    float most = -INFINITY;
#pragma unroll
    for (int v = 0; v < vectors; ++v) {
        const int first = (v * threads + threadIdx.x) * N;
        if (first < a.codes) {
            logits_of(raw[v], bias, first, value + v * N);
        } else {
            for (int i = 0; i < N; ++i) value[v * N + i] = -INFINITY;
        }
        for (int i = 0; i < N; ++i) most = fmaxf(most, value[v * N + i]);
    }
    most = over_block<threads>(most, Larger{});  // no thread is still reading after this
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < per_thread; ++i) {
        value[i] = __expf(value[i] - most);
        sum += value[i];
    }
    sum = over_block<threads>(sum, Add{});
    if (threadIdx.x == 0) a.logps[row] = (target - most) - logf(sum);
    if (!a.write) return;

    const float scale = a.scales ? a.scales[row] : 1.0f, factor = -scale / sum;
#pragma unroll
    for (int v = 0; v < vectors; ++v) {
        const int first = (v * threads + threadIdx.x) * N;
        if (first < a.codes) store_residual<O, N>(reinterpret_cast<O*>(z), first, value + v * N, factor, scale, label);
    }
}

// Any number of codes, a multiple of N. Reads the row again to write.
template <typename T, typename O, int N, int threads>
__global__ void __launch_bounds__(threads) row_in_passes(const Arguments a) {
    const int64_t row = blockIdx.x;
    T* const z = static_cast<T*>(a.logits) + row * a.codes;
    const T* const bias = static_cast<const T*>(a.bias);
    const int label = static_cast<int>(a.labels[row]);
    const float target = bias ? widen(z[label]) + widen(bias[label]) : widen(z[label]);

    Part part{-INFINITY, 0.0f};
#pragma unroll 4
    for (int first = threadIdx.x * N; first < a.codes; first += threads * N) {
        float value[N];
        logits_of(*reinterpret_cast<const Vector<T, N>*>(z + first), bias, first, value);
        float most = part.most;
        for (int i = 0; i < N; ++i) most = fmaxf(most, value[i]);
        const float at = origin(most);
        part.sum *= __expf(part.most - at);
        for (int i = 0; i < N; ++i) part.sum += __expf(value[i] - at);
        part.most = most;
    }
    part = over_block<threads>(part, Merge{});
    if (threadIdx.x == 0) a.logps[row] = (target - part.most) - logf(part.sum);
    if (!a.write) return;

    const float scale = a.scales ? a.scales[row] : 1.0f, factor = -scale / part.sum;
    for (int begin = 0; begin < a.codes; begin += threads * N) {
        const int first = begin + threadIdx.x * N;
        float value[N];
        if (first < a.codes) {
            logits_of(load_once<T, N>(z + first), bias, first, value);
            for (int i = 0; i < N; ++i) value[i] = __expf(value[i] - part.most);
        }
        // A narrower result lies over logits that other threads read in this turn; those of later turns are further on.
        if constexpr (sizeof(O) < sizeof(T)) __syncthreads();
        if (first < a.codes) store_residual<O, N>(reinterpret_cast<O*>(z), first, value, factor, scale, label);
    }
}

bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

template <typename T, typename O>
void launch(const Arguments& a, int64_t rows, cudaStream_t stream) {
    constexpr int N = 16 / sizeof(T);
    const unsigned grid = static_cast<unsigned>(rows);
    if (a.codes % N != 0 || !aligned(a.logits) || !aligned(a.bias)) {
        row_in_passes<T, O, 1, 512><<<grid, 512, 0, stream>>>(a);
    } else if (a.codes <= 4096) {
        row_in_registers<T, O, 128, 32><<<grid, 128, 0, stream>>>(a);
    } else if (a.codes <= 8192) {
        row_in_registers<T, O, 256, 32><<<grid, 256, 0, stream>>>(a);
    } else if (a.codes <= 16384) {
        row_in_registers<T, O, 512, 32><<<grid, 512, 0, stream>>>(a);
    } else {
        if constexpr (sizeof(T) == 2) {  // with fp32 the 64 registers that 1024 threads have each would not do
            if (a.codes <= 32768) {
                row_in_registers<T, O, 1024, 32><<<grid, 1024, 0, stream>>>(a);
                return;
            }
        }
        row_in_passes<T, O, N, 512><<<grid, 512, 0, stream>>>(a);
    }
}

}  // namespace

int token_logprob_cuda(void* logits, Dtype dtype, const void* bias, const int64_t* labels, const float* scales,
                       float* logps, Dtype out, bool write, int64_t rows, int64_t codes, int device, void* stream) {
    if (rows == 0) return cudaSuccess;
    if (rows > 0x7FFFFFFF || codes > 0x7FFFFFFF - 512 * 8) return cudaErrorInvalidValue;
    const OnDevice current(device);
    if (current.status != cudaSuccess) return current.status;
    const Arguments a{logits, bias, labels, scales, logps, write, static_cast<int>(codes)};
    const auto on = static_cast<cudaStream_t>(stream);
    if (dtype == Dtype::bfloat16) {
        launch<__nv_bfloat16, __nv_bfloat16>(a, rows, on);
    } else if (dtype == Dtype::float16) {
        launch<__half, __half>(a, rows, on);
    } else if (out == Dtype::bfloat16) {
        launch<float, __nv_bfloat16>(a, rows, on);
    } else if (out == Dtype::float16) {
        launch<float, __half>(a, rows, on);
    } else {
        launch<float, float>(a, rows, on);
    }
    return cudaGetLastError();
}

}  // namespace ospo

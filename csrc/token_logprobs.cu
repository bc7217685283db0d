// The softmax step of token_logprobs on the GPU, one block per row. A row of up to 32768 logits of two bytes, or 16384
// of fp32, is read from memory once and stays in registers. A longer one, or one that cannot be read 16 bytes at a
// time, is read twice, the second time mostly from the second-level cache. Sums are fp32.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "common.h"
#include "device_guard.h"

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

// 16 bytes of memory. As words: numbers of two bytes would take a register each, and moves.
struct alignas(16) Words {
    uint32_t word[4];
};

template <typename T>
__device__ Words all(float value) {
    Vector<T, 16 / sizeof(T)> vector;
    for (T& each : vector.value) each = narrow<T>(value);
    Words words;
    memcpy(&words, &vector, sizeof words);
    return words;
}

template <typename T>
__device__ Words load(const T* from) {
    return *reinterpret_cast<const Words*>(from);
}

// Logits pass through once: they leave the first-level cache to the bias, which every row reads.
template <typename T>
__device__ Words load_once(const T* from) {
    const uint4 words = __ldcs(reinterpret_cast<const uint4*>(from));
    return {{words.x, words.y, words.z, words.w}};
}

__device__ void widen_word(uint32_t word, float* value, float) { memcpy(value, &word, 4); }
__device__ void widen_word(uint32_t word, float* value, __half) {
    __half pair[2];
    memcpy(pair, &word, 4);
    value[0] = __half2float(pair[0]);
    value[1] = __half2float(pair[1]);
}
__device__ void widen_word(uint32_t word, float* value, __nv_bfloat16) {
    const uint32_t low = word << 16, high = word & 0xFFFF0000u;
    memcpy(value, &low, 4);
    memcpy(value + 1, &high, 4);
}

template <typename T>
__device__ void widen(const Words& from, float* value) {
#pragma unroll
    for (int i = 0; i < 4; ++i) widen_word(from.word[i], value + i * (4 / sizeof(T)), T{});
}

// e^x for x <= 0, 0 where that is below 2^-126: __expf looks for such results and scales them, which takes three more
// instructions for every value.
__device__ float exponential(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x * 1.44269504f));
    return y;
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
        return {most, a.sum * exponential(a.most - at) + b.sum * exponential(b.most - at)};
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

// The values of 16 bytes and of their bias, in fp32.
template <typename T>
__device__ void add(const Words& row, const Words& bias, float* value) {
    constexpr int N = 16 / sizeof(T);
    float shift[N];
    widen<T>(row, value);
    widen<T>(bias, shift);
#pragma unroll
    for (int i = 0; i < N; ++i) value[i] += shift[i];
}

// Values first.. of a row with their bias, N of them: 16 bytes or one. `last` says that they are not read again.
template <typename T, int N, bool last>
__device__ void logits_of(const T* row, const T* bias, int first, float* value) {
    if constexpr (N == 1) {
        *value = widen(row[first]) + (bias ? widen(bias[first]) : 0.0f);
    } else {
        add<T>(last ? load_once(row + first) : load(row + first), bias ? load(bias + first) : all<T>(0.0f), value);
    }
}

// factor·exponential, of N values.
template <typename O, int N>
__device__ void store(O* to, const float* exponential, float factor) {
    Vector<O, N> out;
#pragma unroll
    for (int i = 0; i < N; ++i) out.value[i] = narrow<O>(factor * exponential[i]);
    *reinterpret_cast<Vector<O, N>*>(to) = out;
}

// codes <= threads·per_thread, a multiple of the 16 / sizeof(T) values that a thread moves at once. 64 registers a
// thread, so that one block loads while another computes.
// Threads that a multiprocessor is to hold: at 1024 each has 64 registers, which sm_120 spills 4 bytes of for fp32.
template <typename T>
constexpr int resident() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1200
    return sizeof(T) == 4 ? 512 : 1024;
#else
    return 1024;
#endif
}

template <typename T, typename O, int threads, int per_thread>
__global__ void __launch_bounds__(threads, threads < resident<T>() ? resident<T>() / threads : 1)
    row_in_registers(const Arguments a) {
    constexpr int N = 16 / sizeof(T), vectors = per_thread / N, stride = threads * N;
    const int64_t row = blockIdx.x;  // rows·codes passes 2^31
    T* const z = static_cast<T*>(a.logits) + row * a.codes;
    const T* const bias = static_cast<const T*>(a.bias);
    // Vectors of this thread are at first, first + stride, ...; what is left of the row says which are inside.
    const int first = threadIdx.x * N, left = a.codes - first;

    Words raw[vectors];
#pragma unroll
    for (int v = 0; v < vectors; ++v) {
        raw[v] = v * stride < left ? load_once(z + first + v * stride) : all<T>(-INFINITY);
    }
    // After the row's own loads, none of which shall wait for it.
    const unsigned label = static_cast<unsigned>(a.labels[row]);
    // One thread writes the label's code, and takes its logit before any is overwritten, which is after both barriers.
    const auto owns_label = [&] { return label / N % threads == threadIdx.x; };
    T target{}, target_bias{};
    const auto take_label = [&] {
        if (owns_label()) target = z[label];
        if (owns_label() && bias) target_bias = bias[label];
    };

    float value[per_thread];
    float most = -INFINITY;
#pragma unroll
    for (int v = 0; v < vectors; ++v) {
        add<T>(raw[v], bias && v * stride < left ? load(bias + first + v * stride) : all<T>(0.0f), value + v * N);
        for (int i = 0; i < N; ++i) most = fmaxf(most, value[v * N + i]);
    }
    if constexpr (sizeof(T) == 2) take_label();
    most = over_block<threads>(most, Larger{});
    if constexpr (sizeof(T) == 4) take_label();  // fp32 has had no register left for it
    const float scale = a.scales ? a.scales[row] : 1.0f;
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < per_thread; ++i) {
        value[i] = exponential(value[i] - most);
        sum += value[i];
    }
    sum = over_block<threads>(sum, Add{});
    const float label_logit = widen(target) + widen(target_bias);
    if (owns_label()) a.logps[row] = (label_logit - most) - logf(sum);
    if (!a.write) return;

    const float factor = __fdividef(-scale, sum);
    O* const residual = reinterpret_cast<O*>(z);
#pragma unroll
    for (int v = 0; v < vectors; ++v) {
        if (v * stride < left) store<O, N>(residual + first + v * stride, value + v * N, factor);
    }
    if (owns_label()) residual[label] = narrow<O>(scale + factor * exponential(label_logit - most));
}

// Any number of codes, a multiple of N. Reads the row again to write.
template <typename T, typename O, int N, int threads>
__global__ void __launch_bounds__(threads) row_in_passes(const Arguments a) {
    const int64_t row = blockIdx.x;
    T* const z = static_cast<T*>(a.logits) + row * a.codes;
    const T* const bias = static_cast<const T*>(a.bias);

    Part part{-INFINITY, 0.0f};
#pragma unroll 4
    for (int first = threadIdx.x * N; first < a.codes; first += threads * N) {
        float value[N];
        logits_of<T, N, false>(z, bias, first, value);
        float most = part.most;
        for (int i = 0; i < N; ++i) most = fmaxf(most, value[i]);
        const float at = origin(most);
        part.sum *= exponential(part.most - at);
        for (int i = 0; i < N; ++i) part.sum += exponential(value[i] - at);
        part.most = most;
    }
    const unsigned label = static_cast<unsigned>(a.labels[row]);
    const bool owns_label = label / N % threads == threadIdx.x;
    float target = 0.0f;
    if (owns_label) target = widen(z[label]) + (bias ? widen(bias[label]) : 0.0f);  // before any logit is overwritten
    part = over_block<threads>(part, Merge{});
    if (owns_label) a.logps[row] = (target - part.most) - logf(part.sum);
    if (!a.write) return;

    const float scale = a.scales ? a.scales[row] : 1.0f, factor = __fdividef(-scale, part.sum);
    O* const residual = reinterpret_cast<O*>(z);
    for (int begin = 0; begin < a.codes; begin += threads * N) {
        const int first = begin + threadIdx.x * N;
        float value[N];
        if (first < a.codes) {
            logits_of<T, N, true>(z, bias, first, value);
            for (int i = 0; i < N; ++i) value[i] = exponential(value[i] - part.most);
        }
        // A narrower result lies over logits that other threads read in this turn; those of later turns are further on.
        if constexpr (sizeof(O) < sizeof(T)) __syncthreads();
        if (first < a.codes) store<O, N>(residual + first, value, factor);
    }
    if (owns_label) residual[label] = narrow<O>(scale + factor * exponential(target - part.most));
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

int token_logprobs_cuda(void* logits, Dtype dtype, const void* bias, const int64_t* labels, const float* scales,
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

// The softmax step of token_logprobs on the GPU, one block per row. A row of up to 32768 16-bit or 16384 fp32 logits
// (16384 in the general step) is read from memory once and stays in registers. A longer row, or one that cannot be read
// 16 bytes at a time, is read again, mostly from the L2 cache. Sums are fp32.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "common.h"
#include "launch.h"

namespace ospo {
namespace {

constexpr int PER_THREAD = 32;  // logits of a row that a thread keeps in registers

// See common.h. All pointers but logits and labels may be null; the bias has the dtype of the logits.
struct Arguments {
    const void *logits, *bias;
    const int64_t* labels;
    float inverse_temperature, softcap;
    const float *scales, *others, *entropy_scales;
    float *logps, *entropies, *statistics;
    void* out;
    int codes;

    bool plain() const {
        return inverse_temperature == 1.0f && softcap == 0.0f && !others && !entropy_scales && !entropies &&
               !statistics;
    }
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

// N values that are loaded or stored at once.
template <typename T, int N>
struct alignas(sizeof(T) * N) Vector {
    T value[N];
};

// 16 bytes. As an array of 16-bit numbers they would take a register each, and moves.
struct alignas(16) Words {
    uint32_t word[4];
};

template <typename T>
__device__ Words fill(float value) {
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

// Logits are read once, so they must not evict the bias, which every row reads, from the L1 cache.
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

// e^x for x <= 0, and 0 where that is below 2^-126. __expf keeps such results, for three more instructions per value.
__device__ float exponential(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x * 1.44269504f));
    return y;
}

template <bool flag>
struct Flag {
    static constexpr bool value = flag;
};

// Maximum and Σ exp(z − max) of a part of a row.
struct Part {
    float max, sum;
};

// What to subtract before exponentiation. Not -inf, so that the sum of a part with only -inf is 0 and not NaN.
__device__ float shift_of(float max) { return max == -INFINITY ? 0.0f : max; }

struct Merge {
    __device__ Part operator()(Part a, Part b) const {
        const float max = fmaxf(a.max, b.max), shift = shift_of(max);
        return {max, a.sum * exponential(a.max - shift) + b.sum * exponential(b.max - shift)};
    }
};

struct Max {
    __device__ float operator()(float a, float b) const { return fmaxf(a, b); }
};

struct Add {
    __device__ float operator()(float a, float b) const { return a + b; }
};

// Σ e and Σ e · (s − max) of scores s, where e = exp(s − max).
struct Sums {
    float exponentials, weighted;
};

struct AddSums {
    __device__ Sums operator()(Sums a, Sums b) const {
        return {a.exponentials + b.exponentials, a.weighted + b.weighted};
    }
};

__device__ float from_lane(float value, int mask) { return __shfl_xor_sync(0xFFFFFFFFu, value, mask); }
__device__ Part from_lane(Part part, int mask) { return {from_lane(part.max, mask), from_lane(part.sum, mask)}; }
__device__ Sums from_lane(Sums sums, int mask) {
    return {from_lane(sums.exponentials, mask), from_lane(sums.weighted, mask)};
}

// Reduce the values of all threads, to all threads. Each kernel may call an instance once: `shared` is not reused.
template <int threads, typename Value, typename Operation>
__device__ Value reduce_block(Value value, Operation operation) {
    constexpr int warps = threads / 32;
    __shared__ Value shared[warps];
    for (int mask = 16; mask > 0; mask /= 2) value = operation(value, from_lane(value, mask));
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = value;
    __syncthreads();
    value = shared[threadIdx.x % warps];
    for (int mask = warps / 2; mask > 0; mask /= 2) value = operation(value, from_lane(value, mask));
    return value;
}

// 16 bytes of logits plus their bias, in fp32.
template <typename T>
__device__ void add(const Words& row, const Words& bias, float* value) {
    constexpr int N = 16 / sizeof(T);
    float addend[N];
    widen<T>(row, value);
    widen<T>(bias, addend);
#pragma unroll
    for (int i = 0; i < N; ++i) value[i] += addend[i];
}

// N logits of a row from `first` on, plus their bias: 16 bytes, or one logit. `last`: they are not read again.
template <typename T, int N, bool last>
__device__ void load_logits(const T* row, const T* bias, int first, float* value) {
    if constexpr (N == 1) {
        *value = widen(row[first]) + (bias ? widen(bias[first]) : 0.0f);
    } else {
        add<T>(last ? load_once(row + first) : load(row + first), bias ? load(bias + first) : fill<T>(0.0f), value);
    }
}

// to = factor · exponential, N values.
template <typename O, int N>
__device__ void store(O* to, const float* exponential, float factor) {
    Vector<O, N> out;
#pragma unroll
    for (int i = 0; i < N; ++i) out.value[i] = narrow<O>(factor * exponential[i]);
    *reinterpret_cast<Vector<O, N>*>(to) = out;
}

// The general step: temperature, soft-cap, entropy, and statistics of a part of the codes.

// Scores are s = factor · u with u = tanh(logit / cap) and factor = cap / temperature, or u = logit and factor =
// 1 / temperature without a cap. Differences of scores are taken between u, where they are nearly exact.
__device__ float cap(float logit, const Arguments& a) { return a.softcap > 0.0f ? tanhf(logit / a.softcap) : logit; }
__device__ float factor_of(const Arguments& a) {
    return a.softcap > 0.0f ? a.softcap * a.inverse_temperature : a.inverse_temperature;
}

// s − max s, but not below the argument where `exponential` is 0, so that 0 · (s − max s) of a masked code is not NaN.
__device__ float below_max(float u, float max, float factor) { return fmaxf(factor * (u - max), -88.0f); }

// exp(s − max s), and NaN of NaN, which below_max does not keep.
__device__ float exponential_of(float u, float max, float factor) { return exponential(factor * (u - max)); }

// `shift` is shift_of(max s): sums of a row with only -inf are 0, and NaN is left to rows that hold NaN.
__device__ void add(Sums& sums, float u, float shift, float factor) {
    const float e = exponential_of(u, shift, factor);
    sums.exponentials += e;
    sums.weighted += e * below_max(u, shift, factor);
}

// What the gradients of a row need.
struct Row {
    float max, factor, inverse_total, scale, other, entropy_scale;

    // Called by all threads. One of them `writes` the results: that of the label's code, or of a row without it any.
    __device__ Row(const Arguments& a, int64_t row, float max, Sums sums, float own, bool writes, bool has_label)
        : max(max), factor(factor_of(a)) {
        const float log_total = logf(sums.exponentials);
        const float entropy = log_total - sums.weighted / sums.exponentials;
        if (writes) {
            if (a.logps) a.logps[row] = factor * (own - max) - log_total;
            if (a.entropies) a.entropies[row] = entropy;
            if (a.statistics) {
                // The maximum ignores NaN. Other processes must not: for them this part would be a negligible one.
                const bool has_nan = isnan(sums.exponentials) && max < INFINITY;
                const float found[] = {has_nan ? NAN : factor * max, sums.exponentials, sums.weighted,
                                       has_label ? factor * own : 0.0f};
                for (int i = 0; i < 4; ++i) a.statistics[4 * row + i] = found[i];
            }
        }
        inverse_total = 1.0f / sums.exponentials;
        scale = a.scales ? a.scales[row] : 1.0f;
        entropy_scale = a.entropy_scales ? a.entropy_scales[row] : 0.0f;
        other = a.others ? a.others[row] : scale + entropy_scale * (entropy - log_total);
    }

    // ∂s/∂logit · (scale, if this is the label's code, − p · (other + entropy_scale · (s − max s)))
    __device__ float gradient(float u, bool is_label, const Arguments& a) const {
        const float p = exponential_of(u, max, factor) * inverse_total;
        const float others = p * (other + entropy_scale * below_max(u, max, factor));
        const float derivative = a.inverse_temperature * (a.softcap > 0.0f ? 1.0f - u * u : 1.0f);
        return derivative * ((is_label ? scale : 0.0f) - others);
    }
};

// Threads that a multiprocessor shall hold. With 1024, one block loads while another computes; each thread then has 64
// registers, of which sm_120 would spill 4 bytes for fp32.
template <typename T>
constexpr int resident_threads() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1200
    return sizeof(T) == 4 ? 512 : 1024;
#else
    return 1024;
#endif
}

// codes <= threads · PER_THREAD, and a multiple of the N values that a thread loads at once.
template <typename T, typename O, int threads, bool plain>
__global__ void __launch_bounds__(threads,
                                  plain && threads < resident_threads<T>() ? resident_threads<T>() / threads : 1)
    row_in_registers(const Arguments a) {
    constexpr int N = 16 / sizeof(T), vectors = PER_THREAD / N, stride = threads * N;
    const int64_t row = blockIdx.x;  // 64 bits: rows · codes exceeds 2^31
    const T* const z = static_cast<const T*>(a.logits) + row * a.codes;
    const T* const bias = static_cast<const T*>(a.bias);
    O* const residual = reinterpret_cast<O*>(static_cast<T*>(a.out) + row * a.codes);
    // The vectors of this thread start at first, first + stride, …; those inside the row have an offset below `left`.
    const int first = threadIdx.x * N, left = a.codes - first;

    Words raw[vectors];
#pragma unroll
    for (int v = 0; v < vectors; ++v) {
        raw[v] = v * stride < left ? load_once(z + first + v * stride) : fill<T>(-INFINITY);
    }
    // Loaded after the logits, so that their loads do not wait for it. A label of −1 is that of no code.
    const unsigned label = static_cast<unsigned>(a.labels[row]);
    // One thread writes the label's element. It reads the logit before the barriers, after them logits are overwritten.
    const auto owns_label = [&] {
        return (plain || label < static_cast<unsigned>(a.codes)) && label / N % threads == threadIdx.x;
    };
    T target{}, target_bias{};
    const auto take_label = [&] {
        if (owns_label()) target = z[label];
        if (owns_label() && bias) target_bias = bias[label];
    };

    float value[PER_THREAD];
    float max = -INFINITY;
#pragma unroll
    for (int v = 0; v < vectors; ++v) {
        add<T>(raw[v], bias && v * stride < left ? load(bias + first + v * stride) : fill<T>(0.0f), value + v * N);
        for (int i = 0; i < N; ++i) {
            // The tanh of a cap would make a number of the -inf behind the end of the row.
            if constexpr (!plain) value[v * N + i] = v * stride < left ? cap(value[v * N + i], a) : -INFINITY;
            max = fmaxf(max, value[v * N + i]);
        }
    }
    if constexpr (sizeof(T) == 2) take_label();
    max = reduce_block<threads>(max, Max{});
    if constexpr (sizeof(T) == 4) take_label();  // not before: fp32 has no registers left for it
    if constexpr (!plain) {
        Sums sums{0.0f, 0.0f};
#pragma unroll
        for (int i = 0; i < PER_THREAD; ++i) add(sums, value[i], shift_of(max), factor_of(a));
        sums = reduce_block<threads>(sums, AddSums{});
        const bool no_owner = label >= static_cast<unsigned>(a.codes);
        const float own = no_owner ? max : cap(widen(target) + widen(target_bias), a);
        const Row about(a, row, max, sums, own, no_owner ? threadIdx.x == 0 : owns_label(), !no_owner);
        if (!a.out) return;
#pragma unroll
        for (int v = 0; v < vectors; ++v) {
            float gradient[N];
            for (int i = 0; i < N; ++i) gradient[i] = about.gradient(value[v * N + i], false, a);
            if (v * stride < left) store<O, N>(residual + first + v * stride, gradient, 1.0f);
        }
        if (owns_label()) residual[label] = narrow<O>(about.gradient(own, true, a));
        return;
    }
    const float scale = a.scales ? a.scales[row] : 1.0f;
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < PER_THREAD; ++i) {
        value[i] = exponential(value[i] - max);
        sum += value[i];
    }
    sum = reduce_block<threads>(sum, Add{});
    const float label_logit = widen(target) + widen(target_bias);
    if (a.logps && owns_label()) a.logps[row] = (label_logit - max) - logf(sum);
    if (!a.out) return;

    const float factor = __fdividef(-scale, sum);
#pragma unroll
    for (int v = 0; v < vectors; ++v) {
        if (v * stride < left) store<O, N>(residual + first + v * stride, value + v * N, factor);
    }
    if (owns_label()) residual[label] = narrow<O>(scale + factor * exponential(label_logit - max));
}

// Any multiple of N codes. Reads the row once more to sum what the plain step does not need, and to write it.
template <typename T, typename O, int N, int threads, bool plain>
__global__ void __launch_bounds__(threads) row_in_passes(const Arguments a) {
    const int64_t row = blockIdx.x;
    const T* const z = static_cast<const T*>(a.logits) + row * a.codes;
    const T* const bias = static_cast<const T*>(a.bias);
    O* const residual = reinterpret_cast<O*>(static_cast<T*>(a.out) + row * a.codes);
    const auto load_row = [&](auto last, int first, float* value) {
        load_logits<T, N, decltype(last)::value>(z, bias, first, value);
        if constexpr (!plain) {
            for (int i = 0; i < N; ++i) value[i] = cap(value[i], a);
        }
    };

    Part part{-INFINITY, 0.0f};
#pragma unroll 4
    for (int first = threadIdx.x * N; first < a.codes; first += threads * N) {
        float value[N];
        load_row(Flag<false>{}, first, value);
        float max = part.max;
        for (int i = 0; i < N; ++i) max = fmaxf(max, value[i]);
        if constexpr (plain) {  // the general step sums when it knows the maximum
            const float shift = shift_of(max);
            part.sum *= exponential(part.max - shift);
            for (int i = 0; i < N; ++i) part.sum += exponential(value[i] - shift);
        }
        part.max = max;
    }
    const unsigned label = static_cast<unsigned>(a.labels[row]);
    const bool no_owner = !plain && label >= static_cast<unsigned>(a.codes);
    const bool owns_label = !no_owner && label / N % threads == threadIdx.x;
    float target = 0.0f;
    if (owns_label) target = widen(z[label]) + (bias ? widen(bias[label]) : 0.0f);  // before logits are overwritten
    part = reduce_block<threads>(part, Merge{});
    if constexpr (!plain) {
        const float own = no_owner ? part.max : cap(target, a);
        Sums sums{0.0f, 0.0f};
        const float shift = shift_of(part.max);
#pragma unroll 1  // unrolled, it spills registers on sm_100
        for (int first = threadIdx.x * N; first < a.codes; first += threads * N) {
            float value[N];
            load_row(Flag<false>{}, first, value);
            for (int i = 0; i < N; ++i) add(sums, value[i], shift, factor_of(a));
        }
        sums = reduce_block<threads>(sums, AddSums{});
        const Row about(a, row, part.max, sums, own, no_owner ? threadIdx.x == 0 : owns_label, !no_owner);
        if (!a.out) return;
        for (int begin = 0; begin < a.codes; begin += threads * N) {
            const int first = begin + threadIdx.x * N;
            float value[N];
            if (first < a.codes) {
                load_row(Flag<true>{}, first, value);
                for (int i = 0; i < N; ++i) value[i] = about.gradient(value[i], false, a);
            }
            if constexpr (sizeof(O) < sizeof(T)) __syncthreads();  // as below
            if (first < a.codes) store<O, N>(residual + first, value, 1.0f);
        }
        if (owns_label) residual[label] = narrow<O>(about.gradient(own, true, a));
        return;
    }
    if (a.logps && owns_label) a.logps[row] = (target - part.max) - logf(part.sum);
    if (!a.out) return;

    const float scale = a.scales ? a.scales[row] : 1.0f, factor = __fdividef(-scale, part.sum);
    for (int begin = 0; begin < a.codes; begin += threads * N) {
        const int first = begin + threadIdx.x * N;
        float value[N];
        if (first < a.codes) {
            load_row(Flag<true>{}, first, value);
            for (int i = 0; i < N; ++i) value[i] = exponential(value[i] - part.max);
        }
        // A narrower result overwrites logits that other threads read in this iteration, but none of later iterations.
        if constexpr (sizeof(O) < sizeof(T)) __syncthreads();
        if (first < a.codes) store<O, N>(residual + first, value, factor);
    }
    if (owns_label) residual[label] = narrow<O>(scale + factor * exponential(target - part.max));
}

bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

template <typename T, typename O, bool plain>
int dispatch(const Arguments& a, int64_t rows, int device, void* stream) {
    constexpr int N = 16 / sizeof(T);
    if (a.codes % N != 0 || !aligned(a.logits) || !aligned(a.bias) || !aligned(a.out)) {
        return launch<row_in_passes<T, O, 1, 512, plain>>(rows, 512, 0, device, stream, a);
    }
    if (a.codes <= 4096) return launch<row_in_registers<T, O, 128, plain>>(rows, 128, 0, device, stream, a);
    if (a.codes <= 8192) return launch<row_in_registers<T, O, 256, plain>>(rows, 256, 0, device, stream, a);
    if (a.codes <= 16384) return launch<row_in_registers<T, O, 512, plain>>(rows, 512, 0, device, stream, a);
    if constexpr (sizeof(T) == 2 && plain) {  // 1024 threads have 64 registers each, too few for fp32
        if (a.codes <= 32768) return launch<row_in_registers<T, O, 1024, plain>>(rows, 1024, 0, device, stream, a);
    }
    return launch<row_in_passes<T, O, N, 512, plain>>(rows, 512, 0, device, stream, a);
}

template <typename T, typename O>
int dispatch(const Arguments& a, int64_t rows, int device, void* stream) {
    return a.plain() ? dispatch<T, O, true>(a, rows, device, stream) : dispatch<T, O, false>(a, rows, device, stream);
}

}  // namespace

int token_logprobs_cuda(const void* logits, Dtype dtype, const void* bias, const int64_t* labels,
                        float inverse_temperature, float softcap, const float* scales, const float* others,
                        const float* entropy_scales, float* logps, float* entropies, float* statistics, void* out,
                        Dtype out_dtype, int64_t rows, int64_t codes, int device, void* stream) {
    if (rows > 0x7FFFFFFF || codes > 0x7FFFFFFF - 512 * 8) return cudaErrorInvalidValue;
    const Arguments a{logits, bias, labels, inverse_temperature, softcap, scales, others, entropy_scales,
                      logps, entropies, statistics, out, static_cast<int>(codes)};
    if (dtype == Dtype::bfloat16) return dispatch<__nv_bfloat16, __nv_bfloat16>(a, rows, device, stream);
    if (dtype == Dtype::float16) return dispatch<__half, __half>(a, rows, device, stream);
    if (out_dtype == Dtype::bfloat16) return dispatch<float, __nv_bfloat16>(a, rows, device, stream);
    if (out_dtype == Dtype::float16) return dispatch<float, __half>(a, rows, device, stream);
    return dispatch<float, float>(a, rows, device, stream);
}

}  // namespace ospo

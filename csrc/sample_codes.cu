// sample_codes on the GPU, one block per row. Equal logits give the codes of sample_codes.cpp. Without truncation a row
// is read once. With truncation its keys stay in shared memory if they fit, and radix selection finds the cuts.
// Float operations that decide a code are intrinsics, which nvcc does not contract to FMA.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "common.h"
#include "launch.h"
#include "sampling.h"

namespace ospo {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;
constexpr int kBins = 256;  // values of one radix digit of a key
constexpr int kBlock = 4;   // codes that share a Philox block of as many words
constexpr int kGroups = 2;  // groups of neighboring logits, 16 bytes each, that a thread reads at once
constexpr int kCopies = 8;  // of each bin, against conflicts: neighboring codes often fall into one bin

struct Arguments {
    const void* cond;
    const void* uncond;  // or null
    int64_t logit_stride;
    const int64_t* seeds;
    const int64_t* steps;
    int64_t* tokens;  // or null
    int64_t token_stride, token_columns;
    int64_t* current;
    int64_t* error_steps;
    int64_t codes;
    float guidance, temperature;
    int64_t top_k;
    double top_p;
};

__device__ float widen(float x) { return x; }
__device__ float widen(__half x) { return __half2float(x); }
__device__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }

struct Best {
    double score;
    int64_t code;  // -1 for none; ties go to the smaller code
};

__device__ Best better(Best a, Best b) {
    if (b.code < 0) return a;
    if (a.code < 0 || b.score > a.score) return b;
    return b.score == a.score && b.code < a.code ? b : a;
}

__device__ Best warp_best(Best best) {
#pragma unroll
    for (int distance = 16; distance; distance /= 2) {
        const Best other{__shfl_down_sync(~0u, best.score, distance), __shfl_down_sync(~0u, best.code, distance)};
        best = better(best, other);
    }
    return best;
}

// The row of logits of a thread block, in fp32.
template <class T>
struct Row {
    static constexpr int kGroup = 16 / sizeof(T);          // logits in 16 bytes, one load if the row is aligned
    static constexpr int kWords = kBlock * sizeof(T) / 4;  // 32-bit words that hold kBlock logits

    const T* cond;
    const T* uncond;
    int64_t codes;
    float guidance;
    bool aligned;
    __device__ explicit Row(const Arguments& a)
        : cond(static_cast<const T*>(a.cond) + blockIdx.x * a.logit_stride),
          uncond(a.uncond ? static_cast<const T*>(a.uncond) + blockIdx.x * a.logit_stride : nullptr), codes(a.codes),
          guidance(a.guidance),
          aligned((reinterpret_cast<uintptr_t>(cond) | reinterpret_cast<uintptr_t>(uncond)) % 16 == 0) {}

    // The 16 bytes of a group of logits, zeros beyond the row.
    __device__ uint4 load_group(const T* logits, int64_t from) const {
        if (aligned && from + kGroup <= codes) return __ldg(reinterpret_cast<const uint4*>(logits + from));
        T values[kGroup];
#pragma unroll
        for (int i = 0; i < kGroup; ++i) values[i] = from + i < codes ? __ldg(logits + from + i) : T{};
        uint4 words;
        memcpy(&words, values, sizeof words);
        return words;
    }

    __device__ static float logit(const uint32_t* words, int i) {
        T values[kBlock];
        memcpy(values, words, sizeof values);
        return widen(values[i]);
    }

    // Call use(first code, kBlock logits) for each block of kBlock codes of this thread, in ascending order. Logits of
    // codes beyond the row are undefined. kGroups groups are loaded before the first of their blocks is used, so that
    // their loads overlap. The loop over these blocks is not unrolled because `use` is long: instead of indexing the
    // registers, each iteration shifts the words of the next block to the front.
    template <class Use>
    __device__ void each_block(Use use) const {
        constexpr int stride = kThreads * kGroup;
        for (int64_t from = int64_t{threadIdx.x} * kGroup; from < codes; from += kGroups * stride) {
            uint32_t conds[kGroups * 4], unconds[kGroups * 4];
#pragma unroll
            for (int g = 0; g < kGroups; ++g) {
                const uint4 words = load_group(cond, from + g * stride);
                memcpy(conds + g * 4, &words, sizeof words);
            }
            if (uncond) {
#pragma unroll
                for (int g = 0; g < kGroups; ++g) {
                    const uint4 words = load_group(uncond, from + g * stride);
                    memcpy(unconds + g * 4, &words, sizeof words);
                }
            }
#pragma unroll 1
            for (int i = 0; i < kGroups * kGroup; i += kBlock) {
                const int64_t first = from + i / kGroup * stride + i % kGroup;
                if (first >= codes) break;
                float z[kBlock];
#pragma unroll
                for (int j = 0; j < kBlock; ++j) {
                    z[j] = logit(conds, j);
                    if (uncond) {
                        const float base = logit(unconds, j);
                        z[j] = __fadd_rn(base, __fmul_rn(guidance, __fsub_rn(z[j], base)));
                    }
                }
                use(first, z);
#pragma unroll
                for (int j = 0; j + kWords < kGroups * 4; ++j) {
                    conds[j] = conds[j + kWords];
                    unconds[j] = unconds[j + kWords];
                }
            }
        }
    }
};

// Write the best code of all threads, or mark the row if it is invalid, which all threads know.
__device__ void finish(Best best, bool invalid, const Arguments& a) {
    __shared__ Best found[kWarps];
    best = warp_best(best);
    if (threadIdx.x % 32 == 0) found[threadIdx.x / 32] = best;
    __syncthreads();
    if (threadIdx.x >= 32) return;
    best = warp_best(threadIdx.x < kWarps ? found[threadIdx.x] : Best{-INFINITY, -1});
    if (threadIdx.x != 0) return;
    const int64_t row = blockIdx.x, step = a.steps[row];
    if (invalid || best.code < 0) {
        if (a.error_steps[row] < 0) a.error_steps[row] = step;
        best.code = 0;
    }
    // A step beyond the columns cannot be an error here, which would need a synchronization: it writes nothing.
    if (a.tokens && step >= 0 && step < a.token_columns) a.tokens[row * a.token_stride + step] = best.code;
    a.current[row] = best.code;
}

template <class T>
__global__ void __launch_bounds__(kThreads) sample(Arguments a) {
    const Row<T> row(a);
    const uint64_t seed = static_cast<uint64_t>(a.seeds[blockIdx.x]), step = static_cast<uint64_t>(a.steps[blockIdx.x]);
    Best best{-INFINITY, -1};
    bool invalid = false;
    row.each_block([&](int64_t first, const float* logits) {
        PhiloxWords random{};
        if (a.temperature != 0.0f) random = philox(seed, static_cast<uint32_t>(first / kBlock), step);
#pragma unroll
        for (int i = 0; i < kBlock; ++i) {
            const int64_t code = first + i;
            if (code >= a.codes) break;
            const float z = a.temperature == 0.0f ? logits[i] : __fdiv_rn(logits[i], a.temperature);
            invalid |= isnan(z) || z == INFINITY;
            double score = z;
            if (a.temperature != 0.0f) {
                if (score + gumbel_bound(random.word[i]) <= best.score) continue;
                score += gumbel(random.word[i]);
            }
            if (score > best.score) best = {score, code};
        }
    });
    finish(best, __syncthreads_or(invalid), a);
}

// ---------------------------------------------------------------- truncation

// exp(z − max) in units of 2^-40, with the bits of `_weights` in ospo_fast/ops/sample_codes.py.
__device__ uint64_t weight_of(float z, float max) {
    const double x = __dsub_rn(z, max);
    if (x < -30.0) return 0;
    const double t = __dmul_rn(x, 1.4426950408889634), n = rint(t);
    const double r = __dmul_rn(__dsub_rn(t, n), 0.6931471805599453);
    double p = 1.0 / 39916800, factorial = 39916800;
#pragma unroll
    for (int k = 11; k > 0; --k) {
        factorial /= k;
        p = __dadd_rn(__dmul_rn(p, r), 1.0 / factorial);
    }
    const int64_t scale = static_cast<int64_t>(n) + 1023 + 40;
    return __double2ull_rn(__dmul_rn(p, __longlong_as_double(scale << 52)));
}

// 64-bit sums per bin, in two words each: shared memory has a native atomic addition for 32-bit words only.
struct Sums {
    uint32_t low[kBins * kCopies], high[kBins * kCopies];
    uint64_t whole[kBins];

    __device__ void clear() {
        for (int i = threadIdx.x; i < kBins * kCopies; i += kThreads) low[i] = high[i] = 0;
        __syncthreads();
    }
    __device__ void add(uint32_t bin, uint64_t weight) {
        const uint32_t i = bin * kCopies + threadIdx.x % kCopies, word = static_cast<uint32_t>(weight);
        const uint32_t before = atomicAdd(&low[i], word);
        const uint32_t carry = static_cast<uint32_t>(weight >> 32) + (before + word < word);
        if (carry) atomicAdd(&high[i], carry);
    }
    __device__ void gather() {
        __syncthreads();
        if (threadIdx.x < kBins) {
            uint64_t sum = 0;
            for (int i = 0; i < kCopies; ++i) {
                const int copy = threadIdx.x * kCopies + i;
                sum += static_cast<uint64_t>(high[copy]) << 32 | low[copy];
            }
            whole[threadIdx.x] = sum;
        }
        __syncthreads();
    }
};

// The keys of the row: kept in shared memory, or computed again in each pass.
template <class T, bool staged>
struct Keys {
    Row<T> row;
    float temperature;
    uint32_t* shared;  // (codes), rounded up to whole blocks

    // Call use(first code, kBlock keys) for each block of this thread, in ascending order. Keys of codes beyond the row
    // are undefined.
    template <class Use>
    __device__ void each_block(Use use) const {
        if constexpr (staged) {
            for (int64_t first = int64_t{threadIdx.x} * kBlock; first < row.codes; first += kThreads * kBlock) {
                uint32_t own[kBlock];
                memcpy(own, reinterpret_cast<const uint4*>(shared + first), sizeof own);
                use(first, own);
            }
        } else {
            compute(use);
        }
    }
    template <class Use>
    __device__ void compute(Use use) const {
        row.each_block([&](int64_t first, const float* logits) {
            uint32_t own[kBlock];
#pragma unroll
            for (int i = 0; i < kBlock; ++i) own[i] = key_of(__fdiv_rn(logits[i], temperature));
            use(first, own);
        });
    }
};

struct Cut {
    uint32_t key;      // the largest key for which the codes from it on weigh at least `need`
    uint64_t missing;  // `need` minus the weight of the codes above it
    uint64_t mass;     // the weight of the codes with this key
};

// Radix selection among the codes in ascending order(code, key), 8 bits per pass, in every thread. Codes weigh
// weight(key); 0 < need(sum of the weights) <= that sum.
template <class Keys, class Order, class Weight, class Need>
__device__ Cut find_cut(const Keys& keys, Order order, Weight weight, Need need, Sums& sums) {
    Cut cut{};
    for (int shift = 24; shift >= 0; shift -= 8) {
        sums.clear();
        keys.each_block([&](int64_t first, const uint32_t* own) {
#pragma unroll
            for (int i = 0; i < kBlock; ++i) {
                const uint32_t rank = order(first + i, own[i]);
                if (first + i >= keys.row.codes || (shift < 24 && (rank ^ cut.key) >> (shift + 8))) continue;
                const uint64_t mass = weight(own[i]);
                if (mass) sums.add(rank >> shift & (kBins - 1), mass);
            }
        });
        sums.gather();
        // Every warp computes the same: each lane has 8 bins, the first lane those of the largest keys.
        constexpr int kPerLane = kBins / 32;
        const int lane = threadIdx.x % 32, first = kBins - 1 - lane * kPerLane;
        uint64_t own = 0;
        for (int i = 0; i < kPerLane; ++i) own += sums.whole[first - i];
        uint64_t reached = own;
#pragma unroll
        for (int distance = 1; distance < 32; distance *= 2) {
            const uint64_t other = __shfl_up_sync(~0u, reached, distance);
            if (lane >= distance) reached += other;
        }
        if (shift == 24) cut.missing = need(__shfl_sync(~0u, reached, 31));
        const int crossed = __ffs(static_cast<int>(__ballot_sync(~0u, reached >= cut.missing))) - 1;
        uint64_t above = __shfl_sync(~0u, reached - own, crossed);
        int bin = kBins - 1 - crossed * kPerLane;
        while (above + sums.whole[bin] < cut.missing) above += sums.whole[bin--];
        cut.key |= static_cast<uint32_t>(bin) << shift;
        cut.missing -= above;
        cut.mass = sums.whole[bin];
    }
    return cut;
}

// `sample` from the codes that top_k and top_p keep. One block per multiprocessor: with more, sm_80 spills registers.
template <class T, bool staged>
__global__ void __launch_bounds__(kThreads, 1) sample_truncated(Arguments a) {
    extern __shared__ __align__(16) uint32_t shared[];
    __shared__ Sums sums;
    __shared__ uint32_t largest;
    const Keys<T, staged> keys{Row<T>(a), a.temperature, shared};
    if (threadIdx.x == 0) largest = 0;
    __syncthreads();
    uint32_t max_key = 0;
    bool invalid = false;
    keys.compute([&](int64_t first, const uint32_t* own) {
        if (staged) memcpy(reinterpret_cast<uint4*>(shared + first), own, sizeof(uint4));
#pragma unroll
        for (int i = 0; i < kBlock; ++i) {
            if (first + i >= a.codes) break;
            invalid |= !(logit_of(own[i]) < INFINITY);
            max_key = max(max_key, own[i]);
        }
    });
    atomicMax(&largest, max_key);
    invalid = __syncthreads_or(invalid);
    max_key = largest;
    if (invalid || max_key == key_of(-INFINITY)) return finish(Best{-INFINITY, -1}, true, a);

    uint32_t min_key = 0;
    int64_t end = a.codes;  // codes with min_key stay if they are below this
    const auto by_key = [](int64_t, uint32_t key) { return key; };
    if (a.top_k > 0 && a.top_k < a.codes) {
        const auto one = [](uint32_t) { return uint64_t{1}; };
        const auto need = [&](uint64_t) { return static_cast<uint64_t>(a.top_k); };
        min_key = find_cut(keys, by_key, one, need, sums).key;
    }
    if (a.top_p < 1) {
        const float max = logit_of(max_key);
        const auto weight = [&](uint32_t key) { return key < min_key ? uint64_t{0} : weight_of(logit_of(key), max); };
        const auto need = [&](uint64_t sum) {
            const uint64_t share = __double2ull_ru(__dmul_rn(a.top_p, __ull2double_rn(sum)));
            return share < sum ? share : sum;  // a sum above 2^53 may be rounded up
        };
        const Cut cut = find_cut(keys, by_key, weight, need, sums);
        min_key = cut.key;
        const uint64_t each = weight_of(logit_of(min_key), max), ties = (cut.missing + each - 1) / each;
        if (ties * each < cut.mass) {  // keep the first of equal codes: the largest by ~code
            const auto reversed = [](int64_t code, uint32_t) { return ~static_cast<uint32_t>(code); };
            const auto tied = [&](uint32_t key) { return uint64_t{key == min_key}; };
            const Cut last = find_cut(keys, reversed, tied, [&](uint64_t) { return ties; }, sums);
            end = int64_t{~last.key} + 1;
        }
    }

    const uint64_t seed = static_cast<uint64_t>(a.seeds[blockIdx.x]), step = static_cast<uint64_t>(a.steps[blockIdx.x]);
    Best best{-INFINITY, -1};
    keys.each_block([&](int64_t first, const uint32_t* own) {
        uint32_t kept = 0;
#pragma unroll
        for (int i = 0; i < kBlock; ++i) {
            const int64_t code = first + i;
            if (code < a.codes && (own[i] > min_key || (own[i] == min_key && code < end))) kept |= 1u << i;
        }
        if (!kept) return;
        const PhiloxWords random = philox(seed, static_cast<uint32_t>(first / kBlock), step);
#pragma unroll
        for (int i = 0; i < kBlock; ++i) {
            if (!(kept >> i & 1)) continue;
            double score = logit_of(own[i]);
            if (score + gumbel_bound(random.word[i]) <= best.score) continue;
            score += gumbel(random.word[i]);
            if (score > best.score) best = {score, first + i};
        }
    });
    finish(best, false, a);
}

template <class T>
int dispatch(const Arguments& a, int64_t rows, int device, void* stream) {
    if (a.temperature == 0.0f || ((a.top_k <= 0 || a.top_k >= a.codes) && a.top_p >= 1)) {
        return launch<sample<T>>(rows, kThreads, 0, device, stream, a);
    }
    const size_t bytes = static_cast<size_t>((a.codes + kBlock - 1) / kBlock * kBlock) * sizeof(uint32_t);
    const DeviceGuard guard(device);
    if (guard.status != cudaSuccess) return guard.status;
    size_t max_bytes = 0;
    const cudaError_t status = raise_shared_limit<sample_truncated<T, true>>(device, max_bytes);
    if (status != cudaSuccess) return status;
    if (bytes > max_bytes) return launch<sample_truncated<T, false>>(rows, kThreads, 0, device, stream, a);
    return launch<sample_truncated<T, true>>(rows, kThreads, bytes, device, stream, a);
}

}  // namespace

int sample_codes_cuda(Dtype dtype, const void* cond, const void* uncond, int64_t logit_stride, const int64_t* seeds,
                      const int64_t* steps, int64_t* tokens, int64_t token_stride, int64_t token_columns,
                      int64_t* current, int64_t* error_steps, int64_t rows, int64_t codes, float guidance,
                      float temperature, int64_t top_k, double top_p, int device, void* stream) {
    const Arguments a{cond,          uncond,  logit_stride, seeds, steps,    tokens,      token_stride,
                      token_columns, current, error_steps,  codes, guidance, temperature, top_k,       top_p};
    if (dtype == Dtype::float32) return dispatch<float>(a, rows, device, stream);
    if (dtype == Dtype::float16) return dispatch<__half>(a, rows, device, stream);
    return dispatch<__nv_bfloat16>(a, rows, device, stream);
}

}  // namespace ospo

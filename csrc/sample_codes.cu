// draw_codes on a device: one block per row, the same codes as sample_codes.cpp for equal logits. Without truncation it
// reads them once; with it a row's keys stay in shared memory, where they fit, and cuts are found there by radix.
// Arithmetic that decides is spelled out in intrinsics, because nvcc would contract it to FMA.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "common.h"
#include "device_guard.h"
#include "shared_memory.h"

namespace ospo {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;
constexpr int kBins = 256;  // values of a digit of a key
constexpr int kBlock = 4;   // codes that share a block of Philox, which has as many words
constexpr int kGroups = 2;  // of neighbouring logits, 16 bytes each, that a thread reads at once
constexpr int kCopies = 8;  // of each bin: neighbouring codes often fall into the same one

struct Arguments {
    const void* cond;
    const void* uncond;  // or null
    int64_t logit_stride;
    const int64_t* seeds;
    const int64_t* steps;
    int64_t* tokens;  // or null
    int64_t token_stride;
    int64_t* current;
    int64_t* bad;
    int64_t codes;
    float guidance, temperature;
    int64_t top_k;
    double top_p;
};

__device__ float number(float x) { return x; }
__device__ float number(__half x) { return __half2float(x); }
__device__ float number(__nv_bfloat16 x) { return __bfloat162float(x); }

__device__ uint4 philox(uint64_t seed, uint32_t block, uint64_t step) {
    uint32_t c0 = block, c1 = static_cast<uint32_t>(step), c2 = static_cast<uint32_t>(step >> 32), c3 = 0;
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
#pragma unroll
    for (int round = 0; round < 10; ++round) {
        const uint32_t low = 0xD2511F53u * c0, high = 0xCD9E8D57u * c2;
        const uint32_t low_over = __umulhi(0xD2511F53u, c0), high_over = __umulhi(0xCD9E8D57u, c2);
        c0 = high_over ^ c1 ^ k0;
        c1 = high;
        c2 = low_over ^ c3 ^ k1;
        c3 = low;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return make_uint4(c0, c1, c2, c3);
}

__device__ double gumbel(uint32_t word) { return -log(-log((word + 0.5) * 0x1p-32)); }

// At least the noise of this word, without a logarithm: -log(-log u) <= -log(1 - u), and 1 - u = (~word + 0.5) / 2^32.
__device__ double gumbel_bound(uint32_t word) {
    const int bits = 32 - __clz(static_cast<int>(~word));
    return (33 - bits) * 0.6931471805599454 + 1e-12;
}

struct Best {
    double score;
    int64_t code;  // -1 where there is none; ties go to the smaller code
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

// The logits of a block's row, in fp32.
template <class T>
struct Row {
    static constexpr int kGroup = 16 / sizeof(T);          // codes of 16 bytes, one load where the row is aligned
    static constexpr int kWords = kBlock * sizeof(T) / 4;  // that hold the logits of a block

    const T* cond;
    const T* uncond;
    int64_t codes;
    float guidance;
    bool wide;  // both rows are aligned
    __device__ explicit Row(const Arguments& a)
        : cond(static_cast<const T*>(a.cond) + blockIdx.x * a.logit_stride),
          uncond(a.uncond ? static_cast<const T*>(a.uncond) + blockIdx.x * a.logit_stride : nullptr), codes(a.codes),
          guidance(a.guidance),
          wide((reinterpret_cast<uintptr_t>(cond) | reinterpret_cast<uintptr_t>(uncond)) % 16 == 0) {}

    // A group of logits, as they are in memory; of places beyond the row zeros.
    __device__ uint4 group(const T* logits, int64_t from) const {
        if (wide && from + kGroup <= codes) return __ldg(reinterpret_cast<const uint4*>(logits + from));
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
        return number(values[i]);
    }

    // use(first code, kBlock logits) for each block of this thread, in ascending order; logits of codes beyond the row
    // mean nothing. All loads of a batch come before the first use. The blocks of a batch are one loop, not unrolled,
    // because `use` is long: each iteration shifts the words of the next block to the front.
    template <class Use>
    __device__ void each_block(Use use) const {
        constexpr int apart = kThreads * kGroup;
        for (int64_t from = int64_t{threadIdx.x} * kGroup; from < codes; from += kGroups * apart) {
            uint32_t conds[kGroups * 4], unconds[kGroups * 4];
#pragma unroll
            for (int g = 0; g < kGroups; ++g) {
                const uint4 words = group(cond, from + g * apart);
                memcpy(conds + g * 4, &words, sizeof words);
            }
            if (uncond) {
#pragma unroll
                for (int g = 0; g < kGroups; ++g) {
                    const uint4 words = group(uncond, from + g * apart);
                    memcpy(unconds + g * 4, &words, sizeof words);
                }
            }
#pragma unroll 1
            for (int i = 0; i < kGroups * kGroup; i += kBlock) {
                const int64_t first = from + i / kGroup * apart + i % kGroup;
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

// The best of all threads into its places; `wrong` is the same in all of them.
__device__ void finish(Best best, bool wrong, const Arguments& a) {
    __shared__ Best found[kWarps];
    best = warp_best(best);
    if (threadIdx.x % 32 == 0) found[threadIdx.x / 32] = best;
    __syncthreads();
    if (threadIdx.x >= 32) return;
    best = warp_best(threadIdx.x < kWarps ? found[threadIdx.x] : Best{-INFINITY, -1});
    if (threadIdx.x != 0) return;
    const int64_t row = blockIdx.x, step = a.steps[row];
    if (wrong || best.code < 0) {
        if (a.bad[row] < 0) a.bad[row] = step;
        best.code = 0;
    }
    if (a.tokens) a.tokens[row * a.token_stride + step] = best.code;
    a.current[row] = best.code;
}

template <class T>
__global__ void __launch_bounds__(kThreads) draw(Arguments a) {
    const Row<T> row(a);
    const uint64_t seed = static_cast<uint64_t>(a.seeds[blockIdx.x]), step = static_cast<uint64_t>(a.steps[blockIdx.x]);
    Best best{-INFINITY, -1};
    bool wrong = false;
    row.each_block([&](int64_t first, const float* logits) {
        uint4 random{};
        if (a.temperature != 0.0f) random = philox(seed, static_cast<uint32_t>(first / kBlock), step);
        const uint32_t words[kBlock] = {random.x, random.y, random.z, random.w};
#pragma unroll
        for (int i = 0; i < kBlock; ++i) {
            const int64_t code = first + i;
            if (code >= a.codes) break;
            const float z = logits[i];
            wrong |= isnan(z) || z == INFINITY;
            double score = z;
            if (a.temperature != 0.0f) {
                score = __fdiv_rn(z, a.temperature);
                if (score + gumbel_bound(words[i]) <= best.score) continue;  // spares most codes the logarithms
                score += gumbel(words[i]);
            }
            if (score > best.score) best = {score, code};
        }
    });
    finish(best, __syncthreads_or(wrong), a);
}

// ---------------------------------------------------------------- truncation

// A whole number in the order of the logits.
__device__ uint32_t key_of(float z) {
    const uint32_t bits = __float_as_uint(__fadd_rn(z, 0.0f));  // -0 is 0
    return bits ^ (bits >> 31 ? 0xFFFFFFFFu : 0x80000000u);
}

__device__ float logit_of(uint32_t key) { return __uint_as_float(key ^ (key >> 31 ? 0x80000000u : 0xFFFFFFFFu)); }

// exp(z - most) in units of 2^-40, as `_weights` in ospo_fast/ops/sample_codes.py computes it.
__device__ uint64_t weight_of(float z, float most) {
    const double x = __dsub_rn(z, most);
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

// Sums of 64 bits in two words each, because shared memory adds words of 32 alone without a loop.
struct Sums {
    uint32_t low[kBins * kCopies], high[kBins * kCopies];
    uint64_t whole[kBins];

    __device__ void clear() {
        for (int i = threadIdx.x; i < kBins * kCopies; i += kThreads) low[i] = high[i] = 0;
        __syncthreads();
    }
    __device__ void add(uint32_t bin, uint64_t weight) {
        const uint32_t at = bin * kCopies + threadIdx.x % kCopies, word = static_cast<uint32_t>(weight);
        const uint32_t before = atomicAdd(&low[at], word);
        const uint32_t rest = static_cast<uint32_t>(weight >> 32) + (before + word < word);
        if (rest) atomicAdd(&high[at], rest);
    }
    __device__ void gather() {
        __syncthreads();
        if (threadIdx.x < kBins) {
            uint64_t sum = 0;
            for (int i = 0; i < kCopies; ++i) {
                const int at = threadIdx.x * kCopies + i;
                sum += static_cast<uint64_t>(high[at]) << 32 | low[at];
            }
            whole[threadIdx.x] = sum;
        }
        __syncthreads();
    }
};

// The keys of a block's row: in shared memory, or computed whenever they are wanted.
template <class T, bool staged>
struct Keys {
    Row<T> row;
    float temperature;
    uint32_t* room;  // (codes) and as many more as fill the last block

    // use(first code, kBlock keys) for each block of this thread, in ascending order; keys of codes beyond the row mean
    // nothing.
    template <class Use>
    __device__ void each_block(Use use) const {
        if constexpr (staged) {
            for (int64_t first = int64_t{threadIdx.x} * kBlock; first < row.codes; first += kThreads * kBlock) {
                uint32_t own[kBlock];
                memcpy(own, reinterpret_cast<const uint4*>(room + first), sizeof own);
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
    uint32_t key;            // the largest one at which the weights of the codes from it on reach what was needed
    uint64_t missing, mass;  // what those above it lack; the weights of the codes at it
};

// Radix selection among the codes by order(code, key), 8 bits after the others, in all threads. Their weights are
// weight(key); need(the sum of the weights) is at most that, and not 0.
template <class Keys, class Order, class Weight, class Need>
__device__ Cut find_cut(const Keys& keys, Order order, Weight weight, Need need, Sums& sums) {
    Cut cut{};
    for (int shift = 24; shift >= 0; shift -= 8) {
        sums.clear();
        keys.each_block([&](int64_t first, const uint32_t* own) {
#pragma unroll
            for (int i = 0; i < kBlock; ++i) {
                const uint32_t place = order(first + i, own[i]);
                if (first + i >= keys.row.codes || (shift < 24 && (place ^ cut.key) >> (shift + 8))) continue;
                const uint64_t mass = weight(own[i]);
                if (mass) sums.add(place >> shift & (kBins - 1), mass);
            }
        });
        sums.gather();
        // Every warp alike: a lane has 8 bins, the first lane the largest ones.
        constexpr int kOwn = kBins / 32;
        const int lane = threadIdx.x % 32, first = kBins - 1 - lane * kOwn;
        uint64_t own = 0;
        for (int i = 0; i < kOwn; ++i) own += sums.whole[first - i];
        uint64_t reached = own;
#pragma unroll
        for (int distance = 1; distance < 32; distance *= 2) {
            const uint64_t other = __shfl_up_sync(~0u, reached, distance);
            if (lane >= distance) reached += other;
        }
        if (shift == 24) cut.missing = need(__shfl_sync(~0u, reached, 31));
        const int crossed = __ffs(static_cast<int>(__ballot_sync(~0u, reached >= cut.missing))) - 1;
        uint64_t above = __shfl_sync(~0u, reached - own, crossed);
        int bin = kBins - 1 - crossed * kOwn;
        while (above + sums.whole[bin] < cut.missing) above += sums.whole[bin--];
        cut.key |= static_cast<uint32_t>(bin) << shift;
        cut.missing -= above;
        cut.mass = sums.whole[bin];
    }
    return cut;
}

// As `draw`, from the codes that truncation leaves. One block a multiprocessor is asked for: for more of them registers
// would be spilled on sm_80.
template <class T, bool staged>
__global__ void __launch_bounds__(kThreads, 1) draw_truncated(Arguments a) {
    extern __shared__ __align__(16) uint32_t room[];
    __shared__ Sums sums;
    __shared__ uint32_t largest;
    const Keys<T, staged> keys{Row<T>(a), a.temperature, room};
    if (threadIdx.x == 0) largest = 0;
    __syncthreads();
    uint32_t most = 0;
    bool wrong = false;
    keys.compute([&](int64_t first, const uint32_t* own) {
        if (staged) memcpy(reinterpret_cast<uint4*>(room + first), own, sizeof(uint4));
#pragma unroll
        for (int i = 0; i < kBlock; ++i) {
            if (first + i >= a.codes) break;
            wrong |= !(logit_of(own[i]) < INFINITY);
            most = max(most, own[i]);
        }
    });
    atomicMax(&largest, most);
    wrong = __syncthreads_or(wrong);
    most = largest;
    if (wrong || most == key_of(-INFINITY)) return finish(Best{-INFINITY, -1}, true, a);

    uint32_t least = 0;
    int64_t end = a.codes;  // of the codes with this key, those before it stay
    const auto by_key = [](int64_t, uint32_t key) { return key; };
    if (a.top_k > 0 && a.top_k < a.codes) {
        const auto one = [](uint32_t) { return uint64_t{1}; };
        const auto need = [&](uint64_t) { return static_cast<uint64_t>(a.top_k); };
        least = find_cut(keys, by_key, one, need, sums).key;
    }
    if (a.top_p < 1) {
        const float top = logit_of(most);
        const auto weight = [&](uint32_t key) { return key < least ? uint64_t{0} : weight_of(logit_of(key), top); };
        const auto need = [&](uint64_t sum) {
            const uint64_t share = __double2ull_ru(__dmul_rn(a.top_p, __ull2double_rn(sum)));
            return share < sum ? share : sum;  // a sum beyond 2^53 may round up
        };
        const Cut cut = find_cut(keys, by_key, weight, need, sums);
        least = cut.key;
        const uint64_t each = weight_of(logit_of(least), top), ties = (cut.missing + each - 1) / each;
        if (ties * each < cut.mass) {  // the first ones are the largest ones by ~code
            const auto backwards = [](int64_t code, uint32_t) { return ~static_cast<uint32_t>(code); };
            const auto tied = [&](uint32_t key) { return uint64_t{key == least}; };
            const Cut last = find_cut(keys, backwards, tied, [&](uint64_t) { return ties; }, sums);
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
            if (code < a.codes && (own[i] > least || (own[i] == least && code < end))) kept |= 1u << i;
        }
        if (!kept) return;
        const uint4 random = philox(seed, static_cast<uint32_t>(first / kBlock), step);
        const uint32_t words[kBlock] = {random.x, random.y, random.z, random.w};
#pragma unroll
        for (int i = 0; i < kBlock; ++i) {
            if (!(kept >> i & 1)) continue;
            double score = logit_of(own[i]);
            if (score + gumbel_bound(words[i]) <= best.score) continue;
            score += gumbel(words[i]);
            if (score > best.score) best = {score, first + i};
        }
    });
    finish(best, false, a);
}

template <class T>
int launch(const Arguments& a, int64_t rows, int device, cudaStream_t stream) {
    const unsigned grid = static_cast<unsigned>(rows);
    if (a.temperature == 0.0f || ((a.top_k <= 0 || a.top_k >= a.codes) && a.top_p >= 1)) {
        draw<T><<<grid, kThreads, 0, stream>>>(a);
        return cudaGetLastError();
    }
    size_t most = 0;
    const cudaError_t status = raise_shared_limit<draw_truncated<T, true>>(device, most);
    if (status != cudaSuccess) return status;
    const size_t bytes = static_cast<size_t>((a.codes + kBlock - 1) / kBlock * kBlock) * 4;
    if (bytes > most) {
        draw_truncated<T, false><<<grid, kThreads, 0, stream>>>(a);
        return cudaGetLastError();
    }
    draw_truncated<T, true><<<grid, kThreads, bytes, stream>>>(a);
    return cudaGetLastError();
}

}  // namespace

int draw_codes_cuda(Dtype dtype, const void* cond, const void* uncond, int64_t logit_stride, const int64_t* seeds,
                    const int64_t* steps, int64_t* tokens, int64_t token_stride, int64_t* current, int64_t* bad,
                    int64_t rows, int64_t codes, float guidance, float temperature, int64_t top_k, double top_p,
                    int device, void* stream) {
    if (rows == 0) return 0;
    const OnDevice current_device(device);
    if (current_device.status != cudaSuccess) return current_device.status;
    const auto run = dtype == Dtype::float32   ? launch<float>
                     : dtype == Dtype::float16 ? launch<__half>
                                               : launch<__nv_bfloat16>;
    const Arguments arguments{cond,    uncond, logit_stride, seeds,    steps,       tokens, token_stride,
                              current, bad,    codes,        guidance, temperature, top_k,  top_p};
    return run(arguments, rows, device, static_cast<cudaStream_t>(stream));
}

}  // namespace ospo

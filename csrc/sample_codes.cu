// draw_codes on a device: one block per row, one pass over its logits, the same codes as sample_codes.cpp for equal
// logits. fp32 arithmetic is spelled out in intrinsics, because nvcc would contract it to FMA.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "common.h"
#include "on_device.h"

namespace ospo {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;

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

template <class T>
__global__ void __launch_bounds__(kThreads)
    draw(const T* cond, const T* uncond, int64_t logit_stride, const int64_t* seeds, const int64_t* steps,
         int64_t* tokens, int64_t token_stride, int64_t* current, int64_t* bad, int64_t codes, float guidance,
         float temperature) {
    const int64_t row = blockIdx.x, step = steps[row];
    const uint64_t seed = static_cast<uint64_t>(seeds[row]);
    cond += row * logit_stride;
    if (uncond) uncond += row * logit_stride;
    Best best{-INFINITY, -1};
    bool wrong = false;
    for (int64_t block = threadIdx.x; block * 4 < codes; block += kThreads) {
        uint4 random{};
        if (temperature != 0.0f) random = philox(seed, static_cast<uint32_t>(block), static_cast<uint64_t>(step));
        const uint32_t words[4] = {random.x, random.y, random.z, random.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int64_t code = block * 4 + i;
            if (code >= codes) break;
            float z = number(cond[code]);
            if (uncond) {
                const float u = number(uncond[code]);
                z = __fadd_rn(u, __fmul_rn(guidance, __fsub_rn(z, u)));
            }
            wrong |= isnan(z) || z == INFINITY;
            double score = z;
            if (temperature != 0.0f) {
                score = __fdiv_rn(z, temperature);
                if (score + gumbel_bound(words[i]) <= best.score) continue;  // spares most codes the logarithms
                score += gumbel(words[i]);
            }
            if (score > best.score) best = {score, code};
        }
    }
    __shared__ Best found[kWarps];
    wrong = __syncthreads_or(wrong);
    best = warp_best(best);
    if (threadIdx.x % 32 == 0) found[threadIdx.x / 32] = best;
    __syncthreads();
    if (threadIdx.x >= 32) return;
    best = warp_best(threadIdx.x < kWarps ? found[threadIdx.x] : Best{-INFINITY, -1});
    if (threadIdx.x != 0) return;
    if (wrong || best.code < 0) {
        if (bad[row] < 0) bad[row] = step;
        best.code = 0;
    }
    if (tokens) tokens[row * token_stride + step] = best.code;
    current[row] = best.code;
}

template <class T>
void launch(const void* cond, const void* uncond, int64_t logit_stride, const int64_t* seeds, const int64_t* steps,
            int64_t* tokens, int64_t token_stride, int64_t* current, int64_t* bad, int64_t rows, int64_t codes,
            float guidance, float temperature, cudaStream_t stream) {
    draw<T><<<static_cast<unsigned>(rows), kThreads, 0, stream>>>(
        static_cast<const T*>(cond), static_cast<const T*>(uncond), logit_stride, seeds, steps, tokens, token_stride,
        current, bad, codes, guidance, temperature);
}

}  // namespace

int draw_codes_cuda(Dtype dtype, const void* cond, const void* uncond, int64_t logit_stride, const int64_t* seeds,
                    const int64_t* steps, int64_t* tokens, int64_t token_stride, int64_t* current, int64_t* bad,
                    int64_t rows, int64_t codes, float guidance, float temperature, int device, void* stream) {
    if (rows == 0) return 0;
    const OnDevice current_device(device);
    if (current_device.status != cudaSuccess) return current_device.status;
    const auto run = dtype == Dtype::float32   ? launch<float>
                     : dtype == Dtype::float16 ? launch<__half>
                                               : launch<__nv_bfloat16>;
    run(cond, uncond, logit_stride, seeds, steps, tokens, token_stride, current, bad, rows, codes, guidance,
        temperature, static_cast<cudaStream_t>(stream));
    return cudaGetLastError();
}

}  // namespace ospo

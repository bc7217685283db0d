// The parts of sampling that sample_codes.cpp and sample_codes.cu share, so that both sample the same codes. The random
// bits are those of ospo_fast/ops/sample_codes.py: Philox4x32-10, keyed by the seed and counted by (code / 4, step).
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define OSPO_HOST_DEVICE __host__ __device__
#else
#define OSPO_HOST_DEVICE
#endif

namespace ospo {

// The random words of 4 neighboring codes.
struct PhiloxWords {
    uint32_t word[4];
};

// Both halves of the product of 32-bit numbers. On the GPU two multiplications take fewer registers than one of 64 bits,
// on the CPU one takes less time.
OSPO_HOST_DEVICE inline void multiply(uint32_t a, uint32_t b, uint32_t& high, uint32_t& low) {
#ifdef __CUDA_ARCH__
    high = __umulhi(a, b);
    low = a * b;
#else
    const uint64_t product = uint64_t{a} * b;
    high = static_cast<uint32_t>(product >> 32);
    low = static_cast<uint32_t>(product);
#endif
}

OSPO_HOST_DEVICE inline PhiloxWords philox(uint64_t seed, uint32_t block, uint64_t step) {
    uint32_t c0 = block, c1 = static_cast<uint32_t>(step), c2 = static_cast<uint32_t>(step >> 32), c3 = 0;
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
#ifdef __CUDA_ARCH__
#pragma unroll
#endif
    for (int round = 0; round < 10; ++round) {
        uint32_t high0, low0, high2, low2;
        multiply(0xD2511F53u, c0, high0, low0);
        multiply(0xCD9E8D57u, c2, high2, low2);
        c0 = high2 ^ c1 ^ k0;
        c1 = low2;
        c2 = high0 ^ c3 ^ k1;
        c3 = low0;
        k0 += 0x9E3779B9;
        k1 += 0xBB67AE85;
    }
    return {{c0, c1, c2, c3}};
}

OSPO_HOST_DEVICE inline double gumbel(uint32_t word) { return -std::log(-std::log((word + 0.5) * 0x1p-32)); }

// An upper bound of gumbel(word) without logarithms: -log(-log u) <= -log(1 - u), and 1 - u = (~word + 0.5) / 2^32. It
// spares most codes the logarithms, because they cannot win.
OSPO_HOST_DEVICE inline double gumbel_bound(uint32_t word) {
#ifdef __CUDA_ARCH__
    const int bits = 32 - __clz(static_cast<int>(~word));
#else
    const int bits = word == 0xFFFFFFFF ? 0 : 32 - __builtin_clz(~word);
#endif
    return (33 - bits) * 0.6931471805599454 + 1e-12;
}

// The key of a logit: an integer in the order of the logits, by which truncation selects. No number has key 0.
OSPO_HOST_DEVICE inline uint32_t key_of(float z) {
    z += 0.0f;  // -0 and 0 have one key
    uint32_t bits;
    std::memcpy(&bits, &z, sizeof bits);
    return bits ^ (static_cast<uint32_t>(static_cast<int32_t>(bits) >> 31) | 0x80000000u);
}

OSPO_HOST_DEVICE inline float logit_of(uint32_t key) {
    const uint32_t bits = key ^ (static_cast<uint32_t>(static_cast<int32_t>(~key) >> 31) | 0x80000000u);
    float z;
    std::memcpy(&z, &bits, sizeof z);
    return z;
}

}  // namespace ospo

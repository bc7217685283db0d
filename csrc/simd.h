// Vectors of 16 floats for the CPU kernels of the decoder. The compiler splits them for narrower registers.
#pragma once

#include <cstdint>
#include <cstring>

#include "common.h"

// OSPO_CLONES (common.h) with FMA: results differ between machines by rounding, but on one machine they depend neither
// on the number of rows nor on the number of threads.
#if defined(__linux__) && defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#if __GNUC__ >= 12
#define OSPO_FMA_CLONES \
    __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default"), optimize("fp-contract=fast")))
#define OSPO_FMA_AVX512 __attribute__((target("arch=x86-64-v4"), optimize("fp-contract=fast")))
#define OSPO_FMA_BELOW_AVX512 __attribute__((target_clones("arch=x86-64-v3", "default"), optimize("fp-contract=fast")))
#else  // GCC 11 does not know these names, and avx2 alone brings no FMA
#define OSPO_FMA_CLONES OSPO_CLONES __attribute__((optimize("fp-contract=fast")))
#define OSPO_FMA_AVX512 __attribute__((target("avx512f"), optimize("fp-contract=fast")))
#define OSPO_FMA_BELOW_AVX512 __attribute__((target_clones("avx2", "default"), optimize("fp-contract=fast")))
#endif
#else
#define OSPO_FMA_CLONES
#define OSPO_FMA_AVX512
#define OSPO_FMA_BELOW_AVX512
#endif

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi"  // no vector crosses a call: all helpers are inlined
#endif

namespace ospo {

constexpr int64_t kLanes = 16;
typedef float Vec __attribute__((vector_size(64), aligned(4), may_alias));
typedef int32_t IntVec __attribute__((vector_size(64), aligned(4), may_alias));
typedef float Vec8 __attribute__((vector_size(32)));
typedef float Vec4 __attribute__((vector_size(16)));
typedef int32_t Int4 __attribute__((vector_size(16)));

static OSPO_INLINE Vec load(const float* p) { return *reinterpret_cast<const Vec*>(p); }
static OSPO_INLINE void store(float* p, Vec v) { *reinterpret_cast<Vec*>(p) = v; }

#if defined(__clang__)
#define OSPO_SHUFFLE(a, b, i, j, k, l) __builtin_shufflevector(a, b, i, j, k, l)
#else
#define OSPO_SHUFFLE(a, b, i, j, k, l) __builtin_shuffle(a, b, (Int4{i, j, k, l}))
#endif

// Lane i of the result is the sum of lanes i, i + 4, i + 8 and i + 12.
static OSPO_INLINE Vec4 fold(Vec v) {
    Vec8 a, b;
    std::memcpy(&a, &v, sizeof a);
    std::memcpy(&b, reinterpret_cast<const char*>(&v) + sizeof a, sizeof b);
    a += b;
    Vec4 c, d;
    std::memcpy(&c, &a, sizeof c);
    std::memcpy(&d, reinterpret_cast<const char*>(&a) + sizeof c, sizeof d);
    return c + d;
}

static OSPO_INLINE float sum(Vec v) {
    const Vec4 c = fold(v);
    return (c[0] + c[2]) + (c[1] + c[3]);
}

// Four sums at once, each with the bits of `sum`.
static OSPO_INLINE Vec4 sums(Vec v0, Vec v1, Vec v2, Vec v3) {
    const Vec4 a = fold(v0), b = fold(v1), c = fold(v2), d = fold(v3);
    // ab = (a0 + a2, a1 + a3, b0 + b2, b1 + b3)
    const Vec4 ab = OSPO_SHUFFLE(a, b, 0, 1, 4, 5) + OSPO_SHUFFLE(a, b, 2, 3, 6, 7);
    const Vec4 cd = OSPO_SHUFFLE(c, d, 0, 1, 4, 5) + OSPO_SHUFFLE(c, d, 2, 3, 6, 7);
    return OSPO_SHUFFLE(ab, cd, 0, 2, 4, 6) + OSPO_SHUFFLE(ab, cd, 1, 3, 5, 7);
}

// exp to about one ULP over the whole range of float: subnormal below -87.3, 0 below -104, infinite above 88.72, NaN for
// NaN.
static OSPO_INLINE Vec exp(Vec x) {
    x = x < -105.0f ? Vec{} - 105.0f : x > 90.0f ? Vec{} + 90.0f : x;
    const Vec scaled = x * 1.44269504f;
    const IntVec n = __builtin_convertvector(scaled + (scaled > 0.0f ? Vec{} + 0.5f : Vec{} - 0.5f), IntVec);
    const Vec whole = __builtin_convertvector(n, Vec);
    const Vec r = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;  // ln 2 in two parts; the first product is exact
    Vec p = Vec{} + 1.0f / 5040;  // Taylor series; |r| <= ln 2 / 2
    p = p * r + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    // 2^n in two factors, because it may be subnormal or beyond the largest float where the product is not.
    const IntVec half = n >> 1, first = (half + 127) << 23, second = (n - half + 127) << 23;
    Vec factor, other;
    std::memcpy(&factor, &first, sizeof factor);
    std::memcpy(&other, &second, sizeof other);
    return p * factor * other;
}

}  // namespace ospo

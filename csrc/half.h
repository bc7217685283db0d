// Conversions between float and the 16-bit floating-point types on the CPU, for token_logprobs.cpp and scale_rows.cpp.
#pragma once

#include <cstdint>
#include <cstring>

#include "common.h"

namespace ospo {

template <typename To, typename From>
OSPO_INLINE To bits(From from) {
    static_assert(sizeof(To) == sizeof(From), "bits keeps the size");
    To to;
    std::memcpy(&to, &from, sizeof(to));
    return to;
}

struct Half {
    uint16_t raw;
};
struct BFloat {
    uint16_t raw;
};

OSPO_INLINE float widen(float value) { return value; }
OSPO_INLINE float widen(BFloat value) { return bits<float>(uint32_t{value.raw} << 16); }
OSPO_INLINE float widen(Half value) {
    const uint32_t size = uint32_t{value.raw & 0x7FFFu} << 13, sign = uint32_t{value.raw & 0x8000u} << 16;
    const float scaled = bits<float>(size) * 0x1p112f;  // corrects the bias of the exponent and normalizes subnormals
    return bits<float>((size >= 0x0F800000u ? size | 0x7F800000u : bits<uint32_t>(scaled)) | sign);
}

// Round to nearest, ties to even.
OSPO_INLINE void narrow(float value, float& out) { out = value; }
OSPO_INLINE void narrow(float value, BFloat& out) {
    const uint32_t u = bits<uint32_t>(value);
    const uint32_t rounded = (u + 0x7FFFu + ((u >> 16) & 1u)) >> 16;
    out.raw = static_cast<uint16_t>((u & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC0u : rounded);
}
OSPO_INLINE void narrow(float value, Half& out) {
    const uint32_t u = bits<uint32_t>(value), size = u & 0x7FFFFFFFu, sign = (u >> 16) & 0x8000u;
    const uint32_t normal = (size - 0x38000000u + 0xFFFu + ((size >> 13) & 1u)) >> 13;
    // The spacing of floats just above 1/2 is 2^-24, which is that of Half's subnormals.
    const uint32_t subnormal = bits<uint32_t>(bits<float>(size) + 0.5f) - 0x3F000000u;
    const uint32_t finite = size < 0x38800000u ? subnormal : normal;
    const uint32_t large = size > 0x7F800000u ? 0x7E00u : 0x7C00u;
    out.raw = static_cast<uint16_t>((size >= 0x477FF000u ? large : finite) | sign);
}

// to = factor · from; they may be the same array.
template <typename From, typename To>
OSPO_INLINE void scale(const From* from, float factor, To* to, int64_t n) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) narrow(widen(from[i]) * factor, to[i]);
}

// Call run(value) with a value of the C++ type of a dtype.
template <typename Run>
OSPO_INLINE auto with_type(Dtype dtype, Run run) {
    if (dtype == Dtype::float32) return run(float{});
    if (dtype == Dtype::float16) return run(Half{});
    return run(BFloat{});
}

inline int64_t size_of(Dtype dtype) { return dtype == Dtype::float32 ? 4 : 2; }

}  // namespace ospo

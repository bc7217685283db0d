// The softmax step of token_logprobs between its GEMMs, in place on the logits, and the row scale of its backward. Each
// row is one thread's, so that results do not depend on the number of threads.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "common.h"

#define OSPO_INLINE inline __attribute__((always_inline))

namespace ospo {
namespace {

template <typename To, typename From>
OSPO_INLINE To bits(From from) {
    static_assert(sizeof(To) == sizeof(From), "bits keeps the size");
    To to;
    std::memcpy(&to, &from, sizeof(to));
    return to;
}

// e^x for x <= 0 with a relative error below 2e-7: x = n·ln 2 + r, a polynomial of degree 6 in r (relative error 2e-9 on
// |r| <= ln 2 / 2), a power of two from its bits: 0 from -88 downwards, NaN for NaN.
OSPO_INLINE float exp_negative(float x) {
    x = x < -88.0f ? -88.0f : x;
    const float shift = 12582912.0f;  // 1.5·2^23: adding it rounds to an integer, which then stands in the low bits
    const float shifted = x * 1.44269504f + shift;
    const float n = shifted - shift;
    const float r = (x - n * 0.693145752f) - n * 1.42860677e-6f;  // the first product is exact
    float p = 1.38367419e-3f;
    p = p * r + 8.37489849e-3f;
    p = p * r + 4.16682318e-2f;
    p = p * r + 1.66664192e-1f;
    p = p * r + 4.99999920e-1f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    const float power = bits<float>((bits<uint32_t>(shifted) + (127u - 0x4B400000u)) << 23);
    return p * power;
}

// Numbers of two bytes, as their bits.
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
    const float scaled = bits<float>(size) * 0x1p112f;  // corrects the exponent's bias, and makes subnormals normal
    return bits<float>((size >= 0x0F800000u ? size | 0x7F800000u : bits<uint32_t>(scaled)) | sign);
}

// Rounded to nearest, ties to even.
OSPO_INLINE void narrow(float value, float& out) { out = value; }
OSPO_INLINE void narrow(float value, BFloat& out) {
    const uint32_t u = bits<uint32_t>(value);
    const uint32_t rounded = (u + 0x7FFFu + ((u >> 16) & 1u)) >> 16;
    out.raw = static_cast<uint16_t>((u & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC0u : rounded);
}
OSPO_INLINE void narrow(float value, Half& out) {
    const uint32_t u = bits<uint32_t>(value), size = u & 0x7FFFFFFFu, sign = (u >> 16) & 0x8000u;
    const uint32_t normal = (size - 0x38000000u + 0xFFFu + ((size >> 13) & 1u)) >> 13;
    // Next to 1/2, float's spacing is 2^-24, that of Half's subnormals.
    const uint32_t subnormal = bits<uint32_t>(bits<float>(size) + 0.5f) - 0x3F000000u;
    const uint32_t finite = size < 0x38800000u ? subnormal : normal;
    const uint32_t large = size > 0x7F800000u ? 0x7E00u : 0x7C00u;
    out.raw = static_cast<uint16_t>((size >= 0x477FF000u ? large : finite) | sign);
}

// The loops over one row. ---------------------------------------------------------------------------------------------

// wide = row + bias; returns the largest. wide may be the row itself.
template <bool biased, typename T>
OSPO_INLINE float load(const T* row, const float* bias, float* wide, int64_t n) {
    float most = -INFINITY;
#pragma omp simd reduction(max : most)
    for (int64_t i = 0; i < n; ++i) {
        const float z = biased ? widen(row[i]) + bias[i] : widen(row[i]);
        wide[i] = z;
        most = z > most ? z : most;
    }
    return most;
}

// to = factor·from; they may be the same.
template <typename From, typename To>
OSPO_INLINE void scale(const From* from, float factor, To* to, int64_t n) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) narrow(widen(from[i]) * factor, to[i]);
}

// Calls run(type) with a value of the C++ type of a dtype.
template <typename Run>
OSPO_INLINE auto with_type(Dtype dtype, Run run) {
    if (dtype == Dtype::float32) return run(float{});
    if (dtype == Dtype::float16) return run(Half{});
    return run(BFloat{});
}

// The same, compiled for each kind of vector; in any of the dtypes; bias may be null. ---------------------------------

OSPO_CLONES float load_row(const void* row, Dtype dtype, const float* bias, float* wide, int64_t n) {
    return with_type(dtype, [&](auto type) __attribute__((always_inline)) {
        const auto* from = static_cast<const decltype(type)*>(row);
        return bias ? load<true>(from, bias, wide, n) : load<false>(from, bias, wide, n);
    });
}

// exp(z - most) in the place of each z; returns their sum.
OSPO_CLONES double exponentials(float* z, float most, int64_t n) {
    double total = 0.0;
    for (int64_t begin = 0; begin < n; begin += 1024) {  // no more than these are summed in fp32
        const int64_t end = std::min(n, begin + 1024);
        float part = 0.0f;
#pragma omp simd reduction(+ : part)
        for (int64_t i = begin; i < end; ++i) {
            z[i] = exp_negative(z[i] - most);
            part += z[i];
        }
        total += part;
    }
    return total;
}

OSPO_CLONES void store_row(const float* wide, float factor, void* row, Dtype dtype, int64_t n) {
    with_type(dtype, [&](auto type) __attribute__((always_inline)) {
        scale(wide, factor, static_cast<decltype(type)*>(row), n);
    });
}

OSPO_CLONES void scale_row(const void* from, float factor, void* to, Dtype dtype, int64_t n) {
    with_type(dtype, [&](auto type) __attribute__((always_inline)) {
        scale(static_cast<const decltype(type)*>(from), factor, static_cast<decltype(type)*>(to), n);
    });
}

void store(void* row, Dtype dtype, int64_t index, float value) {
    if (dtype == Dtype::float32) return narrow(value, static_cast<float*>(row)[index]);
    if (dtype == Dtype::float16) return narrow(value, static_cast<Half*>(row)[index]);
    narrow(value, static_cast<BFloat*>(row)[index]);
}

char* row_of(void* first, Dtype dtype, int64_t index, int64_t width) {
    return static_cast<char*>(first) + index * width * size_of(dtype);
}

const char* row_of(const void* first, Dtype dtype, int64_t index, int64_t width) {
    return static_cast<const char*>(first) + index * width * size_of(dtype);
}

}  // namespace

void token_logprobs(void* logits, Dtype dtype, const float* bias, const int64_t* labels, const float* scales,
                   float* logps, Dtype out, bool write, int64_t rows, int64_t codes, int threads) {
    const bool in_place = dtype == Dtype::float32 && out == Dtype::float32;
#pragma omp parallel num_threads(threads) if (threads > 1 && rows > 1)
    {
        std::vector<float> scratch(in_place ? 0 : codes);
#pragma omp for schedule(static)
        for (int64_t r = 0; r < rows; ++r) {
            char* const row = row_of(logits, dtype, r, codes);
            float* const wide = in_place ? reinterpret_cast<float*>(row) : scratch.data();
            const float most = load_row(row, dtype, bias, wide, codes);
            const double target = double{wide[labels[r]]} - most;
            const double total = exponentials(wide, most, codes);
            logps[r] = static_cast<float>(target - std::log(total));
            if (!write) continue;
            const double scale = scales ? scales[r] : 1.0;
            const double rest = total - wide[labels[r]];  // before the row is overwritten
            store_row(wide, static_cast<float>(-scale / total), row, out, codes);
            store(row, out, labels[r], static_cast<float>(scale * rest / total));
        }
    }
    (void)threads;
}

void scale_rows(const void* dhidden, const int64_t* packed_row, const float* scales, void* out, Dtype dtype,
                int64_t rows, int64_t width, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && rows > 1)
    for (int64_t r = 0; r < rows; ++r) {
        char* const to = row_of(out, dtype, r, width);
        if (packed_row[r] < 0 || scales[r] == 0.0f) {
            std::memset(to, 0, width * size_of(dtype));  // a row without a gradient is zero, NaN or not
        } else {
            scale_row(row_of(dhidden, dtype, packed_row[r], width), scales[r], to, dtype, width);
        }
    }
    (void)threads;
}

}  // namespace ospo

// The softmax step of token_logprobs between its GEMMs, in place on the logits. One thread computes a whole row, so
// results do not depend on the number of threads.
#include <algorithm>
#include <cmath>
#include <vector>

#include "common.h"
#include "half.h"

namespace ospo {
namespace {

// e^x for x <= 0 with a relative error below 2e-7: x = n·ln 2 + r, a polynomial of degree 6 in r (relative error 2e-9
// for |r| <= ln 2 / 2) and 2^n from its bits. 0 from -88 downwards, NaN for NaN.
OSPO_INLINE float exp_negative(float x) {
    x = x < -88.0f ? -88.0f : x;
    const float shift = 12582912.0f;  // adding 1.5·2^23 rounds to an integer, which is then in the low bits
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

// logits = row + bias; returns the maximum. logits may be the row itself.
template <bool biased, typename T>
OSPO_INLINE float load(const T* row, const float* bias, float* logits, int64_t n) {
    float max = -INFINITY;
#pragma omp simd reduction(max : max)
    for (int64_t i = 0; i < n; ++i) {
        const float z = biased ? widen(row[i]) + bias[i] : widen(row[i]);
        logits[i] = z;
        max = z > max ? z : max;
    }
    return max;
}

OSPO_CLONES float load_row(const void* row, Dtype dtype, const float* bias, float* logits, int64_t n) {
    return with_type(dtype, [&](auto type) __attribute__((always_inline)) {
        const auto* from = static_cast<const decltype(type)*>(row);
        return bias ? load<true>(from, bias, logits, n) : load<false>(from, bias, logits, n);
    });
}

// z = exp(z − max), in place; returns their sum.
OSPO_CLONES double exponentials(float* z, float max, int64_t n) {
    double total = 0.0;
    for (int64_t begin = 0; begin < n; begin += 1024) {  // at most 1024 terms are summed in fp32
        const int64_t end = std::min(n, begin + 1024);
        float part = 0.0f;
#pragma omp simd reduction(+ : part)
        for (int64_t i = begin; i < end; ++i) {
            z[i] = exp_negative(z[i] - max);
            part += z[i];
        }
        total += part;
    }
    return total;
}

OSPO_CLONES void store_row(const float* values, float factor, void* row, Dtype dtype, int64_t n) {
    with_type(dtype, [&](auto type) __attribute__((always_inline)) {
        scale(values, factor, static_cast<decltype(type)*>(row), n);
    });
}

void store(void* row, Dtype dtype, int64_t index, float value) {
    with_type(dtype, [&](auto type) { narrow(value, static_cast<decltype(type)*>(row)[index]); });
}

}  // namespace

void token_logprobs(void* logits, Dtype dtype, const float* bias, const int64_t* labels, const float* scales,
                    float* logps, Dtype out_dtype, bool write, int64_t rows, int64_t codes, int threads) {
    const bool in_place = dtype == Dtype::float32 && out_dtype == Dtype::float32;
#pragma omp parallel num_threads(threads) if (threads > 1 && rows > 1)
    {
        std::vector<float> scratch(in_place ? 0 : codes);
#pragma omp for schedule(static)
        for (int64_t r = 0; r < rows; ++r) {
            char* const row = static_cast<char*>(logits) + r * codes * size_of(dtype);
            float* const values = in_place ? reinterpret_cast<float*>(row) : scratch.data();
            const float max = load_row(row, dtype, bias, values, codes);
            const double target = double{values[labels[r]]} - max;
            const double total = exponentials(values, max, codes);
            logps[r] = static_cast<float>(target - std::log(total));
            if (!write) continue;
            const double scale = scales ? scales[r] : 1.0;
            const double others = total - values[labels[r]];  // before store_row overwrites it
            store_row(values, static_cast<float>(-scale / total), row, out_dtype, codes);
            store(row, out_dtype, labels[r], static_cast<float>(scale * others / total));
        }
    }
    (void)threads;
}

}  // namespace ospo

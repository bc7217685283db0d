// The softmax step of token_logprobs between its GEMMs. One thread computes a whole row, so results do not depend on the
// number of threads.
#include <algorithm>
#include <cmath>

#include "common.h"
#include "half.h"
#include "parallel.h"

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

// The general step, with temperature, soft-cap, entropy or the statistics of a part of the codes. The plain step above
// keeps its own code, because its values are fewer operations away from the logits and must not change.

// Scores are s = factor · u with u = tanh(logit / cap) and factor = cap / temperature, or u = logit and factor =
// 1 / temperature without a cap. Differences of scores are taken between u, where they are nearly exact.

// u = tanh(u / cap) and slope = 1 − tanh², both with relative errors of a few roundings: below 0.625 by an odd
// polynomial (Cephes), above by e = exp(−2|x|), where 1 − tanh² = 4·e / (1 + e)² does not cancel. Returns max u.
OSPO_CLONES float cap_row(float* u, float* slope, float cap, int64_t n) {
    const float inverse_cap = 1.0f / cap;
    float max = -INFINITY;
#pragma omp simd reduction(max : max)
    for (int64_t i = 0; i < n; ++i) {
        const float x = u[i] * inverse_cap, size = std::fabs(x), square = x * x;
        float p = -5.70498872745e-3f;
        p = p * square + 2.06390887954e-2f;
        p = p * square - 5.37397155531e-2f;
        p = p * square + 1.33314422036e-1f;
        p = p * square - 3.33332819422e-1f;
        const float small = p * square * x + x;
        const float e = exp_negative(-2.0f * size), inverse = 1.0f / (1.0f + e);
        const float large = std::copysign((1.0f - e) * inverse, x);
        const float t = size < 0.625f ? small : large;
        slope[i] = size < 0.625f ? 1.0f - small * small : 4.0f * e * inverse * inverse;
        u[i] = t;
        max = t > max ? t : max;
    }
    return max;
}

// s − max s, but not below the argument where exp_negative is 0, so that 0 · (s − max s) of a masked code is not NaN.
OSPO_INLINE float below_max(float u, float max, float factor) {
    const float difference = factor * (u - max);
    return difference < -88.0f ? -88.0f : difference;
}

struct Sums {
    double exponentials, weighted;  // Σ e and Σ e · (s − max s), where e = exp(s − max s)
};

OSPO_CLONES Sums sum_row(const float* u, float max, float factor, float* exponentials, int64_t n) {
    Sums sums{0.0, 0.0};
    max = max == -INFINITY ? 0.0f : max;  // sums of a row with only -inf are 0: NaN is left to rows that hold NaN
    for (int64_t begin = 0; begin < n; begin += 1024) {  // at most 1024 terms are summed in fp32
        const int64_t end = std::min(n, begin + 1024);
        float part = 0.0f, weighted = 0.0f;
#pragma omp simd reduction(+ : part, weighted)
        for (int64_t i = begin; i < end; ++i) {
            const float difference = below_max(u[i], max, factor);
            const float e = exp_negative(difference);
            exponentials[i] = e;
            part += e;
            weighted += e * difference;
        }
        sums.exponentials += part;
        sums.weighted += weighted;
    }
    return sums;
}

// row = −e / total · (other + entropy_scale · (s − max s)) · ∂s/∂logit, with ∂s/∂logit = slope / temperature; a null
// slope is 1.
template <typename T>
OSPO_INLINE void write_gradient(const float* u, const float* exponentials, const float* slope, float max, float factor,
                                float scale, float other, float entropy_scale, T* row, int64_t n) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
        const float weight = other + entropy_scale * below_max(u[i], max, factor);
        const float gradient = exponentials[i] * scale * weight;
        narrow(slope ? gradient * slope[i] : gradient, row[i]);
    }
}

OSPO_CLONES void write_gradient_row(const float* u, const float* exponentials, const float* slope, float max,
                                    float factor, float scale, float other, float entropy_scale, void* row, Dtype dtype,
                                    int64_t n) {
    with_type(dtype, [&](auto type) __attribute__((always_inline)) {
        auto* const to = static_cast<decltype(type)*>(row);
        if (slope) write_gradient(u, exponentials, slope, max, factor, scale, other, entropy_scale, to, n);
        else write_gradient(u, exponentials, nullptr, max, factor, scale, other, entropy_scale, to, n);
    });
}

}  // namespace

int64_t count_labels(const int64_t* labels, int64_t rows, int64_t ignore_index, int64_t codes) {
    checked_product("count_labels: rows", {rows});
    int64_t count = 0;
    for (int64_t r = 0; r < rows; ++r) {
        if (labels[r] == ignore_index) continue;
        if (labels[r] < 0 || labels[r] >= codes) return -1;
        ++count;
    }
    return count;
}

void token_logprobs(const void* logits, Dtype dtype, const float* bias, const int64_t* labels,
                    float inverse_temperature, float softcap, const float* scales, const float* others,
                    const float* entropy_scales, float* logps, float* entropies, float* statistics, void* out,
                    Dtype out_dtype, int64_t rows, int64_t codes, int threads) {
    const bool plain = inverse_temperature == 1.0f && softcap == 0.0f && !others && !entropy_scales && !entropies &&
                       !statistics;
    // Exponentials that become gradients of the same dtype are written where the gradients will be.
    const bool in_place = plain && out && dtype == Dtype::float32 && out_dtype == Dtype::float32;
    const bool capped = softcap > 0.0f;
    const float factor = capped ? softcap * inverse_temperature : inverse_temperature;
    checked_product("token_logprobs: rows x codes", {rows, codes});
    for (int64_t r = 0; r < rows; ++r) check_range("token_logprobs: labels", labels[r], plain ? 0 : -1, codes - 1);
    const int team = team_size(threads, rows);
    const ThreadScratch<float> scratch("token_logprobs: codes", team,
                                       in_place ? 0 : plain ? codes : capped ? 3 * codes : 2 * codes);
#pragma omp parallel num_threads(team)
    {
#pragma omp for schedule(static)
        for (int64_t r = 0; r < rows; ++r) {
            const char* const row = static_cast<const char*>(logits) + r * codes * size_of(dtype);
            void* const target_row = out ? static_cast<char*>(out) + r * codes * size_of(dtype) : nullptr;
            const int64_t label = labels[r];
            if (plain) {
                float* const values = in_place ? static_cast<float*>(target_row) : scratch.get();
                const float max = load_row(row, dtype, bias, values, codes);
                const double target = double{values[label]} - max;
                const double total = exponentials(values, max, codes);
                if (logps) logps[r] = static_cast<float>(target - std::log(total));
                if (!out) continue;
                const double scale = scales ? scales[r] : 1.0;
                const double other = total - values[label];  // before store_row overwrites it
                store_row(values, static_cast<float>(-scale / total), target_row, out_dtype, codes);
                store(target_row, out_dtype, label, static_cast<float>(scale * other / total));
                continue;
            }
            float* const u = scratch.get();
            float* const exps = u + codes;
            float* const slope = capped ? exps + codes : nullptr;
            float max = load_row(row, dtype, bias, u, codes);
            if (capped) max = cap_row(u, slope, softcap, codes);
            const Sums sums = sum_row(u, max, factor, exps, codes);
            const double total = sums.exponentials, log_total = std::log(total);
            const double entropy = log_total - sums.weighted / total;
            const float own = label < 0 ? max : u[label];
            if (statistics) {
                // The maximum ignores NaN. Other processes must not: for them this part would be a negligible one.
                const bool has_nan = std::isnan(total) && max < INFINITY;
                const float found[] = {has_nan ? NAN : factor * max, static_cast<float>(total),
                                       static_cast<float>(sums.weighted), label < 0 ? 0.0f : factor * own};
                std::copy(found, found + 4, statistics + 4 * r);
            }
            if (logps) logps[r] = static_cast<float>(double{factor} * (own - max) - log_total);
            if (entropies) entropies[r] = static_cast<float>(entropy);
            if (!out) continue;
            const double scale = scales ? scales[r] : 1.0, entropy_scale = entropy_scales ? entropy_scales[r] : 0.0;
            const double other = others ? others[r] : scale + entropy_scale * (entropy - log_total);
            if (!slope && entropy_scale == 0.0) {  // as in the plain step
                store_row(exps, static_cast<float>(-inverse_temperature * other / total), target_row, out_dtype, codes);
            } else {
                write_gradient_row(u, exps, slope, max, factor, static_cast<float>(-inverse_temperature / total),
                                   static_cast<float>(other), static_cast<float>(entropy_scale), target_row, out_dtype,
                                   codes);
            }
            if (label < 0) continue;
            // scale − p · (other + …), where 1 − p is summed without cancellation.
            const double p = exps[label] / total, rest = (total - exps[label]) / total;
            const double gradient = scale * rest - p * (other - scale + entropy_scale * below_max(own, max, factor));
            const double derivative = capped ? inverse_temperature * slope[label] : inverse_temperature;
            store(target_row, out_dtype, label, static_cast<float>(gradient * derivative));
        }
    }
}

}  // namespace ospo

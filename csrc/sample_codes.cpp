// Guidance, temperature, truncation and Gumbel-max sampling. A row of logits is read once. Truncation finds its cuts by
// radix selection among the keys of the logits, without a sort.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "common.h"
#include "parallel.h"
#include "sampling.h"

namespace ospo {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

OSPO_INLINE float guided(const float* cond, const float* uncond, float guidance, int64_t v) {
    return uncond ? uncond[v] + guidance * (cond[v] - uncond[v]) : cond[v];
}

// The code with the highest score so far, -1 before the first. Codes are offered in ascending order.
struct Best {
    int64_t code = -1;
    double score = -std::numeric_limits<double>::infinity();

    void offer(int64_t v, double z, uint32_t word) {
        if (z + gumbel_bound(word) > score) offer(v, z + gumbel(word));
    }
    void offer(int64_t v, double new_score) {
        if (new_score > score) {
            score = new_score;
            code = v;
        }
    }
};

// The sampled code, or -1 for a row with NaN, +inf or only -inf.
int64_t sample(const float* cond, const float* uncond, int64_t codes, float guidance, float temperature, uint64_t seed,
               uint64_t step) {
    Best best;
    PhiloxWords random{};
    for (int64_t v = 0; v < codes; ++v) {
        float z = guided(cond, uncond, guidance, v);
        if (temperature != 0.0f) z /= temperature;
        if (std::isnan(z) || z == kInfinity) return -1;
        if (temperature == 0.0f) {
            best.offer(v, z);
            continue;
        }
        if (v % 4 == 0) random = philox(seed, static_cast<uint32_t>(v / 4), step);
        best.offer(v, z, random.word[v % 4]);
    }
    return best.code;
}

// Buffers for the truncation of one row. A thread reuses them for all its rows.
struct Workspace {
    uint32_t* keys;     // (codes) of all codes, then of the candidates
    uint32_t* codes;    // (codes) the candidates, ascending
    uint64_t* sums;     // (kDigits)
    uint64_t* weights;  // (codes), only for top_p
};

constexpr int64_t kDigits = 2048;  // values of one radix digit of a key

// Fill the keys of a row and return the largest; 0, which is no number's key, if the row holds NaN or +inf.
OSPO_CLONES uint32_t compute_keys(const float* cond, const float* uncond, int64_t codes, float guidance,
                                  float temperature, uint32_t* keys) {
    uint32_t max = 0, invalid = 0;
    for (int64_t v = 0; v < codes; ++v) {
        const float z = guided(cond, uncond, guidance, v) / temperature;
        invalid |= !(z < kInfinity);
        keys[v] = key_of(z);
        max = std::max(max, keys[v]);
    }
    return invalid ? 0 : max;
}

// Weights exp(z − max) in units of 2^-40, with the bits of `_weights` in ospo_fast/ops/sample_codes.py.
OSPO_CLONES void compute_weights(const uint32_t* keys, int64_t count, double max, uint64_t* weights) {
    for (int64_t i = 0; i < count; ++i) {
        double x = logit_of(keys[i]) - max;
        x = x < -30.0 ? -30.0 : x;
        const double t = x * 1.4426950408889634, rounded = t + 0x1.8p52;  // its last bits are the integer n = rint(t)
        const double r = (t - (rounded - 0x1.8p52)) * 0.6931471805599453;
        double p = 1.0 / 39916800;
        p = p * r + 1.0 / 3628800;
        p = p * r + 1.0 / 362880;
        p = p * r + 1.0 / 40320;
        p = p * r + 1.0 / 5040;
        p = p * r + 1.0 / 720;
        p = p * r + 1.0 / 120;
        p = p * r + 1.0 / 24;
        p = p * r + 1.0 / 6;
        p = p * r + 0.5;
        p = p * r + 1.0;
        p = p * r + 1.0;
        uint64_t n, sum;
        std::memcpy(&n, &rounded, sizeof n);
        n = (n + 1023 + 40) << 52;
        double scale;  // 2^(n + 40)
        std::memcpy(&scale, &n, sizeof scale);
        const double shifted = p * scale + 0x1p52;
        std::memcpy(&sum, &shifted, sizeof sum);
        weights[i] = sum & 0xFFFFFFFFFFFFF;
    }
}

struct Cut {
    uint32_t key;      // the largest key for which the entries from it on weigh at least `need`
    uint64_t missing;  // `need` minus the weight of the entries above it
};

// Radix selection, 11 bits of the keys per pass. Without weights each entry weighs 1. 0 < need <= sum of the weights.
Cut find_cut(const uint32_t* keys, const uint64_t* weights, int64_t count, uint64_t need, uint64_t* sums) {
    uint32_t prefix = 0;
    for (int shift = 22; shift >= 0; shift -= 11) {
        std::fill_n(sums, kDigits, 0);
        for (int64_t i = 0; i < count; ++i) {
            if (uint64_t{keys[i] ^ prefix} >> (shift + 11)) continue;
            sums[(keys[i] >> shift) & (kDigits - 1)] += weights ? weights[i] : 1;
        }
        uint32_t digit = kDigits - 1;
        for (; sums[digit] < need; --digit) need -= sums[digit];
        prefix |= digit << shift;
    }
    return {prefix, need};
}

// The codes that top_k and top_p keep are among `count` candidates: those above the cut, and the first ones with its key.
struct Kept {
    int64_t count;  // 0 for a row with NaN, +inf or only -inf
    Cut cut;
    uint64_t ties;
    uint32_t max;  // the largest key

    // Call function(code, key) for each code that is kept, in ascending order.
    template <typename F>
    OSPO_INLINE void each(const Workspace& space, F function) const {
        uint64_t left = ties;
        for (int64_t i = 0; i < count; ++i) {
            const uint32_t key = space.keys[i];
            if (key < cut.key) continue;
            if (key == cut.key) {
                if (left == 0) continue;
                --left;
            }
            function(space.codes[i], key);
        }
    }
};

Kept truncate(const float* cond, const float* uncond, int64_t codes, float guidance, float temperature, int64_t top_k,
              double top_p, const Workspace& space) {
    uint32_t *const keys = space.keys, *const candidates = space.codes;
    const uint32_t max = compute_keys(cond, uncond, codes, guidance, temperature, keys);
    if (max <= key_of(-kInfinity)) return {0, {0, 0}, 0, max};
    uint32_t min = 0;
    if (top_k > 0 && top_k < codes) min = find_cut(keys, nullptr, codes, top_k, space.sums).key;
    if (top_p < 1) min = std::max(min, key_of(logit_of(max) - 30.0f));  // smaller logits have weight 0
    int64_t count = 0;
    for (int64_t v = 0; v < codes; ++v) {  // compacts without a branch: an entry that is not kept is overwritten
        const uint32_t key = keys[v];
        candidates[count] = static_cast<uint32_t>(v);
        keys[count] = key;
        count += key >= min;
    }
    Cut cut{0, 0};
    uint64_t ties = 0;  // how many codes with the key of the cut stay: the first ones
    if (top_p < 1) {
        uint64_t* const weights = space.weights;
        compute_weights(keys, count, logit_of(max), weights);
        uint64_t sum = 0, weight = 0;
        for (int64_t i = 0; i < count; ++i) sum += weights[i];
        const uint64_t need = std::min(sum, static_cast<uint64_t>(std::ceil(top_p * static_cast<double>(sum))));
        cut = find_cut(keys, weights, count, need, space.sums);
        compute_weights(&cut.key, 1, logit_of(max), &weight);
        ties = (cut.missing + weight - 1) / weight;
    }
    return {count, cut, ties, max};
}

// `sample` from the codes that top_k and top_p keep. Writes the log-probability of the code among them to logp, unless
// that is null; NaN for an invalid row.
int64_t sample_truncated(const float* cond, const float* uncond, int64_t codes, float guidance, float temperature,
                         int64_t top_k, double top_p, uint64_t seed, uint64_t step, float* logp,
                         const Workspace& space) {
    const Kept kept = truncate(cond, uncond, codes, guidance, temperature, top_k, top_p, space);
    Best best;
    PhiloxWords random{};
    uint32_t block = ~0u;
    kept.each(space, [&](uint32_t code, uint32_t key) {
        if (code / 4 != block) {
            block = code / 4;
            random = philox(seed, block, step);
        }
        best.offer(code, logit_of(key), random.word[code % 4]);
    });
    if (logp) {
        double total = 0, own = NAN;
        kept.each(space, [&](uint32_t code, uint32_t key) {
            const double below = double{logit_of(key)} - logit_of(kept.max);
            total += std::exp(below);
            if (code == best.code) own = below;
        });
        *logp = static_cast<float>(own - std::log(total));
    }
    return best.code;
}

}  // namespace

int64_t sample_codes(const float* cond, const float* uncond, const int64_t* seeds, const int64_t* steps,
                     int64_t* tokens, int64_t token_stride, int64_t token_columns, int64_t* current,
                     int64_t* error_steps, int64_t rows, int64_t codes, float guidance, float temperature,
                     int64_t top_k, double top_p, float* logps, int threads) {
    checked_product("sample_codes: rows x codes", {rows, codes});
    check_range("sample_codes: codes", codes, 1, UINT32_MAX);  // candidates are numbers of 32 bits
    check_range("sample_codes: top_k", top_k, 0);
    check_range("sample_codes: token_columns", token_columns, 0);
    for (int64_t row = 0; tokens && row < rows; ++row) {
        check_range("sample_codes: steps", steps[row], 0, token_columns - 1);
    }
    const bool truncated = temperature != 0.0f && ((top_k > 0 && top_k < codes) || top_p < 1);
    const int team = team_size(threads, rows);
    const ThreadScratch<uint32_t> keys("sample_codes: codes", team, truncated ? 2 * codes : 0);
    const ThreadScratch<uint64_t> sums("sample_codes: codes", team, truncated ? kDigits + (top_p < 1 ? codes : 0) : 0);
    int64_t invalid = 0;
#pragma omp parallel num_threads(team) reduction(+ : invalid)
    {
        const Workspace space{keys.get(), keys.get() + codes, sums.get(), sums.get() + kDigits};
#pragma omp for schedule(static)
        for (int64_t row = 0; row < rows; ++row) {
            const float* const c = cond + row * codes;
            const float* const u = uncond ? uncond + row * codes : nullptr;
            const uint64_t seed = static_cast<uint64_t>(seeds[row]), step = static_cast<uint64_t>(steps[row]);
            const int64_t code =
                truncated ? sample_truncated(c, u, codes, guidance, temperature, top_k, top_p, seed, step,
                                             logps ? logps + row : nullptr, space)
                          : sample(c, u, codes, guidance, temperature, seed, step);
            invalid += code < 0;
            if (code < 0 && error_steps[row] < 0) error_steps[row] = steps[row];
            current[row] = std::max<int64_t>(code, 0);
            if (tokens) tokens[row * token_stride + steps[row]] = current[row];
        }
    }
    return invalid;
}

}  // namespace ospo

// Guidance, temperature, truncation and Gumbel-max sampling, with the random bits of ospo_fast/ops/sample_codes.py:
// Philox4x32-10 keyed by the seed, counted by (code / 4, step). A row is read once; truncation selects by radix among
// its keys, integers in the order of the logits, without a sort.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "common.h"

namespace ospo {
namespace {

struct Words {
    uint32_t word[4];
};

Words philox(uint64_t seed, uint32_t block, uint64_t step) {
    uint32_t c0 = block, c1 = static_cast<uint32_t>(step), c2 = static_cast<uint32_t>(step >> 32), c3 = 0;
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < 10; ++round) {
        const uint64_t low = uint64_t{0xD2511F53} * c0, high = uint64_t{0xCD9E8D57} * c2;
        c0 = static_cast<uint32_t>(high >> 32) ^ c1 ^ k0;
        c1 = static_cast<uint32_t>(high);
        c2 = static_cast<uint32_t>(low >> 32) ^ c3 ^ k1;
        c3 = static_cast<uint32_t>(low);
        k0 += 0x9E3779B9;
        k1 += 0xBB67AE85;
    }
    return {{c0, c1, c2, c3}};
}

double gumbel(uint32_t word) { return -std::log(-std::log((word + 0.5) * 0x1p-32)); }

// At least the noise of this word, without a logarithm: -log(-log u) <= -log(1 - u), and 1 - u = (~word + 0.5) / 2^32.
double gumbel_bound(uint32_t word) {
    const int bits = word == 0xFFFFFFFF ? 0 : 32 - __builtin_clz(~word);
    return (33 - bits) * 0.6931471805599454 + 1e-12;
}

// The code of the highest score so far, -1 where there is none; codes are offered in ascending order.
struct Best {
    int64_t code = -1;
    double score = -std::numeric_limits<double>::infinity();

    void offer(int64_t v, double z, uint32_t word) {
        if (z + gumbel_bound(word) <= score) return;  // spares most codes the logarithms
        offer(v, z + gumbel(word));
    }
    void offer(int64_t v, double scored) {
        if (scored > score) {
            score = scored;
            code = v;
        }
    }
};

// The drawn code, or -1 for a row with NaN, +inf or nothing but -inf.
int64_t sample(const float* cond, const float* uncond, int64_t codes, float guidance, float temperature, uint64_t seed,
               uint64_t step) {
    Best best;
    Words random{};
    for (int64_t v = 0; v < codes; ++v) {
        const float z = uncond ? uncond[v] + guidance * (cond[v] - uncond[v]) : cond[v];
        if (std::isnan(z) || z == std::numeric_limits<float>::infinity()) return -1;
        if (temperature == 0.0f) {
            best.offer(v, z);
            continue;
        }
        if (v % 4 == 0) random = philox(seed, static_cast<uint32_t>(v / 4), step);
        best.offer(v, z / temperature, random.word[v % 4]);
    }
    return best.code;
}

// ---------------------------------------------------------------- truncation

uint32_t key_of(float z) {
    z += 0.0f;  // -0 is 0
    uint32_t bits;
    std::memcpy(&bits, &z, sizeof bits);
    return bits ^ (static_cast<uint32_t>(static_cast<int32_t>(bits) >> 31) | 0x80000000u);
}

float logit_of(uint32_t key) {
    const uint32_t bits = key ^ (static_cast<uint32_t>(static_cast<int32_t>(~key) >> 31) | 0x80000000u);
    float z;
    std::memcpy(&z, &bits, sizeof z);
    return z;
}

// What truncating one row needs, kept from row to row.
struct Scratch {
    std::vector<uint32_t> keys;   // of all codes, then of those that may be kept
    std::vector<uint32_t> codes;  // those that may be kept, ascending
    std::vector<uint64_t> weights;
    std::vector<uint64_t> sums;
};

// The keys of a row, and the largest one; 0, which is no number's, where the row holds NaN or +inf.
OSPO_CLONES uint32_t make_keys(const float* cond, const float* uncond, int64_t codes, float guidance,
                               float temperature, uint32_t* keys) {
    uint32_t most = 0, wrong = 0;
    for (int64_t v = 0; v < codes; ++v) {
        float z = uncond ? uncond[v] + guidance * (cond[v] - uncond[v]) : cond[v];
        z /= temperature;
        wrong |= !(z < std::numeric_limits<float>::infinity());
        keys[v] = key_of(z);
        most = std::max(most, keys[v]);
    }
    return wrong ? 0 : most;
}

// Weights exp(z - most) in units of 2^-40, as `_weights` in ospo_fast/ops/sample_codes.py computes them.
OSPO_CLONES void weigh(const uint32_t* keys, int64_t count, double most, uint64_t* weights) {
    for (int64_t i = 0; i < count; ++i) {
        double x = logit_of(keys[i]) - most;
        x = x < -30.0 ? -30.0 : x;
        const double t = x * 1.4426950408889634, rounded = t + 0x1.8p52;  // whose last bits are the integer n = rint(t)
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
    uint32_t key;      // the largest one at which the weights of the entries from it on reach what was needed
    uint64_t missing;  // what those above it lack
};

// Radix selection, 11 bits of the keys after the others; weights null: 1 each. 0 < need <= the sum of the weights.
Cut find_cut(const uint32_t* keys, const uint64_t* weights, int64_t count, uint64_t need, std::vector<uint64_t>& sums) {
    uint32_t prefix = 0;
    for (int shift = 22; shift >= 0; shift -= 11) {
        sums.assign(2048, 0);
        for (int64_t i = 0; i < count; ++i) {
            if (uint64_t{keys[i] ^ prefix} >> (shift + 11)) continue;
            sums[(keys[i] >> shift) & 2047] += weights ? weights[i] : 1;
        }
        uint32_t digit = 2047;
        for (; sums[digit] < need; --digit) need -= sums[digit];
        prefix |= digit << shift;
    }
    return {prefix, need};
}

// As `sample`, from the codes that truncation leaves.
int64_t sample_truncated(const float* cond, const float* uncond, int64_t codes, float guidance, float temperature,
                         int64_t top_k, double top_p, uint64_t seed, uint64_t step, Scratch& scratch) {
    scratch.keys.resize(codes);
    scratch.codes.resize(codes);
    uint32_t* const keys = scratch.keys.data();
    uint32_t* const left = scratch.codes.data();
    const uint32_t most = make_keys(cond, uncond, codes, guidance, temperature, keys);
    if (most <= key_of(-std::numeric_limits<float>::infinity())) return -1;
    uint32_t least = 0;
    if (top_k > 0 && top_k < codes) least = find_cut(keys, nullptr, codes, top_k, scratch.sums).key;
    if (top_p < 1) least = std::max(least, key_of(logit_of(most) - 30.0f));  // others weigh nothing
    int64_t count = 0;
    for (int64_t v = 0; v < codes; ++v) {
        const uint32_t key = keys[v];
        left[count] = static_cast<uint32_t>(v);
        keys[count] = key;
        count += key >= least;
    }
    Cut cut{0, 0};
    uint64_t ties = 0;  // of the codes with the key of the cut, the first ones stay
    if (top_p < 1) {
        scratch.weights.resize(codes);
        uint64_t* const weights = scratch.weights.data();
        weigh(keys, count, logit_of(most), weights);
        uint64_t sum = 0, weight = 0;
        for (int64_t i = 0; i < count; ++i) sum += weights[i];
        const uint64_t need = std::min(sum, static_cast<uint64_t>(std::ceil(top_p * static_cast<double>(sum))));
        cut = find_cut(keys, weights, count, need, scratch.sums);
        weigh(&cut.key, 1, logit_of(most), &weight);
        ties = (cut.missing + weight - 1) / weight;
    }
    Best best;
    Words random{};
    uint32_t block = ~0u;
    for (int64_t i = 0; i < count; ++i) {
        if (keys[i] < cut.key) continue;
        if (keys[i] == cut.key) {
            if (ties == 0) continue;
            --ties;
        }
        if (left[i] / 4 != block) {
            block = left[i] / 4;
            random = philox(seed, block, step);
        }
        best.offer(left[i], logit_of(keys[i]), random.word[left[i] % 4]);
    }
    return best.code;
}

}  // namespace

void draw_codes(const float* cond, const float* uncond, const int64_t* seeds, const int64_t* steps, int64_t* tokens,
                int64_t token_stride, int64_t* current, int64_t* bad, int64_t rows, int64_t codes, float guidance,
                float temperature, int64_t top_k, double top_p, int threads) {
    const bool truncated = temperature != 0.0f && ((top_k > 0 && top_k < codes) || top_p < 1);
#pragma omp parallel num_threads(threads) if (threads > 1 && rows > 1)
    {
        Scratch scratch;
#pragma omp for schedule(static)
        for (int64_t row = 0; row < rows; ++row) {
            const float* const c = cond + row * codes;
            const float* const u = uncond ? uncond + row * codes : nullptr;
            const uint64_t seed = static_cast<uint64_t>(seeds[row]), step = static_cast<uint64_t>(steps[row]);
            const int64_t code = truncated ? sample_truncated(c, u, codes, guidance, temperature, top_k, top_p, seed,
                                                              step, scratch)
                                           : sample(c, u, codes, guidance, temperature, seed, step);
            if (code < 0 && bad[row] < 0) bad[row] = steps[row];
            current[row] = code < 0 ? 0 : code;
            if (tokens) tokens[row * token_stride + steps[row]] = current[row];
        }
    }
    (void)threads;
}

}  // namespace ospo

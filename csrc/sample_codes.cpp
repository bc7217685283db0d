// Guidance, temperature and Gumbel-max sampling in one pass over each row, with the random bits of
// ospo_fast/ops/sample_codes.py: Philox4x32-10 keyed by the seed, counted by (code / 4, step).
#include <cmath>
#include <limits>

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

// The drawn code, or -1 for a row with NaN, +inf or nothing but -inf.
int64_t sample(const float* cond, const float* uncond, int64_t codes, float guidance, float temperature, uint64_t seed,
               uint64_t step) {
    int64_t best = -1;
    double most = -std::numeric_limits<double>::infinity();
    Words random{};
    for (int64_t v = 0; v < codes; ++v) {
        float z = uncond ? uncond[v] + guidance * (cond[v] - uncond[v]) : cond[v];
        if (std::isnan(z) || z == std::numeric_limits<float>::infinity()) return -1;
        double score = z;
        if (temperature != 0.0f) {
            if (v % 4 == 0) random = philox(seed, static_cast<uint32_t>(v / 4), step);
            score = z / temperature;
            if (score + gumbel_bound(random.word[v % 4]) <= most) continue;  // spares most codes the logarithms
            score += gumbel(random.word[v % 4]);
        }
        if (score > most) {
            most = score;
            best = v;
        }
    }
    return best;
}

}  // namespace

void draw_codes(const float* cond, const float* uncond, const int64_t* seeds, const int64_t* steps, int64_t* tokens,
                int64_t token_stride, int64_t* current, int64_t* bad, int64_t rows, int64_t codes, float guidance,
                float temperature, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && rows > 1)
    for (int64_t row = 0; row < rows; ++row) {
        const int64_t code = sample(cond + row * codes, uncond ? uncond + row * codes : nullptr, codes, guidance,
                                    temperature, static_cast<uint64_t>(seeds[row]), static_cast<uint64_t>(steps[row]));
        if (code < 0 && bad[row] < 0) bad[row] = steps[row];
        current[row] = code < 0 ? 0 : code;
        if (tokens) tokens[row * token_stride + steps[row]] = current[row];
    }
    (void)threads;
}

}  // namespace ospo

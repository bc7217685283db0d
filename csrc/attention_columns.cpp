// Attention probabilities of a few key columns without the attention matrix: the row kernels. The products of whole
// blocks of rows and keys come from the caller's GEMM.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "common.h"

namespace ospo {
namespace {

// e^x for x <= 0 with an error of 1e-7 of the value, in plain arithmetic that vectorises; 0 below -87, NaN for NaN.
inline float exp_negative(float x) {
    const float bounded = x < -87.0f ? -87.0f : x;
    const float shifted = bounded * 1.44269504f + 12582912.0f;  // adding 1.5·2^23 rounds to an integer
    const float whole = shifted - 12582912.0f;
    const float r = (bounded - whole * 0.693359375f) - whole * -2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    int32_t bits;
    std::memcpy(&bits, &shifted, sizeof bits);
    bits = (bits - 0x4B400000 + 127) << 23;  // 2^whole
    float power;
    std::memcpy(&power, &bits, sizeof power);
    return x < -87.0f ? 0.0f : p * power;
}

// The greatest of `count` scores, scaled, and Σ exp(scaled − greatest).
OSPO_CLONES void softmax_parts(const float* scores, int64_t count, float scale, float* greatest, float* sum) {
    float most = -INFINITY, total = 0.0f;
#pragma omp simd reduction(max : most)
    for (int64_t i = 0; i < count; ++i) most = std::max(most, scores[i] * scale);
#pragma omp simd reduction(+ : total)
    for (int64_t i = 0; i < count; ++i) total += exp_negative(scores[i] * scale - most);
    *greatest = most;
    *sum = total;
}

// Scaled scores of one head: rows (step apart) against n columns of width floats, side by side, into (rows, n).
OSPO_CLONES void head_scores(const float* q, int64_t step, int64_t rows, const float* keys, int64_t n, int64_t width,
                             float scale, float* scores) {
    for (int64_t i = 0; i < rows; ++i) {
        for (int64_t c = 0; c < n; ++c) {
            const float *const a = q + i * step, *const b = keys + c * width;
            float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
            for (int64_t d = 0; d < width; ++d) sum += a[d] * b[d];
            scores[i * n + c] = sum * scale;
        }
    }
}

}  // namespace

void block_columns(const ColumnBlock& t, const ColumnSizes& n, float scale, bool causal, int threads) {
    const int64_t wanted = n.objects * n.columns;
#pragma omp parallel num_threads(threads) if (threads > 1 && n.items * t.rows > 1)
    {
        std::vector<float> sums(wanted);
#pragma omp for schedule(static)
        for (int64_t work = 0; work < n.items * t.rows; ++work) {
            const int64_t b = work / t.rows, row = t.first_row + work % t.rows, i = row - t.row_start[b];
            if (i < 0 || i >= t.row_count[b]) continue;
            const int64_t begin = t.key_start[b], end = causal ? std::min(t.key_end[b], row + 1) : t.key_end[b];
            if (end <= begin) continue;
            std::fill(sums.begin(), sums.end(), 0.0f);
            const int64_t* const columns = t.columns + b * wanted;
            for (int64_t h = 0; h < n.heads; ++h) {
                // Indexed by key: the block starts at first_key.
                const float* const scores =
                    t.scores + ((b * n.heads + h) * t.rows + row - t.first_row) * t.keys - t.first_key;
                float most, total;
                softmax_parts(scores + begin, end - begin, scale, &most, &total);
                for (int64_t c = 0; c < wanted; ++c) {
                    if (columns[c] < begin || columns[c] >= end) continue;
                    sums[c] += std::exp(scores[columns[c]] * scale - most) / total;
                }
            }
            for (int64_t c = 0; c < wanted; ++c) {
                const int64_t o = b * n.objects + c / n.columns;
                t.out[o * n.length + i] += sums[c] * t.share[o];
            }
        }
    }
    (void)threads;
}

void attention_columns(const ColumnTensors& t, const ColumnSizes& n, float scale, bool causal, int threads) {
    constexpr int64_t ROWS = 32;
    const int64_t blocks = (n.length + ROWS - 1) / ROWS, wanted = n.objects * n.columns, group = n.heads / n.kv_heads;
#pragma omp parallel num_threads(threads) if (threads > 1 && n.items * blocks > 1)
    {
        std::vector<float> keys(wanted * n.width), scores(ROWS * wanted), sums(ROWS * wanted);
        std::vector<int64_t> seen(wanted), place(wanted);
#pragma omp for schedule(static)
        for (int64_t work = 0; work < n.items * blocks; ++work) {
            const int64_t b = work / blocks, begin = work % blocks * ROWS;
            const int64_t rows = std::min(ROWS, t.row_count[b] - begin), row = t.row_start[b] + begin;
            float* const out = t.out + b * n.objects * n.length + begin;
            for (int64_t o = 0; o < n.objects; ++o) {
                std::fill_n(out + o * n.length, std::min(ROWS, n.length - begin), 0.0f);
            }
            int64_t used = 0;  // columns that some row of this block may see
            for (int64_t c = 0; c < wanted; ++c) {
                const int64_t column = t.columns[b * wanted + c];
                if (column < t.key_start[b] || column >= t.key_end[b] || (causal && column >= row + rows)) continue;
                seen[used] = column;
                place[used++] = c / n.columns;
            }
            if (rows <= 0 || used == 0) continue;
            std::fill_n(sums.begin(), rows * used, 0.0f);
            for (int64_t h = 0; h < n.heads; ++h) {
                if (h % group == 0) {
                    const float* const source = t.k + b * t.k_item + h / group * t.k_head;
                    for (int64_t c = 0; c < used; ++c) {
                        std::copy_n(source + seen[c] * t.k_row, n.width, keys.begin() + c * n.width);
                    }
                }
                head_scores(t.q + b * t.q_item + h * t.q_head + row * t.q_row, t.q_row, rows, keys.data(), used,
                            n.width, scale, scores.data());
                const float* const lse = t.lse + b * t.lse_item + h * t.lse_head + row * t.lse_row;
                for (int64_t i = 0; i < rows; ++i) {
                    const float norm = lse[i * t.lse_row];
                    for (int64_t c = 0; c < used; ++c) {
                        if (causal && seen[c] > row + i) continue;
                        sums[i * used + c] += std::exp(scores[i * used + c] - norm);
                    }
                }
            }
            for (int64_t i = 0; i < rows; ++i) {
                for (int64_t c = 0; c < used; ++c) {
                    out[place[c] * n.length + i] += sums[i * used + c] * t.share[b * n.objects + place[c]];
                }
            }
        }
    }
    (void)threads;
}

}  // namespace ospo

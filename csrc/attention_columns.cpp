// Attention probabilities of a few key columns, without the attention matrix. block_columns reduces scores that the
// caller's GEMM computes; attention_columns computes the few scores that it needs itself.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "common.h"
#include "parallel.h"

namespace ospo {
namespace {

// e^x for x <= 0 with a relative error of 1e-7, in arithmetic that vectorizes; 0 below -87, NaN for NaN.
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
    uint32_t bits;  // unsigned, whose shifts and overflows are defined for NaN too
    std::memcpy(&bits, &shifted, sizeof bits);
    bits = (bits - 0x4B400000u + 127u) << 23;  // 2^whole
    float power;
    std::memcpy(&power, &bits, sizeof power);
    return x < -87.0f ? 0.0f : p * power;
}

// Maximum of the scores, and Σ exp(score − max).
OSPO_CLONES void softmax_parts(const float* scores, int64_t count, float* max_out, float* sum_out) {
    float max = -INFINITY, sum = 0.0f;
#pragma omp simd reduction(max : max)
    for (int64_t i = 0; i < count; ++i) max = std::max(max, scores[i]);
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < count; ++i) sum += exp_negative(scores[i] - max);
    *max_out = max;
    *sum_out = sum;
}

// Scores (rows, n) of one head: rows of q that are `stride` apart against n contiguous keys of `width` floats.
OSPO_CLONES void head_scores(const float* q, int64_t stride, int64_t rows, const float* keys, int64_t n, int64_t width,
                             float* scores) {
    for (int64_t i = 0; i < rows; ++i) {
        for (int64_t c = 0; c < n; ++c) {
            const float *const a = q + i * stride, *const b = keys + c * width;
            float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
            for (int64_t d = 0; d < width; ++d) sum += a[d] * b[d];
            scores[i * n + c] = sum;
        }
    }
}

// Refuse sizes and bounds with which a kernel would leave its arrays.
void check_request(const ColumnSizes& n, const int64_t* row_start, const int64_t* row_count, const int64_t* key_start,
                   const int64_t* key_end) {
    checked_product("attention_columns: items x objects x columns", {n.items, n.objects, n.columns});
    checked_product("attention_columns: items x objects x length", {n.items, n.objects, n.length});
    checked_product("attention_columns: items x heads x positions x width", {n.items, n.heads, n.positions, n.width});
    check_range("attention_columns: kv_heads", n.kv_heads, 1, n.heads);
    check_range("attention_columns: heads % kv_heads", n.heads % n.kv_heads, 0, 0);
    for (int64_t b = 0; b < n.items; ++b) {
        check_range("attention_columns: key_end", key_end[b], 0, n.positions);
        check_range("attention_columns: key_start", key_start[b], 0, key_end[b]);
        check_range("attention_columns: row_count", row_count[b], 0, std::min(n.length, n.positions));
        check_range("attention_columns: row_start", row_start[b], 0, n.positions - row_count[b]);
    }
}

// Of one column of one head in the mean.
inline float share_of(const float* share, int64_t object, int64_t heads) {
    return share[object] / static_cast<float>(heads);
}

}  // namespace

void block_columns(const BlockTensors& t, const ScoreBlock& block, const ColumnSizes& n, bool causal, int threads) {
    check_request(n, t.row_start, t.row_count, t.key_start, t.key_end);
    checked_product("block_columns: items x heads x rows x keys", {n.items, n.heads, block.rows, block.keys});
    check_range("block_columns: first_row", block.first_row, 0, n.positions - block.rows);
    check_range("block_columns: first_key", block.first_key, 0, n.positions - block.keys);
    for (int64_t b = 0; b < n.items; ++b) {
        const int64_t end = causal ? std::min(t.key_end[b], block.first_row + block.rows) : t.key_end[b];
        if (end <= t.key_start[b]) continue;
        check_range("block_columns: key_start", t.key_start[b], block.first_key);
        check_range("block_columns: key_end", end, 0, block.first_key + block.keys);
    }
    const int64_t per_item = n.objects * n.columns;
    const int team = team_size(threads, checked_product("block_columns: items x rows", {n.items, block.rows}));
    const ThreadScratch<float> scratch("block_columns: objects x columns", team, per_item);
#pragma omp parallel num_threads(team)
    {
        float* const sums = scratch.get();
#pragma omp for schedule(static)
        for (int64_t work = 0; work < n.items * block.rows; ++work) {
            const int64_t b = work / block.rows, row = block.first_row + work % block.rows, i = row - t.row_start[b];
            if (i < 0 || i >= t.row_count[b]) continue;
            const int64_t begin = t.key_start[b], end = causal ? std::min(t.key_end[b], row + 1) : t.key_end[b];
            if (end <= begin) continue;
            std::fill_n(sums, per_item, 0.0f);
            const int64_t* const columns = t.columns + b * per_item;
            for (int64_t h = 0; h < n.heads; ++h) {
                const float* const scores = t.scores +  // from first_key on
                                            ((b * n.heads + h) * block.rows + row - block.first_row) * block.keys;
                float max, sum;
                softmax_parts(scores + (begin - block.first_key), end - begin, &max, &sum);
                for (int64_t c = 0; c < per_item; ++c) {
                    if (columns[c] < begin || columns[c] >= end) continue;
                    sums[c] += std::exp(scores[columns[c] - block.first_key] - max) / sum;
                }
            }
            for (int64_t c = 0; c < per_item; ++c) {
                const int64_t o = b * n.objects + c / n.columns;
                t.out[o * n.length + i] += sums[c] * share_of(t.share, o, n.heads);
            }
        }
    }
}

void attention_columns(const ColumnTensors& t, const ColumnStrides& s, const ColumnSizes& n, float scale, bool causal,
                       int threads) {
    constexpr int64_t ROWS = 32;  // per block
    check_request(n, t.row_start, t.row_count, t.key_start, t.key_end);
    const int64_t blocks = (n.length + ROWS - 1) / ROWS, per_item = n.objects * n.columns, group = n.heads / n.kv_heads;
    const int team = team_size(threads, checked_product("attention_columns: items x blocks", {n.items, blocks}));
    const char* const name = "attention_columns: objects x columns x (width + 64)";
    const ThreadScratch<float> floats(name, team, checked_product(name, {per_item, n.width + 2 * ROWS}));
    const ThreadScratch<int64_t> integers(name, team, 2 * per_item);
#pragma omp parallel num_threads(team)
    {
        float *const keys = floats.get(), *const scores = keys + per_item * n.width;
        float* const sums = scores + ROWS * per_item;
        int64_t *const columns = integers.get(), *const objects = columns + per_item;
#pragma omp for schedule(static)
        for (int64_t work = 0; work < n.items * blocks; ++work) {
            const int64_t b = work / blocks, begin = work % blocks * ROWS;
            const int64_t rows = std::min(ROWS, t.row_count[b] - begin), row = t.row_start[b] + begin;
            float* const out = t.out + b * n.objects * n.length + begin;
            for (int64_t o = 0; o < n.objects; ++o) {
                std::fill_n(out + o * n.length, std::min(ROWS, n.length - begin), 0.0f);
            }
            int64_t used = 0;  // columns that at least one row of this block attends to
            for (int64_t c = 0; c < per_item; ++c) {
                const int64_t column = t.columns[b * per_item + c];
                if (column < t.key_start[b] || column >= t.key_end[b] || (causal && column >= row + rows)) continue;
                columns[used] = column;
                objects[used++] = c / n.columns;
            }
            if (rows <= 0 || used == 0) continue;
            std::fill_n(sums, rows * used, 0.0f);
            for (int64_t h = 0; h < n.heads; ++h) {
                if (h % group == 0) {
                    const float* const source = t.k + b * s.k_item + h / group * s.k_head;
                    for (int64_t c = 0; c < used; ++c) {
                        // Scaled before the products, which may be infinite without it.
                        const float* const key = source + columns[c] * s.k_row;
                        for (int64_t d = 0; d < n.width; ++d) keys[c * n.width + d] = scale * key[d];
                    }
                }
                head_scores(t.q + b * s.q_item + h * s.q_head + row * s.q_row, s.q_row, rows, keys, used, n.width,
                            scores);
                const float* const lse = t.lse + b * s.lse_item + h * s.lse_head + row * s.lse_row;
                for (int64_t i = 0; i < rows; ++i) {
                    const float norm = lse[i * s.lse_row];
                    for (int64_t c = 0; c < used; ++c) {
                        if (causal && columns[c] > row + i) continue;
                        sums[i * used + c] += std::exp(scores[i * used + c] - norm);
                    }
                }
            }
            for (int64_t i = 0; i < rows; ++i) {
                for (int64_t c = 0; c < used; ++c) {
                    const float share = share_of(t.share, b * n.objects + objects[c], n.heads);
                    out[objects[c] * n.length + i] += sums[i * used + c] * share;
                }
            }
        }
    }
}

}  // namespace ospo

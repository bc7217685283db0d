// x·Wᵀ + b with packed weights, for few rows. The bits of a row depend on that row only: each sum runs over k in order,
// in blocks of kBlock, for any number of rows and threads.
#include <algorithm>

#include "common.h"
#include "parallel.h"
#include "simd.h"

namespace ospo {
namespace {

constexpr int64_t kBlock = 64;  // short sums have smaller rounding errors
constexpr int64_t kPrefetch = 32;  // values of k ahead: weights come from the last-level cache

// R rows times C vectors of columns, over one block of k. The first block stores, later ones add.
template <int R, int C>
OSPO_INLINE void tile(const float* x, int64_t ldx, const float* w, const float* bias, float* out, int64_t ldo,
                      int64_t depth, bool first) {
    Vec acc[R][C] = {};
    for (int64_t k = 0; k < depth; ++k) {
        Vec b[C];
        for (int c = 0; c < C; ++c) {
            b[c] = load(w + (k * C + c) * kLanes);
            __builtin_prefetch(w + ((k + kPrefetch) * C + c) * kLanes);
        }
        for (int r = 0; r < R; ++r)
            for (int c = 0; c < C; ++c) acc[r][c] += x[r * ldx + k] * b[c];
    }
    for (int r = 0; r < R; ++r) {
        for (int c = 0; c < C; ++c) {
            float* target = out + r * ldo + c * kLanes;
            if (!first) acc[r][c] += load(target);
            else if (bias) acc[r][c] += load(bias + c * kLanes);
            store(target, acc[r][c]);
        }
    }
}

template <int C>
OSPO_INLINE void rows_of_panel(const float* x, int64_t ldx, const float* w, const float* bias, float* out, int64_t ldo,
                               int64_t rows, int64_t depth) {
    for (int64_t k = 0; k < depth; k += kBlock) {
        const int64_t part = std::min(kBlock, depth - k);
        const float* panel = w + k * C * kLanes;
        switch (rows) {
#define OSPO_ROWS(R)                                                 \
    case R:                                                          \
        tile<R, C>(x + k, ldx, panel, bias, out, ldo, part, k == 0); \
        break;
            OSPO_ROWS(1)
            OSPO_ROWS(2)
            OSPO_ROWS(3)
            OSPO_ROWS(4)
            OSPO_ROWS(5)
            OSPO_ROWS(6)
            default:
                if constexpr (C == 2) {
                    switch (rows) {
                        OSPO_ROWS(7)
                        OSPO_ROWS(8)
                        OSPO_ROWS(9)
                        OSPO_ROWS(10)
                        OSPO_ROWS(11)
                        OSPO_ROWS(12)
                    }
                }
#undef OSPO_ROWS
        }
    }
}

// The accumulators fill the vector registers: 12 × 2 of 32 with AVX-512, else 6 × 1 in two halves of 16.
OSPO_FMA_AVX512 void panel_wide(const float* x, int64_t ldx, const float* w, const float* bias, float* out,
                                int64_t ldo, int64_t rows, int64_t depth) {
    rows_of_panel<2>(x, ldx, w, bias, out, ldo, rows, depth);
}

OSPO_FMA_BELOW_AVX512 void panel_narrow(const float* x, int64_t ldx, const float* w, const float* bias, float* out,
                                        int64_t ldo, int64_t rows, int64_t depth) {
    rows_of_panel<1>(x, ldx, w, bias, out, ldo, rows, depth);
}

bool has_avx512() {
#ifdef OSPO_HAS_CLONES
    // What x86-64-v4 has.
    static const bool found = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                              __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                              __builtin_cpu_supports("avx512vl");
    return found;
#else
    return false;
#endif
}

}  // namespace

int64_t linear_columns() { return has_avx512() ? 2 * kLanes : kLanes; }

void pack_linear(const float* weight, float* packed, int64_t columns, int64_t depth) {
    checked_product("pack_linear: columns x depth", {columns, depth});
    const int64_t width = linear_columns(), panels = (columns + width - 1) / width;
    for (int64_t p = 0; p < panels; ++p)
        for (int64_t c = 0; c < width; ++c) {
            const int64_t column = p * width + c;
            float* target = packed + p * depth * width + c;
            for (int64_t k = 0; k < depth; ++k) {
                target[k * width] = column < columns ? weight[column * depth + k] : 0.0f;
            }
        }
}

void linear(const float* x, int64_t ldx, const float* packed, const float* bias, float* out, int64_t ldo, int64_t rows,
            int64_t columns, int64_t depth, int threads) {
    checked_product("linear: columns x depth", {columns, depth});
    checked_product("linear: rows x row stride", {rows, std::max(ldx, ldo)});
    check_range("linear: row stride of x", ldx, rows > 1 ? depth : 0);
    check_range("linear: row stride of out", ldo, rows > 1 ? columns : 0);
    const int64_t width = linear_columns(), max_rows = has_avx512() ? 12 : 6;
    const int64_t panels = (columns + width - 1) / width, blocks = (rows + max_rows - 1) / max_rows;
    const auto kernel = has_avx512() ? panel_wide : panel_narrow;
    // Panel by panel: the weights of a panel stay in the first-level cache for all blocks of rows.
    const int64_t work = checked_product("linear: rows x columns x depth", {rows, columns, depth});
    const int team = team_size(threads, panels * blocks, work, 1 << 16);
#pragma omp parallel for schedule(static) num_threads(team)
    for (int64_t item = 0; item < panels * blocks; ++item) {
        const int64_t p = item / blocks, block = item % blocks;
        const int64_t begin = rows * block / blocks, count = rows * (block + 1) / blocks - begin;
        const float* w = packed + p * depth * width;
        const float* b = bias ? bias + p * width : nullptr;
        float* target = out + begin * ldo + p * width;
        if ((p + 1) * width <= columns) {
            kernel(x + begin * ldx, ldx, w, b, target, ldo, count, depth);
            continue;
        }
        float edge[12 * 2 * kLanes], edge_bias[2 * kLanes] = {};
        const int64_t left = columns - p * width;
        if (b) std::copy(b, b + left, edge_bias);
        kernel(x + begin * ldx, ldx, w, b ? edge_bias : nullptr, edge, width, count, depth);
        for (int64_t r = 0; r < count; ++r) std::copy(edge + r * width, edge + r * width + left, target + r * ldo);
    }
}

}  // namespace ospo

// x·Wᵀ + b with packed weights: for products of few rows, and with bits that depend on nothing but the row itself.
// Every sum runs over k in order, in blocks of kBlock, whatever the number of rows, their place or the threads.
#include <algorithm>
#include <cmath>

#include "common.h"
#include "simd.h"

namespace ospo {
namespace {

constexpr int64_t kBlock = 64;  // short sums round less

constexpr int64_t kAhead = 32;  // the weights of a model come from the last cache, and panels are short streams

// R rows times C vectors of columns, over one block of k. Later blocks are added to what the first one stored.
template <int R, int C>
OSPO_INLINE void tile(const float* x, int64_t ldx, const float* w, const float* bias, float* out, int64_t ldo,
                      int64_t depth, bool first) {
    Vec acc[R][C] = {};
    for (int64_t k = 0; k < depth; ++k) {
        Vec b[C];
        for (int c = 0; c < C; ++c) {
            b[c] = load(w + (k * C + c) * kLanes);
            __builtin_prefetch(w + ((k + kAhead) * C + c) * kLanes);
        }
        for (int r = 0; r < R; ++r)
            for (int c = 0; c < C; ++c) acc[r][c] += x[r * ldx + k] * b[c];
    }
    for (int r = 0; r < R; ++r) {
        for (int c = 0; c < C; ++c) {
            float* place = out + r * ldo + c * kLanes;
            if (!first) acc[r][c] += load(place);
            else if (bias) acc[r][c] += load(bias + c * kLanes);
            store(place, acc[r][c]);
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
#define OSPO_ROWS(R)                                                            \
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

// The accumulators fill the vector registers: 12 × 2 of 32 with AVX-512, 6 × 1 (in halves) of 16 without.
OSPO_FMA_CLONES void panel_wide(const float* x, int64_t ldx, const float* w, const float* bias, float* out,
                                int64_t ldo, int64_t rows, int64_t depth) {
    rows_of_panel<2>(x, ldx, w, bias, out, ldo, rows, depth);
}

OSPO_FMA_CLONES void panel_narrow(const float* x, int64_t ldx, const float* w, const float* bias, float* out,
                                  int64_t ldo, int64_t rows, int64_t depth) {
    rows_of_panel<1>(x, ldx, w, bias, out, ldo, rows, depth);
}

bool wide() {
#ifdef OSPO_HAS_CLONES
    static const bool found = __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
    return found;
#else
    return false;
#endif
}

}  // namespace

int64_t linear_columns() { return wide() ? 2 * kLanes : kLanes; }

void pack_linear(const float* weight, float* packed, int64_t columns, int64_t depth) {
    const int64_t width = linear_columns(), panels = (columns + width - 1) / width;
    for (int64_t p = 0; p < panels; ++p)
        for (int64_t c = 0; c < width; ++c) {
            const int64_t column = p * width + c;
            float* place = packed + p * depth * width + c;
            for (int64_t k = 0; k < depth; ++k) place[k * width] = column < columns ? weight[column * depth + k] : 0.0f;
        }
}

void linear(const float* x, int64_t ldx, const float* packed, const float* bias, float* out, int64_t ldo, int64_t rows,
            int64_t columns, int64_t depth, int threads) {
    const int64_t width = linear_columns(), most = wide() ? 12 : 6;
    const int64_t panels = (columns + width - 1) / width, blocks = (rows + most - 1) / most;
    const auto kernel = wide() ? panel_wide : panel_narrow;
    // Panel by panel, so that a panel's weights stay in the nearest cache while all rows pass.
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && rows * columns * depth > 1 << 16)
    for (int64_t item = 0; item < panels * blocks; ++item) {
        const int64_t p = item / blocks, block = item % blocks;
        const int64_t begin = rows * block / blocks, count = rows * (block + 1) / blocks - begin;
        const float* w = packed + p * depth * width;
        const float* b = bias ? bias + p * width : nullptr;
        float* place = out + begin * ldo + p * width;
        if ((p + 1) * width <= columns) {
            kernel(x + begin * ldx, ldx, w, b, place, ldo, count, depth);
            continue;
        }
        float edge[12 * 2 * kLanes], edge_bias[2 * kLanes] = {};
        const int64_t left = columns - p * width;
        if (b) std::copy(b, b + left, edge_bias);
        kernel(x + begin * ldx, ldx, w, b ? edge_bias : nullptr, edge, width, count, depth);
        for (int64_t r = 0; r < count; ++r) std::copy(edge + r * width, edge + r * width + left, place + r * ldo);
    }
    (void)threads;
}

void gelu(float* x, int64_t count, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && count > 1 << 12)
    for (int64_t i = 0; i < count; ++i) x[i] = 0.5f * x[i] * (1.0f + std::erf(x[i] * 0.70710678f));
    (void)threads;
}

}  // namespace ospo

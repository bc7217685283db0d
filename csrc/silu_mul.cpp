// out = silu(gate) · up, row by row.
#include "common.h"
#include "parallel.h"
#include "simd.h"

namespace ospo {
namespace {

OSPO_INLINE Vec silu(Vec x) { return x / (1.0f + exp(-x)); }

OSPO_FMA_CLONES void multiply(const float* gate, const float* up, float* out, int64_t width) {
    int64_t i = 0;
    for (; i + kLanes <= width; i += kLanes) store(out + i, silu(load(gate + i)) * load(up + i));
    if (i == width) return;
    Vec g{}, u{};
    const size_t bytes = static_cast<size_t>(width - i) * sizeof(float);
    std::memcpy(&g, gate + i, bytes);
    std::memcpy(&u, up + i, bytes);
    g = silu(g) * u;
    std::memcpy(out + i, &g, bytes);
}

}  // namespace

void silu_mul(const float* gate_up, float* out, int64_t rows, int64_t width, int threads) {
    const int64_t work = checked_product("silu_mul: rows x width", {rows, width});
    const int team = team_size(threads, rows, work, 1 << 14);
#pragma omp parallel for schedule(static) num_threads(team)
    for (int64_t row = 0; row < rows; ++row)
        multiply(gate_up + 2 * row * width, gate_up + (2 * row + 1) * width, out + row * width, width);
}

}  // namespace ospo

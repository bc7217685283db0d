// out = silu(gate) · up, row by row.
#include "common.h"
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
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && rows * width > 1 << 14)
    for (int64_t row = 0; row < rows; ++row)
        multiply(gate_up + 2 * row * width, gate_up + (2 * row + 1) * width, out + row * width, width);
    (void)threads;
}

}  // namespace ospo

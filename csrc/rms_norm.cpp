// residual += delta, then out = weight · residual / sqrt(mean(residual²) + eps), row by row.
#include <cmath>

#include "common.h"
#include "parallel.h"
#include "simd.h"

namespace ospo {
namespace {

OSPO_FMA_CLONES void normalize(const float* delta, float* residual, const float* weight, float* out, int64_t width,
                               float eps) {
    Vec squares[4] = {};
    float tail = 0.0f;
    int64_t i = 0;
    for (; i + kLanes <= width; i += kLanes) {
        Vec x = load(residual + i);
        if (delta) store(residual + i, x += load(delta + i));
        squares[i / kLanes % 4] += x * x;
    }
    for (; i < width; ++i) {
        if (delta) residual[i] += delta[i];
        tail += residual[i] * residual[i];
    }
    const float mean = (sum((squares[0] + squares[1]) + (squares[2] + squares[3])) + tail) / static_cast<float>(width);
    const float scale = 1.0f / std::sqrt(mean + eps);
    for (i = 0; i + kLanes <= width; i += kLanes) store(out + i, load(weight + i) * (load(residual + i) * scale));
    for (; i < width; ++i) out[i] = weight[i] * (residual[i] * scale);
}

}  // namespace

void add_rms_norm(const float* delta, float* residual, const float* weight, float* out, int64_t rows, int64_t width,
                  float eps, int threads) {
    const int64_t work = checked_product("add_rms_norm: rows x width", {rows, width});
    const int team = team_size(threads, rows, work, 1 << 15);
#pragma omp parallel for schedule(static) num_threads(team)
    for (int64_t row = 0; row < rows; ++row)
        normalize(delta ? delta + row * width : nullptr, residual + row * width, weight, out + row * width, width, eps);
}

}  // namespace ospo

// Object masks to token weights: 1 + alpha · m^gamma, with m the mask after a Gaussian blur and min-max normalization.
#include "token_weights.h"

#include <algorithm>
#include <cmath>

#include "common.h"
#include "parallel.h"

namespace ospo {
namespace {

// One axis of the blur: `lines` lines of `length` cells. Cells at the same distance are added first, so that a mirrored
// map gives mirrored bits.
void blur_axis(const double* in, double* out, int64_t lines, int64_t line_stride, int64_t length, int64_t stride,
               const Blur& blur) {
    for (int64_t l = 0; l < lines; ++l) {
        for (int64_t i = 0; i < length; ++i) {
            const int64_t cell = l * line_stride + i * stride;
            double sum = in[cell] * blur.tap[0];
            for (int t = 1; t <= blur.radius; ++t) {
                const double before = i >= t ? in[cell - t * stride] : 0.0;
                const double after = i + t < length ? in[cell + t * stride] : 0.0;
                sum += (before + after) * blur.tap[t];
            }
            out[cell] = sum;
        }
    }
}

}  // namespace

Blur gaussian_blur(int size, double sigma) {
    check_range("token_weights: blur_size", size, 1, 31);
    Blur blur{size / 2, {}};
    double sum = 0.0;
    for (int t = 0; t <= blur.radius; ++t) {
        blur.tap[t] = std::exp(-0.5 * (t / sigma) * (t / sigma));
        sum += t ? 2 * blur.tap[t] : blur.tap[t];
    }
    for (int t = 0; t <= blur.radius; ++t) blur.tap[t] /= sum;
    return blur;
}

void token_weights(const float* masks, float* weights, int64_t images, int64_t height, int64_t width, double alpha,
                   double gamma, int blur_size, double blur_sigma, int threads) {
    const Blur blur = gaussian_blur(blur_size, blur_sigma);
    checked_product("token_weights: images x height x width", {images, height, width});
    const int64_t cells = checked_product("token_weights: height x width", {height, width});
    check_range("token_weights: cells", cells, 1);
    const int team = team_size(threads, images);
    const ThreadScratch<double> scratch("token_weights: cells", team, checked_product("token_weights: cells", {2, cells}));
#pragma omp parallel num_threads(team)
    {
        double *const grid = scratch.get(), *const half = grid + cells;
#pragma omp for schedule(static)
        for (int64_t b = 0; b < images; ++b) {
            std::copy_n(masks + b * cells, cells, grid);
            if (blur.radius > 0) {
                blur_axis(grid, half, height, width, width, 1, blur);
                blur_axis(half, grid, width, 1, height, width, blur);
            }
            double low = grid[0], high = grid[0];
            for (int64_t i = 0; i < cells; ++i) {
                low = std::min(low, grid[i]);
                high = std::max(high, grid[i]);
            }
            if (std::any_of(grid, grid + cells, [](double value) { return std::isnan(value); })) low = NAN;
            const double range = high - low + 1e-8;
            for (int64_t i = 0; i < cells; ++i) {
                double value = (grid[i] - low) / range;
                if (gamma != 1.0) value = std::pow(value, gamma);
                weights[b * cells + i] = static_cast<float>(1.0 + alpha * value);
            }
        }
    }
}

}  // namespace ospo

// Token weights on the GPU, one block per image. Operations of the blur are intrinsics, which the compiler does not
// contract to FMA: equal cells stay equal, and the blur is that of token_weights.cpp.
#include "token_weights.h"

#include <cmath>

#include "common.h"
#include "launch.h"
#include "thread_team.cuh"

namespace ospo {
namespace {

constexpr int THREADS = 256;

__device__ void blur_axis(const double* in, double* out, int cells, int width, int height, bool horizontal,
                          const Blur& blur) {
    const int stride = horizontal ? 1 : width, length = horizontal ? width : height;
    for (int cell = threadIdx.x; cell < cells; cell += THREADS) {
        const int i = horizontal ? cell % width : cell / width;
        double sum = __dmul_rn(in[cell], blur.tap[0]);
        for (int t = 1; t <= blur.radius; ++t) {
            const double before = i >= t ? in[cell - t * stride] : 0.0;
            const double after = i + t < length ? in[cell + t * stride] : 0.0;
            sum = __dadd_rn(sum, __dmul_rn(__dadd_rn(before, after), blur.tap[t]));
        }
        out[cell] = sum;
    }
    __syncthreads();
}

__global__ void __launch_bounds__(THREADS) token_weights_kernel(const float* masks, float* weights, int height,
                                                                int width, double alpha, double gamma, Blur blur) {
    extern __shared__ double grid[];  // (2, cells): the image, and the image with one axis blurred
    __shared__ ExtremaScratch<double> scratch;
    const int cells = height * width;
    const int64_t first = static_cast<int64_t>(blockIdx.x) * cells;
    for (int i = threadIdx.x; i < cells; i += THREADS) grid[i] = masks[first + i];
    __syncthreads();
    if (blur.radius > 0) {
        blur_axis(grid, grid + cells, cells, width, height, true, blur);
        blur_axis(grid + cells, grid, cells, width, height, false, blur);
    }
    double low = INFINITY, high = -INFINITY;
    bool has_nan = false;  // fmin and fmax ignore NaN
    for (int i = threadIdx.x; i < cells; i += THREADS) {
        low = fmin(low, grid[i]);
        high = fmax(high, grid[i]);
        has_nan |= isnan(grid[i]);
    }
    reduce_extrema(ThreadTeam<true>(THREADS), low, high, scratch);
    if (__syncthreads_or(has_nan)) low = NAN;
    const double range = high - low + 1e-8;
    for (int i = threadIdx.x; i < cells; i += THREADS) {
        double value = (grid[i] - low) / range;
        if (gamma != 1.0) value = pow(value, gamma);
        weights[first + i] = static_cast<float>(1.0 + alpha * value);
    }
}

}  // namespace

int token_weights_cuda(const float* masks, float* weights, int64_t images, int height, int width, double alpha,
                       double gamma, int blur_size, double blur_sigma, int device, void* stream) {
    const size_t bytes = 2 * static_cast<size_t>(height) * width * sizeof(double);
    return launch<token_weights_kernel>(images, THREADS, bytes, device, stream, masks, weights, height, width, alpha,
                                        gamma, gaussian_blur(blur_size, blur_sigma));
}

}  // namespace ospo
